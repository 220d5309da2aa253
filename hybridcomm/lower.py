"""From a plan to one rank's program for the engine.

A step names a collective act of a group; lowering writes down this rank's part in it:

    reduce            owner: reduce                      others: put
    reduce_all        all: share, then collect
    compress_intra    encode
    reduce_payload    owner: decode_add                  others: put
    compress          encode
    exchange_payload  send to the root (-1: to every other owner), which receives from all
    recompress        decode, then encode
    exchange_recompressed  root: send to all             others: receive
    exchange_reduce   root: receive from all, then sum   others: send to root
    exchange_reduce_all  send to and receive from every other owner, then sum
    exchange_gather   root: send to all                  others: receive in place
    decompress        decode
    gather            owner: publish                     others: get

Operations of one stream are issued in plan order. Receive buffers live in rings of engine scratch
(`hybridcomm.lower_scratch`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from hybridcomm import _C, policy, reduction
from hybridcomm.custom import CustomSpec
from hybridcomm.errors import PlanError
from hybridcomm.lower_node import delivered, hand_out_first
from hybridcomm.lower_payload import PayloadLowering
from hybridcomm.lower_scratch import Message, Ring

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


def lower(
    plan: Plan,
    rank: int,
    compressor: Compressor | None = None,
    intra: Compressor | None = None,
    *,
    members: Members | None = None,
) -> _C.Program:
    """The program that makes ``rank`` do its part of ``plan``; a pure function of its arguments.

    ``members`` says which of the job's ranks the plan's are; default: the same.

    Raises `DataTypeError` for a dtype that ``plan.op`` cannot combine, `PlanError` for a step it cannot run.
    """
    if plan.op != "none":
        reduction.check(plan.op, plan.dtype)
    return _Lowering(plan, rank, (compressor, intra), members).program


class _Lowering(PayloadLowering):
    def __init__(
        self,
        plan: Plan,
        rank: int,
        compressors: tuple[Compressor | None, Compressor | None],
        members: Members | None,
    ) -> None:
        self.plan, self.rank, self.compressors, self.members = plan, rank, compressors, members
        self.node = plan.topology.nodes[plan.topology.node_of(rank)]
        self.itemsize = policy.itemsize(plan.dtype)
        self.streams: dict[Hashable, int] = {}
        self.done_by: dict[int, list[int]] = {}  # step -> operations that complete it here
        self.program = self._new_program()
        steps = plan.for_rank(rank)
        self.delivered = delivered(steps, rank)
        inter = max(
            (s.region.numel * (len(s.group) - 1) for s in steps if s.op.startswith("exchange_reduce")),
            default=0,
        )
        self.receive_ring = Ring(0, inter * self.itemsize)
        self.program.scratch_nbytes = self._prepare_payloads(steps, self.receive_ring.end)
        for step in hand_out_first(steps, rank):
            getattr(self, f"_{step.op}")(step)

    def _new_program(self) -> _C.Program:
        plan = self.plan
        active = (plan.compressor, plan.intra_compressor)
        codecs = [
            (0, 0, 0, 0, 0) if codec is None or text == "none" else codec.spec.params
            for codec, text in zip(self.compressors, active, strict=True)
        ]
        program = _C.Program(
            digest=plan.digest if self.members is None else self.members.digest_of(plan),
            numel=plan.numel,
            collective=COLLECTIVES.index(plan.collective),
            dtype=DTYPES.index(plan.dtype),
            op=OPS.index(plan.op),
            group=0 if self.members is None else self.members.digest,
            members="" if self.members is None else self.members.label,
            codecs=codecs,
        )
        codec = self.compressors[0]
        if codec is not None and plan.compressor != "none" and isinstance(codec.spec, CustomSpec):
            _C.set_custom(program, codec.spec)
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
        codec: int = 0,
        momentum: bool = False,
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
            codec=codec,
            momentum=momentum,
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

    def _allreduce_flat(self, step: Step) -> None:
        raise PlanError(
            f"step {step.id}: a flat all-reduce is NCCL's, for tensors on GPUs; hosts take the route"
        )

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

    def _region_bytes(self, region: Region) -> Message:
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
            message: Message = {"offset": offset, "nbytes": nbytes, "in_scratch": True}
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
