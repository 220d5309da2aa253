"""Playing the lists without doing the work: in which order can all ranks' instructions happen?

1. Every rank goes through its list. Nothing but computation waits: it waits for values of other ranks.
2. With ``slots`` a send waits too, until the receiver has asked for the message so many places before it. With
   ``rendezvous`` all sides of what ranks do together wait until the others have come to it.
3. The order found is a valid sequential execution; if there is none, some ranks wait for each other.

What waits for what is known by lines (`train.pipeline.lines`). On its own rank it must stand further up, which needs no
playing; ranks are played from one wait for another rank to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, permutations
from operator import itemgetter

import numpy as np

from train.errors import ScheduleError
from train.pipeline.grid import list_grid
from train.pipeline.instructions import PipelineSchedule
from train.pipeline.lines import OP, Numbers
from train.pipeline.table import Table

__all__ = ["Stretch", "broken", "execution_order"]

Stretch = tuple[int, int, int]
"""(rank, begin, end): the entries of its list from place begin to before end."""


def broken(schedule: PipelineSchedule, what: str, marks: dict[int, int]) -> ScheduleError:
    """The error that says what is wrong, with the grid in which ``marks`` (rank -> place) are marked."""
    return ScheduleError(f"schedule {schedule.name}: {what}\n{list_grid(schedule, marks)}")


def execution_order(
    schedule: PipelineSchedule, *, slots: int | None = None, rendezvous: bool = False
) -> list[Stretch]:
    """All instructions in an order in which they can happen; the same for equal schedules.

    ``slots``: messages that a channel holds before its receiver asks for them; None: any number. ``rendezvous``: none,
    and neither side goes on before the other has come to the message. Raises `ScheduleError` for what is used before it
    is there, and for a deadlock, with the steps marked.
    """
    if slots is not None and slots < 1:
        raise ScheduleError(f"slots={slots}: a channel must hold one message at least")
    _stands_behind_its_needs(schedule.table)
    return _Run(schedule.table, _waits(schedule.table, slots, rendezvous)).play()


def _stands_behind_its_needs(table: Table) -> None:
    """Of what a rank itself is to do before: it does not wait for that, so the order of its list is what counts."""
    schedule, (after, before) = table.schedule, table.lines.local
    early = table.by_line[before] > table.by_line[after]  # B has I and W in one place
    if early.any():
        row, microbatch = min(
            np.argwhere(early).tolist(), key=lambda at: int(table.by_line[after[at[0]], at[1]])
        )
        rank, place = table.event(int(table.by_line[after[row], microbatch]))
        need = table.lines.name(int(before[row]), microbatch)
        raise broken(schedule, f"{schedule.lists[rank][place]} stands before its {need}", {rank: place})
    complete = table.accumulates.max(axis=1).tolist()
    for index, unit in table.reduces:
        if complete[unit] > index:
            rank, place = table.event(index)
            microbatch = int(np.argmax(table.accumulates[unit] > index))
            op = "W" if unit < schedule.stages else "HEAD_T"
            need = f"{op}{min(unit, schedule.head)}.{microbatch} on rank {rank}"
            raise broken(schedule, f"{schedule.lists[rank][place]} stands before its {need}", {rank: place})


@dataclass(frozen=True, kw_only=True)
class _Waits:
    """Waits for other ranks, in the order of the lists: entry ``at`` for the entry ``need`` of rank ``peer``.

    ``name``: line * microbatches + microbatch of what is waited for, which may be missing.
    """

    at: Numbers
    need: Numbers
    peer: Numbers
    name: Numbers


def _waits(table: Table, slots: int | None, rendezvous: bool) -> _Waits:
    lines, count = table.lines, table.schedule.microbatches
    names = np.arange(len(lines.rank) * count).reshape(-1, count)
    after, before = lines.across
    groups = [(table.by_line[after], table.by_line[before], lines.rank[before, None], names[before])]
    if slots is not None:  # a send waits for the receive that is so many messages before it on its channel
        channel, send, receive, number = table.messages
        full = np.flatnonzero(channel[slots:] == channel[:-slots])
        name = names[lines.channels[2]].ravel()[number[full]]
        groups.append((send[full + slots], receive[full], lines.rank[name // count], name))
    if rendezvous:
        groups += list(_meetings(table))
    columns = zip(*(np.broadcast_arrays(*group) for group in groups), strict=True)
    at, need, peer, name = (np.concatenate([part.ravel() for part in column]) for column in columns)
    order = at.argsort(kind="stable")
    return _Waits(at=at[order], need=need[order], peer=peer[order], name=name[order])


def _meetings(table: Table) -> Iterator[tuple[Numbers, Numbers, Numbers, Numbers]]:
    """Waits until the other side is about to do its part: until what stands before that is done."""
    lines, count = table.lines, table.schedule.microbatches
    _, send, receive = lines.channels
    pairs = [*zip(send, receive, strict=True), *zip(receive, send, strict=True)]
    for op in (OP["HEAD_X"], OP["HEAD_C"]) if lines.split_head else ():
        pairs += permutations((op * lines.units + shard for shard in lines.shards), 2)
    for mine, other in pairs:
        rank = np.full(count, lines.rank[other])
        yield table.by_line[mine], table.by_line[other] - 1, rank, other * count + np.arange(count)


class _Run:
    """Ranks run in turn, as far as they come: ``here[rank]`` is the entry that it has come to."""

    def __init__(self, table: Table, waits: _Waits) -> None:
        self.table = table
        begin = table.begin.tolist()
        self.begin, self.end, self.here = begin[:-1], begin[1:], begin[:-1]
        columns = [column.tolist() for column in (waits.at, waits.need, waits.peer, waits.name)]
        edges = waits.at.searchsorted(table.begin).tolist()  # what is missing waits behind the last
        self.waits = [
            zip(*(column[here:end] for column in columns), strict=True) for here, end in pairwise(edges)
        ]
        self.sleepers: list[list[tuple[int, int]]] = [[] for _ in self.here]
        """By rank: (entry of its list that is waited for, rank that waits)."""
        self.missed = [-1] * len(self.here)
        """By rank: what it waits for, or waited for last."""

    def play(self) -> list[Stretch]:
        here, order = self.here, []
        runnable = list(range(len(here)))[::-1]
        while runnable:
            rank = runnable.pop()
            end = self.end[rank]
            for at, need, peer, name in self.waits[rank]:
                if here[peer] <= need:
                    self.sleepers[peer].append((need, rank))
                    self.missed[rank], end = name, at
                    break
            order.append((rank, here[rank] - self.begin[rank], end - self.begin[rank]))
            here[rank] = end
            sleepers = self.sleepers[rank]
            if sleepers:  # those whose entry it has done go on, in the order in which it did them
                awake = sorted((sleeper for sleeper in sleepers if sleeper[0] < end), key=_entry)
                self.sleepers[rank] = [sleeper for sleeper in sleepers if sleeper[0] >= end]
                runnable += [other for _, other in awake]
        self._all_came_to_their_end()
        return order

    def _all_came_to_their_end(self) -> None:
        schedule, table = self.table.schedule, self.table
        stuck = [table.event(here) for here, end in zip(self.here, self.end, strict=True) if here < end]
        if stuck:
            rank, place = stuck[0]
            need = table.lines.name(*divmod(self.missed[rank], schedule.microbatches))
            what = f"deadlock: rank {rank} stands at {schedule.lists[rank][place]}, which waits for {need}"
            raise broken(
                schedule, f"{what}; ranks {[rank for rank, _ in stuck]} do not come to their end", dict(stuck)
            )


_entry = itemgetter(0)
