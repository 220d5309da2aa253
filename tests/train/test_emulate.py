"""A step whose computation is time: it communicates what a real one does, and its prediction is the simulator's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hybridcomm import collective_plans
from hybridcomm.context import Context
from hybridcomm.probe import Figures
from hybridcomm.reducer import Reducer
from hybridcomm.topology import Link, Topology
from model.parts import split
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.replicas import ITEMS, ThreadReplica, spec
from train.batch import Packed, pack
from train.emulate import Emulation, emulated_table
from train.mesh import Mesh
from train.outcome import StepTimes
from train.pipeline import lower, make_schedule, simulate

COUNT = 3
FREE = Link(alpha=0.0, beta=0.0)


def alike() -> list[Packed]:
    """Microbatches of one size, so that all messages are as large as the largest."""
    dice = np.random.default_rng(1)
    rows = [[dice.integers(0, ITEMS, 8) for _ in range(4)] for _ in range(COUNT)]
    draws = np.arange(4)
    return [pack(users, [dice.integers(0, ITEMS, 8) for _ in users], draws) for users in rows]


def on_mesh(
    topology: Topology,
    body: Callable[[Emulation, ThreadReplica, Context], Any],
    *,
    name: str = "1f1b",
    pp: int = 1,
    tp: int = 1,
    head: bool = False,
    sequence: bool = False,
    compress: str | None = None,
    seconds: float = 1e-4,
) -> list[Any]:
    model = spec(text=False)
    model = replace(model, config=model.config.model_copy(update={"dim": 64, "heads": 2, "hidden": 64}))

    def rank(ctx: Context) -> Any:
        mesh = Mesh.over(ctx.topology, pp=pp, tp=tp)
        node = ctx.connect_node() if tp > 1 else None
        lowered = lower(make_schedule(name, pp, COUNT), head=head)
        replica = ThreadReplica(
            model, split(4, lowered.stages, head=0.0 if head else 1.0), lowered,
            mesh=mesh, ctx=ctx, node=node, sequence=sequence,
            make_reducer=lambda module, group: Reducer(
                module, ctx=group, compress=compress, sync_parameters=False
            ),
        )  # fmt: skip
        try:
            return body(Emulation(seconds, model, replica, ctx, alike()), replica, ctx)
        finally:
            if node is not None:
                node.close()

    with engine_contexts(topology) as contexts:
        return run_ranks(rank, contexts)


MESHES = {
    "dp": ((2, 2), {}),
    "dp, compressed": ((2, 1), {"compress": "topk:0.05"}),
    "pp": ((2, 1), {"pp": 2, "name": "zbv"}),
    "pp, split head": ((2, 1), {"pp": 2, "head": True}),
    "all": ((2, 4), {"pp": 2, "tp": 2, "name": "zbv", "head": True}),
    "tp, tokens split": ((1, 2), {"tp": 2, "sequence": True}),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_as_many_bytes_go_between_nodes_as_in_training(mesh: str) -> None:
    """Buckets and messages of one step; control messages of the engine are what differs, a few dozen bytes each."""

    def body(emulation: Emulation, replica: ThreadReplica, ctx: Context) -> list[int]:
        def emulated() -> None:
            emulation.runtime.step()
            replica.complete(StepTimes())

        sent = []
        for play in (lambda: replica.step(alike()), emulated):
            for _ in range(2):  # connections are made in the first
                ctx.barrier()
                before = ctx.counters()["wire_tx_bytes"]
                play()
                for reducer in replica.runtime.all_reducers():
                    reducer.commit()
                ctx.barrier()
            sent.append(ctx.counters()["wire_tx_bytes"] - before)
        return sent

    topology, options = MESHES[mesh]
    results = on_mesh(Topology.virtual(*topology), body, **options)
    real, emulated = (sum(sent[which] for sent in results) for which in range(2))
    if topology[0] > 1:
        assert real > 4 * 64 * 32  # a microbatch's activations, or more
        assert emulated == pytest.approx(real, rel=0.02)
    else:
        assert real == emulated == 0


@pytest.mark.parametrize("sequence", [False, True])
def test_layers_wait_as_often_as_in_training(sequence: bool) -> None:
    """On a stage of nothing but layers."""

    def body(emulation: Emulation, replica: ThreadReplica, ctx: Context) -> tuple[Counter[str], Counter[str]]:
        found = []
        for play in (lambda: replica.runtime.step(alike()), emulation.runtime.step):
            replica.recorder.begin()
            play()
            found.append(Counter(s.name for s in replica.recorder.steps[-1] if s.track == "layers"))
        return found[0], found[1]

    results = on_mesh(Topology.virtual(3, 2), body, pp=3, tp=2, sequence=sequence)
    for real, emulated in results[2:4]:
        assert real == emulated
        assert real.total() > 0


def figures(topology: Topology, near: Link = FREE, far: Link = FREE) -> Figures:
    return Figures(topology=replace(topology, intra_node=near, inter_node=far))


@pytest.mark.parametrize(("name", "pp"), [("1f1b", 2), ("zbv", 3)])
def test_with_free_links_the_prediction_is_the_schedules(name: str, pp: int) -> None:
    def body(emulation: Emulation, replica: ThreadReplica, ctx: Context) -> tuple[float, float]:
        wanted = simulate(emulation.schedule, emulation.costs).step_time
        return emulation._predicted(figures(ctx.topology)), wanted

    for found, wanted in on_mesh(Topology.virtual(pp, 1), body, name=name, pp=pp):
        assert found == pytest.approx(wanted)


def test_a_slow_link_costs_what_plans_cost() -> None:
    """Two replicas on two nodes: computation, then one bucket whose all-reduce nothing hides."""
    far = Link(alpha=1e-3, beta=1e-6)

    def body(emulation: Emulation, replica: ThreadReplica, ctx: Context) -> tuple[float, float]:
        slow = figures(ctx.topology, far=far)
        buckets = [layout.numel for r in replica.runtime.all_reducers() for layout in r.layouts]
        plans = [collective_plans.allreduce(ctx.topology, numel, op="mean") for numel in buckets]
        work = sum(3 * emulation.seconds * emulation._units(0) * n / 1000 for n in emulation.shape.tokens)
        return emulation._predicted(slow), work + sum(plan.cost(slow.topology) for plan in plans)

    for found, wanted in on_mesh(Topology.virtual(2, 1), body):
        assert found == pytest.approx(wanted)


def test_a_run_tells_what_was_measured_beside_what_was_predicted() -> None:
    results = on_mesh(
        Topology.virtual(2, 2), lambda emulation, *_: emulation.run(2), pp=2, tp=2, head=True, seconds=2e-3
    )
    assert all(each == results[0] for each in results)
    (found,) = {tuple(sorted(each.items())) for each in results}
    values = dict(found)
    assert 0 < values["utilisation"] <= 1
    assert 0 < values["predicted_utilisation"] <= 1
    assert 0 < values["communication_share"] < 1
    assert emulated_table(values, "a mesh").title == "emulated: a mesh"
