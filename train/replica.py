"""A rank's share of the model, cut along the mesh's axes, and one optimizer step's gradients of it.

1. cut       pp: the stages that a schedule places here; tp: the rank's share of each of their layers
2. run       the rank's list of the lowered schedule (`train.pipeline.stages`); dp: buckets are averaged beside it
3. complete  what has parts of its gradient on several ranks is summed: the item table of a tied model whose first and
             last stage are on different ranks, and parameters of which each tp rank has seen a part of the tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hybridcomm.groups import Group, Grouping
from hybridcomm.reducer import Reducer
from model.computing import PLAIN, Computing
from model.config import ModelConfig
from model.parts import Part
from model.recommender import Recommender
from model.sharding import shardings
from model.tensor_parallel import TensorParallel, sum_partial_gradients
from model.vocab import ItemTable
from train.batch import Packed
from train.errors import ConfigError
from train.mesh import Mesh
from train.outcome import StepTimes
from train.pipeline.instructions import PipelineSchedule
from train.pipeline.stages import PipelineRuntime

__all__ = ["ModelSpec", "Replica"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The whole model: what every rank knows of it, whatever its part is."""

    config: ModelConfig
    num_items: int
    features: Tensor | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    computing: Computing = PLAIN


class Replica:
    """One rank of a replica of the model.

    ``schedule`` is lowered, for ``mesh.pp`` ranks; ``parts[stage]`` say how the model is cut into its stages.
    ``make_reducer(module, group)`` averages a stage's gradients over the dp axis, which is only asked for where there
    is more than one replica.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parts: Sequence[Part],
        schedule: PipelineSchedule,
        *,
        mesh: Mesh,
        ctx: Grouping,
        make_reducer: Callable[[nn.Module, Grouping], Reducer],
        sequence: bool = False,
    ) -> None:
        if len(parts) != schedule.stages or schedule.ranks != mesh.pp:
            raise ConfigError(
                f"schedule {schedule.name} has {schedule.stages} stages on {schedule.ranks} ranks; the model was cut "
                f"into {len(parts)}, and the mesh has pp {mesh.pp}"
            )
        self.mesh, self.schedule, self.parts = mesh, schedule, tuple(parts)
        self.place = mesh.at(ctx.rank)
        self.tp = TensorParallel(group=mesh.group("tp", ctx) if mesh.tp > 1 else None, sequence=sequence)
        self._pipeline = mesh.group("pp", ctx) if mesh.pp > 1 else None
        self._model = ctx.group(mesh.replica(ctx.rank)) if mesh.pp * mesh.tp > 1 else None
        self.stages = {stage: self._make(spec, parts[stage]) for stage in schedule.stages_of(self.place.pp)}
        self._tie = self._share_table(spec)
        self.module = nn.ModuleDict({str(stage): module for stage, module in self.stages.items()})
        self.reducers: dict[int, Reducer] = {}
        shared = None
        if mesh.dp > 1:
            replicas, table = mesh.group("dp", ctx), self._shared_table()
            for stage, module in self.stages.items():
                own = nn.ModuleDict({n: child for n, child in module.named_children() if child is not table})
                if any(True for _ in own.parameters()):  # else the stage is the shared table alone
                    self.reducers[stage] = make_reducer(own, replicas)
            shared = None if table is None else make_reducer(nn.ModuleDict({"table": table}), replicas)
        self.runtime = PipelineRuntime(
            schedule,
            self.place.pp,
            self.stages,
            group=self._pipeline,
            reducers=self.reducers,
            shared=shared,
        )

    def _make(self, spec: ModelSpec, part: Part) -> Recommender:
        torch.manual_seed(spec.seed)
        return Recommender(
            spec.config, spec.num_items, spec.features, part=part, tp=self.tp, computing=spec.computing
        ).to(spec.dtype)

    def _share_table(self, spec: ModelSpec) -> Group | None:
        """One table where first and last stage are both here; else the group of the two ranks that have a copy."""
        first, last = self.schedule.placement[0], self.schedule.placement[-1]
        if not spec.config.tied or self.schedule.stages == 1 or self.place.pp not in (first, last):
            return None
        if first == last:
            self.stages[self.schedule.last].table = self.stages[0].table
            return None
        return self._pipeline.group([first, last]) if self._pipeline is not None else None

    def _shared_table(self) -> ItemTable | None:
        first, last = self.stages.get(0), self.stages.get(self.schedule.last)
        both = first is not None and last is not None and first is not last
        return first.table if both and first.table is last.table else None

    def step(self, batches: Sequence[Packed], scale: float = 1.0, times: StepTimes | None = None) -> float:
        """Gradients of one optimizer step in .grad; the sum of losses on the last stage's ranks, 0 on the others.

        ``batches`` are the replica's microbatches, the same on all its ranks. ``scale``: what the sum of losses is
        multiplied by before backward; reducers divide by the number of replicas. No step waits for the loss, which
        nothing is computed from: `loss_of_all` brings it to the other stages when it is to be read.
        """
        times = StepTimes() if times is None else times
        loss = self.runtime.step(batches, scale, times)
        begin = time.perf_counter()
        if self._tie is not None:
            self._sum_copies(self._tie)
        sum_partial_gradients(self.module, self.tp)
        times.exposed += time.perf_counter() - begin
        return loss

    def loss_of_all(self, loss: float) -> float:
        """What steps have returned, summed: the last stage's sum, on all ranks of the replica."""
        if self._pipeline is None:
            return loss
        total = torch.tensor([loss], dtype=torch.float64)
        self._pipeline.broadcast(total, self.schedule.placement[-1])
        return float(total)

    @torch.no_grad()
    def target_ranks(self, batch: Packed, histories: Sequence[np.ndarray]) -> Tensor:
        """Each target's rank (`Recommender.target_ranks`) through all stages, one after the other; on all ranks."""
        me, placement, x = self.place.pp, self.schedule.placement, None
        ranks = torch.zeros(len(batch.targets), dtype=torch.int64)
        sends = []
        for stage, holder in enumerate(placement):
            if holder != me:
                continue
            module = self.stages[stage]
            if stage > 0 and placement[stage - 1] != me:
                x = self.runtime.room(batch, stage - 1)
                self._pipeline.recv(x, placement[stage - 1])
            if stage == self.schedule.last:
                ranks = module.target_ranks(batch.inputs, batch.targets, histories, x)
                break
            x = module(*batch.inputs, None, x)
            if placement[stage + 1] != me:
                sends.append(self._pipeline.isend(x.contiguous(), placement[stage + 1]))
        for work in sends:
            work.wait()
        if self._pipeline is not None:
            self._pipeline.broadcast(ranks, placement[-1])
        return ranks

    def gradient_norm(self) -> Tensor:
        """Norm of the whole model's gradient, fp64: every parameter once, whatever copies and shares there are."""
        split = self.shares()
        copied = self._tie is not None and self.place.pp != self.schedule.placement[0]
        mine = [
            parameter.grad
            for name, parameter in self.named_parameters().items()
            if parameter.grad is not None
            and (name in split or self.place.tp == 0)
            and not (copied and name.startswith("table."))
        ]
        square = torch.zeros(1, dtype=torch.float64)
        for norm in torch._foreach_norm(mine) if mine else ():
            square += norm.double().square()
        if self._model is not None:
            self._model.allreduce(square)
        return square.sqrt()[0]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's, under the names that the whole model has."""
        return {name: p for module in self.stages.values() for name, p in module.named_parameters()}

    def parameters(self) -> list[nn.Parameter]:
        """This rank's, each once, in the order of stages."""
        return list(self.module.parameters())

    def shares(self) -> set[str]:
        """Names of the parameters of which each tp rank has a share of its own."""
        return {name for module in self.stages.values() for name in shardings(module)}

    def _sum_copies(self, pair: Group) -> None:
        here = 0 if self.place.pp == self.schedule.placement[0] else self.schedule.last
        table = self.stages[here].table
        for parameter in table.parameters() if table is not None else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pair.allreduce(parameter.grad)
