"""Runs a rank's list with the stages of a model: one optimizer step's gradients.

F        the stage's input -> its output (the last stage: the loss); the graph stays until I or B
I, W     the gradient of the input; later the weights' (put off by `model.weight_gradients`)
B        both at once
REDUCE   buckets are launched by the last W or B itself, as gradients are complete: here the launch is checked
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridcomm.groups import Grouping
from hybridcomm.reducer import Reducer
from model.recommender import Recommender
from model.weight_gradients import WeightGradients
from train.batch import Packed
from train.errors import ScheduleError
from train.outcome import StepTimes
from train.pipeline.instructions import Instruction, PipelineSchedule
from train.pipeline.runtime import ListRuntime, Place, Step

__all__ = ["PipelineRuntime"]


@dataclass(kw_only=True)
class _Step(Step[Packed]):
    scale: float
    inputs: dict[Place, Tensor] = field(default_factory=dict)
    queues: dict[Place, WeightGradients] = field(default_factory=dict)
    loss: Tensor | None = None


class PipelineRuntime(ListRuntime[Packed]):
    """One rank of a pipeline: the stages that it holds, and the list that says what it does with them.

    ``stages[stage]`` are parts of one model, ``group`` the pipeline's ranks in their order (None for one rank alone).
    ``reducers[stage]`` average the stage's gradients over the replicas; ``shared`` those of the item table that first
    and last stage have in common, where both are here. How they compute is up to them (`model.computing`).
    """

    def __init__(
        self,
        schedule: PipelineSchedule,
        rank: int,
        stages: Mapping[int, Recommender],
        *,
        group: Grouping | None = None,
        reducers: Mapping[int, Reducer] | None = None,
        shared: Reducer | None = None,
    ) -> None:
        super().__init__(schedule, rank, group=group)
        if tuple(sorted(stages)) != schedule.stages_of(rank):
            raise ScheduleError(
                f"rank {rank} holds stages {schedule.stages_of(rank)} in schedule {schedule.name}, "
                f"and was given {tuple(sorted(stages))}"
            )
        self.stages = dict(stages)
        self.reducers, self.shared = dict(reducers or {}), shared
        self._last_use = -1 if shared is None else max(self.final[0], self.final[schedule.last])

    def step(self, batches: Sequence[Packed], scale: float = 1.0, times: StepTimes | None = None) -> float:
        """Forward and backward of all microbatches: gradients of ``scale`` times the sum of losses are added to .grad.

        Returns the sum of this rank's losses, in nats: of all microbatches on the rank of the last stage, else 0.
        Adds to ``times`` where this rank's time went. Gradients are accumulated in the order of microbatches, and
        where there are reducers they are means over the replicas when this returns. After an error nothing of the
        step is left, but what is in .grad.
        """
        step = _Step(batches=batches, scale=scale, times=StepTimes() if times is None else times)
        self.run(step)
        begin = time.perf_counter()
        for reducer in self.all_reducers():
            reducer.finalize()
        step.times.exposed += time.perf_counter() - begin
        return 0.0 if step.loss is None else float(step.loss)

    def all_reducers(self) -> list[Reducer]:
        """In the order in which they are finalized, which is the same in all replicas."""
        shared = [] if self.shared is None else [self.shared]
        return [*(self.reducers[stage] for stage in sorted(self.reducers, reverse=True)), *shared]

    def room(self, batch: Packed, stage: int) -> Tensor:
        module = next(iter(self.stages.values()))  # the residual stream is as wide everywhere
        weight = next(module.parameters())
        if not module.tp.sequence:
            return weight.new_empty(*batch.items.shape, module.config.dim)
        return weight.new_empty(module.tp.sizes(batch.items.numel())[module.tp.rank], module.config.dim)

    def _forward(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        batch, place, x = step.batches[microbatch], (stage, microbatch), None
        if stage > 0:
            x = step.arrived("F", place)
            if x is None:  # the stage before is here too
                x = step.outputs[stage - 1, microbatch].detach()
            step.inputs[place] = x = x.requires_grad_()
        targets = batch.targets if stage == self.schedule.last else None
        step.outputs[place] = out = self.stages[stage](*batch.inputs, targets, x)
        if targets is not None:
            step.loss = out.detach().double() if step.loss is None else step.loss + out.detach()

    def _input_gradient(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        queue = step.queues[stage, microbatch] = WeightGradients()
        with queue.collect(self.stages[stage]), self._accumulating():
            self._run_backward(step, stage, microbatch)

    def _backward(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        with self._accumulating(complete=stage if self._is_final(entry) else None):
            self._run_backward(step, stage, microbatch)

    def _run_backward(self, step: _Step, stage: int, microbatch: int) -> None:
        place = (stage, microbatch)
        out = step.outputs.pop(place)
        if stage == self.schedule.last:
            gradient: Tensor | None = torch.full_like(out, step.scale)
        else:
            gradient = step.arrived("I", place)
            gradient = step.gradients.pop(place) if gradient is None else gradient
        out.backward(gradient)
        x = step.inputs.pop(place, None)
        if x is not None and x.grad is not None:
            step.gradients[stage - 1, microbatch] = x.grad

    def _weight_gradients(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        queue = step.queues.pop((stage, microbatch))
        reducer = self.reducers.get(stage)
        if reducer is None or not self._is_final(entry):
            queue.run()
            return
        left = dict.fromkeys(reducer.parameters)

        def complete(parameter: Tensor) -> None:
            if parameter in left:  # else it is of the shared table
                del left[parameter]
                reducer.ready(parameter)

        queue.run(complete)
        for parameter in tuple(left):  # norms: theirs was complete with the last I
            complete(parameter)

    def _is_final(self, entry: Instruction) -> bool:
        """Whether the stage's gradients are complete behind it."""
        return self.list[self.final[entry.stage]] == entry

    @contextmanager
    def _accumulating(self, complete: int | None = None) -> Iterator[None]:
        """Around a backward: gradients are added up, and complete at most for one stage."""
        with ExitStack() as stack:
            for stage, reducer in self.reducers.items():
                if stage != complete:
                    stack.enter_context(reducer.no_sync())
            if self.shared is not None:
                stack.enter_context(self.shared.no_sync())
            yield

    def _after(self, place: int) -> None:
        if self.shared is not None and place == self._last_use:
            for parameter in self.shared.parameters:
                self.shared.ready(parameter)

    def _reduce(self, step: Step[Packed], entry: Instruction) -> None:
        reducer = self.reducers.get(entry.stage)
        if reducer is None or not reducer.launched(entry.bucket):
            raise ScheduleError(
                f"{entry}: not all gradients of the bucket are complete, or it has no reducer"
            )
