"""Runs one rank's list of a lowered schedule: real messages, and computation that a subclass provides.

    F, I, W, B   `_forward`, `_input_gradient`, `_weight_gradients`, `_backward`
    SEND_*       is started and forgotten until the step's end; a channel (source, target, kind) keeps its order
    RECV_*       is asked for; the wait is where the value is used
                 Between GPUs both are started in batches (`train.pipeline.rendezvous`), and nothing waits but streams.
    REDUCE       `_reduce`
    HEAD_*       `_head`, which a subclass gives by op (`train.pipeline.exchange` moves the values)

All ranks of a replica know every microbatch's shape, since they cut the same users into the same microbatches:
nothing about shapes is ever sent. `train.pipeline.stages` computes with the stages of a model,
`train.pipeline.emulated` lets modelled time pass.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from hybridcomm.device_context import DeviceContext
from hybridcomm.groups import Grouping
from hybridcomm.work import Work
from train.errors import ScheduleError
from train.outcome import StepTimes
from train.pipeline.instructions import COMPUTE, FORWARD, SEND, Instruction, PipelineSchedule
from train.pipeline.rendezvous import batch_ends
from train.pipeline.trace import Recorder, TimedGroup

__all__ = ["ListRuntime", "Place", "Step"]

_TAGS = {"F": 0, "I": 1}
Place = tuple[int, int]  # stage, microbatch
Batch = TypeVar("Batch")


@dataclass(kw_only=True)
class Step(Generic[Batch]):
    """What is alive in a step, by stage and microbatch; an entry goes when it has been used.

    ``gradients[stage, microbatch]``: of that stage's output.
    """

    batches: Sequence[Batch]
    times: StepTimes
    outputs: dict[Place, Tensor] = field(default_factory=dict)
    gradients: dict[Place, Tensor] = field(default_factory=dict)
    receives: dict[tuple[str, int, int], tuple[Work, Tensor]] = field(default_factory=dict)
    sends: list[tuple[Instruction, Work]] = field(default_factory=list)
    batch: list[tuple[Instruction, Tensor]] = field(default_factory=list)
    """Messages between GPUs that are not started yet."""
    recorder: Recorder | None = None
    ready: float = 0.0
    """When the latest wait was over."""
    held: float = 0.0
    """When the latest wait was over of those that were not at once."""

    def wait(self, work: Work, what: str) -> None:
        """``what`` is waited for, as the text of the instruction that brings it."""
        begin, came_late = time.perf_counter(), not work.is_completed()
        work.wait()
        self.ready = time.perf_counter()
        if came_late:
            self.held = self.ready
        self.times.waiting += self.ready - begin
        if self.recorder is not None:
            self.recorder.add("waits", what, begin, self.ready)

    def arrived(self, kind: str, place: Place) -> Tensor | None:
        """What was asked for, waited for; None where it comes from this rank."""
        found = self.receives.pop((kind, *place), None)
        if found is None:
            return None
        self.wait(found[0], str(Instruction(f"RECV_{kind}", *place)).partition("<")[0])
        return found[1]


class ListRuntime(ABC, Generic[Batch]):
    """One rank of a pipeline; ``group`` are the pipeline's ranks in their order (None for one rank alone).

    The agreement of all ranks on ``schedule.digest`` is up to the caller.
    """

    recorder: Recorder | None = None
    layers: TimedGroup | None = None
    """What this rank's layers wait for, which is no computation."""

    def __init__(self, schedule: PipelineSchedule, rank: int, *, group: Grouping | None = None) -> None:
        if schedule.ranks > 1 and (group is None or not schedule.communicates):
            raise ScheduleError(
                f"schedule {schedule.name} of {schedule.ranks} ranks needs a group, and to be lowered"
            )
        self.schedule, self.rank = schedule, rank
        self._group = group
        self.list = schedule.lists[rank]
        self._batch_ends = batch_ends(self.list) if isinstance(group, DeviceContext) else None
        self._ops = {
            "F": self._forward,
            "I": self._input_gradient,
            "W": self._weight_gradients,
            "B": self._backward,
            "SEND_F": self._send,
            "SEND_I": self._send,
            "RECV_F": self._receive,
            "RECV_I": self._receive,
            "REDUCE": self._reduce,
            "HEAD_X": self._broadcast,
            "HEAD_S": self._score,
            "HEAD_C": self._combine,
            "HEAD_T": self._shard_gradients,
        }

    def run(self, step: Step[Batch]) -> None:
        """The whole list, until everything that it sends is gone."""
        if len(step.batches) != self.schedule.microbatches:
            raise ScheduleError(
                f"{len(step.batches)} microbatches for a schedule of {self.schedule.microbatches}"
            )
        step.recorder = self.recorder
        for entry in self.list:
            begin, waited, shared = time.perf_counter(), step.times.waiting, self._in_layers
            self._ops[entry.op](step, entry)
            end, shared = time.perf_counter(), self._in_layers - shared
            took = end - begin - (step.times.waiting - waited) - shared
            step.times.tensor += shared
            if self.recorder is not None:
                self.recorder.add("instructions", str(entry), max(begin, step.ready), end)
            if entry.op in FORWARD:
                step.times.forward += took
            elif entry.op in COMPUTE:
                step.times.backward += took
        for entry, work in step.sends:
            step.wait(work, str(entry))

    @property
    def _in_layers(self) -> float:
        return 0.0 if self.layers is None else self.layers.seconds

    # -- computation -----------------------------------------------------------------------------------------

    @abstractmethod
    def _forward(self, step: Step[Batch], entry: Instruction) -> None:
        """Leaves ``step.outputs``."""

    @abstractmethod
    def _input_gradient(self, step: Step[Batch], entry: Instruction) -> None:
        """Leaves ``step.gradients`` of the stage before."""

    @abstractmethod
    def _weight_gradients(self, step: Step[Batch], entry: Instruction) -> None:
        """Adds the stage's gradients."""

    @abstractmethod
    def _backward(self, step: Step[Batch], entry: Instruction) -> None:
        """Both."""

    @abstractmethod
    def _reduce(self, step: Step[Batch], entry: Instruction) -> None:
        """The sum of a bucket over the replicas is under way."""

    # -- the split head --------------------------------------------------------------------------------------

    @abstractmethod
    def _broadcast(self, step: Step[Batch], entry: Instruction) -> None:
        """The last stage's output is on its way to all ranks."""

    @abstractmethod
    def _score(self, step: Step[Batch], entry: Instruction) -> None:
        """It has been scored against this rank's items."""

    @abstractmethod
    def _combine(self, step: Step[Batch], entry: Instruction) -> None:
        """Statistics are on their way to all ranks, parts of its gradient to the last stage's."""

    @abstractmethod
    def _shard_gradients(self, step: Step[Batch], entry: Instruction) -> None:
        """Adds the gradients of this rank's items."""

    # -- messages --------------------------------------------------------------------------------------------

    @abstractmethod
    def room(self, batch: Batch, stage: int) -> Tensor:
        """Memory for what comes out of a stage, or its gradient, for one microbatch."""

    def _send(self, step: Step[Batch], entry: Instruction) -> None:
        op, stage, microbatch, peer, _ = entry
        if op == "SEND_F":
            tensor = step.outputs[stage, microbatch].detach()
        else:
            tensor = step.gradients.pop((stage - 1, microbatch))
        tensor = tensor.contiguous()
        if self._batch_ends is not None:
            return self._gather(step, entry, tensor)
        step.sends.append((entry, self._peers().isend(tensor, peer, _TAGS[op[-1]])))
        return None

    def _receive(self, step: Step[Batch], entry: Instruction) -> None:
        op, stage, microbatch, peer, _ = entry
        room = self.room(step.batches[microbatch], stage - 1 if op == "RECV_F" else stage)
        if self._batch_ends is not None:
            return self._gather(step, entry, room)
        step.receives[op[-1], stage, microbatch] = self._peers().irecv(room, peer, _TAGS[op[-1]]), room
        return None

    def _gather(self, step: Step[Batch], entry: Instruction, tensor: Tensor) -> None:
        """Starts a batch with its last message."""
        step.batch.append((entry, tensor))
        if self._batch_ends is None or entry not in self._batch_ends:
            return
        work = self._peers().batch([(each.op in SEND, t, each.peer) for each, t in step.batch])
        for each, room in step.batch:
            if each.op in SEND:
                step.sends.append((each, work))
            else:
                step.receives[each.op[-1], each.stage, each.microbatch] = work, room
        step.batch.clear()

    def _peers(self) -> Grouping:
        if self._group is None:
            raise ScheduleError(f"rank {self.rank} of schedule {self.schedule.name} sends, and has no group")
        return self._group
