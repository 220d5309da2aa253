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
_PAYLOAD = tuple(Argument(name=n, type=t) for n, t in (
    ("payload", "*u8"), ("payload_i16", "*i16"), ("payload_i32", "*i32"), ("payload_i64", "*i64"),
))  # fmt: skip
_SIZES = (Argument(name="numel", type="i64", aligned=False), Argument(name="records_offset", type="i64"))


def _floats(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name=name, type="*fp32") for name in names)


def kernels_of(spec: TopKSpec) -> dict[str, DeviceKernel]:
    """The three kernels of a spec, with residuals in and out."""
    block, k, bits = spec.layout
    shape = (("BLOCK", block), ("K", k))
    padded, has = ("KP", 1 << (k - 1).bit_length()), (("HAS_IN", 1), ("HAS_OUT", 1))
    payloads = tuple(Argument(name=n, type=t) for n, t in (
        ("payloads", "*u8"), ("payloads_i16", "*i16"), ("payloads_i32", "*i32"),
    ))  # fmt: skip

    def kernel(function: str, arguments: tuple[Argument, ...], *constants: tuple[str, int]) -> DeviceKernel:
        return DeviceKernel(
            name=f"topk{function}",
            source="triton/topk.py",
            function=function,
            arguments=arguments,
            constants=(*shape, *constants),
            num_warps=4,
            elements=block,
            budget=Budget(nbytes=12.5, instructions=160, registers=64),
            codec=str(spec),
        )

    checksum = Argument(name="checksum", type="i64", aligned=False)
    more = (Argument(name="count", type="i32", aligned=False), Argument(name="stride", type="i64"))
    encoded = (*_floats("grad", "e_in", "e_out"), *_PAYLOAD, *_SIZES)
    withdrawn = (*_floats("e_in", "e_out"), *_PAYLOAD, *_SIZES, checksum)
    decoded = (
        *payloads,
        *_floats("out"),
        *more,
        *_SIZES,
        Argument(name="weight", type="fp32", aligned=False),
    )
    return {
        "encode": kernel("_encode", encoded, ("VALUE_BITS", bits), *has),
        "withdraw": kernel("_withdraw", withdrawn, padded, *has),
        "decode": kernel("_decode_add", decoded, padded, ("VALUE_BITS", bits)),
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
        views = {argument.name: at for argument in _PAYLOAD}
        residual, rest = memory.place(e_in, name="e_in"), memory.reserve(e_out.nbytes, name="e_out")
        common = {"e_in": residual, "e_out": rest, **views, "numel": grad.size}
        common["records_offset"] = spec.records_offset(grad.size)
        self._run(kernels["encode"], memory, grad.size, grad=memory.place(grad, name="grad"), **common)
        flagged = (clean + FLAG_NONFINITE * FLAGS_FACTOR) & ((1 << 64) - 1)
        self._run(kernels["withdraw"], memory, grad.size, checksum=flagged, **common)
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
            payloads=at, payloads_i16=at, payloads_i32=at, out=target, count=len(payloads),
            stride=payloads[0].size, numel=out.size, records_offset=spec.records_offset(out.size), weight=weight,
        )  # fmt: skip
        out[:] = memory.read(target, np.float32)
