"""The oracle of plans: executes one global plan on all ranks' numpy buffers, step by step, in plan order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridcomm.plan import Plan, Region, Step

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

    ``call``: the number of the collective on its context, from 1, which seeds go by.
    """

    def __init__(self, plan: Plan, codec: Codec | None = None, *, call: int = 1) -> None:
        if codec is None and plan.compressor != "none":
            codec = ReferenceCodec(plan.compressor)
        self.plan, self.call = plan, call
        self.codec = codec
        self.wire_nbytes = dict.fromkeys(range(plan.topology.world_size), 0)
        self._payloads: dict[tuple[int, int, int], list[NDArray[np.uint8]]] = {}
        self._offsets = {
            rank: _offsets(plan.residual_regions(rank)) for rank in range(plan.topology.world_size)
        }

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

    def _compress(self, step: Step, buffers: Buffers, residuals: Mapping[int, ResidualBuffers]) -> None:
        e_in = e_out = None
        if step.root in residuals:
            begin = self._offsets[step.root][step.region]
            part = slice(begin, begin + step.region.numel)
            e_in, e_out = (half[part] for half in residuals[step.root])
        grad = buffers[step.root][slice(*step.region)]
        seed = seed_of(self.plan.digest, self.call, step.region.begin, step.root)
        payload = self._need().encode(grad, e_in, e_out, self.plan.digest, seed)
        self._payloads[step.root, step.shard, step.chunk] = [payload]

    def _exchange_payload(self, step: Step, _: Buffers, __: object) -> None:
        payloads = [self._payloads[rank, step.shard, step.chunk][0] for rank in step.group]
        for rank, payload in zip(step.group, payloads, strict=True):
            self.wire_nbytes[rank] += (len(step.group) - 1) * payload.nbytes
            self._payloads[rank, step.shard, step.chunk] = payloads

    def _decompress(self, step: Step, buffers: Buffers, _: object) -> None:
        out = np.zeros(step.region.numel, np.float32)
        payloads = self._payloads.pop((step.root, step.shard, step.chunk))
        self._need().decode_add(payloads, out, float(np.float32(1 / step.divisor)), self.plan.digest)
        buffers[step.root][slice(*step.region)] = out

    def _need(self) -> Codec:
        if self.codec is None:
            raise ValueError(f"plan with compressor {self.plan.compressor!r} needs a codec")
        return self.codec


def seed_of(digest: int, call: int, begin: int, rank: int) -> int:
    """What the engine seeds an encode with; csrc/executor_codec.cpp has the same."""

    def mix(x: int) -> int:
        x &= (1 << 64) - 1
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor % (1 << 64)
        return x ^ (x >> 31)

    return mix(mix(mix(digest + call) + begin) + rank)


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


def _offsets(regions: Sequence[Region]) -> dict[Region, int]:
    out, offset = {}, 0
    for region in regions:
        out[region] = offset
        offset += region.numel
    return out
