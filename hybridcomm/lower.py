"""From a plan to one rank's program for the engine.

A step names a collective act of a group; lowering writes down this rank's part in it:

    reduce            owner: reduce                      others: put
    reduce_all        all: share, then collect
    compress          encode
    exchange_payload  send to and receive from every other owner
    exchange_reduce   root: receive from all, then sum   others: send to root
    exchange_reduce_all  send to and receive from every other owner, then sum
    exchange_gather   root: send to all                  others: receive in place
    decompress        decode
    gather            owner: publish                     others: get

Operations of one stream are issued in plan order. Receive buffers live in a ring of engine scratch: a message
may arrive while the one before it is still being summed, but not more than ``RING`` of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, TypedDict

from hybridcomm import _C, policy, reduction
from hybridcomm.custom import CustomSpec
from hybridcomm.errors import PlanError
from hybridcomm.lower_node import delivered, hand_out_first

if TYPE_CHECKING:
    from hybridcomm.compress import Compressor
    from hybridcomm.members import Members
    from hybridcomm.plan import Plan, Region, Step

__all__ = ["CODECS", "COLLECTIVES", "DTYPES", "OPS", "lower"]

# Codes of the wire format; csrc/tag.cpp holds the same lists.
COLLECTIVES = (
    "allreduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "barrier",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "monitored_barrier",
    "message",
)
DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "int64",
    "uint8",
    "float64",
    "int32",
    "int8",
    "int16",
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
    "complex128",
)
OPS = ("sum", "mean", "none", "min", "max", "product", "band", "bor", "bxor", "premul_sum")
CODECS = (
    "none",
    "topk",
    "fp16",
    "bf16",
    "fp8",
    "int8",
    "int4",
    "sign1",
    "gtop1",
    "gtopk",
    "randk",
    "powersgd",
    "custom",
)

RING = 16  # messages on the way per purpose; at 256 KiB each, 4 MiB cover 10 Gbit/s at 3 ms
_ALIGN = 64  # bytes: every scratch buffer begins on its own cache line


def lower(plan: Plan, rank: int, compressor: Compressor | None, members: Members | None = None) -> _C.Program:
    """The program that makes ``rank`` do its part of ``plan``; a pure function of its arguments.

    ``members`` says which of the job's ranks the plan's are; default: the same.

    Raises `DataTypeError` for a dtype that ``plan.op`` cannot combine, `PlanError` for a step it cannot run.
    """
    if plan.op != "none":
        reduction.check(plan.op, plan.dtype)
    return _Lowering(plan, rank, compressor, members).program


class _Bytes(TypedDict):
    """Where a message's data lies: bytes into the tensor, or into scratch."""

    offset: int
    nbytes: int
    in_scratch: bool


def most_held(steps: Iterable[Step]) -> int:
    """Payload sets between their compress and their decompress at most: a slot is taken over only after both."""
    held = most = 0
    for step in steps:
        held += (step.op == "compress") - (step.op == "decompress")
        most = max(most, held)
    return most


class _Slot:
    """A piece of scratch: the operations that use it now, and those of its last use, which must be over."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.before: list[int] = []
        self.users: list[int] = []


class _Ring:
    def __init__(self, begin: int, nbytes: int, slots: int = RING) -> None:
        self.stride = -(-nbytes // _ALIGN) * _ALIGN
        self._slots = [_Slot(begin + i * self.stride) for i in range(slots)]
        self._turn = 0

    @property
    def end(self) -> int:
        return self._slots[-1].offset + self.stride

    def take(self) -> _Slot:
        slot = self._slots[self._turn % len(self._slots)]
        self._turn += 1
        slot.before, slot.users = slot.users, []
        return slot


class _Lowering:
    def __init__(self, plan: Plan, rank: int, compressor: Compressor | None, members: Members | None) -> None:
        self.plan, self.rank, self.compressor, self.members = plan, rank, compressor, members
        self.node = plan.topology.nodes[plan.topology.node_of(rank)]
        self.itemsize = policy.itemsize(plan.dtype)
        self.streams: dict[Hashable, int] = {}
        self.done_by: dict[int, list[int]] = {}  # step -> operations that complete it here
        self.payloads: dict[tuple[int, int], _Slot] = {}  # (shard, chunk) -> where its payloads lie
        self.residual_offset = _offsets(plan.residual_regions(rank))
        self.program = self._new_program()
        steps = plan.for_rank(rank)
        self.delivered = delivered(steps, rank)
        inter = max(
            (s.region.numel * (len(s.group) - 1) for s in steps if s.op.startswith("exchange_reduce")),
            default=0,
        )
        self.receive_ring = _Ring(0, inter * self.itemsize)
        held = max(RING, most_held(steps))
        self.payload_ring = _Ring(self.receive_ring.end, self._payload_set_nbytes(steps), held)
        self.program.scratch_nbytes = self.payload_ring.end
        for step in hand_out_first(steps, rank):
            getattr(self, f"_{step.op}")(step)

    def _new_program(self) -> _C.Program:
        plan, codec = self.plan, {}
        if self.compressor is not None and plan.compressor != "none":
            codec = {"codec": self.compressor.spec.params}
        program = _C.Program(
            digest=plan.digest if self.members is None else self.members.digest_of(plan),
            numel=plan.numel,
            collective=COLLECTIVES.index(plan.collective),
            dtype=DTYPES.index(plan.dtype),
            op=OPS.index(plan.op),
            group=0 if self.members is None else self.members.digest,
            members="" if self.members is None else self.members.label,
            **codec,
        )
        if codec and self.compressor is not None and isinstance(self.compressor.spec, CustomSpec):
            _C.set_custom(program, self.compressor.spec)
        return program

    def _add(
        self,
        kind: _C.Kind,
        stream: Hashable,
        step: Step,
        *,
        after: Iterable[int] = (),
        peer: int = -1,
        in_scratch: bool = False,
        offset: int = 0,
        nbytes: int = 0,
        residual: int = 0,
        divisor: int = 1,
        deliver: bool = False,
        sources: Iterable[int] = (),
    ) -> int:
        return self.program.add(
            kind,
            stream=self.streams.setdefault(stream, len(self.streams)),
            step=step.id,
            begin=step.region.begin,
            count=step.region.numel,
            after=sorted(set(after)),
            peer=self._engine_rank(peer) if kind in (_C.Kind.send, _C.Kind.receive) else peer,
            in_scratch=in_scratch,
            offset=offset,
            nbytes=nbytes,
            residual=residual,
            divisor=divisor,
            deliver=deliver,
            sources=list(sources),
        )

    def _after(self, step: Step) -> list[int]:
        return [op for before in step.after for op in self.done_by.get(before, ())]

    def _local(self, rank: int) -> int:
        return self.node.index(rank) if self.members is None else self.members.locals[rank]

    def _engine_rank(self, rank: int) -> int:
        return rank if self.members is None else self.members.ranks[rank]

    # -- inside the node: shared memory --------------------------------------------------------------------

    def _locals(self, step: Step) -> list[int]:
        if not set(step.group) <= set(self.node):
            raise PlanError(f"step {step.id}: {step.op} runs inside a node, got ranks {step.group}")
        return [self._local(rank) for rank in step.group]

    def _reduce(self, step: Step) -> None:
        sources = self._locals(step)
        if step.root == self.rank:
            op = self._add(
                _C.Kind.reduce,
                "reduce",
                step,
                after=self._after(step),
                sources=sources,
                divisor=step.divisor,
                deliver=step.id in self.delivered,
            )
        else:
            lane = self._local(step.root)
            op = self._add(_C.Kind.put, ("put", lane), step, after=self._after(step), peer=lane)
        self.done_by[step.id] = [op]

    def _reduce_all(self, step: Step) -> None:
        sources = self._locals(step)
        out = self._add(_C.Kind.share, "share", step, after=self._after(step), sources=sources)
        after = [*self._after(step), out]  # what goes out is the input, not the sum
        op = self._add(_C.Kind.collect, "collect", step, after=after, sources=sources, divisor=step.divisor)
        self.done_by[step.id] = [op]

    def _gather(self, step: Step) -> None:
        readers = [local for local in self._locals(step) if local != self._local(self.rank)]
        if step.root == self.rank:
            op = self._add(
                _C.Kind.publish,
                "publish",
                step,
                after=self._after(step),
                sources=readers,
                deliver=step.id in self.delivered,
            )
        else:
            lane = self._local(step.root)
            op = self._add(_C.Kind.get, ("get", lane), step, after=self._after(step), peer=lane)
        self.done_by[step.id] = [op]

    # -- between nodes, dense ------------------------------------------------------------------------------

    def _region_bytes(self, region: Region) -> _Bytes:
        begin, count = region.begin * self.itemsize, region.numel * self.itemsize
        return {"offset": begin, "nbytes": count, "in_scratch": False}

    def _exchange_reduce(self, step: Step) -> None:
        region = self._region_bytes(step.region)
        if step.root != self.rank:
            op = self._add(
                _C.Kind.send, ("send", step.root), step, after=self._after(step), peer=step.root, **region
            )
            self.done_by[step.id] = [op]
            return
        self._receive_and_sum(step, region["nbytes"], self._after(step))

    def _exchange_reduce_all(self, step: Step) -> None:
        region, after = self._region_bytes(step.region), self._after(step)
        sends = [
            self._add(_C.Kind.send, ("send", rank), step, after=after, peer=rank, **region)
            for rank in step.group
            if rank != self.rank
        ]
        self._receive_and_sum(step, region["nbytes"], [*after, *sends])  # what goes out is not the sum

    def _receive_and_sum(self, step: Step, nbytes: int, after: list[int]) -> None:
        """The others' regions, into scratch; then the sum of all, in group order, in place."""
        slot = self.receive_ring.take()
        receives, sources, offset = [], [], slot.offset
        for rank in step.group:
            if rank == self.rank:
                sources.append(_C.OWN_REGION)
                continue
            message: _Bytes = {"offset": offset, "nbytes": nbytes, "in_scratch": True}
            receives.append(
                self._add(_C.Kind.receive, ("receive", rank), step, after=slot.before, peer=rank, **message)
            )
            sources.append(offset)
            offset += nbytes
        op = self._add(
            _C.Kind.sum,
            "exchange",
            step,
            after=[*after, *receives],
            sources=sources,
            divisor=step.divisor,
        )
        slot.users = [op]
        self.done_by[step.id] = [op]

    def _exchange_gather(self, step: Step) -> None:
        region, after = self._region_bytes(step.region), self._after(step)
        if step.root == self.rank:
            others = [rank for rank in step.group if rank != self.rank]
            for rank in others:
                self._add(_C.Kind.send, ("send", rank), step, after=after, peer=rank, **region)
            # Sending does not change the region: what follows waits for the data alone, not for the sends.
            self.done_by[step.id] = after
        else:
            root = step.root
            op = self._add(_C.Kind.receive, ("receive", root), step, after=after, peer=root, **region)
            self.done_by[step.id] = [op]

    # -- between nodes, compressed -------------------------------------------------------------------------

    def _payload_nbytes(self, region: Region) -> int:
        if self.compressor is None:
            raise PlanError(f"a plan compressed by {self.plan.compressor} needs its compressor to be lowered")
        return self.compressor.nbytes(region.numel)

    def _payload_set_nbytes(self, steps: Iterable[Step]) -> int:
        """The payloads of one chunk, one per node."""
        sizes = (self._payload_nbytes(s.region) * len(s.group) for s in steps if s.op == "exchange_payload")
        return max(sizes, default=0)

    def _payload_offset(self, step: Step, node: int) -> int:
        return self.payloads[step.shard, step.chunk].offset + node * self._payload_nbytes(step.region)

    def _compress(self, step: Step) -> None:
        slot = self.payload_ring.take()
        self.payloads[step.shard, step.chunk] = slot
        node = self.plan.topology.node_of(self.rank)
        op = self._add(
            _C.Kind.encode,
            "compress",
            step,
            after=[*self._after(step), *slot.before],
            offset=self._payload_offset(step, node),
            nbytes=self._payload_nbytes(step.region),
            residual=self.residual_offset[step.region],
        )
        slot.users.append(op)
        self.done_by[step.id] = [op]

    def _exchange_payload(self, step: Step) -> None:
        slot = self.payloads[step.shard, step.chunk]
        nbytes, done = self._payload_nbytes(step.region), []
        for node, rank in enumerate(step.group):
            if rank == self.rank:
                continue
            receive: _Bytes = {
                "offset": self._payload_offset(step, node),
                "nbytes": nbytes,
                "in_scratch": True,
            }
            done.append(
                self._add(_C.Kind.receive, ("receive", rank), step, after=slot.before, peer=rank, **receive)
            )
        own = self._payload_offset(step, step.group.index(self.rank))
        for rank in step.group:
            if rank != self.rank:
                send: _Bytes = {"offset": own, "nbytes": nbytes, "in_scratch": True}
                after = self._after(step)
                slot.users.append(
                    self._add(_C.Kind.send, ("send", rank), step, after=after, peer=rank, **send)
                )
        self.done_by[step.id] = [*self._after(step), *done]

    def _decompress(self, step: Step) -> None:
        slot = self.payloads.pop((step.shard, step.chunk))
        nodes = range(len(self.plan.topology.nodes))
        nbytes = self._payload_nbytes(step.region)
        op = self._add(
            _C.Kind.decode,
            "decompress",
            step,
            after=self._after(step),
            sources=[slot.offset + node * nbytes for node in nodes],
            divisor=step.divisor,
        )
        slot.users.append(op)
        self.done_by[step.id] = [op]


def _offsets(regions: Iterable[Region]) -> dict[Region, int]:
    offsets, total = {}, 0
    for region in regions:
        offsets[region] = total
        total += region.numel
    return offsets
