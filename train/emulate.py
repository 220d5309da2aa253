"""``--emulate SECONDS``: a training step whose computation is time that passes, and whose communication is all real.

1. costs       a layer's F, I and W take SECONDS each for 1,000 tokens on one rank; embedding and head what they cost
               beside a layer (`train.stage_costs`); ranks that share layers share the time
2. measured    pipeline messages, layers' collectives, a split head's values and buckets of real parameters travel as in
               training, on whatever network the ranks are on; the first step's batches, again and again
3. predicted   the same lists and costs in the simulator, with measured links

So meshes can be studied with more ranks than cores. What comes of it is *emulated*, and called so wherever it is told.
Left out of the prediction: that pipeline messages and buckets take the same way out of a node at the same time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from hybridcomm import collective_plans
from hybridcomm.compress import Compressor, resolve
from hybridcomm.probe import Figures, probe
from hybridcomm.topology import Topology
from model.tensor_parallel import COPY, GATHER, SCATTER, TOTAL
from train.batch import Packed
from train.breakdown import breakdown
from train.mesh import Mesh
from train.outcome import StepTimes
from train.pipeline import Costs, HeadCost, Instruction, StageCost, simulate
from train.pipeline.emulated import EmulatedRuntime
from train.profile import gather
from train.replica import ModelSpec, Replica
from train.stage_costs import relative_costs

__all__ = ["Emulation", "emulated_table"]

_WARMUP = 2
_GRADIENT = 1e-3  # what all parameters get, whatever it is


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the costs of a microbatch go by: tokens of each, the most predictions of one."""

    tokens: tuple[int, ...]
    predictions: int

    @classmethod
    def of(cls, batches: Sequence[Packed]) -> Shape:
        return cls(
            tokens=tuple(batch.items.numel() for batch in batches),
            predictions=max(1, *(len(batch.picks) for batch in batches)),
        )


class Emulation:
    """One rank of it; all ranks make one, and call it alike. ``seconds``: of a layer's F per 1,000 tokens."""

    def __init__(
        self, seconds: float, spec: ModelSpec, replica: Replica, ctx: Any, batches: Sequence[Packed]
    ) -> None:
        self.seconds, self.spec, self.replica, self.ctx = seconds, spec, replica, ctx
        self.mesh, self.schedule, self.shape = replica.mesh, replica.schedule, Shape.of(batches)
        self.costs = self._costs()
        self._made = {parameter: torch.full_like(parameter, _GRADIENT) for parameter in replica.parameters()}
        for parameter, gradient in self._made.items():
            parameter.grad = gradient
        runtime = replica.runtime
        self.runtime = EmulatedRuntime(
            self.schedule, replica.place.pp, self.costs,
            group=replica.pipeline, exchange=runtime.exchange, buckets=runtime.buckets,
            edges=self._edges if self.mesh.tp > 1 else None,
        )  # fmt: skip
        self.runtime.recorder, self.runtime.layers = runtime.recorder, runtime.layers

    def run(self, steps: int) -> dict[str, float]:
        """Plays ``steps`` steps; the figures, equal on all ranks."""
        figures = probe(self.ctx, codecs=self._codecs(), budget=0.5)
        times, work = [], 0.0
        for _ in range(_WARMUP + steps):
            self.ctx.barrier()
            begin = time.perf_counter()
            self.replica.recorder.begin()
            work = self.runtime.step().work
            self.replica.complete(StepTimes())
            slowest = np.array([time.perf_counter() - begin])
            self.ctx.allreduce(slowest, op="max")
            times.append(float(slowest[0]))
            for reducer in self.runtime.buckets.all():
                reducer.commit()
            for gradient in self._made.values():
                gradient.fill_(_GRADIENT)
        step_time = statistics.median(times[_WARMUP:])
        total = np.array([work])
        self.ctx.allreduce(total, op="sum")
        predicted = self._predicted(figures)
        return {
            "step_seconds": step_time,
            "predicted_step_seconds": predicted,
            "utilisation": float(total[0]) / self.ctx.world_size / step_time,
            "predicted_utilisation": float(total[0]) / self.ctx.world_size / predicted,
            **self._shares(),
        }

    # -- costs -----------------------------------------------------------------------------------------------

    def _units(self, stage: int) -> float:
        """A stage's work, in layers."""
        embedding, head = relative_costs(self.spec)
        part = self.replica.parts[stage]
        scores = part.scores and not self.schedule.split_head
        return len(part.layers) + embedding * part.embeds + head * scores

    def _costs(self) -> Costs:
        """Of computation alone; messages as large as the largest microbatch makes them."""
        mesh, dim, item = self.mesh, self.spec.config.dim, self.spec.dtype.itemsize
        share = mesh.tp if self.replica.tp.sequence else 1
        nbytes = item * dim * -(-max(self.shape.tokens) // share)
        stages = []
        for stage in range(self.schedule.stages):
            each = self.seconds * self._units(stage) / mesh.tp
            stages.append(StageCost(forward=each, input_grad=each, weight_grad=each, nbytes=nbytes))
        heads: tuple[HeadCost, ...] = ()
        if self.schedule.split_head:
            shards = mesh.tp * mesh.pp
            half = 1.5 * self.seconds * relative_costs(self.spec)[1] / shards
            hidden = item * dim * self.shape.predictions
            cost = HeadCost(
                score=half, weight_grad=half, hidden_nbytes=hidden,
                part_nbytes=hidden + hidden // shards,  # and the rows of a shard's own targets
                statistics_nbytes=3 * item * self.shape.predictions,
            )  # fmt: skip
            heads = (cost,) * mesh.pp
        return Costs(stages=tuple(stages), heads=heads, sizes=tuple(n / 1000 for n in self.shape.tokens))

    def _edges(self, entry: Instruction) -> list[Callable[[], object]]:
        """What the layers of a stage wait for: the pairs of `model.tensor_parallel`, at each half of a layer."""
        if entry.op in ("W", "HEAD_S", "HEAD_T"):
            return []
        tp, part, tokens = (
            self.replica.tp,
            self.replica.parts[entry.stage],
            self.shape.tokens[entry.microbatch],
        )
        whole = torch.zeros(tokens, self.spec.config.dim, dtype=self.spec.dtype)
        own = whole[: tp.sizes(tokens)[tp.rank]]
        first, last = (GATHER, SCATTER) if tp.sequence else (COPY, TOTAL)
        if entry.op == "F":
            half = [
                lambda: first.forward(tp, own, tokens, False),
                lambda: last.forward(tp, whole, tokens, False),
            ]
        else:
            half = [
                lambda: last.backward(tp, own, tokens, False),
                lambda: first.backward(tp, whole, tokens, False),
            ]
            if tp.sequence:  # what a column layer's weights see is gathered once more
                half.append(lambda: first.forward(tp, own, tokens, False))
        if not tp.sequence:
            half = half[1:]  # the other edge does nothing
        return half * 2 * len(part.layers)

    # -- the prediction --------------------------------------------------------------------------------------

    def _codecs(self) -> list[str]:
        """By all ranks' reducers: probing is a collective call."""
        mine = {
            str(codec)
            for r in self.runtime.buckets.all()
            for s in r.schedules
            if (codec := s.at(0)) is not None
        }
        text = np.zeros(256, dtype=np.uint8)
        encoded = np.frombuffer(" ".join(sorted(mine)).encode(), dtype=np.uint8)
        text[: len(encoded)] = encoded
        every = np.empty(256 * self.ctx.world_size, dtype=np.uint8)
        self.ctx.all_gather_into_tensor(every, text)
        rows = every.reshape(-1, 256)
        return sorted({word for row in rows for word in row.tobytes().rstrip(b"\0").decode().split()})

    def _predicted(self, figures: Figures) -> float:
        """s of a step: the slowest replica's, as simulated."""
        mesh, links, dim = self.mesh, figures.topology, self.spec.config.dim
        reduce, ready = self._reduce_seconds(figures), self._ready()
        layers = 0.0
        if mesh.tp > 1:  # per 1,000 tokens, an all-reduce; or a gather and a scatter, half of one each
            shares = _linked(Topology.virtual(1, mesh.tp), links)
            layers = collective_plans.allreduce(shares.without_links(), 1000 * dim).cost(shares)
        stages = []
        for stage, cost in enumerate(self.costs.stages):
            count = 2 * len(self.replica.parts[stage].layers)
            buckets = self.schedule.buckets[stage] if self.schedule.buckets else 0
            backward = count * layers * (1.5 if self.replica.tp.sequence else 1.0)
            stages.append(
                replace(
                    cost,
                    forward=cost.forward + count * layers,
                    input_grad=cost.input_grad + backward,
                    reduce=tuple(reduce[stage][:buckets]),
                    ready=tuple(ready[stage][:buckets]),
                )
            )
        heads = self.costs.heads
        if heads and self.schedule.buckets:
            at, count = self.schedule.head, self.schedule.buckets[self.schedule.head]
            sums, parts = tuple(reduce[at][:count]), tuple(ready[at][:count])
            heads = tuple(replace(head, reduce=sums, ready=parts) for head in heads)
        ways = _linked(_of_ranks(mesh, mesh.along("pp", self.ctx.rank)), links, crowd=self._crowd("dp"))
        timeline = simulate(
            self.schedule,
            replace(self.costs, stages=tuple(stages), heads=heads),
            ways if mesh.pp > 1 else None,
        )
        out = np.array([timeline.step_time + self._copies_seconds(figures)])
        self.ctx.allreduce(out, op="max")
        return float(out[0])

    def _reduce_seconds(self, figures: Figures) -> np.ndarray:
        """[stages (and head), most buckets]: what each bucket's all-reduce takes where it takes longest."""
        out = np.zeros((self.schedule.stages + 1, max(self.schedule.buckets or (1,)) or 1))
        buckets = self.runtime.buckets
        for stage in range(len(out)):
            place = 0
            for reducer in buckets.of_stage(stage):
                group = _linked(reducer.ctx.topology, figures.topology, crowd=self._crowd("tp"))
                for layout, schedule, way in zip(
                    reducer.layouts, reducer.schedules, reducer.exchanges, strict=True
                ):
                    out[stage, place] = _allreduce_seconds(group, layout.numel, schedule.at(0), way, figures)
                    place += 1
        self.ctx.allreduce(out, op="max")
        return out

    def _ready(self) -> np.ndarray:
        """[stages (and head), most buckets]: by which part of its stage's last computation a bucket is complete."""
        out = np.zeros((self.schedule.stages + 1, max(self.schedule.buckets or (1,)) or 1))
        buckets = self.runtime.buckets
        for stage, row in enumerate(out):
            parts: list[float] = []
            for reducer in buckets.of_stage(stage):
                sizes = np.array([layout.numel for layout in reducer.layouts])
                whole = reducer is buckets.shared  # the shared table's gradient is complete at the end
                parts += [1.0] * len(sizes) if whole else list(np.cumsum(sizes) / sizes.sum())
            row[: len(parts)] = parts
        self.ctx.allreduce(out, op="max")
        return out

    def _copies_seconds(self, figures: Figures) -> float:
        """The gradient of a tied table that two stages have."""
        first, last = self.schedule.placement[0], self.schedule.placement[-1]
        if not self.spec.config.tied or first == last:
            return 0.0
        ranks = self.mesh.along("pp", self.ctx.rank)
        pair = _linked(
            _of_ranks(self.mesh, (ranks[first], ranks[last])), figures.topology, crowd=self._crowd("dp")
        )
        numel = self.spec.num_items * self.spec.config.dim // self.mesh.tp
        return _allreduce_seconds(pair, numel, None, "auto", figures)

    def _crowd(self, axis: str) -> int:
        """How many groups beside each other leave a node at the same time: of tp ranks, or of replicas there too."""
        mesh = self.mesh
        node = mesh.topology.nodes[mesh.topology.node_of(self.ctx.rank)]
        mine = mesh.at(self.ctx.rank)
        same = [mesh.at(rank) for rank in node if mesh.at(rank).pp == mine.pp]
        return len(same) if axis == "dp" else len({place.tp for place in same})

    def _shares(self) -> dict[str, float]:
        """Means over ranks and the latest steps: communication that was waited for, and the bubble, of the step."""
        pipelines = [self.mesh.along("pp", rank) for rank in range(self.ctx.world_size)]
        traces = gather(self.ctx, self.replica.recorder.steps, pipelines)
        out = np.zeros(2)
        if traces:
            rows = [row for step in range(len(traces[0].steps)) for row in breakdown(traces, step)]
            waited = [row["exposed_tp"] + row["exposed_pp"] + row["exposed_dp"] for row in rows]
            whole = sum(row["total"] for row in rows)
            out[:] = sum(waited) / whole, sum(row["bubble"] for row in rows) / whole
        self.ctx.broadcast(out, 0)
        return {"communication_share": float(out[0]), "bubble_share": float(out[1])}


def _of_ranks(mesh: Mesh, ranks: Sequence[int]) -> Topology:
    return Topology.from_hosts([mesh.topology.node_of(rank) for rank in ranks])


def _linked(topology: Topology, links: Topology, crowd: int = 1) -> Topology:
    """With measured links; ``crowd`` groups share the way between nodes."""
    far = links.inter_node
    if far.beta is not None:
        far = replace(far, beta=crowd * far.beta)
    return replace(topology, intra_node=links.intra_node, inter_node=far)


def _allreduce_seconds(
    links: Topology, numel: int, codec: Compressor | None, exchange: str, figures: Figures
) -> float:
    codec = codec if len(links.nodes) > 1 else None
    if codec is None:
        plan = collective_plans.allreduce(links.without_links(), numel, op="mean")
    else:
        plan = collective_plans.allreduce(
            links.without_links(), numel, op="mean", compressor=resolve(codec), exchange=exchange
        )
    return plan.cost(links, kernels=figures.kernels)


def emulated_table(figures: dict[str, float], what: str) -> Table:
    """The figures for people; the title says what they are."""
    table = Table(title=f"emulated: {what}", title_justify="left")
    for name in ("figure", "measured", "predicted"):
        table.add_column(name)
    table.add_row(
        "iteration",
        f"{1e3 * figures['step_seconds']:.1f} ms",
        f"{1e3 * figures['predicted_step_seconds']:.1f} ms",
    )
    table.add_row(
        "utilisation",
        f"{100 * figures['utilisation']:.1f} %",
        f"{100 * figures['predicted_utilisation']:.1f} %",
    )
    table.add_row("communication waited for", f"{100 * figures['communication_share']:.1f} %", "")
    table.add_row("bubble", f"{100 * figures['bubble_share']:.1f} %", "")
    table.caption = "computation is time that passes; all communication is real"
    return table
