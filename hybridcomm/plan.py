"""Plans: one immutable global list of steps, the same value on all ranks.

A plan can be printed, parsed back, checked (:mod:`hybridcomm.plan_check`), interpreted and executed. Its
64-bit digest rides in every message header, so that ranks which disagree get an error instead of a hang.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from hybridcomm.errors import PlanError
from hybridcomm.policy import itemsize
from hybridcomm.topology import Topology

if TYPE_CHECKING:
    from hybridcomm.cost import KernelCost

__all__ = ["ALL", "OPS", "RESIDUALS", "STREAMS", "WORDS", "Part", "Plan", "Region", "Step"]

WORDS = ("ready", "bucket", "reduce", "compress", "exchange", "decompress", "gather")
"""The seven words of the route of a gradient."""

STREAMS = ("reduce", "compress", "exchange", "decompress", "gather")
"""Every rank runs each stream's steps in plan order; streams run beside each other."""

OPS = {
    "reduce": "reduce",  # step 3, shared memory: root's region becomes the sum over group, in group order
    "reduce_all": "reduce",  # steps 3 and 7 in one, small regions: every rank of group sums all of theirs itself
    "compress_intra": "compress",  # before a compressed step 3: root encodes its region (+ residual) for the owner
    "reduce_payload": "reduce",  # step 3, compressed, shared memory: root adds the others' payloads to its region
    "compress": "compress",  # step 4: root encodes its region (+ residual) into the payload of (shard, chunk)
    "exchange_payload": "exchange",  # step 5: root (-1: every owner in group) gets all owners' payloads
    "recompress": "compress",  # step 5 in two stages: root adds the payloads (+ residual) and encodes the sum anew
    "exchange_recompressed": "exchange",  # step 5 in two stages, second half: root's second payload to the group
    "exchange_reduce": "exchange",  # step 5, dense, first half: like reduce, between nodes
    "exchange_reduce_all": "exchange",  # step 5, dense, in one: every rank of group sums all of theirs itself
    "allreduce_flat": "exchange",  # steps 3 to 7 in one, on GPUs: all ranks, by an algorithm of NCCL's
    "exchange_gather": "exchange",  # step 5, dense, second half: root's region is copied to the group
    "decompress": "decompress",  # step 6: root clears its region and adds the payloads that it has, in node order
    "gather": "gather",  # step 7, shared memory: root's region is copied to the group, ranks of its node
}
"""Op of a step -> the stream it runs on."""

RESIDUALS = ("compress", "recompress", "compress_intra")
"""Ops that leave a residual behind: of (node, shard), of a slice, of a rank and what it does not own."""

_MAGIC = "hybridcomm-plan/2"

ALL = -1
"""Among the source and target of a `Part`: every rank."""


class Region(NamedTuple):
    """Elements ``[begin, end)`` of the plan's flat buffer."""

    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin

    def __str__(self) -> str:
        return f"[{self.begin}:{self.end}]"


class Part(NamedTuple):
    """What a collective promises of elements ``[begin, end)``: whose they are at first, who has them at the end.

    ``source`` `ALL`: what ``op`` makes of all ranks' elements.
    """

    begin: int
    end: int
    source: int
    target: int

    def __str__(self) -> str:
        names = ("*" if rank == ALL else str(rank) for rank in (self.source, self.target))
        return f"{'>'.join(names)}[{self.begin}:{self.end}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One operation of a plan.

    ``group`` are the ranks that take part (in node order between nodes, ascending within one), ``root`` the
    rank that ends with the result or begins with the data (-1: none). ``divisor`` is W on the step that
    completes a mean, else 1. ``after`` names the steps this one waits for, on every rank that takes part in
    both.
    """

    id: int
    op: str
    bucket: int
    shard: int
    chunk: int
    region: Region
    group: tuple[int, ...]
    root: int
    divisor: int
    after: tuple[int, ...]

    @property
    def stream(self) -> str:
        return OPS[self.op]

    def __str__(self) -> str:
        begin, end = self.region
        after = ",".join(map(str, self.after)) or "-"
        group = ",".join(map(str, self.group))
        return (
            f"{self.id} {self.op} bucket={self.bucket} shard={self.shard} chunk={self.chunk} [{begin}:{end}] "
            f"group={group} root={self.root} divisor={self.divisor} after={after}"
        )


_STEP = re.compile(
    r"(\d+) (\w+) bucket=(\d+) shard=(\d+) chunk=(\d+) \[(\d+):(\d+)\] "
    r"group=([\d,]+) root=(-?\d+) divisor=(\d+) after=(-|[\d,]+)"
)

_PART = re.compile(r"(\*|\d+)>(\*|\d+)\[(\d+):(\d+)\]")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A collective as a value: what is done, by whom, on which elements, in which order.

    ``numel`` elements of ``dtype``; ``op`` is "sum", "mean" or "none"; ``compressor`` the canonical text of the
    compressor ("none": dense), ``intra_compressor`` that of the one inside nodes; ``chunk_elems`` the longest
    chunk; ``root`` the rank that all data comes from or goes to, else -1. Steps stand in one global order that is
    itself a valid sequential execution.

    ``parts`` tile the elements (empty: one part, from all to all). The buffer is flat in the plan's eyes alone: a
    rank needs memory for what its steps touch, wherever that lies.
    """

    collective: str
    numel: int
    dtype: str
    op: str
    compressor: str
    topology: Topology
    chunk_elems: int
    steps: tuple[Step, ...]
    root: int = -1
    parts: tuple[Part, ...] = ()
    intra_compressor: str = "none"

    def for_rank(self, rank: int) -> tuple[Step, ...]:
        """The steps that ``rank`` takes part in, in plan order."""
        self.topology.node_of(rank)  # raises for a rank that is not there
        return self._by_rank[rank]

    @cached_property
    def _by_rank(self) -> tuple[tuple[Step, ...], ...]:
        out: list[list[Step]] = [[] for _ in range(self.topology.world_size)]
        for step in self.steps:
            for rank in step.group:
                out[rank].append(step)
        return tuple(map(tuple, out))

    def residual_regions(self, rank: int, op: str = "compress") -> tuple[Region, ...]:
        """The regions, ascending, whose residual lives on ``rank``: those that it compresses.

        ``op``: one of `RESIDUALS`.
        """
        return tuple(sorted(step.region for step in self.for_rank(rank) if step.op == op))

    def residuals(self, rank: int) -> dict[str, tuple[Region, ...]]:
        """All of `residual_regions`, by op."""
        return {op: self.residual_regions(rank, op) for op in RESIDUALS}

    @cached_property
    def exchange(self) -> str:
        """How payloads are exchanged: "gather", "two_stage", or "none" in a plan that has no payloads."""
        ops = {step.op for step in self.steps}
        if "exchange_payload" not in ops:
            return "none"
        return "two_stage" if "recompress" in ops else "gather"

    def written_regions(self, rank: int) -> tuple[Region, ...]:
        """The regions, ascending and merged, that steps write on ``rank``: results, and partial ones."""
        edges = sorted(step.region for step in self.for_rank(rank) if _writes(step, rank))
        merged: list[Region] = []
        for region in edges:
            if merged and region.begin <= merged[-1].end:
                merged[-1] = Region(merged[-1].begin, max(merged[-1].end, region.end))
            else:
                merged.append(region)
        return tuple(merged)

    def wire_nbytes(self, payload_nbytes: Callable[[int], int] | None = None) -> int:
        """Bytes that all ranks together send between nodes, without framing.

        ``payload_nbytes`` gives the size of a payload of so many elements (`Compressor.nbytes`).
        """
        size = itemsize(self.dtype)
        total = 0
        for step in self.steps:
            peers = len(step.group) - 1
            if step.op in ("exchange_reduce", "exchange_gather"):
                total += peers * step.region.numel * size
            elif step.op == "exchange_reduce_all":
                total += len(step.group) * peers * step.region.numel * size
            elif step.op in ("exchange_payload", "exchange_recompressed"):
                if payload_nbytes is None:
                    raise PlanError(f"compressor {self.compressor}: give payload_nbytes to size its payloads")
                receivers = len(step.group) if step.root == -1 else 1
                total += receivers * peers * payload_nbytes(step.region.numel)
        return total

    def cost(self, topology: Topology, *, kernels: Mapping[str, KernelCost] | None = None) -> float:
        """Predicted s on ``topology``, whose links hold measured alpha and beta; see `hybridcomm.cost`.

        ``kernels``: measured cost by compressor text. Raises `PlanError` where a needed figure is missing.
        """
        from hybridcomm.cost import plan_cost

        return plan_cost(self, topology, kernels)

    @cached_property
    def text(self) -> str:
        """The canonical text form; ``Plan.parse`` reads it back."""
        count = Counter(step.stream for step in self.steps)
        route = " ".join(f"{word}={count[word]}" for word in STREAMS)
        if self.exchange == "two_stage":
            route += " exchanged in two stages"
        head = (
            f"{_MAGIC} collective={self.collective} numel={self.numel} dtype={self.dtype} op={self.op} "
            f"compressor={self.compressor} chunk_elems={self.chunk_elems} root={self.root} "
            f"parts={','.join(map(str, self.parts)) or '-'} intra_compressor={self.intra_compressor}\n"
            f"topology {self.topology}\nroute ready -> bucket -> {route}\n"
        )
        return head + "".join([f"{step}\n" for step in self.steps])

    def __str__(self) -> str:
        return self.text

    @cached_property
    def digest(self) -> int:
        """64-bit digest of the text form: equal exactly when the plans are."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=8).digest(), "little")

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Reads the text form; raises :class:`PlanError` naming the line that is not in it."""
        lines = text.splitlines()
        if len(lines) < 3 or not lines[0].startswith(_MAGIC + " "):
            raise PlanError(f"line 1: a plan's text begins with {_MAGIC!r}")
        head = dict(item.partition("=")[::2] for item in lines[0].split(" ")[1:])
        want = {field.name for field in fields(cls)} - {"topology", "steps"}
        if set(head) != want:
            raise PlanError(f"line 1: expected the fields {sorted(want)}, got {sorted(head)}")
        if not lines[1].startswith("topology "):
            raise PlanError("line 2: expected 'topology ...'")
        steps = tuple(_parse_step(line, number) for number, line in enumerate(lines[3:], start=4))
        try:
            plan = cls(
                collective=head["collective"],
                numel=int(head["numel"]),
                dtype=head["dtype"],
                op=head["op"],
                compressor=head["compressor"],
                topology=Topology.parse(lines[1].removeprefix("topology ")),
                chunk_elems=int(head["chunk_elems"]),
                steps=steps,
                root=int(head["root"]),
                parts=tuple(map(_parse_part, head["parts"].split(","))) if head["parts"] != "-" else (),
                intra_compressor=head["intra_compressor"],
            )
        except ValueError as error:
            raise PlanError(f"lines 1-2: {error}") from error
        if plan.text.splitlines()[2] != lines[2]:
            raise PlanError(f"line 3: {lines[2]!r} does not count the steps below it; were lines lost?")
        return plan

    def check(self, *, slots: int = 4) -> None:
        """Raises :class:`PlanError` unless the plan is a correct schedule of its collective.

        Structure, coverage (by symbolic execution), data dependencies, and freedom from deadlock with FIFO
        streams and ``slots`` chunks per shared-memory lane.
        """
        from hybridcomm.plan_check import check_plan

        check_plan(self, slots=slots)


def _writes(step: Step, rank: int) -> bool:
    if step.op in ("gather", "exchange_gather"):
        return rank != step.root
    if step.op in ("compress", "compress_intra", "exchange_payload", "exchange_recompressed"):
        return False
    return rank == step.root or step.op in ("reduce_all", "exchange_reduce_all", "allreduce_flat")


def _parse_part(text: str) -> Part:
    match = _PART.fullmatch(text)
    if match is None:
        raise ValueError(f"not a part: {text!r}")
    source, target = (ALL if rank == "*" else int(rank) for rank in match.group(1, 2))
    return Part(int(match[3]), int(match[4]), source, target)


def _parse_step(line: str, number: int) -> Step:
    match = _STEP.fullmatch(line)
    if match is None or match[2] not in OPS:
        raise PlanError(f"line {number}: not a step: {line!r}")
    return Step(
        id=int(match[1]),
        op=match[2],
        bucket=int(match[3]),
        shard=int(match[4]),
        chunk=int(match[5]),
        region=Region(int(match[6]), int(match[7])),
        group=tuple(map(int, match[8].split(","))),
        root=int(match[9]),
        divisor=int(match[10]),
        after=() if match[11] == "-" else tuple(map(int, match[11].split(","))),
    )
