"""The kernels in CUDA C++ behind the oracle's interface, executed as PTX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels import FLAG_NONFINITE, HEADER_NBYTES, Spec, reference
from hybridcomm.kernels.cuda import gtopk, topk
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.payload import HEADER_DTYPE
from tests.kernels.cases import DIGEST, Bytes, Case, Floats
from tests.ptx import Counters, Memory
from tests.ptx.conformance import executable

__all__ = ["Device", "inputs", "narrowed", "widened"]

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
    """Encoders and decoders for one architecture; ``launches`` keeps the counters of the last call, by kernel."""

    arch: int
    grad: str = "fp32"
    rest: str = "fp32"
    decay: float = 1.0
    launches: dict[str, list[Counters]] = field(default_factory=dict)

    def run(self, kernel: DeviceKernel, memory: Memory, numel: int, *arguments: int | float) -> None:
        names = [argument.name for argument in kernel.arguments]
        counters = executable(kernel, self.arch).launch(
            memory, numel, **dict(zip(names, arguments, strict=True))
        )
        self.launches.setdefault(kernel.name, []).append(counters)

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
        self.launches.clear()
        memory, start = Memory(), _empty(spec, grad.size, digest)
        at = memory.place(start, name="payload")
        given = memory.place(narrowed(grad, self.grad), name="grad")
        source = 0 if e_in is None else memory.place(narrowed(e_in, self.rest), name="e_in")
        rest = memory.reserve(topk.BYTES[self.rest] * grad.size, name="e_out")
        if spec == topk.SPEC:
            regions, sizes = (source, rest, at), (grad.size, topk.SPEC.records_offset(grad.size))
            encode, withdraw = f"topk_encode_{self.grad}_{self.rest}", f"topk_withdraw_{self.rest}"
            self.run(KERNELS[encode], memory, grad.size, given, *regions, *sizes, self.decay)
            self.run(
                KERNELS[withdraw], memory, grad.size, *regions, *sizes, _withdrawn(spec, grad.size, digest)
            )
        else:
            steps = gtopk.encode_steps(
                grad.size, self.grad, feedback=e_in is not None, decay=self.decay,
                withdrawn=_withdrawn(spec, grad.size, digest),
            )  # fmt: skip
            nbytes, cleared = gtopk.workspace(grad.size)
            space = memory.place(
                np.zeros(nbytes, np.uint8), name="workspace", initialised=np.arange(nbytes) < cleared
            )
            buffers = {"grad": given, "e_in": source, "e_out": rest, "payload": at, "workspace": space}
            self.enqueue(memory, steps, buffers, grad.size)
        payload[:] = memory.read(at)
        assert memory.written(rest).all()
        e_out[:] = widened(memory.read(rest, np.uint16 if self.rest == "bf16" else np.float32), self.rest)
        return int(payload[40])

    def enqueue(
        self, memory: Memory, steps: Sequence[gtopk.Launch], buffers: dict[str, int], numel: int
    ) -> None:
        for step in steps:
            assert step.programs == step.kernel.grid(numel)
            self.run(
                step.kernel,
                memory,
                numel,
                *(
                    0 if a is None else buffers[a.buffer] + a.offset if isinstance(a, gtopk.At) else a
                    for a in step.arguments
                ),
            )

    def decode_add(
        self, spec: Spec, payloads: Sequence[Bytes], out: Floats, weight: float = 1.0, *, clear: bool = False
    ) -> None:
        """``reference.decode_add`` of payloads that need no check; ``clear``: into zeros, whatever ``out`` holds."""
        self.launches.clear()
        memory = Memory()
        at = memory.place(np.stack(payloads), name="payloads")
        target = memory.reserve(out.nbytes, name="out") if clear else memory.place(out, name="out")
        stride = payloads[0].size
        if spec == topk.SPEC:
            kernel = KERNELS["topk_decode" if clear else "topk_decode_add"]
            sizes = (len(payloads), stride, out.size, topk.SPEC.records_offset(out.size))
            self.run(kernel, memory, out.size, at, target, *sizes, weight)
        else:
            space = memory.reserve(gtopk.workspace(out.size)[0], name="workspace")
            steps = gtopk.decode_steps(out.size, len(payloads), weight=weight)
            self.enqueue(memory, steps, {"payloads": at, "out": target, "workspace": space}, out.size)
        out[:] = memory.read(target, np.float32)

    def reencode(self, payloads: Sequence[Bytes], e_in: Floats, e_out: Floats, payload: Bytes) -> None:
        """Decoding into zeros and encoding anew, in one kernel."""
        self.launches.clear()
        spec, memory, numel = topk.SPEC, Memory(), e_in.size
        at = memory.place(_empty(spec, numel, DIGEST), name="payload")
        source, rest = memory.place(e_in, name="e_in"), memory.reserve(e_out.nbytes, name="e_out")
        given, start = memory.place(np.stack(payloads), name="payloads"), spec.records_offset(numel)
        sizes = (len(payloads), payloads[0].size, numel, start)
        self.run(KERNELS["topk_reencode"], memory, numel, given, source, rest, at, *sizes, 0.25, self.decay)
        withdrawn = _withdrawn(spec, numel, DIGEST)
        self.run(KERNELS["topk_withdraw_fp32"], memory, numel, source, rest, at, numel, start, withdrawn)
        payload[:] = memory.read(at)
        e_out[:] = memory.read(rest, np.float32)


def _empty(spec: Spec, numel: int, digest: int) -> Bytes:
    """What the host writes before a kernel runs."""
    payload = np.zeros(spec.nbytes(numel), np.uint8)
    payload[:HEADER_NBYTES] = reference.header(spec, numel, digest=digest, flags=0)
    payload[:HEADER_NBYTES].view(HEADER_DTYPE)["checksum"] = reference.checksum(payload)
    return payload


def _withdrawn(spec: Spec, numel: int, digest: int) -> int:
    """The checksum of a payload with the flag up and no body."""
    payload = np.zeros(spec.nbytes(numel), np.uint8)
    payload[:HEADER_NBYTES] = reference.header(spec, numel, digest=digest, flags=FLAG_NONFINITE)
    return reference.checksum(payload)
