"""Which rank stands on which node: frozen data that every rank holds in the same form.

"Node" is what the topology says, never a device count: four processes on a laptop can be two nodes of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hybridcomm.errors import TopologyError

__all__ = ["Link", "Topology"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One link class: ``alpha`` is latency in s, ``beta`` the inverse bandwidth in s/byte; None = not
    measured.
    """

    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None and not 0.0 <= value < float("inf"):
                raise TopologyError(f"link {name}={value!r}: must be None or a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks laid out on nodes.

    ``nodes[n]`` holds the global ranks of node ``n``, ascending; nodes are ordered by their lowest rank;
    ranks ``0 .. world_size - 1`` appear once each. Raises :class:`TopologyError` otherwise.
    """

    nodes: tuple[tuple[int, ...], ...]
    intra_node: Link = Link()
    inter_node: Link = Link()

    def __post_init__(self) -> None:
        ranks = [rank for node in self.nodes for rank in node]
        if not ranks or any(len(node) == 0 for node in self.nodes):
            raise TopologyError(f"nodes={self.nodes}: every node needs at least one rank")
        if sorted(ranks) != list(range(len(ranks))):
            raise TopologyError(
                f"nodes={self.nodes}: ranks 0..{len(ranks) - 1} must appear exactly once each"
            )
        if any(list(node) != sorted(node) for node in self.nodes):
            raise TopologyError(f"nodes={self.nodes}: the ranks of a node must ascend")
        if [node[0] for node in self.nodes] != sorted(node[0] for node in self.nodes):
            raise TopologyError(f"nodes={self.nodes}: order nodes by their lowest rank")

    @classmethod
    def virtual(cls, nodes: int, per_node: int) -> Topology:
        """``nodes`` nodes of ``per_node`` ranks each, ranks numbered node by node."""
        if nodes < 1 or per_node < 1:
            raise TopologyError(f"virtual({nodes}, {per_node}): both must be >= 1")
        return cls.from_sizes([per_node] * nodes)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Topology:
        """Nodes of the given sizes, ranks numbered node by node: ``[3, 2]`` is the topology "3+2"."""
        out: list[tuple[int, ...]] = []
        begin = 0
        for size in sizes:
            out.append(tuple(range(begin, begin + size)))
            begin += size
        return cls(nodes=tuple(out))

    @classmethod
    def even(cls, nodes: int, world_size: int) -> Topology:
        """``nodes`` nodes whose sizes differ by one at most: 5 ranks on 2 nodes are "3+2"."""
        if not 1 <= nodes <= world_size:
            raise TopologyError(f"even({nodes}, {world_size}): need 1 <= nodes <= ranks")
        return cls.from_sizes([world_size // nodes + (node < world_size % nodes) for node in range(nodes)])

    @classmethod
    def from_hosts(cls, hosts: Sequence[Hashable]) -> Topology:
        """Groups ranks by host: ``hosts[rank]`` is any value that is equal for ranks of one node."""
        groups: dict[Hashable, list[int]] = {}
        for rank, host in enumerate(hosts):
            groups.setdefault(host, []).append(rank)
        return cls(nodes=tuple(tuple(group) for group in groups.values()))

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads the form that ``str(topology)`` writes, such as ``0,1|2,3``."""
        layout, *links = text.split()
        fields: dict[str, Link] = {}
        try:
            nodes = tuple(tuple(int(rank) for rank in node.split(",")) for node in layout.split("|"))
            for link in links:
                name, _, value = link.partition("=")
                alpha, _, beta = value.partition(":")
                fields[name] = Link(alpha=_parse_number(alpha), beta=_parse_number(beta))
            return cls(nodes=nodes, **fields)
        except (ValueError, TypeError) as error:
            raise TopologyError(
                f"topology text {text!r}: expected a form like '0,1|2,3' ({error})"
            ) from error

    def __str__(self) -> str:
        text = "|".join(",".join(map(str, node)) for node in self.nodes)
        for name, link in (("intra_node", self.intra_node), ("inter_node", self.inter_node)):
            if link != Link():
                text += f" {name}={_number(link.alpha)}:{_number(link.beta)}"
        return text

    @cached_property
    def world_size(self) -> int:
        return sum(len(node) for node in self.nodes)

    @cached_property
    def max_local_size(self) -> int:
        return max(len(node) for node in self.nodes)

    @property
    def K(self) -> int:  # noqa: N802 (the design's letter)
        """The number of shards of a bucket: the size of the largest node."""
        return self.max_local_size

    @cached_property
    def _places(self) -> tuple[tuple[int, int], ...]:
        places = [(0, 0)] * self.world_size
        for node_rank, node in enumerate(self.nodes):
            for local_rank, rank in enumerate(node):
                places[rank] = (node_rank, local_rank)
        return tuple(places)

    def _place(self, rank: int) -> tuple[int, int]:
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank} is not in 0..{self.world_size - 1}")
        return self._places[rank]

    def node_of(self, rank: int) -> int:
        """The node_rank of the node that ``rank`` stands on."""
        return self._place(rank)[0]

    def local_rank(self, rank: int) -> int:
        """The place of ``rank`` within its node, from 0."""
        return self._place(rank)[1]

    def owner(self, node: int, shard: int) -> int:
        """The rank that reduces, compresses and exchanges ``shard`` for ``node``."""
        ranks = self.nodes[node]
        return ranks[shard % len(ranks)]

    def owners(self, shard: int) -> tuple[int, ...]:
        """The owners of ``shard``, one per node, in node order."""
        return tuple(node[shard % len(node)] for node in self.nodes)

    def leaders(self, rank: int) -> tuple[int, ...]:
        """One rank per node, in node order, that stands for ``rank``'s data; at home ``rank`` itself."""
        return self.owners(self.local_rank(rank))

    def without_links(self) -> Topology:
        """The same layout with no measured numbers; plans hold this form."""
        return replace(self, intra_node=Link(), inter_node=Link())

    def digest(self) -> int:
        """64-bit digest of layout and link data."""
        return int.from_bytes(hashlib.blake2b(str(self).encode(), digest_size=8).digest(), "little")


def _number(value: float | None) -> str:
    return "-" if value is None else repr(value)


def _parse_number(text: str) -> float | None:
    return None if text == "-" else float(text)
