"""Pipeline schedules as values: one list of instructions per rank, the same value on all ranks.

Like a plan of the library, a schedule can be printed and parsed back, checked, simulated and executed. Generators
make lists of compute; passes lower them by adding what is to be communicated.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from train.errors import ScheduleError

if TYPE_CHECKING:
    from train.pipeline.table import Table

__all__ = [
    "BACKWARD",
    "COMPUTE",
    "FORWARD",
    "HEAD",
    "OPS",
    "RECEIVE",
    "SEND",
    "Instruction",
    "PipelineSchedule",
    "instruction",
    "peer",
]

OPS = {
    "F": "forward of a stage on a microbatch",
    "I": "backward, first half: the gradient of the stage's input",
    "W": "backward, second half: the gradients of the stage's weights are accumulated",
    "B": "the whole backward: I and W in one",
    "SEND_F": "the stage's output goes to rank peer, which holds the next stage",
    "RECV_F": "the stage's input is asked for from rank peer, which holds the stage before",
    "SEND_I": "the gradient of the stage's input goes to rank peer, which holds the stage before",
    "RECV_I": "the gradient of the stage's output is asked for from rank peer, which holds the next stage",
    "REDUCE": "the sum of a bucket of the stage's gradients over the replicas is started",
    "HEAD_X": "the last stage's output is broadcast to all ranks",
    "HEAD_S": "forward of the rank's shard of the head: scores, their statistics, its part of the hidden's gradient",
    "HEAD_C": "statistics are combined over all shards; the hidden's gradient arrives at the last stage",
    "HEAD_T": "backward of the rank's shard of the head: the gradients of its weights are accumulated",
}
"""Op -> what it does. Only computation takes the rank's time; all else is started and goes on beside it."""

BACKWARD = ("I", "W", "B")
FORWARD = ("F", "HEAD_S")
COMPUTE = (*FORWARD, *BACKWARD, "HEAD_T")
SEND = ("SEND_F", "SEND_I")
RECEIVE = ("RECV_F", "RECV_I")
HEAD = ("HEAD_X", "HEAD_S", "HEAD_C", "HEAD_T")

_MAGIC = "hybridcomm-pipeline/1"


class Instruction(NamedTuple):
    """One entry of a rank's list; ``stage`` is the stage that it acts on, on this rank.

    Ops of the head have the stage behind the last one (`PipelineSchedule.head`), of which each rank holds a
    shard. -1: does not apply.
    """

    op: str
    stage: int
    microbatch: int = -1
    peer: int = -1
    bucket: int = -1

    def __str__(self) -> str:
        if self.op == "REDUCE":
            return f"REDUCE{self.stage}/{self.bucket}"
        peer = f"{'>' if self.op in SEND else '<'}{self.peer}" if self.op in SEND + RECEIVE else ""
        return f"{self.op}{self.stage}.{self.microbatch}{peer}"

    @classmethod
    def parse(cls, text: str) -> Instruction:
        """Reads what ``str`` wrote; raises `ScheduleError` for anything else."""
        match = _INSTRUCTION.fullmatch(text)
        op, stage, microbatch, peer, bucket = match.groups() if match else ("",) * 5
        numbers = (-1 if number is None else int(number) for number in (microbatch, peer, bucket))
        made = cls(op, int(stage), *numbers) if op in OPS else None
        if made is None or str(made) != text:
            raise ScheduleError(f"not an instruction: {text!r}")
        return made


@lru_cache(maxsize=1 << 16)
def instruction(op: str, stage: int, microbatch: int, peer: int = -1) -> Instruction:
    """An `Instruction` that lists share: equal ones are one object, made once."""
    return Instruction(op, stage, microbatch, peer)


_INSTRUCTION = re.compile(r"([A-Z_]+)(\d+)(?:\.(\d+))?(?:[<>](\d+))?(?:/(\d+))?")


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """What every rank of a pipeline does in one optimizer step, in which order.

    ``placement[stage]`` is the rank that holds a stage, ``lists[rank]`` what the rank runs. ``communicates``: the
    lists hold sends and receives; else values appear where they are needed (as in a grid on paper).
    ``split_head``: the item head is not part of the last stage but split over all ranks. ``buckets[stage]``: how
    many buckets of its gradients are reduced by REDUCE; empty: that is not part of the lists. With a split head its
    shards come last, one stage more.
    """

    name: str
    ranks: int
    microbatches: int
    placement: tuple[int, ...]
    lists: tuple[tuple[Instruction, ...], ...]
    communicates: bool = False
    split_head: bool = False
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise ScheduleError(f"name {self.name!r}: letters, digits and . + - _ only")
        if self.ranks < 1 or self.microbatches < 1 or not self.placement:
            raise ScheduleError(f"schedule {self.name}: needs a rank, a microbatch and a stage at least")
        if set(self.placement) != set(range(self.ranks)):
            raise ScheduleError(f"placement {self.placement}: each of {self.ranks} ranks needs a stage")
        if len(self.lists) != self.ranks:
            raise ScheduleError(f"schedule {self.name}: {len(self.lists)} lists for {self.ranks} ranks")
        if self.buckets and len(self.buckets) != self.stages + self.split_head:
            raise ScheduleError(f"buckets {self.buckets}: give a count for each stage (and the split head)")

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def last(self) -> int:
        """The last stage."""
        return self.stages - 1

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are put off: I and W instead of B."""
        return any(entry.op == "W" for entries in self.lists for entry in entries)

    @property
    def head(self) -> int:
        """The number that the split head has as a stage."""
        return self.stages

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending; without its shard of the head."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def peer(self, stage: int, step: int) -> int:
        """The rank of the stage before (``step`` -1) or behind (+1), -1 where there is none or it is the same.

        The same: at the turn of a V, or with one rank, values stay where they are.
        """
        return peer(self.placement, stage, step)

    @cached_property
    def table(self) -> Table:
        """The lists as arrays."""
        from train.pipeline.table import Table  # which is made of what stands here

        return Table(self)

    @cached_property
    def text(self) -> str:
        """The canonical text form: a line of facts, a line per rank; `parse` reads it back."""
        head = (
            f"{_MAGIC} name={self.name} ranks={self.ranks} microbatches={self.microbatches} "
            f"placement={','.join(map(str, self.placement))} communicates={_yes(self.communicates)} "
            f"split_head={_yes(self.split_head)} buckets={','.join(map(str, self.buckets)) or '-'}\n"
        )
        lines = (f"{rank}: {' '.join(map(str, entries))}\n" for rank, entries in enumerate(self.lists))
        return head + "".join(lines)

    def __str__(self) -> str:
        return self.text

    @cached_property
    def digest(self) -> int:
        """64-bit digest of the text form: equal exactly when the schedules are."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=8).digest(), "little")

    @classmethod
    def parse(cls, text: str) -> PipelineSchedule:
        """Reads the text form; raises `ScheduleError` naming the line that is not in it."""
        first, *lines = text.splitlines() or [""]
        match = _HEADER.fullmatch(first)
        if match is None:
            raise ScheduleError(f"line 1: a schedule's text begins with '{_MAGIC} name=...'")
        lists = []
        for rank, line in enumerate(lines):
            number, _, entries = line.partition(":")
            if number != str(rank):
                raise ScheduleError(f"line {rank + 2}: expected the list of rank {rank}")
            try:
                lists.append(tuple(map(Instruction.parse, entries.split())))
            except ScheduleError as error:
                raise ScheduleError(f"line {rank + 2}: {error}") from None
        return cls(
            name=match["name"],
            ranks=int(match["ranks"]),
            microbatches=int(match["microbatches"]),
            placement=tuple(map(int, match["placement"].split(","))),
            lists=tuple(lists),
            communicates=match["communicates"] == "yes",
            split_head=match["split_head"] == "yes",
            buckets=() if match["buckets"] == "-" else tuple(map(int, match["buckets"].split(","))),
        )


_HEADER = re.compile(
    re.escape(_MAGIC) + r" name=(?P<name>\S+) ranks=(?P<ranks>\d+) microbatches=(?P<microbatches>\d+) "
    r"placement=(?P<placement>\d+(,\d+)*) communicates=(?P<communicates>yes|no) "
    r"split_head=(?P<split_head>yes|no) buckets=(?P<buckets>-|\d+(,\d+)*)"
)


def peer(placement: tuple[int, ...], stage: int, step: int) -> int:
    """`PipelineSchedule.peer`, of a placement."""
    other = stage + step
    if not 0 <= other < len(placement) or placement[other] == placement[stage]:
        return -1
    return placement[other]


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
