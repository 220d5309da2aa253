"""Lowering of what happens to payloads: steps 4 to 6 of a compressed plan, and step 3 where that is compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hybridcomm import _C
from hybridcomm.errors import PlanError
from hybridcomm.lower_scratch import RING, Message, PayloadSlot, Ring
from hybridcomm.plan import RESIDUALS

if TYPE_CHECKING:
    from hybridcomm.compress import Compressor
    from hybridcomm.plan import Plan, Region, Step

__all__ = ["PayloadLowering", "most_held"]

_INTER, _INTRA = 0, 1  # places of the program's codecs


class PayloadLowering:
    """The part of a lowering that compresses, exchanges and decompresses."""

    plan: Plan
    rank: int
    compressors: tuple[Compressor | None, Compressor | None]  # between nodes, inside a node
    done_by: dict[int, list[int]]
    _add: Callable[..., int]
    _after: Callable[[Step], list[int]]
    _locals: Callable[[Step], list[int]]

    def _prepare_payloads(self, steps: Sequence[Step], begin: int) -> int:
        """Lays out residuals, and scratch from byte ``begin`` on; returns its end."""
        self.residual_offset, total = {}, 0
        for op in RESIDUALS:
            regions = self.plan.residual_regions(self.rank, op)
            self.residual_offset[op] = _offsets(regions, total)
            total += sum(region.numel for region in regions)
        self.payloads: dict[Region, PayloadSlot] = {}  # of the chunks that are under way
        self.adds = {s.region for s in steps if s.op == "exchange_payload" and s.root in (-1, self.rank)}
        nodes, sums = len(self.plan.topology.nodes), int(self.plan.exchange == "two_stage")
        largest = max((self._payload_nbytes(s.region) for s in steps if s.op == "compress"), default=0)
        self.rings = {}
        for adds in (True, False):
            places = (nodes if adds else 1) + sums
            held = most_held([step for step in steps if (step.region in self.adds) == adds])
            self.rings[adds] = Ring(begin, largest * places if held else 0, max(RING, held))
            begin = self.rings[adds].end
        return self._prepare_node(steps, begin)

    def _prepare_node(self, steps: Sequence[Step], begin: int) -> int:
        """Room for payloads on their way to an owner, and for those that an owner fetches, one chunk at a time."""
        self.offered: dict[Region, PayloadSlot] = {}
        out = [
            s for s in steps if s.op == "compress_intra" or (s.op == "reduce_payload" and s.root != self.rank)
        ]
        sizes = [self._payload_nbytes(s.region, _INTRA) for s in out]
        held = most_held(out, "compress_intra", "reduce_payload")
        self.offer_ring = Ring(begin, max(sizes, default=0), max(RING, held) if out else 1)
        fetched = [
            self._payload_nbytes(s.region, _INTRA) * (len(s.group) - 1)
            for s in steps
            if s.op == "reduce_payload" and s.root == self.rank
        ]
        self.fetch_ring = Ring(self.offer_ring.end, max(fetched, default=0), 1)
        return self.fetch_ring.end

    def _payload_nbytes(self, region: Region, codec: int = _INTER) -> int:
        compressor = self.compressors[codec]
        if compressor is None:
            text = (self.plan.compressor, self.plan.intra_compressor)[codec]
            raise PlanError(f"a plan compressed by {text} needs its compressor to be lowered")
        return compressor.nbytes(region.numel)

    def _encode(self, step: Step, stream: str, payloads: PayloadSlot, place: int, after: list[int]) -> None:
        op = self._add(
            _C.Kind.encode,
            stream,
            step,
            after=[*after, *payloads.slot.before],
            offset=payloads.at(place),
            nbytes=payloads.nbytes,
            residual=self.residual_offset[step.op][step.region],
            codec=_INTRA if step.op == "compress_intra" else _INTER,
            momentum=step.op == "compress",
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

    def _compress_intra(self, step: Step) -> None:
        nbytes = self._payload_nbytes(step.region, _INTRA)
        payloads = self.offered[step.region] = PayloadSlot(self.offer_ring.take(), nbytes, own=0, second=0)
        self._encode(step, "compress_intra", payloads, payloads.own, self._after(step))

    def _reduce_payload(self, step: Step) -> None:
        lanes, after = self._locals(step), self._after(step)
        if step.root == self.rank:
            op = self._add(
                _C.Kind.decode_add,
                "reduce",
                step,
                after=after,
                sources=lanes,
                offset=self.fetch_ring.take().offset,
                nbytes=self._payload_nbytes(step.region, _INTRA),
                divisor=step.divisor,
                codec=_INTRA,
            )
        else:
            payloads, lane = self.offered.pop(step.region), lanes[step.group.index(step.root)]
            message: Message = {"offset": payloads.at(0), "nbytes": payloads.nbytes, "in_scratch": True}
            op = self._add(_C.Kind.put, ("put", lane), step, after=after, peer=lane, **message)
            payloads.slot.users.append(op)
        self.done_by[step.id] = [op]

    def _compress(self, step: Step) -> None:
        adds, topology = step.region in self.adds, self.plan.topology
        payloads = PayloadSlot(
            self.rings[adds].take(),
            self._payload_nbytes(step.region),
            own=topology.node_of(self.rank) if adds else 0,
            second=len(topology.nodes) if adds else 1,
        )
        self.payloads[step.region] = payloads
        self._encode(step, "compress", payloads, payloads.own, self._after(step))

    def _exchange_payload(self, step: Step) -> None:
        payloads, done = self.payloads[step.region], []
        own = payloads.at(payloads.own)
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
        payloads = self.payloads[step.region]
        summed = self._decode(step, "recompress", payloads)
        self._encode(step, "recompress", payloads, payloads.second, summed)

    def _exchange_recompressed(self, step: Step) -> None:
        payloads, second, done = self.payloads[step.region], self.payloads[step.region].second, []
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


def most_held(steps: Iterable[Step], begins: str = "compress", ends: str = "decompress") -> int:
    """The most chunks that are compressed before one of them, the first, is decompressed.

    A ring with room for less would write one's payloads over another's.
    """
    most, begun, first = 0, 0, {}
    for step in steps:
        if step.op == begins:
            first[step.region] = begun
            begun += 1
        elif step.op == ends and step.region in first:
            most = max(most, begun - first.pop(step.region))
    return most


def _offsets(regions: Iterable[Region], begin: int = 0) -> dict[Region, int]:
    offsets, total = {}, begin
    for region in regions:
        offsets[region] = total
        total += region.numel
    return offsets
