"""Playing the lists without doing the work: in which order can all ranks' instructions happen?

1. Every rank goes through its list. Nothing but computation waits: it waits for values of other ranks.
2. With ``slots`` a send waits too, until the receiver has asked for the message so many places before it.
3. The order found is a valid sequential execution; if there is none, some ranks wait for each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from train.errors import ScheduleError
from train.pipeline.grid import list_grid
from train.pipeline.instructions import RECEIVE, SEND, Instruction, PipelineSchedule

__all__ = ["Event", "broken", "execution_order"]

Event = tuple[int, int]
"""(rank, place in its list)."""

_Key = tuple[str, int, int, int]
"""What can be waited for: (op, stage, microbatch, rank), where B counts as I and as W."""


def broken(schedule: PipelineSchedule, what: str, marks: dict[int, int]) -> ScheduleError:
    """The error that says what is wrong, with the grid in which ``marks`` (rank -> place) are marked."""
    return ScheduleError(f"schedule {schedule.name}: {what}\n{list_grid(schedule, marks)}")


def execution_order(schedule: PipelineSchedule, *, slots: int | None = None) -> list[Event]:
    """All instructions in an order in which they can happen; the same for equal schedules.

    ``slots``: messages that a channel holds before its receiver asks for them; None: any number. Raises
    `ScheduleError` for what is used before it is there, and for a deadlock, with the steps marked.
    """
    return _Run(schedule=schedule, slots=slots).play()


@dataclass(kw_only=True)
class _Run:
    schedule: PipelineSchedule
    slots: int | None
    done: set[_Key] = field(default_factory=set)
    waiting: dict[_Key, list[int]] = field(default_factory=lambda: defaultdict(list))
    order: list[Event] = field(default_factory=list)

    def play(self) -> list[Event]:
        schedule = self.schedule
        self.places = [0] * schedule.ranks
        self.needs: dict[str, Callable[[int, Instruction], list[_Key]]] = {
            "F": self._forward,
            "I": self._backward,
            "B": self._backward,
            "W": self._weights,
            "REDUCE": self._reduce,
            "HEAD_X": self._broadcast,
            "HEAD_S": self._score,
            "HEAD_C": self._combine,
            "HEAD_T": self._shard_weights,
        }
        self.before = self._held_back() if self.slots is not None else {}
        runnable = list(range(schedule.ranks))[::-1]
        while runnable:
            self._advance(runnable.pop(), runnable)
        stuck = {
            rank: self.places[rank]
            for rank, entries in enumerate(schedule.lists)
            if self.places[rank] < len(entries)
        }
        if stuck:
            rank, place = next(iter(stuck.items()))
            key = next(key for key, ranks in self.waiting.items() if rank in ranks)
            what = (
                f"deadlock: rank {rank} stands at {schedule.lists[rank][place]}, which waits for {_name(key)}"
            )
            raise broken(schedule, f"{what}; ranks {sorted(stuck)} do not come to their end", stuck)
        return self.order

    def _advance(self, rank: int, runnable: list[int]) -> None:
        """Runs ``rank`` until it waits; ranks that waited for what it did become runnable."""
        entries = self.schedule.lists[rank]
        while self.places[rank] < len(entries):
            place = self.places[rank]
            entry = entries[place]
            missing = self._missing(rank, entry)
            if missing is not None:
                self.waiting[missing].append(rank)
                return
            self.order.append((rank, place))
            self.places[rank] += 1
            for op in ("I", "W") if entry.op == "B" else (entry.op,):
                which = entry.bucket if op == "REDUCE" else entry.microbatch
                key = (op, entry.stage, which, rank)
                self.done.add(key)
                runnable += self.waiting.pop(key, [])

    def _missing(self, rank: int, entry: Instruction) -> _Key | None:
        """What another rank has yet to do before ``entry``; what this rank itself has not done is an error."""
        if entry.op in RECEIVE:
            return None
        if entry.op in SEND:
            needs = [("F" if entry.op == "SEND_F" else "I", entry.stage, entry.microbatch, rank)]
            needs += self.before.get((entry.op, entry.stage, entry.microbatch, rank), [])
        else:
            needs = self.needs[entry.op](rank, entry)
        for key in needs:
            if key in self.done:
                continue
            if key[3] == rank:
                raise broken(
                    self.schedule, f"{entry} stands before its {_name(key)}", {rank: self.places[rank]}
                )
            return key
        return None

    # -- what each op needs: (op, stage, microbatch, rank) -------------------------------------------------

    def _value(self, op: str, rank: int, entry: Instruction, step: int) -> list[_Key]:
        """The output of the neighbouring stage, or the gradient that it makes."""
        other, microbatch = entry.stage + step, entry.microbatch
        peer = self.schedule.peer(entry.stage, step)
        if peer < 0:
            return [(op, other, microbatch, rank)]
        if not self.schedule.communicates:
            return [(op, other, microbatch, peer)]
        return [(f"RECV_{op}", entry.stage, microbatch, rank), (f"SEND_{op}", other, microbatch, peer)]

    def _forward(self, rank: int, entry: Instruction) -> list[_Key]:
        return self._value("F", rank, entry, -1) if entry.stage > 0 else []

    def _backward(self, rank: int, entry: Instruction) -> list[_Key]:
        needs: list[_Key] = [("F", entry.stage, entry.microbatch, rank)]
        if entry.stage < self.schedule.last:
            return needs + self._value("I", rank, entry, 1)
        return needs + (self._combined(rank, entry.microbatch) if self.schedule.split_head else [])

    def _weights(self, rank: int, entry: Instruction) -> list[_Key]:
        return [("I", entry.stage, entry.microbatch, rank)]

    def _reduce(self, rank: int, entry: Instruction) -> list[_Key]:
        op = "HEAD_T" if entry.stage == self.schedule.head else "W"
        return [(op, entry.stage, microbatch, rank) for microbatch in range(self.schedule.microbatches)]

    def _broadcast(self, rank: int, entry: Instruction) -> list[_Key]:
        last = self.schedule.last
        root = self.schedule.placement[last]
        return [("F", last, entry.microbatch, rank)] if rank == root else []

    def _score(self, rank: int, entry: Instruction) -> list[_Key]:
        root = self.schedule.placement[self.schedule.last]
        return [("HEAD_X", entry.stage, entry.microbatch, holder) for holder in (rank, root)]

    def _combine(self, rank: int, entry: Instruction) -> list[_Key]:
        return [("HEAD_S", entry.stage, entry.microbatch, rank)]

    def _shard_weights(self, rank: int, entry: Instruction) -> list[_Key]:
        return self._combined(rank, entry.microbatch)

    def _combined(self, rank: int, microbatch: int) -> list[_Key]:
        head = self.schedule.head
        others = (holder for holder in range(self.schedule.ranks) if holder != rank)
        return [("HEAD_C", head, microbatch, holder) for holder in (rank, *others)]

    def _held_back(self) -> dict[_Key, list[_Key]]:
        """For each send: the receive, ``slots`` messages before it on its channel, that makes room for it."""
        assert self.slots is not None  # noqa: S101 (the caller has looked)
        if self.slots < 1:
            raise ScheduleError(f"slots={self.slots}: a channel must hold one message at least")
        channels: dict[tuple[str, int, int], list[Instruction]] = defaultdict(list)
        for rank, entries in enumerate(self.schedule.lists):
            for entry in entries:
                if entry.op in SEND:
                    channels[entry.op, rank, entry.peer].append(entry)
        out: dict[_Key, list[_Key]] = {}
        for (op, rank, peer), sends in channels.items():
            step, receive = (1, "RECV_F") if op == "SEND_F" else (-1, "RECV_I")
            for first, send in zip(sends, sends[self.slots :], strict=False):
                room: _Key = (receive, first.stage + step, first.microbatch, peer)
                out[op, send.stage, send.microbatch, rank] = [room]
        return out


def _name(key: _Key) -> str:
    op, stage, which, rank = key
    return f"{op}{'/' if op == 'REDUCE' else ''}{stage}.{which} on rank {rank}"
