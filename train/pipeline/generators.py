"""Generators: from ranks and microbatches to each rank's list of compute, for any number of either.

A generator writes down one rank at a time, as the papers draw it. Those that are drawn for a least number of
microbatches are written for that number; then what belongs to microbatches that are not there is left out. That keeps
every order between those that are, so a correct schedule stays correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from train.errors import ConfigError
from train.pipeline.instructions import Instruction, PipelineSchedule, instruction

__all__ = ["SCHEDULES", "Generator", "make_schedule"]

Instructions = Iterator[Instruction]


def straight(ranks: int, chunks: int) -> tuple[int, ...]:
    """Stages go round the ranks: with two chunks and three ranks 0 1 2 0 1 2."""
    return tuple(range(ranks)) * chunks


def folded(ranks: int, chunks: int) -> tuple[int, ...]:
    """A V: stages go to the last rank and come back, so the first rank has the first stage and the last one."""
    return tuple(rank for chunk in range(chunks) for rank in range(ranks)[:: -1 if chunk % 2 else 1])


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A kind of schedule: facts about it, and what writes the list of a rank.

    ``rank_list(rank, ranks, microbatches, chunks)``. ``splits_backward``: it has I and W apart. ``chunks``:
    stages per rank, None where they may be chosen (then 2 unless said otherwise). ``peak``, of the same arguments as
    ``rank_list``: stages' microbatches that are alive on the rank at most.
    """

    source: str
    splits_backward: bool
    placement: Callable[[int, int], tuple[int, ...]]
    chunks: int | None
    rank_list: Callable[[int, int, int, int], Instructions]
    peak: Callable[[int, int, int, int], int]


def make_schedule(name: str, ranks: int, microbatches: int, *, chunks: int | None = None) -> PipelineSchedule:
    """The schedule ``name`` (a key of `SCHEDULES`) on so many ranks, for so many microbatches, both >= 1.

    ``chunks``: stages per rank, for schedules that leave the choice. Raises `ConfigError` for what is not there.
    """
    kind = SCHEDULES.get(name)
    if kind is None:
        raise ConfigError(f"no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if ranks < 1 or microbatches < 1:
        raise ConfigError(f"{name}: {ranks} ranks and {microbatches} microbatches: both must be >= 1")
    if chunks is not None and chunks != kind.chunks and (kind.chunks is not None or chunks < 1):
        raise ConfigError(f"{name}: {kind.chunks or 'one or more'} stages per rank, not {chunks}")
    per_rank = chunks or kind.chunks or 2
    lists = (kind.rank_list(rank, ranks, microbatches, per_rank) for rank in range(ranks))
    return PipelineSchedule(
        name=name,
        ranks=ranks,
        microbatches=microbatches,
        placement=kind.placement(ranks, per_rank),
        lists=tuple(
            tuple([entry for entry in entries if entry.microbatch < microbatches]) for entries in lists
        ),
    )


def gpipe(rank: int, ranks: int, microbatches: int, chunks: int) -> Instructions:
    """All forwards, then all backwards (arXiv 1811.06965); everything is alive in between."""
    for microbatch in range(microbatches):
        yield instruction("F", rank, microbatch)
    for microbatch in range(microbatches):
        yield instruction("B", rank, microbatch)


def one_f_one_b(rank: int, ranks: int, microbatches: int, chunks: int, ahead: int = 0) -> Instructions:
    """One forward, one backward (PipeDream-Flush, arXiv 2006.09503): p - rank microbatches alive at most.

    ``ahead``: so many more go forward first, which hides a delay between the last forward and its backward.
    """
    warmup = min(ranks - rank - 1 + ahead, microbatches)
    for microbatch in range(warmup):
        yield instruction("F", rank, microbatch)
    for microbatch in range(microbatches):
        if microbatch + warmup < microbatches:
            yield instruction("F", rank, microbatch + warmup)
        yield instruction("B", rank, microbatch)


def interleaved(rank: int, ranks: int, microbatches: int, chunks: int, ahead: int = 0) -> Instructions:
    """1F1B over several stages per rank (arXiv 2104.04473): a bubble 1/chunks as long.

    Microbatches take turns through the stages, p or more at a time; longer turns come first, so that the warmup, which
    is as long as the first turn asks for, is long enough for all.
    """
    forward, first = [], 0
    for turn in _turns(ranks, microbatches):
        span = range(first, first + turn)
        forward += [(chunk, microbatch) for chunk in range(chunks) for microbatch in span]
        first += turn
    backward = [(chunks - 1 - chunk, microbatch) for chunk, microbatch in forward]
    warmup = interleaved_peak(rank, ranks, microbatches, chunks, ahead - 1)  # the peak is one more
    for number in range(len(forward) + warmup):
        if number < len(forward):
            chunk, microbatch = forward[number]
            yield instruction("F", chunk * ranks + rank, microbatch)
        if number >= warmup:
            chunk, microbatch = backward[number - warmup]
            yield instruction("B", chunk * ranks + rank, microbatch)


def interleaved_peak(rank: int, ranks: int, microbatches: int, chunks: int, ahead: int = 0) -> int:
    """Stages' microbatches alive at most: those of the warmup, and one more."""
    longest = _turns(ranks, microbatches)[0]
    return min((chunks - 1) * longest + 2 * (ranks - rank - 1) + ahead + 1, chunks * microbatches)


def _turns(ranks: int, microbatches: int) -> list[int]:
    """How many microbatches go through the stages together, turn by turn."""
    turns = max(1, microbatches // ranks)
    return [microbatches // turns + (turn < microbatches % turns) for turn in range(turns)]


def zb_h1(rank: int, ranks: int, microbatches: int, chunks: int) -> Instructions:
    """1F1B whose W waits (arXiv 2401.10241, section 2.1): a third of its bubble, p microbatches alive at most.

    On rank r, W comes r microbatches behind its I, so that all ranks hold as much as the first.
    """
    warmup, weights = min(ranks - rank - 1, microbatches), 0
    for microbatch in range(warmup):
        yield instruction("F", rank, microbatch)
    for microbatch in range(microbatches):
        if microbatch + warmup < microbatches:
            yield instruction("F", rank, microbatch + warmup)
        yield instruction("I", rank, microbatch)
        if microbatch >= rank or microbatch + warmup >= microbatches:
            yield instruction("W", rank, weights)
            weights += 1
    for microbatch in range(weights, microbatches):
        yield instruction("W", rank, microbatch)


class _Fold:
    """Writes the list of a rank that holds two stages of a V, of each op the next microbatch."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.stage = (rank, 2 * ranks - 1 - rank)
        self.next = {(op, chunk): 0 for op in "FIW" for chunk in (0, 1)}

    def __call__(self, op: str, chunk: int) -> Instruction:
        """``op`` of the rank's first stage (0) or second (1)."""
        microbatch = self.next["I" if op == "B" else op, chunk]
        for part in "IW" if op == "B" else op:
            self.next[part, chunk] += 1
        return instruction(op, self.stage[chunk], microbatch)


def zbv(rank: int, ranks: int, microbatches: int, chunks: int) -> Instructions:
    """Zero bubble on a V (arXiv 2401.10241, section 6): p - 1 units of bubble in all, as much memory as 1F1B.

    Written for 2p - 1 microbatches or more.
    """
    total, do = max(microbatches, 2 * ranks - 1), _Fold(rank, ranks)
    for _ in range(2 * (ranks - rank) - 1):
        yield do("F", 0)
    for _ in range(rank):
        yield from (do("F", 1), do("F", 0))
    for _ in range(ranks - rank):
        yield from (do("F", 1), do("I", 1), do("W", 1))
    while do.next["F", 1] < total:
        if do.next["F", 0] < total:
            yield do("F", 0)
        yield from (do("I", 0), do("W", 0), do("F", 1), do("I", 1), do("W", 1))
    for _ in range(rank):
        yield from (do("I", 0), do("I", 1))
    for _ in range(ranks - rank):
        yield from (do("I", 0), do("W", 0))
    for chunk in (1, 0):
        while do.next["W", chunk] < total:
            yield do("W", chunk)


def dualpipev(rank: int, ranks: int, microbatches: int, chunks: int) -> Instructions:
    """DualPipe cut in half (arXiv 2412.19437, on a V): 2p + 1 half stages alive at most.

    The forward of one stage stands beside the backward of the other, to be overlapped where a device can. Written
    for 2p microbatches or more.
    """
    total, do = max(microbatches, 2 * ranks), _Fold(rank, ranks)
    behind = ranks - rank - 1
    for _ in range(2 * behind):
        yield do("F", 0)
    for _ in range(rank + 1):
        yield from (do("F", 0), do("F", 1))
    for _ in range(behind):
        yield from (do("I", 1), do("W", 1), do("F", 1))
    for _ in range(total - 2 * ranks + rank + 1):
        yield from (do("F", 0), do("B", 1), do("F", 1), do("B", 0))
    for _ in range(behind):
        yield from (do("B", 1), do("F", 1), do("B", 0))
    yield from _dualpipev_end(rank, behind, do)


def _dualpipev_end(rank: int, behind: int, do: _Fold) -> Instructions:
    """The last rank + 1 backwards of either stage: from the middle on W waits, to fill the gaps of the end."""
    late: list[int] = []  # stages of the Ws that wait
    for number in range(2 * (rank + 1)):
        chunk = 1 - number % 2
        split = number > rank
        yield do("I" if split else "B", chunk)
        late += [chunk] * split
    for _ in range(behind):
        yield do("W", late.pop(0))
        yield do("I", 0)
        late.append(0)
    for chunk in late:
        yield do("W", chunk)


SCHEDULES: dict[str, Generator] = {
    "gpipe": Generator(
        source="arXiv 1811.06965",
        splits_backward=False,
        placement=straight,
        chunks=1,
        rank_list=gpipe,
        peak=lambda rank, ranks, microbatches, chunks: microbatches,
    ),
    "1f1b": Generator(
        source="arXiv 2006.09503",
        splits_backward=False,
        placement=straight,
        chunks=1,
        rank_list=one_f_one_b,
        peak=lambda rank, ranks, microbatches, chunks: min(microbatches, ranks - rank),
    ),
    "1f1b+1": Generator(
        source="arXiv 2411.05288: 1F1B for a split head",
        splits_backward=False,
        placement=straight,
        chunks=1,
        rank_list=partial(one_f_one_b, ahead=1),
        peak=lambda rank, ranks, microbatches, chunks: min(microbatches, ranks - rank + 1),
    ),
    "interleaved": Generator(
        source="arXiv 2104.04473",
        splits_backward=False,
        placement=straight,
        chunks=None,
        rank_list=interleaved,
        peak=interleaved_peak,
    ),
    "interleaved+1": Generator(
        source="arXiv 2104.04473, 2411.05288: interleaved 1F1B for a split head",
        splits_backward=False,
        placement=straight,
        chunks=None,
        rank_list=partial(interleaved, ahead=1),
        peak=partial(interleaved_peak, ahead=1),
    ),
    "zb-h1": Generator(
        source="arXiv 2401.10241",
        splits_backward=True,
        placement=straight,
        chunks=1,
        rank_list=zb_h1,
        peak=lambda rank, ranks, microbatches, chunks: min(microbatches, ranks),
    ),
    "zbv": Generator(
        source="arXiv 2401.10241",
        splits_backward=True,
        placement=folded,
        chunks=2,
        rank_list=zbv,
        peak=lambda rank, ranks, microbatches, chunks: 2 * min(microbatches, ranks),
    ),
    "dualpipev": Generator(
        source="arXiv 2412.19437",
        splits_backward=True,
        placement=folded,
        chunks=2,
        rank_list=dualpipev,
        peak=lambda rank, ranks, microbatches, chunks: min(2 * microbatches, 2 * ranks + 1),
    ),
}
"""Name -> how it is made. Those with +1 send one microbatch more ahead, which hides the barrier of a split head."""
