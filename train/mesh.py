"""The mesh: which rank has which place along the axes dp (replicas), pp (pipeline stages) and tp (shares of a layer).

A pure function of the topology and three sizes. Ranks are taken node by node. tp varies fastest, inside a node: its
collectives stand between two layers. Then comes the axis that is not ``outer``, and the outer one spans the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from hybridcomm.groups import Group, Grouping
from hybridcomm.topology import Topology
from train.errors import ConfigError

__all__ = ["AXES", "Axis", "Coordinates", "Mesh"]

Axis = Literal["dp", "pp", "tp"]
AXES: tuple[Axis, ...] = ("dp", "pp", "tp")


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """A rank's place along each axis."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """``dp`` x ``pp`` x ``tp`` ranks on ``topology``; ``outer`` is the axis whose neighbours are farthest apart.

    Raises `ConfigError`, which says what would do, where the sizes do not make up the job or a tensor-parallel group
    would span nodes.
    """

    topology: Topology
    dp: int = 1
    pp: int = 1
    tp: int = 1
    outer: Literal["dp", "pp"] = "pp"

    @classmethod
    def over(cls, topology: Topology, *, pp: int = 1, tp: int = 1, outer: Literal["dp", "pp"] = "pp") -> Mesh:
        """All ranks of ``topology``, with as many replicas as ``pp`` and ``tp`` leave."""
        world = topology.world_size
        if min(pp, tp) < 1 or world % (pp * tp):
            raise ConfigError(
                f"--tp {tp} --pp {pp}: {world} ranks are no multiple of {pp * tp}; "
                f"tp * pp may be {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
            )
        return cls(topology=topology, dp=world // (pp * tp), pp=pp, tp=tp, outer=outer)

    def __post_init__(self) -> None:
        sizes, world = {axis: self.size(axis) for axis in AXES}, self.topology.world_size
        if min(sizes.values()) < 1 or prod(sizes.values()) != world:
            raise ConfigError(
                f"a mesh of {' x '.join(f'{axis} {size}' for axis, size in sizes.items())} has "
                f"{prod(sizes.values())} places, the job {world} ranks: their product must be {world}"
            )
        for number, node in enumerate(self.topology.nodes):
            if len(node) % self.tp:
                fits = [
                    n for n in range(1, world + 1) if all(len(each) % n == 0 for each in self.topology.nodes)
                ]
                raise ConfigError(
                    f"--tp {self.tp}: node {number} has {len(node)} ranks, which {self.tp} does not divide, so a layer "
                    f"would be shared across nodes; --tp may be {', '.join(map(str, fits))} on this topology"
                )

    def size(self, axis: Axis) -> int:
        return {"dp": self.dp, "pp": self.pp, "tp": self.tp}[axis]

    def at(self, rank: int) -> Coordinates:
        """The place of ``rank``."""
        place = self._places().index(rank)
        above, tp = divmod(place, self.tp)
        outer, inner = divmod(above, self.dp if self.outer == "pp" else self.pp)
        dp, pp = (inner, outer) if self.outer == "pp" else (outer, inner)
        return Coordinates(dp=dp, pp=pp, tp=tp)

    def rank(self, coordinates: Coordinates) -> int:
        """Who has this place."""
        dp, pp = coordinates.dp, coordinates.pp
        above = pp * self.dp + dp if self.outer == "pp" else dp * self.pp + pp
        return self._places()[above * self.tp + coordinates.tp]

    def along(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` in their place along ``axis`` alone, in the order of that place."""
        mine = self.at(rank)
        places = {"dp": mine.dp, "pp": mine.pp, "tp": mine.tp}
        return tuple(self.rank(Coordinates(**{**places, axis: place})) for place in range(self.size(axis)))

    def node_replicas(self, rank: int) -> tuple[int, ...]:
        """The part of the dp axis of ``rank`` that lies in its node."""
        node = self.topology.node_of(rank)
        return tuple(other for other in self.along("dp", rank) if self.topology.node_of(other) == node)

    def check_shared_state(self) -> None:
        """Raises `ConfigError` where no node has two ranks with the same parameters, so that none can share state."""
        if all(len(self.node_replicas(rank)) == 1 for rank in range(self.topology.world_size)):
            outer = (
                ""
                if self.dp == 1 or self.outer == "pp"
                else ", or --outer pp, which puts replicas side by side"
            )
            raise ConfigError(
                f"--zero 1 shares the optimizer's state out among a node's replicas: with dp {self.dp}, pp {self.pp}, "
                f"tp {self.tp} on {len(self.topology.nodes)} nodes none has two of one share of the model; leave it "
                f"out{outer}"
            )

    def replica(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold one copy of the model together with ``rank``."""
        dp = self.at(rank).dp
        return tuple(other for other in self._places() if self.at(other).dp == dp)

    def group(self, axis: Axis, ctx: Grouping) -> Group:
        """This rank's group along ``axis``, in which its rank is its place; no communication."""
        return ctx.group(self.along(axis, ctx.rank))

    def tensor_group(self, ctx: Grouping, node: Grouping | None = None) -> Group:
        """This rank's group along tp; over ``node``, where the node's ranks have a context of their own."""
        ranks = self.along("tp", ctx.rank)
        return ctx.group(ranks) if node is None else node.group([*map(self.topology.local_rank, ranks)])

    def table(self) -> str:
        """Text: a line per rank with its node and its places; which links each axis uses."""
        lines = [f"{'rank':>6} {'node':>5} " + " ".join(f"{axis:>4}" for axis in AXES)]
        for rank in range(self.topology.world_size):
            at = self.at(rank)
            lines.append(f"{rank:>6} {self.topology.node_of(rank):>5} {at.dp:>4} {at.pp:>4} {at.tp:>4}")
        for axis in AXES:
            nodes = {self.topology.node_of(rank) for rank in self.along(axis, 0)}
            where = "inside a node" if len(nodes) == 1 else f"over {len(nodes)} nodes"
            lines.append(f"{axis}: {self.size(axis)} {'ranks' if self.size(axis) > 1 else 'rank'}, {where}")
        return "\n".join(lines)

    def _places(self) -> list[int]:
        return [rank for node in self.topology.nodes for rank in node]
