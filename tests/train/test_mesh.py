"""Every rank has one place; groups along the axes partition the ranks; tp never leaves a node; refusals explain."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.topology import Topology
from train.errors import ConfigError
from train.mesh import AXES, Mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    tp, groups = draw(st.integers(1, 4)), draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    total = sum(groups)
    pp = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    topology = Topology.from_sizes([tp * n for n in groups])
    return Mesh.over(topology, pp=pp, tp=tp, outer=draw(st.sampled_from(["dp", "pp"])))


@given(mesh=meshes())
def test_every_rank_has_one_place(mesh: Mesh) -> None:
    world = range(mesh.topology.world_size)
    places = [mesh.at(rank) for rank in world]
    assert len(set(places)) == len(places) == mesh.dp * mesh.pp * mesh.tp
    assert [mesh.rank(place) for place in places] == list(world)
    for axis in AXES:
        groups = {mesh.along(axis, rank) for rank in world}
        assert sorted(rank for group in groups for rank in group) == list(world)
        for group in groups:
            assert [getattr(mesh.at(rank), axis) for rank in group] == list(range(mesh.size(axis)))
            assert len({tuple(getattr(mesh.at(r), a) for a in AXES if a != axis) for r in group}) == 1
    for rank in world:
        assert len({mesh.topology.node_of(other) for other in mesh.along("tp", rank)}) == 1


def test_nodes_need_not_hold_neighbouring_ranks() -> None:
    mesh = Mesh.over(Topology(nodes=((0, 2), (1, 3))), tp=2)
    assert {mesh.along("tp", rank) for rank in range(4)} == {(0, 2), (1, 3)}


@pytest.mark.parametrize(("outer", "dp", "pp"), [("pp", (0, 2), (0, 4)), ("dp", (0, 4), (0, 2))])
def test_the_outer_axis_spans_the_nodes(outer: str, dp: tuple[int, ...], pp: tuple[int, ...]) -> None:
    mesh = Mesh.over(Topology.virtual(2, 4), pp=2, tp=2, outer=outer)  # type: ignore[arg-type]
    assert (mesh.along("dp", 0), mesh.along("pp", 0), mesh.along("tp", 0)) == (dp, pp, (0, 1))
    text = mesh.table()
    assert re.search(r"tp: 2 ranks, inside a node", text)
    assert re.search(rf"{outer}: 2 ranks, over 2 nodes", text)
    assert len(re.findall(r"^ +\d+ +\d+ ", text, re.MULTILINE)) == 8


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([4], {"pp": 3}, "4 ranks are no multiple of 3; tp . pp may be 1, 2, 4"),
        ([3, 2], {"tp": 5}, "node 0 has 3 ranks, which 5 does not divide.*--tp may be 1 on"),
        ([4, 4], {"tp": 8}, "would be shared across nodes; --tp may be 1, 2, 4 on"),
        ([4], {"pp": 0}, "no multiple of 0"),
    ],
)
def test_what_cannot_be_says_what_can(sizes: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mesh.over(Topology.from_sizes(sizes), **options)


def test_the_product_must_be_the_world() -> None:
    for dp, pp, tp in product((1, 2), repeat=3):
        if dp * pp * tp != 4:
            with pytest.raises(ConfigError, match="their product must be 4"):
                Mesh(topology=Topology.virtual(1, 4), dp=dp, pp=pp, tp=tp)
