"""The kernels in CUDA C++ behind the oracle's interface, executed as PTX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybridcomm.kernels import Spec
from hybridcomm.kernels.cuda import gtopk, launch, topk
from hybridcomm.kernels.device import DeviceKernel
from tests.kernels.cases import DIGEST, Bytes, Case, Floats
from tests.kernels.ptx_run import PtxRun
from tests.ptx import Counters
from tests.ptx.conformance import Executable, executable

__all__ = ["Device", "inputs", "narrowed", "tensor", "widened"]

KERNELS = {kernel.name: kernel for kernel in topk.KERNELS + gtopk.KERNELS}
Array = npt.NDArray[Any]


def narrowed(values: Floats, kind: str) -> Array:
    """To a gradient's or residual's type, half to even; bf16 as its bits, nothing finite made infinite."""
    with np.errstate(all="ignore"):
        if kind == "fp32":
            return values
        if kind == "fp16":
            return values.astype(np.float16)
        bits = values.view(np.uint32)
        size = bits & np.uint32(0x7FFFFFFF)
        rounded = (size + np.uint32(0x7FFF) + (size >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        finite = np.where(size < 0x7F800000, np.minimum(rounded, 0x7F7F), size >> np.uint32(16))
        return (finite | (bits >> np.uint32(16) & np.uint32(0x8000))).astype(np.uint16)


def widened(values: Array, kind: str) -> Floats:
    """The reverse, exact."""
    if kind == "bf16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def tensor(values: Floats, kind: str) -> torch.Tensor:
    """In a gradient's or residual's type."""
    bits = narrowed(values, kind).copy()
    return (
        torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        if kind == "bf16"
        else torch.from_numpy(bits)
    )


def inputs(case: Case) -> tuple[Floats, Floats]:
    """Besides what a case has: largest elements in few lanes, so that the lanes' maxima bound them badly."""
    if case.kind not in ("few lanes", "few lanes tied"):
        grad, e_in = Case(spec=case.spec, kind=case.kind, numel=case.numel, seed=case.seed).inputs()
        assert e_in is not None
        return grad, e_in
    kind = "tied" if case.kind == "few lanes tied" else "normal"
    grad, e_in = Case(spec=case.spec, kind=kind, numel=case.numel, seed=case.seed).inputs()
    assert e_in is not None
    few = np.arange(case.numel) % 128 < 8
    grad[few] = np.sign(grad[few]) * 5 if kind == "tied" else grad[few] * 100
    return grad, e_in


@dataclass(kw_only=True)
class Device:
    """Encoders and decoders for one architecture.

    ``load``: where executables come from, so that a test can plant bugs in them.
    """

    arch: int
    load: Callable[[DeviceKernel, int], Executable] = executable
    grad: str = "fp32"
    rest: str = "fp32"
    decay: float = 1.0
    run: PtxRun = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> PtxRun:
        """Forgets earlier launches, and what they wrote."""
        self.run = PtxRun(arch=self.arch, load=self.load)
        return self.run

    @property
    def launches(self) -> dict[str, list[Counters]]:
        """The counters of the last call, by kernel."""
        found: dict[str, list[Counters]] = {}
        for kernel, _, counters in self.run.launches:
            found.setdefault(kernel.name, []).append(counters)
        return found

    def workspace(self, spec: Spec, numel: int, rest: str = "fp32") -> torch.Tensor | None:
        """Only what the host clears may be read before it is written."""
        if spec == topk.SPEC:
            return None
        made = launch.make_workspace(
            numel, torch.device("cpu"), torch.bfloat16 if rest == "bf16" else torch.float32
        )
        made.fill_(0xA5)
        self.run.hold(made, np.arange(made.numel()) < gtopk.workspace(numel, rest)[1])
        return made

    def encode(
        self,
        spec: Spec,
        grad: Floats,
        e_in: Floats | None,
        e_out: Floats,
        payload: Bytes,
        digest: int = DIGEST,
    ) -> int:
        """``reference.encode`` of narrowed inputs; ``e_out`` as the residual's type has it, widened."""
        run = self.begin()
        source = None if e_in is None else tensor(e_in, self.rest)
        rest, made = (
            tensor(np.full(grad.size, 77, np.float32), self.rest),
            torch.zeros(payload.size, dtype=torch.uint8),
        )
        if spec == gtopk.SPEC:  # its kernels add to the payload's body, which the host clears
            run.hold(made, np.ones(made.numel(), np.bool_))
        launch.encode(
            run, spec, tensor(grad, self.grad), source, rest, made, digest,
            decay=self.decay, workspace=self.workspace(spec, grad.size, self.rest),
        )  # fmt: skip
        assert grad.size == 0 or run.written(rest)
        payload[:] = made.numpy()
        e_out[:] = rest.float().numpy()
        return int(payload[40])

    def decode_add(
        self, spec: Spec, payloads: Sequence[Bytes], out: Floats, weight: float = 1.0, *, clear: bool = False
    ) -> None:
        """``reference.decode_add`` of payloads; ``clear``: into zeros, whatever ``out`` holds."""
        run, made, given = self.begin(), torch.from_numpy(out.copy()), torch.from_numpy(np.stack(payloads))
        run.hold(given, np.ones(given.numel(), np.bool_))
        if clear:
            run.hold(made, np.zeros(out.nbytes, np.bool_))
        launch.decode_add(
            run, spec, given, made, weight, DIGEST,
            clear=clear, workspace=self.workspace(spec, out.size),
        )  # fmt: skip
        out[:] = made.numpy()

    def reencode(self, payloads: Sequence[Bytes], e_in: Floats, e_out: Floats, payload: Bytes) -> None:
        """Decoding into zeros and encoding anew, in one kernel."""
        run, source = self.begin(), tensor(e_in, self.rest)
        rest, made = torch.zeros_like(source), torch.zeros(payload.size, dtype=torch.uint8)
        launch.reencode(
            run, topk.SPEC, torch.from_numpy(np.stack(payloads)), e_in.size, source, rest, made,
            DIGEST, weight=0.25, decay=self.decay,
        )  # fmt: skip
        payload[:] = made.numpy()
        e_out[:] = rest.float().numpy()
