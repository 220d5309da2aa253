"""One order of all messages, as a lowering pass: for senders and receivers that wait for each other on a queue.

On a GPU a message is a kernel on each side, and neither ends before the other has begun. All of a device's stand on one
stream, so an order that suits buffered messages deadlocks: under 1F1B the first stage sends F1 before it receives I0,
the second sends I0 before it receives F1. This pass makes each rank's list a part of one order of everything:

1. The computation is played. By the times of that, a message comes right behind what makes it.
2. Each rank's list has what the rank takes part in, in this order.

So the first message of the order that is not over has both sides at the heads of their streams, behind computation that
comes before it in the order too: it goes on, and nobody waits for ever. That also holds where messages that follow each
other on a rank, with no computation between, are one NCCL group (`batch_ends`): a group begins no later than its first
message would alone, and who waits for it comes behind all of it. What ranks do together besides stands inside of an
instruction (collectives of layers that they share) or is one (REDUCE), at one place of the same list on all of them, so
it has a place in the order too. `train.pipeline.checker` proves of the lists what is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from train.errors import ScheduleError
from train.pipeline.costs import Costs
from train.pipeline.execute import execution_order
from train.pipeline.instructions import RECEIVE, SEND, Instruction, PipelineSchedule
from train.pipeline.lines import OP, Numbers, lines_of
from train.pipeline.simulator import simulate
from train.pipeline.table import numbering

__all__ = ["add_rendezvous", "batch_ends"]

_FINER = 1024
"""Times are told apart to this part of the shortest computation; what neighbours have ready together they exchange."""


def add_rendezvous(schedule: PipelineSchedule, costs: Costs | None = None) -> PipelineSchedule:
    """Adds SEND_F, RECV_F, SEND_I and RECV_I in one order of all ranks' messages.

    ``costs`` (None: unit costs) say when messages are ready; whatever they say, the lists run. A receive stands before
    the first computation that ends later, beside which the transfer runs. Raises `ScheduleError` for a split head,
    whose values have no place in the order, and for computation that takes no time.
    """
    if schedule.communicates or schedule.split_head or schedule.buckets:
        raise ScheduleError(
            f"schedule {schedule.name}: messages get one order where there is computation alone"
        )
    costs = costs or Costs.unit(schedule)
    shortest = min(stage.seconds(op) for stage in costs.stages for op in ("F", "I", "B"))
    if shortest <= 0:
        raise ScheduleError("one order of messages goes by times: each of F, I and B must take some")
    table, count = schedule.table, schedule.microbatches
    lines = lines_of(replace(schedule, communicates=True))
    _, send, receive = lines.channels
    op = np.where(send < lines.number(("SEND_I", 0)), OP["F"], OP["I"])
    made = table.by_line[op * lines.units + lines.unit[send]].ravel()
    computed, messages = _order(schedule, costs, made, shortest / _FINER)
    texts = numbering(schedule.placement, count).instructions[..., :count]
    far = computed.size + messages.size  # keeps ranks apart
    places = table.rank * far + computed
    turn, at, ranks, new = messages.argsort(), [], [], []
    for line in (send, receive):
        rank = lines.rank[line].repeat(count)[turn]
        at.append(places.searchsorted(rank * far + messages[turn]))
        ranks.append(rank)
        new.append(texts[line // lines.units, lines.unit[line]].ravel()[turn])
    by_turn = np.tile(messages[turn], 2).argsort(kind="stable")
    lists = table.insert(*(np.concatenate(column)[by_turn] for column in (at, ranks, new)))
    return replace(schedule, communicates=True, lists=lists)


def _order(
    schedule: PipelineSchedule, costs: Costs, made: Numbers, quantum: float
) -> tuple[Numbers, Numbers]:
    """The places in one order of each entry, and of the messages that the entries ``made`` make."""
    table = schedule.table
    stretches = (np.arange(here, end) + table.begin[rank] for rank, here, end in execution_order(schedule))
    turn = np.empty(table.size, np.intp)
    turn[np.concatenate(list(stretches))] = np.arange(table.size)
    finish = np.fromiter(chain.from_iterable(simulate(schedule, costs).finish), float, table.size)
    # By this clock, too, whoever takes a value ends later than what makes it.
    time = np.floor(finish / quantum)
    both = np.concatenate((np.arange(table.size), made))
    message = np.arange(both.size) >= table.size
    place = np.empty(both.size, np.intp)
    place[np.lexsort((turn[both], message, time[both]))] = np.arange(both.size)
    return place[: table.size], place[table.size :]


def batch_ends(entries: Sequence[Instruction]) -> frozenset[Instruction]:
    """The messages of a list that are the last of a batch: those of a batch are started as one.

    What has just been computed is sent together with what the next computation takes, both ways at once. Messages that
    stand behind that are for later, and each is a batch of its own: nobody has to wait for them.
    """
    ends: set[Instruction] = set()
    run: list[Instruction] = []
    for entry in (*entries, Instruction("F", -1)):
        if entry.op in SEND + RECEIVE:
            run.append(entry)
            continue
        needed = [place for place, each in enumerate(run) if each.op in SEND or _takes(entry, each)]
        ends |= set(run[max(needed, default=0) :])
        run.clear()
    return frozenset(ends)


def _takes(entry: Instruction, message: Instruction) -> bool:
    """Whether a computation takes what a message brings."""
    kinds = {"RECV_F": ("F",), "RECV_I": ("I", "B")}[message.op]
    return entry.op in kinds and (entry.stage, entry.microbatch) == (message.stage, message.microbatch)
