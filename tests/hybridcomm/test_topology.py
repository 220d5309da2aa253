from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.errors import TopologyError
from hybridcomm.topology import Link, Topology

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(sizes=SIZES)
def test_owners_spread_shards_over_each_node(sizes: list[int]) -> None:
    topology = Topology.from_sizes(sizes)
    assert max(sizes) == topology.K == topology.max_local_size
    assert topology.world_size == sum(sizes)
    for node, ranks in enumerate(topology.nodes):
        owned = [topology.owner(node, shard) for shard in range(topology.K)]
        assert set(owned) == set(ranks)
        counts = [owned.count(rank) for rank in ranks]
        assert max(counts) - min(counts) <= 1
        for local, rank in enumerate(ranks):
            assert (topology.node_of(rank), topology.local_rank(rank)) == (node, local)
            assert topology.leaders(rank)[node] == rank


@given(sizes=SIZES, alpha=st.none() | st.floats(0, 1), beta=st.none() | st.floats(0, 1))
def test_text_round_trips(sizes: list[int], alpha: float | None, beta: float | None) -> None:
    topology = Topology(nodes=Topology.from_sizes(sizes).nodes, inter_node=Link(alpha=alpha, beta=beta))
    assert Topology.parse(str(topology)) == topology
    assert topology.without_links() == Topology.from_sizes(sizes)


def test_from_hosts_groups_ranks_that_are_not_contiguous() -> None:
    assert Topology.from_hosts(["a", "b", "a", "c", "b"]).nodes == ((0, 2), (1, 4), (3,))
    assert Topology.virtual(2, 2).nodes == ((0, 1), (2, 3))


def test_digest_tells_layouts_and_links_apart() -> None:
    layouts = [
        Topology.from_sizes(s) for s in ([4], [2, 2], [3, 1], [1, 3], [2, 1, 1], [1, 1, 2], [1, 1, 1, 1])
    ]
    layouts.append(Topology(nodes=((0, 2), (1, 3))))
    layouts.append(Topology(nodes=((0, 1), (2, 3)), inter_node=Link(beta=1e-9)))
    layouts.append(Topology(nodes=((0, 1), (2, 3)), intra_node=Link(beta=1e-9)))
    assert len({layout.digest() for layout in layouts}) == len(layouts)
    assert Topology.virtual(2, 2).digest() == Topology.from_sizes([2, 2]).digest()


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        ((),),
        ((0, 1), ()),
        ((1, 0),),
        ((0, 0),),
        ((0, 2),),
        ((1, 2), (0, 3)),
        ((0, 1), (1, 2)),
        ((-1, 0),),
    ],
)
def test_layouts_that_are_none_are_refused(nodes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(TopologyError):
        Topology(nodes=nodes)


def test_bad_requests_are_named() -> None:
    with pytest.raises(TopologyError, match=r"virtual\(0, 2\)"):
        Topology.virtual(0, 2)
    with pytest.raises(TopologyError, match=r"rank 4 is not in 0\.\.3"):
        Topology.virtual(2, 2).node_of(4)
    with pytest.raises(TopologyError, match="expected a form like"):
        Topology.parse("0,1|x")
    with pytest.raises(TopologyError, match="alpha"):
        Link(alpha=-1.0)
