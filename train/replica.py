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
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from hybridcomm.groups import Group, Grouping
from hybridcomm.reducer import Reducer
from model.computing import PLAIN, Computing
from model.config import ModelConfig
from model.head import HeadShard
from model.parts import Part
from model.ranking import target_ranks
from model.recommender import Recommender
from model.sharding import balanced, shardings
from model.tensor_parallel import TensorParallel, check_alike, sum_partial_gradients
from model.vocab import Items, ItemTable
from model.weight_gradients import recompute
from train.batch import Packed
from train.errors import ConfigError
from train.mesh import Coordinates, Mesh
from train.outcome import StepTimes
from train.pipeline.buckets import bucket_counts
from train.pipeline.exchange import HeadExchange
from train.pipeline.instructions import PipelineSchedule
from train.pipeline.passes import add_reduce
from train.pipeline.stages import PipelineRuntime
from train.pipeline.trace import Recorder, TimedGroup
from train.table_copies import sum_copies, sum_shards

__all__ = ["ModelSpec", "Replica"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The whole model: what every rank knows of it, whatever its part is. ``negatives``: items of the loss; 0: all.

    ``place``: moves a module that was just made to where it is computed.
    """

    config: ModelConfig
    num_items: int
    features: Tensor | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    computing: Computing = PLAIN
    negatives: int = 0
    place: Callable[[nn.Module], None] | None = None


class Replica:
    """One rank of a replica of the model.

    ``schedule`` is lowered for ``mesh.pp`` ranks, but for its buckets: REDUCE is added here, where they are known.
    ``parts[stage]`` say how the model is cut into its stages.
    ``make_reducer(module, group)`` averages a stage's gradients over the dp axis, which is only asked for where there
    is more than one replica. ``node``: a context of the node's ranks alone, in whose queue the layers' collectives
    stand; without one they stand behind the buckets in that of ``ctx``.
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
        node: Grouping | None = None,
        sequence: bool = False,
    ) -> None:
        if len(parts) != schedule.stages or schedule.ranks != mesh.pp:
            raise ConfigError(
                f"schedule {schedule.name} has {schedule.stages} stages on {schedule.ranks} ranks; the model was cut "
                f"into {len(parts)}, and the mesh has pp {mesh.pp}"
            )
        if schedule.split_head and (mesh.pp == 1 or (mesh.tp > 1 and node is None)):
            raise ConfigError(
                "a split head needs a pipeline, and with tp a context of the node's own: in one queue layers would "
                "wait for hidden states that are only made behind them"
            )
        self.mesh, self.schedule, self.parts = mesh, schedule, tuple(parts)
        self.place = mesh.at(ctx.rank)
        self.recorder = Recorder()
        self._layers = TimedGroup(mesh.tensor_group(ctx, node), self.recorder) if mesh.tp > 1 else None
        self.tp = TensorParallel(group=cast("Grouping | None", self._layers), sequence=sequence)
        self._pipeline = mesh.group("pp", ctx) if mesh.pp > 1 else None
        host = getattr(ctx, "host", ctx)  # that of a GPU: norms are summed there
        self._model = host.group(mesh.replica(ctx.rank)) if mesh.pp * mesh.tp > 1 else None
        self.stages = {stage: self._make(spec, parts[stage]) for stage in schedule.stages_of(self.place.pp)}
        self.head = self._make_head(spec, ctx) if schedule.split_head else None
        self._tie = self._share_table(spec)
        self.module = nn.ModuleDict({str(stage): module for stage, module in self.stages.items()})
        if self.head is not None:
            self.module["head"] = self.head
        check_alike(self.module, self.tp)
        self.reducers: dict[int, Reducer] = {}
        shared = None
        if mesh.dp > 1:
            replicas, table = mesh.group("dp", ctx), self._shared_table()
            for stage, module in self.stages.items():
                own = nn.ModuleDict({n: child for n, child in module.named_children() if child is not table})
                if any(True for _ in own.parameters()):  # else the stage is the shared table alone
                    self.reducers[stage] = make_reducer(own, replicas)
            shared = None if table is None else make_reducer(nn.ModuleDict({"table": table}), replicas)
            if self.head is not None:
                self.reducers[schedule.head] = make_reducer(self.head, replicas)
            self.schedule = self._with_buckets(shared, ctx)
        self.runtime = PipelineRuntime(
            self.schedule,
            self.place.pp,
            self.stages,
            group=self._pipeline,
            head=self.head,
            exchange=self._exchange(),
            reducers=self.reducers,
            shared=shared,
        )
        self.runtime.recorder, self.runtime.layers = self.recorder, self._layers

    def _make(self, spec: ModelSpec, part: Part) -> Recommender:
        torch.manual_seed(spec.seed)
        module = Recommender(
            spec.config, spec.num_items, spec.features,
            part=part, tp=self.tp, split_head=self.schedule.split_head, computing=spec.computing,
        ).to(spec.dtype)  # fmt: skip
        if spec.place is not None:
            spec.place(module)
        if self.schedule.splits_backward and spec.computing.checkpoint:
            recompute(module)
        return module

    def _make_head(self, spec: ModelSpec, ctx: Grouping) -> HeadShard:
        """Items over pp x tp: each tp rank's range, as of the first stage's table, is shared out over the pipeline."""
        sizes = tuple(size for own in self.tp.sizes(spec.num_items) for size in balanced(own, self.mesh.pp))
        places = (
            Coordinates(dp=self.place.dp, pp=pp, tp=tp)
            for tp in range(self.mesh.tp)
            for pp in range(self.mesh.pp)
        )
        shards = TensorParallel(group=ctx.group([self.mesh.rank(place) for place in places]))
        torch.manual_seed(spec.seed)
        items = Items(count=spec.num_items, tp=shards, sizes=sizes)
        return HeadShard(spec.config, spec.features, items=items, tp=self.tp).to(spec.dtype)

    def _exchange(self) -> HeadExchange | None:
        shards = None if self.head is None else self.head.items.tp.group
        if shards is None or self._pipeline is None:
            return None
        return HeadExchange(self._pipeline, shards, self.schedule.placement[-1])

    def _with_buckets(self, shared: Reducer | None, ctx: Grouping) -> PipelineSchedule:
        """All ranks' lists with REDUCE: as many of each stage as the rank has that has most of its buckets."""
        counts = np.array(bucket_counts(self.schedule, self.place.pp, self.reducers, shared), dtype=np.int64)
        ctx.allreduce(counts, op="max")
        return add_reduce(self.schedule, counts.tolist())

    def _share_table(self, spec: ModelSpec) -> Group | None:
        """One table where first and last stage are both here; else the group of the two ranks that have a copy."""
        first, last = self.schedule.placement[0], self.schedule.placement[-1]
        if not spec.config.tied or self.schedule.stages == 1 or self.place.pp not in (first, last):
            return None
        if self.head is not None:
            return None  # all ranks have copies: `sum_shards`
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
        self.recorder.begin()
        loss = self.runtime.step(batches, scale, times)
        self.complete(times)
        return loss

    def complete(self, times: StepTimes) -> None:
        """Sums what has parts of its gradient on several ranks."""
        begin, shared = time.perf_counter(), 0.0 if self._layers is None else self._layers.seconds
        table = None if self.stages.get(0) is None else self.stages[0].table
        if self._tie is not None:
            sum_copies(self.stages[self.schedule.last].table if table is None else table, self._tie)
        if self.head is not None and self.head.tied and self._pipeline is not None:
            rows = balanced(self.tp.sizes(self.head.items.count)[self.tp.rank], self.mesh.pp)
            first = self.schedule.placement[0]
            sum_shards(self.head.table, table, self._pipeline, first=first, rows=rows)
        sum_partial_gradients(self.module, self.tp)
        end, shared = time.perf_counter(), 0.0 if self._layers is None else self._layers.seconds - shared
        times.tensor += shared
        times.exposed += end - begin - shared
        self.recorder.add("waits", "copies", begin, end)

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
        ranks = torch.zeros_like(batch.targets)
        sends = []
        for stage, holder in enumerate(placement):
            if holder != me:
                continue
            module = self.stages[stage]
            if stage > 0 and placement[stage - 1] != me:
                x = self.runtime.room(batch, stage - 1)
                self._pipeline.recv(x, placement[stage - 1])
            if stage == self.schedule.last and self.head is None:
                ranks = module.target_ranks(batch.inputs, batch.targets, histories, x)
                break
            x = module(*batch.inputs, None, x)
            if stage < self.schedule.last and placement[stage + 1] != me:
                sends.append(self._pipeline.isend(x.contiguous(), placement[stage + 1]))
        for work in sends:
            work.wait()
        if self.head is not None and self._pipeline is not None:
            rows = self.head.table()
            hidden = x if placement[-1] == me else rows.new_empty(len(batch.picks), rows.shape[1])
            self._pipeline.broadcast(hidden, placement[-1])
            return target_ranks(hidden, rows, batch.targets, self.head.items, histories=histories)
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
        square = torch.zeros(1, dtype=torch.float64, device=mine[0].device if mine else None)
        for norm in torch._foreach_norm(mine) if mine else ():
            square += norm.double().square()
        square = square.cpu()  # where the step is decided on
        if self._model is not None:
            self._model.allreduce(square)
        return square.sqrt()[0]

    @property
    def pipeline(self) -> Group | None:
        """The ranks of this one's pipeline; None for one."""
        return self._pipeline

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's, under the names that the whole model has; without its copies of a tied table's rows."""
        return {name: p for named in self._named_modules() for name, p in named.named_parameters()}

    def _named_modules(self) -> list[nn.Module]:
        own = self.head is not None and not self.head.tied
        return [*self.stages.values(), *([nn.ModuleDict({"head": self.head.table})] if own else [])]

    def parameters(self) -> list[nn.Parameter]:
        """This rank's, each once, in the order of stages."""
        return list(self.module.parameters())

    def shares(self) -> set[str]:
        """Names of the parameters of which each tp rank has a share of its own."""
        return {name for named in self._named_modules() for name in shardings(named)}
