"""Ours: replicas of the model, each a pipeline of stages whose layers are shared, on hybridcomm's collectives.

*Exposed communication* of a step is the time from the moment this rank's last gradient is complete to the moment all
averaged gradients are in ``p.grad``. Copies out of the buckets count. Communication that slows backward down by
taking processor time shows up in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import hybridcomm
from hybridcomm import collective_plans
from hybridcomm.context import Context
from hybridcomm.device_context import DeviceContext
from hybridcomm.groups import Grouping
from model.parts import Part
from train.backend import Backend
from train.batch import Packed
from train.config import TrainConfig
from train.errors import TrainError
from train.mesh import Mesh
from train.outcome import StepTimes
from train.pipeline import PipelineSchedule, check, lower, make_schedule
from train.profile import RankTrace, gather
from train.replica import ModelSpec, Replica
from train.stage_costs import best_parts, relative_costs, stage_costs
from train.zero import SharedState

__all__ = ["HybridBackend"]


class HybridBackend(Backend):
    """One rank of a mesh of replicas, stages and shares of layers."""

    def __init__(self, config: TrainConfig, context: Context | DeviceContext | None = None) -> None:
        """``context``: this rank's, if it has joined the job already; it stays open then."""
        self._config = config
        self._joined = context is None
        self.context = _join(config) if context is None else context
        self._on_gpu = isinstance(self.context, DeviceContext)
        provider = getattr(self.context, "provider", None)
        self._place = None if provider is None else provider.place
        self._device = torch.device("cpu") if provider is None else provider.device
        self.rank, self.world_size = self.context.rank, self.context.world_size
        self.mesh = Mesh.over(self.context.topology, pp=config.pp, tp=config.tp, outer=config.outer)
        self.replica, self.replicas = self.mesh.at(self.rank).dp, self.mesh.dp
        host = getattr(self.context, "host", self.context)  # of a GPU: what is summed there is on the host
        self._replicas = self.mesh.group("dp", host)
        # Layers wait for their collectives: those must not stand in one queue with buckets, for which nobody waits yet.
        # (On a GPU they do: all of NCCL is on one stream.)
        self._node = self.context.connect_node() if self.mesh.tp > 1 and not self._on_gpu else None
        if config.zero:
            self.mesh.check_shared_state()
        self._shared: SharedState | None = None

    def build(self, spec: ModelSpec) -> Sequence[nn.Parameter]:
        self.schedule, self.parts = self._cut(spec)
        self._agree()
        self._replica = Replica(
            replace(spec, place=self._place),
            self.parts,
            self.schedule,
            mesh=self.mesh,
            ctx=self.context,
            make_reducer=self._make_reducer,
            node=self._node,
            sequence=self._config.sequence,
        )
        self.schedule = self._replica.schedule
        check(self.schedule, rendezvous=self._on_gpu)
        self._agree()  # on the buckets too
        parameters = self._replica.parameters()
        if self._config.zero:
            neighbours = self.mesh.node_replicas(self.rank)
            self._shared = SharedState(parameters, self.context.group(neighbours))
        return parameters

    def updated(self) -> Sequence[Tensor]:
        return super().updated() if self._shared is None else self._shared.pieces

    @property
    def held(self) -> Replica:
        """This rank's share of the model, and what runs it."""
        return self._replica

    def _cut(self, spec: ModelSpec) -> tuple[PipelineSchedule, tuple[Part, ...]]:
        """The lowered schedule, but for buckets, and the model's parts: pure functions of settings and model."""
        config = self._config
        schedule = make_schedule(config.pipeline, config.pp, config.pieces, chunks=config.chunks)
        embedding, head = relative_costs(spec)
        if config.split_head:
            head = 0.0  # shared out over all ranks, whatever else they have
        parts = best_parts(schedule, spec.config.layers, embedding=embedding, head=head)
        costs = stage_costs(parts, embedding=embedding, head=head)
        lowered = lower(schedule, head=config.split_head, costs=costs, rendezvous=self._on_gpu)
        check(lowered, rendezvous=self._on_gpu)
        return lowered, parts

    def _agree(self) -> None:
        """All ranks run lists of one schedule: else they would wait for each other for ever."""
        mine = np.array([self.schedule.digest & (1 << 62) - 1], dtype=np.int64)
        every = np.empty(self.world_size, dtype=np.int64)
        self.context.all_gather(every, mine)
        differ = [rank for rank, digest in enumerate(every) if digest != every[0]]
        if differ:
            raise TrainError(f"rank {self.rank}: ranks {differ} have another pipeline schedule than rank 0")

    def _make_reducer(self, module: nn.Module, replicas: Grouping) -> hybridcomm.Reducer:
        compress = None if self._config.compress == "none" else self._config.compress
        return hybridcomm.Reducer(
            module, ctx=replicas, compress=compress, bucket_cap_mb=self._config.wire.bucket_cap_mb
        )

    @property
    def module(self) -> nn.Module:
        return self._replica.module

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        for reducer in self._reducers():
            reducer.attach(optimizer)
        if self._shared is not None:
            self._shared.attach(optimizer)

    def step(self, batches: Sequence[Packed], scale: float, times: StepTimes) -> float:
        return self._replica.step([batch.to(self._device) for batch in batches], scale, times)

    def optimized(self, begin: float, end: float) -> None:
        self._replica.recorder.add("instructions", "optimizer", begin, end)

    def traces(self) -> list[RankTrace]:
        pipelines = [self.mesh.along("pp", rank) for rank in range(self.world_size)]
        return gather(self.context, self._replica.recorder.steps, pipelines)

    def total_loss(self, loss: float) -> float:
        return super().total_loss(self._replica.loss_of_all(loss))

    def gradient_norm(self) -> Tensor:
        return self._replica.gradient_norm()

    def rollback(self) -> None:
        for reducer in self._reducers():
            reducer.rollback()

    def target_ranks(self, batch: Packed, histories: Sequence[np.ndarray]) -> Tensor:
        return self._replica.target_ranks(batch.to(self._device), histories).cpu()

    def sum(self, values: np.ndarray) -> np.ndarray:
        total = values.copy()
        self._replicas.allreduce(total, op="sum")
        return total

    def sum_of_ranks(self, values: np.ndarray) -> np.ndarray:
        total = values.copy()
        self.context.allreduce(total, op="sum")
        return total

    def share(self, features: Tensor) -> Tensor:
        self.context.broadcast(features, 0)
        return features

    def wire_nbytes(self) -> int:
        return sum(reducer.stats().total_wire_nbytes for reducer in self._reducers())

    def dense_wire_nbytes(self) -> int:
        if self._replicas.rank > 0:
            return 0  # a plan knows what all of its ranks send
        plans = [
            collective_plans.allreduce(self._replicas.topology, layout.numel, dtype=layout.dtype, op="mean")
            for reducer in self._reducers()
            for layout in reducer.layouts
        ]
        return sum(plan.wire_nbytes() for plan in plans)

    def describe(self) -> str:
        lines = []
        if self.mesh.pp * self.mesh.tp > 1:
            lines = [
                self.mesh.table(),
                f"schedule {self.schedule.name}, {self.schedule.microbatches} microbatches",
            ]
            lines += [
                f"stage {stage} on pp {holder}: {part}"
                for stage, (holder, part) in enumerate(zip(self.schedule.placement, self.parts, strict=True))
            ]
            if self._replica.head is not None:
                sizes = self._replica.head.items.sharding.sizes
                lines.append(f"items in shards of {', '.join(map(str, sizes))}, over pp within tp")
        if self.replicas == 1:
            lines.append(
                f"one replica: no gradients are averaged, so --compress {self._config.compress} has no effect"
            )
        lines += [reducer.table() for reducer in self._reducers()]
        if self._shared is not None:
            lines.append(self._shared.describe())
        return "\n".join(lines)

    def close(self) -> None:
        if self._node is not None:
            self._node.close()
        if self._joined:
            if isinstance(self.context, DeviceContext):
                self.context.close()
            hybridcomm.shutdown()

    def _reducers(self) -> list[hybridcomm.Reducer]:
        return self._replica.runtime.all_reducers()


def _join(config: TrainConfig) -> Context | DeviceContext:
    """Meets the other ranks, and with ``--device cuda`` connects this one's GPU to theirs."""
    host = hybridcomm.init(timeout=config.wire.timeout)
    if config.device == "cpu":
        return host
    from hybridcomm.stream_provider import TorchCuda

    return DeviceContext.connect(
        host, TorchCuda(f"cuda:{host.local_rank % max(torch.cuda.device_count(), 1)}")
    )
