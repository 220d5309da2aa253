"""Groups: some of a context's ranks, in an order of their own, with everything a context can do together.

A group is a value: making one talks to nobody, and costs nothing that has to be given back. It shares its context's
engine, connections and queue. Groups with the same members in the same order are the same group.

Collectives of a rank run one after another in the order of their calls, whatever their groups; so ranks that share two
groups must issue the calls of both in one order. Where they do not, the engine says so and names both calls: it sees
it by the digest in every message, or, where no message shows it, by a chase around the circle of waiting ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hybridcomm import shared
from hybridcomm.collectives import Collectives
from hybridcomm.errors import GroupError
from hybridcomm.members import Members
from hybridcomm.point_to_point import PointToPoint

if TYPE_CHECKING:
    from hybridcomm.arrays import Array
    from hybridcomm.context import Context
    from hybridcomm.topology import Topology

__all__ = ["Group", "Grouping"]


class Grouping(Collectives, PointToPoint):
    """A rank of some ranks that can be divided further: a context, or a group."""

    timeout: float
    _home: Context | None = None  # whose group it is; None: it is a context itself

    def empty(self, *size: Any, dtype: Any = None) -> Array:
        """An array in shared memory; see `hybridcomm.empty`."""
        return shared.empty(self._engine, size, dtype)

    @property
    def is_member(self) -> bool:
        """Whether this rank takes part; a context's ranks all do."""
        return True

    def group(self, ranks: Sequence[int]) -> Group:
        """The group of ``ranks`` (of this context or group), which get the ranks 0, 1, ... in the given order.

        No communication, and only members need to call it. On a rank that is not among them the group is there,
        but using it raises `GroupError`, as do ranks that are not here or named twice.
        """
        return Group(self, _checked(self, ranks))

    def split(self, color: int | None, key: int = 0) -> Group | None:
        """Divides the ranks into a group for each ``color``, ordered by ``key``, then by rank.

        Every rank calls it: one small all-gather. ``color=None`` joins no group and gets None.
        """
        wanted = np.array([color is not None, 0 if color is None else color, key], np.int64)
        every = np.empty(3 * self.world_size, np.int64)
        self.all_gather(every, wanted)
        if color is None:
            return None
        rows = every.reshape(-1, 3).tolist()
        joining = [rank for rank, (joins, other, _) in enumerate(rows) if joins and other == color]
        return self.group(sorted(joining, key=lambda rank: (rows[rank][2], rank)))


class Group(Grouping):
    """Some ranks of a context; made by `Context.group` or `Context.split`. ``topology`` is the members' own."""

    def __init__(self, parent: Grouping, ranks: tuple[int, ...]) -> None:
        job = ranks if parent.members is None else tuple(parent.members.ranks[rank] for rank in ranks)
        topology: Topology = parent.topology if parent.members is None else parent.members.job
        members = Members(job, topology)
        self._rank = ranks.index(parent.rank) if parent.is_member and parent.rank in ranks else -1
        super().__init__(
            rank=self._rank,
            topology=members.topology,
            engine=parent._engine,
            chunk_nbytes=parent.chunk_nbytes,
            members=members,
        )
        self.timeout = parent.timeout
        self._home = parent._home or cast("Context", parent)  # the engine closes when its context dies

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members as ranks of the context, in group order."""
        assert self.members is not None  # noqa: S101 (a group always has them)
        return self.members.ranks

    @property
    def is_member(self) -> bool:
        """Whether this rank is in the group."""
        return self._rank >= 0

    @property
    def rank(self) -> int:
        """This rank's place in the group; raises `GroupError` where it has none."""
        if not self.is_member:
            raise GroupError(
                f"this rank is not in the group of ranks {list(self.ranks)}: only members may call its collectives"
            )
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self._rank = rank

    def __repr__(self) -> str:
        return f"Group(ranks={list(self.ranks)}, rank={self._rank if self.is_member else None})"


def _checked(parent: Grouping, ranks: Sequence[int]) -> tuple[int, ...]:
    out = tuple(ranks)
    known = range(parent.world_size)
    if not out or len(set(out)) != len(out) or any(rank not in known for rank in out):
        raise GroupError(
            f"group({list(out)}): name at least one rank, each once, of 0..{parent.world_size - 1}"
        )
    return tuple(map(int, out))
