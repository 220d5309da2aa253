"""Lowering of what happens to payloads between nodes: steps 4 to 6 of a compressed plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hybridcomm import _C
from hybridcomm.errors import PlanError
from hybridcomm.lower_scratch import RING, Message, PayloadSlot, Ring

if TYPE_CHECKING:
    from hybridcomm.compress import Compressor
    from hybridcomm.plan import Plan, Region, Step

__all__ = ["PayloadLowering", "most_payloads"]


class PayloadLowering:
    """The part of a lowering that compresses, exchanges and decompresses."""

    plan: Plan
    rank: int
    compressor: Compressor | None
    done_by: dict[int, list[int]]
    _add: Callable[..., int]
    _after: Callable[[Step], list[int]]

    def _prepare_payloads(self, steps: Sequence[Step], begin: int) -> int:
        """Lays out residuals, and scratch from byte ``begin`` on; returns its end."""
        first, second = (self.plan.residual_regions(self.rank, op) for op in ("compress", "recompress"))
        self.residual_offset = {"compress": _offsets(first), "recompress": _offsets(second, _numel(first))}
        self.payloads: dict[Region, PayloadSlot] = {}  # of the chunks that are under way
        slots = max(RING, most_payloads(steps))
        self.payload_ring = Ring(begin, self._payload_set_nbytes(steps), slots)
        return self.payload_ring.end

    def _payload_nbytes(self, region: Region) -> int:
        if self.compressor is None:
            raise PlanError(f"a plan compressed by {self.plan.compressor} needs its compressor to be lowered")
        return self.compressor.nbytes(region.numel)

    def _payload_set_nbytes(self, steps: Iterable[Step]) -> int:
        """The payloads of one chunk, one per node, and in two stages the second payload."""
        second = self.plan.exchange == "two_stage"
        sizes = (
            self._payload_nbytes(s.region) * (len(s.group) + second)
            for s in steps
            if s.op == "exchange_payload"
        )
        return max(sizes, default=0)

    def _encode(self, step: Step, stream: str, payloads: PayloadSlot, place: int, after: list[int]) -> None:
        op = self._add(
            _C.Kind.encode,
            stream,
            step,
            after=[*after, *payloads.slot.before],
            offset=payloads.at(place),
            nbytes=payloads.nbytes,
            residual=self.residual_offset[step.op][step.region],
        )
        payloads.held = [payloads.at(place)]
        payloads.slot.users.append(op)
        self.done_by[step.id] = [op]

    def _decode(self, step: Step, stream: str, payloads: PayloadSlot) -> list[int]:
        op = self._add(
            _C.Kind.decode,
            stream,
            step,
            after=self._after(step),
            sources=payloads.held,
            divisor=step.divisor,
        )
        payloads.slot.users.append(op)
        self.done_by[step.id] = [op]
        return [op]

    def _receive_payload(self, step: Step, payloads: PayloadSlot, place: int, peer: int) -> int:
        message: Message = {"offset": payloads.at(place), "nbytes": payloads.nbytes, "in_scratch": True}
        after = payloads.slot.before
        return self._add(_C.Kind.receive, ("receive", peer), step, after=after, peer=peer, **message)

    def _send_payload(self, step: Step, payloads: PayloadSlot, offset: int, peer: int) -> None:
        message: Message = {"offset": offset, "nbytes": payloads.nbytes, "in_scratch": True}
        op = self._add(_C.Kind.send, ("send", peer), step, after=self._after(step), peer=peer, **message)
        payloads.slot.users.append(op)

    def _compress(self, step: Step) -> None:
        payloads = PayloadSlot(self.payload_ring.take(), self._payload_nbytes(step.region))
        self.payloads[step.region] = payloads
        node = self.plan.topology.node_of(self.rank)
        self._encode(step, "compress", payloads, node, self._after(step))

    def _exchange_payload(self, step: Step) -> None:
        payloads, done = self.payloads[step.region], []
        own = payloads.at(step.group.index(self.rank))
        if step.root in (-1, self.rank):
            for place, rank in enumerate(step.group):
                if rank != self.rank:
                    done.append(self._receive_payload(step, payloads, place, rank))
            payloads.held = [payloads.at(place) for place in range(len(step.group))]
        for rank in step.group if step.root == -1 else (step.root,):
            if rank != self.rank:
                self._send_payload(step, payloads, own, rank)
        self.done_by[step.id] = [*self._after(step), *done]

    def _recompress(self, step: Step) -> None:
        """The sum of the payloads stands in the tensor's region until it is encoded."""
        payloads, second = self.payloads[step.region], len(self.plan.topology.nodes)
        self._encode(step, "recompress", payloads, second, self._decode(step, "recompress", payloads))

    def _exchange_recompressed(self, step: Step) -> None:
        payloads, second = self.payloads[step.region], len(step.group)
        done = []
        if step.root == self.rank:
            for rank in step.group:
                if rank != self.rank:
                    self._send_payload(step, payloads, payloads.at(second), rank)
        else:
            done = [self._receive_payload(step, payloads, second, step.root)]
            payloads.held = [payloads.at(second)]
        self.done_by[step.id] = [*self._after(step), *done]

    def _decompress(self, step: Step) -> None:
        self._decode(step, "decompress", self.payloads.pop(step.region))


def most_payloads(steps: Iterable[Step]) -> int:
    """How many chunks have payloads at once, in plan order: with less room a chunk would wait for a later one."""
    most = held = 0
    for step in steps:
        held += (step.op == "compress") - (step.op == "decompress")
        most = max(most, held)
    return most


def _numel(regions: Iterable[Region]) -> int:
    return sum(region.numel for region in regions)


def _offsets(regions: Iterable[Region], begin: int = 0) -> dict[Region, int]:
    offsets, total = {}, begin
    for region in regions:
        offsets[region] = total
        total += region.numel
    return offsets
