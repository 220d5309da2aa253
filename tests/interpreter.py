"""The oracle of plans: executes one global plan on all ranks' numpy buffers, step by step, in plan order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridcomm.plan import RESIDUALS, Plan, Region, Step

Buffers = Sequence[NDArray[Any]]
ResidualBuffers = tuple[NDArray[np.float32], NDArray[np.float32]]


class Codec(Protocol):
    """encode/decode_add as `hybridcomm.kernels.reference` spells them, bound to a spec."""

    def encode(
        self,
        grad: NDArray[np.float32],
        e_in: NDArray[np.float32] | None,
        e_out: NDArray[np.float32] | None,
        digest: int,
        seed: int,
    ) -> NDArray[np.uint8]: ...

    def decode_add(
        self, payloads: Sequence[NDArray[np.uint8]], out: NDArray[np.float32], weight: float, digest: int
    ) -> None: ...


class ReferenceCodec:
    """The numpy oracle from a compressor's canonical text."""

    def __init__(self, text: str) -> None:
        from hybridcomm.kernels.spec import parse

        self.spec = parse(text)
        self.nbytes_sent = 0

    def encode(
        self,
        grad: NDArray[np.float32],
        e_in: NDArray[np.float32] | None,
        e_out: NDArray[np.float32] | None,
        digest: int,
        seed: int,
    ) -> NDArray[np.uint8]:
        from hybridcomm.kernels import reference

        payload = np.zeros(self.spec.nbytes(grad.size), np.uint8)
        reference.encode(self.spec, grad, e_in, e_out, payload, digest, seed=seed)
        return payload

    def decode_add(
        self, payloads: Sequence[NDArray[np.uint8]], out: NDArray[np.float32], weight: float, digest: int
    ) -> None:
        from hybridcomm.kernels import reference

        reference.decode_add(self.spec, payloads, out, weight, digest)


class Interpreter:
    """Runs a plan; ``wire_nbytes[rank]`` counts what each rank sent between nodes.

    ``call``: the number of the collective on its context or group, from 1, which seeds go by; ``digest``: of the
    plan as a group runs it.
    """

    def __init__(
        self, plan: Plan, codec: Codec | None = None, *, call: int = 1, digest: int | None = None
    ) -> None:
        if codec is None and plan.compressor != "none":
            codec = ReferenceCodec(plan.compressor)
        self.plan, self.call = plan, call
        self.digest = plan.digest if digest is None else digest
        self.codec = codec
        self.intra = None if plan.intra_compressor == "none" else ReferenceCodec(plan.intra_compressor)
        self.wire_nbytes = dict.fromkeys(range(plan.topology.world_size), 0)
        self._payloads: dict[tuple[int, Region], list[NDArray[np.uint8]]] = {}
        self._offsets: dict[int, dict[tuple[str, Region], int]] = {}
        for rank in range(plan.topology.world_size):
            offset = 0
            self._offsets[rank] = {}
            for op in RESIDUALS:
                for region in plan.residual_regions(rank, op):
                    self._offsets[rank][op, region] = offset
                    offset += region.numel

    def run(self, buffers: Buffers, residuals: Mapping[int, ResidualBuffers] | None = None) -> None:
        """In place. ``buffers[rank]`` is 1-D; ``residuals[rank]`` is (e_in, e_out), absent: memoryless."""
        for step in self.plan.steps:
            getattr(self, f"_{step.op}")(step, buffers, residuals or {})

    def _reduce(self, step: Step, buffers: Buffers, _: object) -> None:
        part = slice(*step.region)
        sources = [buffers[rank][part] for rank in step.group]
        buffers[step.root][part] = combine(self.plan.op, sources, step.divisor)

    def _reduce_all(self, step: Step, buffers: Buffers, _: object) -> None:
        part = slice(*step.region)
        total = combine(self.plan.op, [buffers[rank][part] for rank in step.group], step.divisor)
        for rank in step.group:
            buffers[rank][part] = total

    def _exchange_reduce_all(self, step: Step, buffers: Buffers, residuals: object) -> None:
        for rank in step.group:
            self.wire_nbytes[rank] += (len(step.group) - 1) * step.region.numel * buffers[rank].itemsize
        self._reduce_all(step, buffers, residuals)

    def _exchange_reduce(self, step: Step, buffers: Buffers, residuals: object) -> None:
        for rank in step.group:
            if rank != step.root:
                self.wire_nbytes[rank] += step.region.numel * buffers[rank].itemsize
        self._reduce(step, buffers, residuals)

    def _gather(self, step: Step, buffers: Buffers, _: object) -> None:
        part = slice(*step.region)
        for rank in step.group:
            if rank != step.root:
                buffers[rank][part] = buffers[step.root][part]

    def _exchange_gather(self, step: Step, buffers: Buffers, residuals: object) -> None:
        nbytes = step.region.numel * buffers[step.root].itemsize
        self.wire_nbytes[step.root] += (len(step.group) - 1) * nbytes
        self._gather(step, buffers, residuals)

    def _encode(
        self,
        step: Step,
        values: NDArray[np.float32],
        residuals: Mapping[int, ResidualBuffers],
        codec: Codec | None,
    ) -> None:
        e_in = e_out = None
        if step.root in residuals:
            begin = self._offsets[step.root][step.op, step.region]
            part = slice(begin, begin + step.region.numel)
            e_in, e_out = (half[part] for half in residuals[step.root])
        seed = seed_of(self.digest, self.call, step.id)
        payload = self._need(codec).encode(values, e_in, e_out, self.digest, seed)
        self._payloads[step.root, step.region] = [payload]

    def _decoded(self, step: Step) -> NDArray[np.float32]:
        out = np.zeros(step.region.numel, np.float32)
        payloads = self._payloads.pop((step.root, step.region))
        self._need(self.codec).decode_add(payloads, out, float(np.float32(1 / step.divisor)), self.digest)
        return out

    def _compress_intra(self, step: Step, buffers: Buffers, residuals: Mapping[int, ResidualBuffers]) -> None:
        self._encode(step, buffers[step.root][slice(*step.region)], residuals, self.intra)

    def _reduce_payload(self, step: Step, buffers: Buffers, _: object) -> None:
        """In place: the own region first, then the others' payloads in rank order."""
        part = buffers[step.root][slice(*step.region)]
        payloads = [self._payloads.pop((r, step.region))[0] for r in step.group if r != step.root]
        self._need(self.intra).decode_add(payloads, part, 1.0, self.digest)
        part /= np.float32(step.divisor)

    def _compress(self, step: Step, buffers: Buffers, residuals: Mapping[int, ResidualBuffers]) -> None:
        self._encode(step, buffers[step.root][slice(*step.region)], residuals, self.codec)

    def _exchange_payload(self, step: Step, _: Buffers, __: object) -> None:
        payloads = [self._payloads[rank, step.region][0] for rank in step.group]
        for rank in step.group if step.root == -1 else (step.root,):
            self._payloads[rank, step.region] = payloads
            for source, payload in zip(step.group, payloads, strict=True):
                self.wire_nbytes[source] += payload.nbytes if source != rank else 0

    def _recompress(self, step: Step, _: Buffers, residuals: Mapping[int, ResidualBuffers]) -> None:
        self._encode(step, self._decoded(step), residuals, self.codec)

    def _exchange_recompressed(self, step: Step, _: Buffers, __: object) -> None:
        (payload,) = self._payloads[step.root, step.region]
        for rank in step.group:
            self._payloads[rank, step.region] = [payload]
        self.wire_nbytes[step.root] += (len(step.group) - 1) * payload.nbytes

    def _decompress(self, step: Step, buffers: Buffers, _: object) -> None:
        buffers[step.root][slice(*step.region)] = self._decoded(step)

    def _need(self, codec: Codec | None) -> Codec:
        if codec is None:
            raise ValueError(f"plan with compressor {self.plan.compressor!r} needs a codec")
        return codec


def seed_of(digest: int, call: int, step: int) -> int:
    """What the engine seeds an encode with; csrc/executor_codec.cpp has the same."""

    def mix(x: int) -> int:
        x &= (1 << 64) - 1
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor % (1 << 64)
        return x ^ (x >> 31)

    return mix(mix(digest + call) + step)


_COMBINE: dict[str, np.ufunc] = {
    "sum": np.add,
    "mean": np.add,
    "premul_sum": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "product": np.multiply,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}


def combine(op: str, sources: Sequence[NDArray[Any]], divisor: int = 1) -> NDArray[Any]:
    """What a step makes of ``sources``, in their order: float16 in float32, rounded once."""
    dtype = sources[0].dtype
    total = sources[0].astype(np.float32 if dtype == np.float16 else dtype)
    for source in sources[1:]:
        total = _COMBINE[op](total, source, dtype=total.dtype)
    return (total / divisor if divisor != 1 else total).astype(dtype)
