"""Plans of every kind, and how to spoil them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hybridcomm import collective_plans as build
from hybridcomm.plan import Plan, Step
from hybridcomm.topology import Topology
from tests.hybridcomm.strategies import NAMED, gtopk, topk, uneven

__all__ = [
    "COMPRESSED",
    "both_links",
    "changed",
    "compressed",
    "dense",
    "find",
    "others",
    "renumbered",
    "swapped",
    "two_stage",
    "whole",
    "whole_both_links",
    "whole_slices",
]


def renumbered(plan: Plan, steps: Sequence[Step]) -> Plan:
    """The plan with other steps: ids are given anew, waits for dropped steps go."""
    ids = {step.id: place for place, step in enumerate(steps)}
    return dataclasses.replace(
        plan,
        steps=tuple(
            dataclasses.replace(
                step, id=place, after=tuple(sorted(ids[before] for before in step.after if before in ids))
            )
            for place, step in enumerate(steps)
        ),
    )


def changed(plan: Plan, place: int, **fields: object) -> Plan:
    steps = list(plan.steps)
    steps[place] = dataclasses.replace(steps[place], **fields)  # type: ignore[arg-type]
    return dataclasses.replace(plan, steps=tuple(steps))


def dense() -> Plan:
    return build.allreduce(Topology.from_sizes([2, 2, 1]), 9000, op="mean", chunk_elems=1024)


def swapped() -> Plan:
    """Of two nodes: their owners send each other all they have."""
    return build.allreduce(NAMED["3+2"], 9000, op="mean", chunk_elems=1024)


def compressed() -> Plan:
    return build.allreduce(NAMED["3+2"], 9000, op="mean", compressor=topk(), chunk_elems=1024)


def whole() -> Plan:
    return build.allreduce(NAMED["3+2"], 9000, op="mean", compressor=gtopk(), chunk_elems=1024)


def two_stage() -> Plan:
    topology = Topology.from_sizes([3, 2, 1])
    return build.allreduce(
        topology, 5000, op="mean", compressor=topk(), exchange="two_stage", chunk_elems=512
    )


def whole_slices() -> Plan:
    topology = Topology.from_sizes([3, 2, 1])
    return build.allreduce(
        topology, 5000, op="mean", compressor=gtopk(), exchange="two_stage", chunk_elems=256
    )


def both_links() -> Plan:
    topology = Topology.from_sizes([3, 2, 1])
    return build.allreduce(topology, 5000, op="mean", compressor=topk(), intra=topk(), chunk_elems=512)


def whole_both_links() -> Plan:
    topology = Topology.from_sizes([3, 2, 1])
    return build.allreduce(topology, 5000, op="mean", compressor=gtopk(), intra=topk(), chunk_elems=512)


COMPRESSED = [compressed, whole, two_stage, whole_slices, both_links, whole_both_links]


def others() -> list[Plan]:
    topology = NAMED["3+2"]
    return [
        build.broadcast(Topology.from_sizes([2, 2, 1]), 20_000, root=3, chunk_elems=4096),
        build.broadcast(topology, 9000, root=4, chunk_elems=1024),
        build.all_gather(topology, 9000, chunk_elems=1024),
        build.reduce_scatter(topology, 9000, op="mean", chunk_elems=1024),
        build.reduce(topology, 9000, root=1, op="mean", chunk_elems=1024),
        build.reduce(topology, 9000, root=4, chunk_elems=1024),
        build.gather(topology, 9000, root=1, chunk_elems=1024),
        build.scatter(topology, 9000, root=4, chunk_elems=1024),
        build.all_to_all(topology, uneven(5, 2000), chunk_elems=1024),
        build.monitored_barrier(topology),
    ]


def find(plan: Plan, op: str, nth: int = 0) -> int:
    return [step.id for step in plan.steps if step.op == op][nth]
