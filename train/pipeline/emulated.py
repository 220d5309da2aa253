"""Runs a rank's list with time that passes in place of computation; all messages are real.

So schedules can be studied with more ranks than cores: who sleeps needs none. What comes of it is *emulated*, and is
to be called so wherever it is printed.

Computation is queued, as on a device: it begins when what was before it has ended and its input has come, though this
thread may still be posting messages then. Posting delays messages, as it does there, and no computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridcomm.groups import Grouping
from train.errors import ScheduleError
from train.outcome import StepTimes
from train.pipeline.buckets import Buckets
from train.pipeline.costs import Costs
from train.pipeline.exchange import Combined, HeadExchange
from train.pipeline.instructions import COMPUTE, Instruction, PipelineSchedule
from train.pipeline.runtime import ListRuntime, Step

__all__ = ["Edges", "EmulatedRuntime", "EmulatedStep"]

_WAKE_UP_S = 100e-6  # a sleeper may be woken so much too late: the rest is spent awake


@dataclass(frozen=True, kw_only=True)
class EmulatedStep:
    """s of a step on this rank: in all, and of computation as it was to take."""

    seconds: float
    work: float


Edges = Callable[[Instruction], Sequence[Callable[[], object]]]
"""Of a computation: the collectives of its layers, which its time is shared out between."""


class EmulatedRuntime(ListRuntime[int]):
    """One rank whose computation takes what ``costs`` say, and whose messages are of the sizes that they say.

    ``buckets`` are real: reducers of parameters that have a gradient in ``.grad``. ``edges``: what its layers wait for.
    """

    def __init__(
        self,
        schedule: PipelineSchedule,
        rank: int,
        costs: Costs,
        *,
        group: Grouping | None = None,
        exchange: HeadExchange | None = None,
        buckets: Buckets | None = None,
        edges: Edges | None = None,
    ) -> None:
        super().__init__(schedule, rank, group=group)
        if schedule.split_head != (exchange is not None):
            raise ScheduleError(
                f"schedule {schedule.name}: give an exchange for a split head, and only for one"
            )
        costs.check(schedule)
        if schedule.buckets and buckets is None:
            raise ScheduleError(f"schedule {schedule.name} reduces buckets: give them, or lower without")
        self._costs, self.exchange, self._edges = costs, exchange, edges
        self.buckets = Buckets(schedule, rank, {}) if buckets is None else buckets
        self._combined: dict[int, Combined] = {}
        self._rooms = [torch.zeros(max(1, cost.nbytes // 4)) for cost in costs.stages]
        self._free = 0.0  # when all computation so far has ended

    def step(self, times: StepTimes | None = None) -> EmulatedStep:
        """Plays the list once."""
        work = sum(self._costs.seconds(entry, self.rank) for entry in self.list if entry.op in COMPUTE)
        begin = self._free = time.perf_counter()
        microbatches = range(self.schedule.microbatches)
        times = StepTimes() if times is None else times
        self.run(Step(batches=microbatches, times=times))
        times.exposed += self.buckets.finalize(self.recorder)
        return EmulatedStep(seconds=time.perf_counter() - begin, work=work)

    def room(self, batch: int, stage: int) -> Tensor:
        return torch.empty_like(self._rooms[stage])

    def _forward(self, step: Step[int], entry: Instruction) -> None:
        step.arrived("F", (entry.stage, entry.microbatch))
        self._compute(step, entry)
        step.outputs[entry.stage, entry.microbatch] = self._rooms[entry.stage]

    def _input_gradient(self, step: Step[int], entry: Instruction) -> None:
        step.arrived("I", (entry.stage, entry.microbatch))
        if self.exchange is not None and entry.stage == self.schedule.last:
            combined = self._combined[entry.microbatch]
            for work in (combined.work, *combined.works):
                step.wait(work, f"HEAD_C{self.schedule.head}.{entry.microbatch}")
        step.gradients.pop((entry.stage, entry.microbatch), None)
        self._compute(step, entry)
        if entry.stage > 0:
            step.gradients[entry.stage - 1, entry.microbatch] = self._rooms[entry.stage - 1]

    _backward = _input_gradient

    def _weight_gradients(self, step: Step[int], entry: Instruction) -> None:
        self._compute(step, entry)

    def _broadcast(self, step: Step[int], entry: Instruction) -> None:
        hidden = torch.zeros(max(1, self._costs.heads[self.rank].hidden_nbytes // 4))
        step.receives["X", 0, entry.microbatch] = self._exchange.broadcast(hidden), hidden

    def _score(self, step: Step[int], entry: Instruction) -> None:
        step.arrived("X", (0, entry.microbatch))
        self._compute(step, entry)

    def _combine(self, step: Step[int], entry: Instruction) -> None:
        heads = self._costs.heads
        statistics = torch.zeros(max(1, heads[self.rank].statistics_nbytes // 4))
        lengths = [max(1, head.sends // 4) for head in heads]
        part = torch.zeros(lengths[self.rank], 1)
        combined = self._exchange.combine(statistics, part, lengths)
        self._combined[entry.microbatch] = combined
        if not self._exchange.at_root:
            step.sends += [(entry, work) for work in combined.works]

    def _shard_gradients(self, step: Step[int], entry: Instruction) -> None:
        step.wait(self._combined[entry.microbatch].work, f"HEAD_C{entry.stage}.{entry.microbatch}")
        self._compute(step, entry)

    @property
    def _exchange(self) -> HeadExchange:
        if self.exchange is None:
            raise ScheduleError(f"schedule {self.schedule.name} has no split head")
        return self.exchange

    def _reduce(self, step: Step[int], entry: Instruction) -> None:
        self.buckets.launch(entry)

    # -- time that passes ------------------------------------------------------------------------------------

    def _compute(self, step: Step[int], entry: Instruction) -> None:
        """The time of ``entry``, between the collectives of its layers; gradients become complete as it passes."""
        seconds = self._costs.seconds(entry, self.rank)
        self._free = max(self._free, step.held)
        if entry.op in ("W", "B", "HEAD_T") and self.buckets.is_final(entry):
            self._complete(entry.stage, seconds)
            self.buckets.shared_ready(entry.stage)
            if entry.op == "W":
                return
            seconds = 0.0  # of a B: its layers' collectives are still to come
        edges = [] if self._edges is None else self._edges(entry)
        for edge in edges:
            self._pass(seconds / len(edges))
            edge()
            self._free = time.perf_counter()  # a layer waits for its collectives
        if not edges:
            self._pass(seconds)

    def _complete(self, stage: int, seconds: float) -> None:
        """Parameters get their gradients last one first, each after its part of the time."""
        self.buckets.release_behind(stage)
        reducer = self.buckets.reducers.get(stage)
        parameters = [] if reducer is None else list(reducer.parameters)[::-1]
        whole = sum(parameter.numel() for parameter in parameters)
        for parameter in parameters:
            self._pass(seconds * parameter.numel() / whole)
            reducer.ready(parameter)  # type: ignore[union-attr]
        if not parameters:
            self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        self._free += seconds
        left = self._free - time.perf_counter() - _WAKE_UP_S
        if left > 0:
            time.sleep(left)
        while time.perf_counter() < self._free:
            pass
