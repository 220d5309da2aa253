"""Which ranks of the job a group's are: what plans, made for ranks 0 .. n - 1, are lowered with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hybridcomm.topology import Topology

if TYPE_CHECKING:
    from hybridcomm.plan import Plan

__all__ = ["Members"]

_LABEL = 23  # characters of the members in messages between ranks (csrc/control.h)


@dataclass(frozen=True)
class Members:
    """The members of a group in group order, as ranks of ``job``, the topology of the whole job."""

    ranks: tuple[int, ...]
    job: Topology

    @cached_property
    def topology(self) -> Topology:
        """Theirs alone, in group ranks: nodes without a member vanish."""
        hosts = Topology.from_hosts([self.job.node_of(rank) for rank in self.ranks])
        return Topology(nodes=hosts.nodes, intra_node=self.job.intra_node, inter_node=self.job.inter_node)

    @cached_property
    def locals(self) -> tuple[int, ...]:
        """The members' places on their nodes, in the job's topology."""
        return tuple(self.job.local_rank(rank) for rank in self.ranks)

    @cached_property
    def digest(self) -> int:
        """64 bits that differ between groups; never 0, which stands for the whole job."""
        text = ",".join(map(str, self.ranks)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1

    def digest_of(self, plan: Plan) -> int:
        """Of a plan run by these ranks: groups of one shape have equal plans."""
        return plan.digest ^ self.digest

    @cached_property
    def label(self) -> str:
        text = ", ".join(map(str, self.ranks))
        if len(text) <= _LABEL:
            return text
        tail = f"... ({len(self.ranks)})"
        return text[: _LABEL - len(tail)] + tail
