"""From a plan to one rank's operations on a GPU.

Steps are taken phase by phase, all of one op together, as NCCL moves the shards of a node in one call:

    reduce                 reduce-scatter on the node's communicator; grouped reduces where shards differ in size
    compress               kernels
    exchange_payload       all-gather of payloads between owners; with a root: grouped sends and receives
    recompress             kernels
    exchange_recompressed  grouped sends and receives
    exchange_reduce        as reduce, between owners
    exchange_reduce_all    all-reduce between owners
    exchange_gather        as gather, between owners
    decompress             kernels
    gather                 all-gather on the node's communicator; grouped broadcasts where shards differ in size
    reduce_all             all-reduce on the node's communicator
    allreduce_flat         all-reduce of all ranks: NCCL's own algorithm

That order keeps what steps wait for, since those of a phase wait for earlier phases only. In place throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybridcomm import policy
from hybridcomm.device_check import pruned
from hybridcomm.device_plan import START, Buffer, DevicePlan, Operation, Touch
from hybridcomm.errors import PlanError, UnsupportedError
from hybridcomm.plan import OPS

if TYPE_CHECKING:
    from hybridcomm.device_codec import DevicePayloads
    from hybridcomm.plan import Plan, Region, Step

__all__ = ["PHASES", "Places", "lower_device"]

PHASES = (
    "allreduce_flat",
    "reduce",
    "reduce_all",
    "compress",
    "exchange_payload",
    "recompress",
    "exchange_recompressed",
    "exchange_reduce",
    "exchange_reduce_all",
    "exchange_gather",
    "decompress",
    "gather",
)
"""Ops in the order in which they are issued."""

_TAIL = ("decompress", "gather")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a rank's plan finds what it works on: the tensor, and communicators by their ranks in order."""

    tensor: Buffer
    comms: Mapping[tuple[int, ...], int]


def lower_device(
    plan: Plan,
    rank: int,
    places: Places,
    payloads: DevicePayloads | None = None,
    *,
    name: str = "",
    factor: float | None = None,
) -> DevicePlan:
    """The operations that make ``rank`` do its part of ``plan``; the same order on all ranks.

    ``payloads``: kernels and memory of a compressed plan. ``factor``: this rank's of a premul_sum, which has one
    step, of all ranks. Raises `UnsupportedError` for a step that GPUs cannot run.
    """
    return _DeviceLowering(plan, rank, places, payloads, factor).lowered(
        name or f"{plan.collective} of {plan.numel:,}"
    )


class _DeviceLowering:
    def __init__(
        self,
        plan: Plan,
        rank: int,
        places: Places,
        payloads: DevicePayloads | None,
        factor: float | None,
    ) -> None:
        self.plan, self.rank, self.places, self._payloads, self._factor = plan, rank, places, payloads, factor
        self.itemsize = policy.itemsize(plan.dtype)
        self.operations: list[Operation] = []
        self.done_by: dict[int, tuple[int, ...]] = {}
        self.groups = 0

    def lowered(self, name: str) -> DevicePlan:
        steps = self.plan.for_rank(self.rank)
        unknown = {step.op for step in steps} - set(PHASES)
        if unknown:
            raise UnsupportedError(f"{', '.join(sorted(unknown))}: no part of a plan on GPUs")
        if (self._factor is not None) != (self.plan.op == "premul_sum"):
            raise PlanError(f"a factor is a premul_sum's, and this is a plan of op={self.plan.op!r}")
        if self._factor is not None and {step.op for step in steps} - {"allreduce_flat"}:
            raise UnsupportedError("premul_sum on GPUs: in one step alone, of all ranks")
        tail = 0
        for phase in PHASES:
            if phase == _TAIL[0] or (phase == _TAIL[1] and not tail):
                tail = len(self.operations)
            members = [step for step in steps if step.op == phase]
            if members:
                getattr(self, f"_{phase}")(members)
        waits = pruned(self.operations)
        buffers = (self.places.tensor, *(() if self._payloads is None else self._payloads.buffers))
        return DevicePlan(
            name=name,
            digest=self.plan.digest,
            operations=tuple(
                replace(op, after=after) for op, after in zip(self.operations, waits, strict=True)
            ),
            tail=tail,
            buffers=buffers,
            draws=None if self._payloads is None else self._payloads.draws,
        )

    # -- writing down --------------------------------------------------------------------------------------

    def _add(self, kind: str, step: Step, stream: str, touches: Iterable[Touch], **fields: Any) -> int:
        """One operation, behind those that the step's ``after`` names, or else the caller's stream."""
        after = sorted({op for before in step.after for op in self.done_by.get(before, ())})
        self.operations.append(
            Operation(
                kind=kind,
                word=OPS[step.op],
                stream=stream,
                step=step.id,
                after=tuple(after) or (START,),
                touches=tuple(touches),
                **fields,
            )
        )
        return len(self.operations) - 1

    def _region(self, region: Region) -> tuple[int, int]:
        """Address and end of a region of the tensor."""
        begin = self.places.tensor.address + region.begin * self.itemsize
        return begin, begin + region.numel * self.itemsize

    def _comm(self, group: tuple[int, ...]) -> int:
        try:
            return self.places.comms[group]
        except KeyError:
            raise PlanError(f"no communicator of the ranks {list(group)}") from None

    def _new_group(self) -> int:
        self.groups += 1
        return self.groups - 1

    @property
    def payloads(self) -> DevicePayloads:
        if self._payloads is None:
            raise PlanError(f"a plan that is compressed by {self.plan.compressor} needs kernels for it")
        return self._payloads

    # -- sums and copies of regions ------------------------------------------------------------------------

    def _allreduce_flat(self, steps: Sequence[Step]) -> None:
        self._all_reduce(steps, "inter")

    def _reduce_all(self, steps: Sequence[Step]) -> None:
        self._all_reduce(steps, "intra")

    def _exchange_reduce_all(self, steps: Sequence[Step]) -> None:
        self._all_reduce(steps, "inter")

    def _all_reduce(self, steps: Sequence[Step], stream: str) -> None:
        group = self._new_group() if len(steps) > 1 else -1
        for step in steps:
            begin, end = self._region(step.region)
            op = self._add(
                "all_reduce",
                step,
                stream,
                [Touch(begin, end, True)],
                group=group,
                comm=self._comm(step.group),
                source=begin,
                target=begin,
                count=step.region.numel,
                dtype=self.plan.dtype,
                op=_reduction(self.plan.op),
                divisor=step.divisor,
                factor=self._factor,
            )
            self.done_by[step.id] = (op,)

    def _reduce(self, steps: Sequence[Step]) -> None:
        self._to_roots(steps, "intra")

    def _exchange_reduce(self, steps: Sequence[Step]) -> None:
        self._to_roots(steps, "inter")

    def _gather(self, steps: Sequence[Step]) -> None:
        self._rooted(steps, "intra", ("all_gather", "broadcast"), {})

    def _exchange_gather(self, steps: Sequence[Step]) -> None:
        self._rooted(steps, "inter", ("all_gather", "broadcast"), {})

    def _to_roots(self, steps: Sequence[Step], stream: str) -> None:
        fields = {"op": _reduction(self.plan.op), "divisor": steps[0].divisor}
        self._rooted(steps, stream, ("reduce_scatter", "reduce"), fields)

    def _rooted(
        self, steps: Sequence[Step], stream: str, kinds: tuple[str, str], fields: Mapping[str, Any]
    ) -> None:
        """Regions that come together on their roots, or go out from them.

        ``kinds``: the one call of a group whose regions are in its shape, and that of each region where they are not.
        """
        whole, single = kinds
        for members in _by_group(steps):
            common = {"comm": self._comm(members[0].group), "dtype": self.plan.dtype, **fields}
            if _even(members):
                begin, end = self._region(members[0].region)[0], self._region(members[-1].region)[1]
                own = self._region(next(s.region for s in members if s.root == self.rank))[0]
                source, target = (begin, own) if whole == "reduce_scatter" else (own, begin)
                waits = tuple(sorted({before for step in members for before in step.after}))
                op = self._add(
                    whole,
                    replace(members[0], after=waits),
                    stream,
                    [Touch(begin, end, True)],
                    source=source,
                    target=target,
                    count=members[0].region.numel,
                    **common,
                )
                self.done_by.update({step.id: (op,) for step in members})
                continue
            group = self._new_group()
            for step in members:
                begin, end = self._region(step.region)
                written = (step.root == self.rank) == (single == "reduce")
                op = self._add(
                    single,
                    step,
                    stream,
                    [Touch(begin, end, written)],
                    group=group,
                    source=begin,
                    target=begin,
                    count=step.region.numel,
                    peer=step.group.index(step.root),
                    **common,
                )
                self.done_by[step.id] = (op,)

    # -- payloads ------------------------------------------------------------------------------------------

    def _kernels(self, step: Step, recorded: Iterable[Any]) -> None:
        """Kernels, copies and fills of one step; the first waits, the others stand behind it on their stream."""
        last: tuple[int, ...] = ()
        for each in recorded:
            op = self._add(
                each.kind,
                step,
                "codec",
                each.touches,
                source=each.source,
                target=each.target,
                count=each.nbytes,
                image=each.image,
                blocks=each.blocks,
                arguments=each.arguments,
            )
            last = (op,)
        self.done_by[step.id] = last

    def _compress(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._kernels(step, self.payloads.encode(step))

    def _recompress(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._kernels(step, self.payloads.reencode(step))

    def _decompress(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._kernels(step, self.payloads.decode(step, step.divisor))

    def _exchange_payload(self, steps: Sequence[Step]) -> None:
        if steps[0].root != -1:
            self._messages(steps, {step.id: _to_root(step) for step in steps})
            return
        group = self._new_group() if len(steps) > 1 else -1
        for step in steps:
            places = [self.payloads.place(step, rank) for rank in step.group]
            own = places[step.group.index(self.rank)]
            op = self._add(
                "all_gather",
                step,
                "inter",
                [Touch(places[0].address, places[-1].end, True)],
                group=group,
                comm=self._comm(step.group),
                source=own.address,
                target=places[0].address,
                count=own.nbytes,
            )
            self.done_by[step.id] = (op,)

    def _exchange_recompressed(self, steps: Sequence[Step]) -> None:
        self._messages(steps, {step.id: _from_root(step) for step in steps}, second=True)

    def _messages(
        self, steps: Sequence[Step], pairs: Mapping[int, Sequence[tuple[int, int]]], *, second: bool = False
    ) -> None:
        """One NCCL group of all that go from one rank to another; ``pairs``: (source, target) by step."""
        group = self._new_group()
        for step in steps:
            received = []
            for source, target in pairs[step.id]:
                if self.rank not in (source, target):
                    continue
                kind, peer = ("send", target) if source == self.rank else ("receive", source)
                at = self.payloads.second(step) if second else self.payloads.place(step, source)
                op = self._add(
                    kind,
                    step,
                    "inter",
                    [Touch(at.address, at.end, kind == "receive")],
                    group=group,
                    comm=self._comm(step.group),
                    source=at.address if kind == "send" else 0,
                    target=at.address,
                    count=at.nbytes,
                    peer=step.group.index(peer),
                )
                received += [op] if kind == "receive" else []
            # Nobody has to wait for what is only sent: nothing is written over it.
            waited = [op for before in step.after for op in self.done_by.get(before, ())]
            self.done_by[step.id] = tuple(received or waited)


def _to_root(step: Step) -> list[tuple[int, int]]:
    return [(rank, step.root) for rank in step.group if rank != step.root]


def _from_root(step: Step) -> list[tuple[int, int]]:
    return [(step.root, rank) for rank in step.group if rank != step.root]


def _by_group(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps of the same ranks together, by region."""
    groups: dict[tuple[int, ...], list[Step]] = {}
    for step in steps:
        groups.setdefault(step.group, []).append(step)
    return [sorted(members, key=lambda step: step.region) for members in groups.values()]


def _even(members: Sequence[Step]) -> bool:
    """Whether the regions are one array of equal parts, part i of the group's rank i."""
    first = members[0]
    return [step.root for step in members] == list(first.group) and all(
        step.region
        == (first.region.begin + i * first.region.numel, first.region.begin + (i + 1) * first.region.numel)
        for i, step in enumerate(members)
    )


def _reduction(op: str) -> str:
    if op in ("sum", "mean", "premul_sum"):
        return "sum"
    if op in ("min", "max", "product"):
        return op
    raise UnsupportedError(f"op={op!r} on a GPU: NCCL has sum, avg, min, max, product and premul_sum")
