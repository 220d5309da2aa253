"""Generators: from ranks and microbatches to each rank's list of compute, for any number of either.

A generator writes down one rank at a time, as the papers draw it. Those that are drawn for a least number of
microbatches, or a multiple, are written for the next such number; then what belongs to microbatches that are not
there is left out. That keeps every order between those that are, so a correct schedule stays correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from train.errors import ConfigError
from train.pipeline.instructions import Instruction, PipelineSchedule

__all__ = ["SCHEDULES", "Generator", "make_schedule"]

List = Iterator[Instruction]


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
    stages per rank, None where they may be chosen (then 2 unless said otherwise).
    """

    source: str
    splits_backward: bool
    placement: Callable[[int, int], tuple[int, ...]]
    chunks: int | None
    rank_list: Callable[[int, int, int, int], List]


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
            tuple(entry for entry in entries if entry.microbatch < microbatches) for entries in lists
        ),
    )


def gpipe(rank: int, ranks: int, microbatches: int, chunks: int) -> List:
    """All forwards, then all backwards (arXiv 1811.06965); everything is alive in between."""
    for microbatch in range(microbatches):
        yield Instruction("F", rank, microbatch)
    for microbatch in range(microbatches):
        yield Instruction("B", rank, microbatch)


def one_f_one_b(rank: int, ranks: int, microbatches: int, chunks: int, ahead: int = 0) -> List:
    """One forward, one backward (PipeDream-Flush, arXiv 2006.09503): p - rank microbatches alive at most.

    ``ahead``: so many more go forward first, which hides a delay between the last forward and its backward.
    """
    warmup = min(ranks - rank - 1 + ahead, microbatches)
    for microbatch in range(warmup):
        yield Instruction("F", rank, microbatch)
    for microbatch in range(microbatches):
        if microbatch + warmup < microbatches:
            yield Instruction("F", rank, microbatch + warmup)
        yield Instruction("B", rank, microbatch)


SCHEDULES: dict[str, Generator] = {
    "gpipe": Generator(
        source="arXiv 1811.06965", splits_backward=False, placement=straight, chunks=1, rank_list=gpipe
    ),
    "1f1b": Generator(
        source="arXiv 2006.09503", splits_backward=False, placement=straight, chunks=1, rank_list=one_f_one_b
    ),
}
"""Name -> how it is made."""
