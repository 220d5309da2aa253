"""Runs a rank's list with the stages of a model: one optimizer step's gradients.

F        the stage's input -> its output (the last stage: the loss); the graph stays until I or B
I, W     the gradient of the input; later the weights' (put off by `model.weight_gradients`)
B        both at once
HEAD_*   a shard of the items (`model.head`): scored, combined, its gradients; the last stage's output is what is scored
REDUCE   a bucket of the stage is launched (`train.pipeline.buckets`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridcomm.device_context import DeviceContext
from hybridcomm.groups import Grouping
from hybridcomm.reducer import Reducer
from hybridcomm.work import Work
from model.head import HeadShard, Scored
from model.recommender import Recommender
from model.weight_gradients import Deferrable, WeightGradients
from train.batch import Packed
from train.errors import ScheduleError
from train.outcome import StepTimes
from train.pipeline.buckets import Buckets
from train.pipeline.exchange import Combined, HeadExchange
from train.pipeline.instructions import Instruction, PipelineSchedule
from train.pipeline.runtime import ListRuntime, Place, Step

__all__ = ["PipelineRuntime"]


@dataclass(kw_only=True)
class _Step(Step[Packed]):
    """Of the split head, by microbatch: its hidden states on their way, what this rank made of them, what it gets."""

    scale: float
    inputs: dict[Place, Tensor] = field(default_factory=dict)
    queues: dict[Place, WeightGradients] = field(default_factory=dict)
    loss: Tensor | None = None
    hidden: dict[int, tuple[Work, Tensor]] = field(default_factory=dict)
    scored: dict[int, Scored] = field(default_factory=dict)
    combined: dict[int, Combined] = field(default_factory=dict)

    def add_loss(self, loss: Tensor) -> None:
        self.loss = loss.double() if self.loss is None else self.loss + loss


class PipelineRuntime(ListRuntime[Packed]):
    """One rank of a pipeline: the stages that it holds, and the list that says what it does with them.

    ``stages[stage]`` are parts of one model, ``group`` the pipeline's ranks in their order (None for one rank alone).
    ``head`` is this rank's shard of a split head and ``exchange`` how its values travel. ``reducers[stage]`` average
    the stage's gradients over the replicas (the head is one stage more); ``shared`` those of the item table that first
    and last stage have in common, where both are here: its buckets come behind those of the stage that is done last.
    How stages compute is up to them (`model.computing`).
    """

    def __init__(
        self,
        schedule: PipelineSchedule,
        rank: int,
        stages: Mapping[int, Recommender],
        *,
        group: Grouping | None = None,
        head: HeadShard | None = None,
        exchange: HeadExchange | None = None,
        reducers: Mapping[int, Reducer] | None = None,
        shared: Reducer | None = None,
    ) -> None:
        super().__init__(schedule, rank, group=group)
        if tuple(sorted(stages)) != schedule.stages_of(rank):
            raise ScheduleError(
                f"rank {rank} holds stages {schedule.stages_of(rank)} in schedule {schedule.name}, "
                f"and was given {tuple(sorted(stages))}"
            )
        if schedule.split_head != (head is not None and exchange is not None):
            raise ScheduleError(
                f"schedule {schedule.name} {'has' if schedule.split_head else 'has no'} split head: give its shard and "
                "exchange where there is one, and only there"
            )
        self.stages, self.head, self.exchange = dict(stages), head, exchange
        self._deferrable = {stage: Deferrable.of(module) for stage, module in stages.items()}
        self._split = {(entry.stage, entry.microbatch) for entry in self.list if entry.op == "I"}
        queued = isinstance(group, DeviceContext)
        self.buckets = Buckets(schedule, rank, reducers or {}, shared, queued=queued)

    def step(self, batches: Sequence[Packed], scale: float = 1.0, times: StepTimes | None = None) -> float:
        """Forward and backward of all microbatches: gradients of ``scale`` times the sum of losses are added to .grad.

        Returns the sum of this rank's losses, in nats: of all microbatches on the rank of the last stage, else 0.
        Adds to ``times`` where this rank's time went. Gradients are accumulated in the order of microbatches, and
        where there are reducers they are means over the replicas when this returns. After an error nothing of the
        step is left, but what is in .grad.
        """
        step = _Step(batches=batches, scale=scale, times=StepTimes() if times is None else times)
        self.run(step)
        step.times.exposed += self.buckets.finalize(self.recorder)
        return 0.0 if step.loss is None else float(step.loss)

    def all_reducers(self) -> list[Reducer]:
        """In the order in which they are finalized, which is the same in all replicas."""
        return self.buckets.all()

    def room(self, batch: Packed, stage: int) -> Tensor:
        module = next(iter(self.stages.values()))  # the residual stream is as wide everywhere
        weight = next(module.parameters())
        if not module.tp.sequence:
            return weight.new_empty(*batch.items.shape, module.config.dim)
        return weight.new_empty(module.tp.sizes(batch.items.numel())[module.tp.rank], module.config.dim)

    # -- stages ----------------------------------------------------------------------------------------------

    def _forward(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        batch, place, x = step.batches[microbatch], (stage, microbatch), None
        if stage > 0:
            x = step.arrived("F", place)
            if x is None:  # the stage before is here too
                x = step.outputs[stage - 1, microbatch].detach()
            step.inputs[place] = x = x.requires_grad_()
        scores = stage == self.schedule.last and self.head is None
        targets = batch.targets if scores else None
        with self._collecting(step, place):
            step.outputs[place] = out = self.stages[stage](
                *batch.inputs, targets, x, negatives=batch.negatives, draws=batch.draws
            )
        if scores:
            step.add_loss(out.detach())

    def _collecting(self, step: _Step, place: Place) -> AbstractContextManager[object]:
        """Around a forward whose backward is in two parts."""
        if place not in self._split:
            return nullcontext()
        queue = step.queues[place] = WeightGradients(self._deferrable[place[0]])
        return queue.collect()

    def _input_gradient(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        place = stage, microbatch
        out, gradient = self._output(step, place)
        gradient = step.queues[place].backward(out, gradient, step.inputs.pop(place, None))
        if gradient is not None:
            step.gradients[stage - 1, microbatch] = gradient

    def _backward(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        final = self.buckets.is_final(entry)
        if final:
            self.buckets.release_behind(stage)
        with self._accumulating(complete=stage if final else None):
            out, gradient = self._output(step, (stage, microbatch))
            out.backward(gradient)
        x = step.inputs.pop((stage, microbatch), None)
        if x is not None and x.grad is not None:
            step.gradients[stage - 1, microbatch] = x.grad
        if final:
            self.buckets.shared_ready(stage)

    def _output(self, step: _Step, place: Place) -> tuple[Tensor, Tensor]:
        """What came out of a stage, and its gradient."""
        stage, microbatch = place
        out = step.outputs.pop(place)
        if stage == self.schedule.last and self.head is None:
            return out, torch.full_like(out, step.scale)
        if stage == self.schedule.last:
            return out, self._states_gradient(step, microbatch).to(out.dtype)
        gradient = step.arrived("I", place)
        return out, step.gradients.pop(place) if gradient is None else gradient

    def _weight_gradients(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        _, stage, microbatch, *_ = entry
        queue = step.queues.pop((stage, microbatch))
        if not self.buckets.is_final(entry):
            queue.run()
            return
        self.buckets.release_behind(stage)
        reducer = self.buckets.reducers.get(stage)
        left = dict.fromkeys(() if reducer is None else reducer.parameters)

        def complete(parameter: Tensor) -> None:
            if reducer is not None and parameter in left:  # else it is of the shared table
                del left[parameter]
                reducer.ready(parameter)

        queue.run(complete)
        for parameter in tuple(left):  # norms: theirs was complete with the last I
            complete(parameter)
        self.buckets.shared_ready(stage)

    @contextmanager
    def _accumulating(self, complete: int | None = None) -> Iterator[None]:
        """Around a backward: gradients are added up, and complete at most for one stage."""
        with ExitStack() as stack:
            for stage, reducer in self.buckets.reducers.items():
                if stage != complete:
                    stack.enter_context(reducer.no_sync())
            if self.buckets.shared is not None:
                stack.enter_context(self.buckets.shared.no_sync())
            yield

    # -- the split head --------------------------------------------------------------------------------------

    def _broadcast(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        microbatch, weight = entry.microbatch, self._shard.table.embedding
        if self._exchange.at_root:
            hidden = step.outputs[self.schedule.last, microbatch].detach().to(weight.dtype, copy=True)
        else:
            hidden = weight.new_empty(len(step.batches[microbatch].picks), weight.shape[1])
        step.hidden[microbatch] = self._exchange.broadcast(hidden), hidden

    def _score(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        work, hidden = step.hidden.pop(entry.microbatch)
        step.wait(work, f"HEAD_X{entry.stage}.{entry.microbatch}")
        step.scored[entry.microbatch] = self._shard.score(hidden, step.batches[entry.microbatch].targets)

    def _combine(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        scored = step.scored[entry.microbatch]
        lengths = self._shard.part_lengths(step.batches[entry.microbatch].targets)
        mine = [lengths[shard] for shard in self._shards]
        combined = self._exchange.combine(scored.statistics, scored.part, mine)
        step.combined[entry.microbatch] = combined
        if not self._exchange.at_root:
            step.sends += [(entry, work) for work in combined.works]

    def _states_gradient(self, step: _Step, microbatch: int) -> Tensor:
        """What HEAD_C brings the last stage; the loss comes with it."""
        combined = step.combined[microbatch]
        for work in (combined.work, *combined.works):
            step.wait(work, f"HEAD_C{self.schedule.head}.{microbatch}")
        step.add_loss(self._shard.loss(combined.every))
        parts = [(self._shards[rank], part) for rank, part in combined.parts]
        combined.parts.clear()
        if microbatch not in step.scored:  # HEAD_T has been
            del step.combined[microbatch]
        return self._shard.states_gradient(
            parts, combined.every, step.batches[microbatch].targets, step.scale
        )

    def _shard_gradients(self, step: _Step, entry: Instruction) -> None:  # type: ignore[override]
        combined, scored = step.combined[entry.microbatch], step.scored.pop(entry.microbatch)
        step.wait(combined.work, f"HEAD_C{entry.stage}.{entry.microbatch}")
        if not combined.parts:  # else the last stage's backward has yet to take them
            del step.combined[entry.microbatch]
        with self._accumulating():
            self._shard.accumulate(scored, combined.every, step.scale)
        reducer = self.buckets.reducers.get(entry.stage)
        if reducer is not None and self.buckets.is_final(entry):
            self.buckets.release_behind(entry.stage)
            for parameter in reducer.parameters:
                reducer.ready(parameter)

    @property
    def _shard(self) -> HeadShard:
        if self.head is None:
            raise ScheduleError(f"schedule {self.schedule.name} has no split head")
        return self.head

    @property
    def _exchange(self) -> HeadExchange:
        if self.exchange is None:
            raise ScheduleError(f"schedule {self.schedule.name} has no split head")
        return self.exchange

    @property
    def _shards(self) -> range:
        """The places among all shards of those of this pipeline's ranks: ranks that share layers have the others."""
        size = self._exchange.pipeline.world_size
        first = self._shard.items.tp.rank - self._exchange.pipeline.rank
        return range(first, first + size)

    def _reduce(self, step: Step[Packed], entry: Instruction) -> None:
        self.buckets.launch(entry)
