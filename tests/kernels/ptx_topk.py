"""The top-k kernels behind the oracle's interface, executed as PTX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridcomm.kernels import HEADER_NBYTES, TopKSpec, reference
from hybridcomm.kernels.device import Argument, Budget, DeviceKernel
from hybridcomm.kernels.payload import FLAG_NONFINITE, HEADER_DTYPE
from tests.kernels.cases import Bytes, Floats
from tests.ptx import Counters, Memory
from tests.ptx.conformance import Executable, executable

__all__ = ["Device", "kernels_of"]

FLAGS_FACTOR = 2 * 10 + 1
_TYPES = {
    "payload": "*u8",
    "payloads": "*u8",
    "numel": "i64",
    "stride": "i64",
    "checksum": "i64",
    "weight": "fp32",
}
_ALIGNED = ("payload", "payloads", "grad", "e_in", "e_out", "out", "stride")


def _arguments(names: str) -> tuple[Argument, ...]:
    """Regions of any size, so of no promise."""
    types = dict.fromkeys(("grad", "e_in", "e_out", "out"), "*fp32") | _TYPES | {"decay": "fp32"}
    return tuple(
        Argument(name=name, type=types.get(name, "i32"), aligned=name in _ALIGNED) for name in names.split()
    )


def kernels_of(spec: TopKSpec) -> dict[str, DeviceKernel]:
    """The three kernels of a spec, with residuals in and out."""
    block, k, bits = spec.layout
    warps = max(block // 1024, 1)
    padded = max(32 * warps, 1 << (k - 1).bit_length())
    shape = (("BLOCK", block), ("K", k), ("KP", padded), ("VALUE_BITS", bits))
    has = (("HAS_IN", 1), ("HAS_OUT", 1))

    def kernel(source: str, names: str, constants: tuple[tuple[str, int], ...]) -> DeviceKernel:
        file, function = source.split(":")
        return DeviceKernel(
            name=f"topk_{function}",
            source=f"triton/{file}.py",
            function=function,
            arguments=_arguments(names),
            constants=constants,
            num_warps=warps if file == "topk" else 4,
            elements=block,
            budget=Budget(nbytes=12.5, instructions=160, registers=64),
            codec=str(spec),
        )

    return {
        "encode": kernel(
            "topk:encode_kernel",
            "grad e_in e_out payload numel records_half decay",
            (*shape, *has, ("DECAYED", 0)),
        ),
        "withdraw": kernel("withdraw:withdraw_kernel", "e_in e_out payload nwords numel checksum", has),
        "decode": kernel(
            "topk:decode_kernel",
            "payloads out count stride numel records_half weight",
            (*shape, ("CLEAR", 0)),
        ),
    }


@dataclass(kw_only=True)
class Device:
    """Encoder and decoder for one architecture; ``launches`` keeps the counters of the last call.

    ``change``: what is done to each executable first (the mutation harness plants its bugs there).
    """

    arch: int
    change: Callable[[Executable], Executable] = lambda unchanged: unchanged
    launches: list[Counters] = field(default_factory=list)

    def _run(self, kernel: DeviceKernel, memory: Memory, elements: int, /, **arguments: int | float) -> None:
        self.launches.append(self.change(executable(kernel, self.arch)).launch(memory, elements, **arguments))

    def encode(
        self,
        spec: TopKSpec,
        grad: Floats,
        e_in: Floats | None,
        e_out: Floats | None,
        payload: Bytes,
        digest: int,
    ) -> int:
        """``reference.encode``; header from the host, then both kernels, as the launcher does it."""
        assert e_in is not None
        assert e_out is not None
        head = reference.header(spec, grad.size, digest=digest, flags=0)
        clean = reference.checksum(head)
        head.view(HEADER_DTYPE)["checksum"] = clean
        start = np.zeros(payload.size, np.uint8)
        start[:HEADER_NBYTES] = head
        self.launches.clear()
        payload[:] = start
        if grad.size == 0:
            return 0
        memory, kernels = Memory(), kernels_of(spec)
        at = memory.place(start, name="payload")
        residual, rest = memory.place(e_in, name="e_in"), memory.reserve(e_out.nbytes, name="e_out")
        common = {"e_in": residual, "e_out": rest, "payload": at, "numel": grad.size}
        half, given = spec.records_offset(grad.size) // 2, memory.place(grad, name="grad")
        self._run(kernels["encode"], memory, grad.size, grad=given, records_half=half, decay=1.0, **common)
        flagged = (clean + FLAG_NONFINITE * FLAGS_FACTOR) & ((1 << 64) - 1)
        nwords = (payload.size - HEADER_NBYTES) // 4
        self._run(kernels["withdraw"], memory, grad.size, nwords=nwords, checksum=flagged, **common)
        payload[:] = memory.read(at)
        e_out[:] = memory.read(rest, np.float32)
        return int(payload[40])

    def decode_add(
        self, spec: TopKSpec, payloads: Sequence[Bytes], out: Floats, weight: float = 1.0, digest: int = 0
    ) -> None:
        """``reference.decode_add`` of payloads that need no check."""
        del digest
        self.launches.clear()
        if out.size == 0 or not payloads:
            return
        memory = Memory()
        at = memory.place(np.stack(payloads), name="payloads")
        target = memory.place(out, name="out")
        self._run(
            kernels_of(spec)["decode"], memory, out.size,
            payloads=at, out=target, count=len(payloads), stride=payloads[0].size, numel=out.size,
            records_half=spec.records_offset(out.size) // 2, weight=weight,
        )  # fmt: skip
        out[:] = memory.read(target, np.float32)
