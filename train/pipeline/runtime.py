"""Runs one rank's list of a lowered schedule: real computation, real messages, one optimizer step's gradients.

    F         the stage's input -> its output (the last stage: the loss); the graph stays until I or B
    I, W      the gradient of the input; later the weights' (put off by `model.weight_gradients`)
    B         both at once
    SEND_*    is started and forgotten until the step's end; a channel (source, target, kind) keeps its order
    RECV_*    is asked for; the wait is where the value is used
    REDUCE    buckets are launched by the last W or B itself as gradients are complete: here the launch is checked

All ranks of a replica know every microbatch's shape, since they cut the same users into the same microbatches:
nothing about shapes is ever sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridcomm.groups import Grouping
from hybridcomm.reducer import Reducer
from hybridcomm.work import Work
from model.recommender import Recommender
from model.weight_gradients import WeightGradients
from train.batch import Packed
from train.errors import ScheduleError
from train.outcome import StepTimes
from train.pipeline.instructions import BACKWARD, Instruction, PipelineSchedule

__all__ = ["PipelineRuntime"]

_TAGS = {"F": 0, "I": 1}
Place = tuple[int, int]  # stage, microbatch


@dataclass(kw_only=True)
class _Step:
    """What is alive in a step, by stage and microbatch; an entry goes when it has been used."""

    batches: Sequence[Packed]
    scale: float
    inputs: dict[Place, Tensor] = field(default_factory=dict)
    outputs: dict[Place, Tensor] = field(default_factory=dict)
    gradients: dict[Place, Tensor] = field(default_factory=dict)
    queues: dict[Place, WeightGradients] = field(default_factory=dict)
    receives: dict[tuple[str, int, int], tuple[Work, Tensor]] = field(default_factory=dict)
    sends: list[Work] = field(default_factory=list)
    loss: Tensor | None = None
    times: StepTimes

    def wait(self, work: Work) -> None:
        begin = time.perf_counter()
        work.wait()
        self.times.waiting += time.perf_counter() - begin


class PipelineRuntime:
    """One rank of a pipeline: the stages that it holds, and the list that says what it does with them.

    ``stages[stage]`` are parts of one model, ``group`` the pipeline's ranks in their order (None for one rank alone).
    ``reducers[stage]`` average the stage's gradients over the replicas; ``shared`` those of the item table that first
    and last stage have in common, where both are here.
    Checkpointing or compiling stages is up to the caller, as is the agreement of all ranks on ``schedule.digest``.
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
        if tuple(sorted(stages)) != schedule.stages_of(rank):
            raise ScheduleError(
                f"rank {rank} holds stages {schedule.stages_of(rank)} in schedule {schedule.name}, "
                f"and was given {tuple(sorted(stages))}"
            )
        if schedule.ranks > 1 and (group is None or not schedule.communicates):
            raise ScheduleError(
                f"schedule {schedule.name} of {schedule.ranks} ranks needs a group, and to be lowered"
            )
        if schedule.split_head:
            raise ScheduleError("this runtime has no split head: leave head=False when lowering")
        self.schedule, self.rank, self.stages = schedule, rank, dict(stages)
        self.reducers, self.shared = dict(reducers or {}), shared
        self._group = group
        self._list = schedule.lists[rank]
        final = {entry.stage: place for place, entry in enumerate(self._list) if entry.op in ("W", "B")}
        self._final = set(final.values())
        self._last_use = max(final[0], final[schedule.last]) if shared is not None else -1
        self._ops: dict[str, Callable[[_Step, Instruction, bool], None]] = {
            "F": self._forward,
            "I": self._input_gradient,
            "W": self._weight_gradients,
            "B": self._backward,
            "SEND_F": self._send,
            "SEND_I": self._send,
            "RECV_F": self._receive,
            "RECV_I": self._receive,
            "REDUCE": self._reduce,
        }

    def step(self, batches: Sequence[Packed], scale: float = 1.0, times: StepTimes | None = None) -> float:
        """Forward and backward of all microbatches: gradients of ``scale`` times the sum of losses are added to .grad.

        Returns the sum of this rank's losses, in nats: of all microbatches on the rank of the last stage, else 0.
        Adds to ``times`` where this rank's time went. Gradients are accumulated in the order of microbatches, and
        where there are reducers they are means over the replicas when this returns. After an error nothing of the
        step is left, but what is in .grad.
        """
        if len(batches) != self.schedule.microbatches:
            raise ScheduleError(f"{len(batches)} microbatches for a schedule of {self.schedule.microbatches}")
        step = _Step(batches=batches, scale=scale, times=StepTimes() if times is None else times)
        for place, entry in enumerate(self._list):
            begin, waited = time.perf_counter(), step.times.waiting
            self._ops[entry.op](step, entry, place in self._final)
            took = time.perf_counter() - begin - (step.times.waiting - waited)
            if entry.op == "F":
                step.times.forward += took
            elif entry.op in BACKWARD:
                step.times.backward += took
            if self.shared is not None and place == self._last_use:
                for parameter in self.shared.parameters:
                    self.shared.ready(parameter)
        for work in step.sends:
            step.wait(work)
        begin = time.perf_counter()
        for reducer in self.all_reducers():
            reducer.finalize()
        step.times.exposed += time.perf_counter() - begin
        return 0.0 if step.loss is None else float(step.loss)

    # -- computation -----------------------------------------------------------------------------------------

    def _forward(self, step: _Step, entry: Instruction, _: bool) -> None:
        _, stage, microbatch, *_ = entry
        batch, place, x = step.batches[microbatch], (stage, microbatch), None
        if stage > 0:
            x = self._arrived(step, "F", place)
            if x is None:  # the stage before is here too
                x = step.outputs[stage - 1, microbatch].detach()
            step.inputs[place] = x = x.requires_grad_()
        targets = batch.targets if stage == self.schedule.last else None
        step.outputs[place] = out = self.stages[stage](*batch.inputs, targets, x)
        if targets is not None:
            step.loss = out.detach().double() if step.loss is None else step.loss + out.detach()

    def _input_gradient(self, step: _Step, entry: Instruction, _: bool) -> None:
        _, stage, microbatch, *_ = entry
        queue = step.queues[stage, microbatch] = WeightGradients()
        with queue.collect(self.stages[stage]), self._accumulating():
            self._run_backward(step, stage, microbatch)

    def _backward(self, step: _Step, entry: Instruction, final: bool) -> None:
        _, stage, microbatch, *_ = entry
        with self._accumulating(complete=stage if final else None):
            self._run_backward(step, stage, microbatch)

    def _run_backward(self, step: _Step, stage: int, microbatch: int) -> None:
        place = (stage, microbatch)
        out = step.outputs.pop(place)
        if stage == self.schedule.last:
            gradient: Tensor | None = torch.full_like(out, step.scale)
        else:
            gradient = self._arrived(step, "I", place)
            gradient = step.gradients.pop(place) if gradient is None else gradient
        out.backward(gradient)
        x = step.inputs.pop(place, None)
        if x is not None and x.grad is not None:
            step.gradients[stage - 1, microbatch] = x.grad

    def _weight_gradients(self, step: _Step, entry: Instruction, final: bool) -> None:
        _, stage, microbatch, *_ = entry
        queue = step.queues.pop((stage, microbatch))
        reducer = self.reducers.get(stage)
        if not final or reducer is None:
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

    def all_reducers(self) -> list[Reducer]:
        """In the order in which they are finalized, which is the same in all replicas."""
        shared = [] if self.shared is None else [self.shared]
        return [*(self.reducers[stage] for stage in sorted(self.reducers, reverse=True)), *shared]

    # -- messages --------------------------------------------------------------------------------------------

    def _send(self, step: _Step, entry: Instruction, _: bool) -> None:
        op, stage, microbatch, peer, _ = entry
        kind = op[-1]
        tensor = (
            step.outputs[stage, microbatch].detach()
            if kind == "F"
            else step.gradients.pop((stage - 1, microbatch))
        )
        step.sends.append(self._peers().isend(tensor.contiguous(), peer, _TAGS[kind]))

    def _receive(self, step: _Step, entry: Instruction, _: bool) -> None:
        op, stage, microbatch, peer, _ = entry
        room = self.room(step.batches[microbatch], self.stages[stage])
        step.receives[op[-1], stage, microbatch] = self._peers().irecv(room, peer, _TAGS[op[-1]]), room

    def _arrived(self, step: _Step, kind: str, place: Place) -> Tensor | None:
        """What was asked for, waited for; None where it comes from this rank."""
        found = step.receives.pop((kind, *place), None)
        if found is None:
            return None
        step.wait(found[0])
        return found[1]

    @staticmethod
    def room(batch: Packed, stage: Recommender) -> Tensor:
        """Memory for what goes between stages, for one microbatch."""
        weight = next(stage.parameters())
        if not stage.tp.sequence:
            return weight.new_empty(*batch.items.shape, stage.config.dim)
        return weight.new_empty(stage.tp.sizes(batch.items.numel())[stage.tp.rank], stage.config.dim)

    def _peers(self) -> Grouping:
        if self._group is None:
            raise ScheduleError(f"rank {self.rank} of schedule {self.schedule.name} sends, and has no group")
        return self._group

    def _reduce(self, step: _Step, entry: Instruction, _: bool) -> None:
        reducer = self.reducers.get(entry.stage)
        if reducer is None or not reducer.launched(entry.bucket):
            raise ScheduleError(
                f"{entry}: not all gradients of the bucket are complete, or it has no reducer"
            )
