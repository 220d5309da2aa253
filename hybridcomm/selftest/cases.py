"""The self-test's table of cases: which there are, what each is held against, and on how many ranks it means anything.

The tests on simulated GPUs run the same bodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybridcomm.selftest import orders, reductions, under_way, verbs
from hybridcomm.selftest.kernels import SPECS
from hybridcomm.selftest.rank import EXACT_RANKS
from hybridcomm.selftest.reductions import Body

__all__ = ["HOST", "SUMS", "TWICE", "Case", "conformance", "ending"]

HOST, SUMS, BOUND = "host's bits", "exact values", "rounding bound"
TWICE = tuple(spec for spec in SPECS if not spec.startswith("gtopk"))
"""Codecs whose sums can be encoded anew."""
SEEDED = ("powersgd:2", "randk:0.01")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the report.

    ``against``: what results are compared with. ``ranks``, ``nodes``: fewer mean nothing. ``few``: yet up to two ranks
    are good, whose sum has no order. ``most``: ranks up to which sums are exact; ``powers``: they also grow by
    world_size ** powers, which no float32 minds where world_size is a power of two.
    """

    name: str
    body: Body
    against: str
    ranks: int = 1
    nodes: int = 1
    few: bool = False
    most: int = EXACT_RANKS
    powers: int = 0

    def why_not(self, ranks: int, nodes: int) -> str:
        """Why it is left out on so many ranks on so many nodes; "" where it runs."""
        if ranks < self.ranks:
            return f"needs {self.ranks} ranks"
        if nodes < self.nodes and not (self.few and ranks <= 2):
            return f"needs {self.nodes} nodes: nothing is compressed inside one"
        exact = not ranks & (ranks - 1) or ranks ** (self.powers + 1) * (ranks + 3) <= 1 << 24
        if ranks > self.most or not exact:
            return f"sums over {ranks} ranks would not be exact"
        return ""


def conformance(codecs: Sequence[str], *, numel: int, seeds: Sequence[int]) -> tuple[Case, ...]:
    """All cases but that which ends the context. ``numel``: elements of an all-reduce; ``seeds``: of orders."""
    return (
        *_controls(),
        *_dense(numel),
        *_codecs(codecs, numel),
        *_under_way(),
        *(Case(name=f"verbs that move {name}", body=verbs.moves(name), against=SUMS) for name in verbs.MOVED),
        *(
            Case(
                name=f"verbs that reduce {name}",
                body=verbs.reduces(name),
                against=SUMS,
                most=verbs.NARROW_RANKS,
            )
            for name in verbs.DTYPES
        ),
        Case(name="messages and verbs in one order", body=verbs.messages, against=SUMS, ranks=2),
        Case(name="means by every communicator", body=verbs.means, against=BOUND),
        Case(
            name="sums by a factor of each rank's own",
            body=verbs.scaled,
            against=HOST,
            ranks=2,
            most=verbs.NARROW_RANKS,
        ),
        Case(name="groups", body=verbs.groups, against=f"{HOST}, {SUMS}"),
        Case(name="the host waits", body=verbs.awaited, against=SUMS),
        *(
            [
                Case(
                    name=f"orders of {len(seeds)} seeds",
                    body=orders.orders(seeds, codecs, numel),
                    against=HOST,
                )
            ]
            if seeds
            else []
        ),
    )


def ending() -> Case:
    """The last one, which ends the context."""
    return Case(name="an abort on one rank", body=orders.aborted, against="typed error in time")


def _controls() -> tuple[Case, ...]:
    return (
        Case(name="control: a changed element", body=orders.changed, against="must be noticed"),
        Case(
            name="control: swapped buckets, debug=True",
            body=orders.swapped,
            against="must be noticed",
            ranks=2,
        ),
    )


def _dense(numel: int) -> list[Case]:
    found = []
    for flat, way in ((True, "flat"), (False, "staged")):
        for dtype in (torch.float32, torch.float64):
            name = f"dense {way}, {str(dtype).removeprefix('torch.')}"
            found.append(Case(name=name, body=reductions.dense(dtype, flat=flat, numel=numel), against=SUMS))
        body = reductions.reals(flat=flat, numel=numel)
        found.append(Case(name=f"dense {way}, real numbers", body=body, against=BOUND))
    return found


def _codecs(codecs: Sequence[str], numel: int) -> list[Case]:
    found = []
    for codec in codecs:
        for exchange, size in (("gather", numel), ("two_stage", 3 * numel)):
            if exchange == "gather" or codec in TWICE:
                body = reductions.feedback(codec, exchange, size)
                name = f"{codec}, {exchange.replace('_', '-')}, error feedback"
                found.append(Case(name=name, body=body, against=HOST, nodes=2))
        if codec in SEEDED:
            body = reductions.draws(codec, 10 * numel)
            found.append(Case(name=f"{codec}, every call draws anew", body=body, against=HOST, nodes=2))
    return found


def _under_way() -> tuple[Case, ...]:
    compressed = (
        ("buckets under way together", under_way.buckets),
        ("two-stage buckets under way together", under_way.two_stage),
        ("shards of unequal size", under_way.uneven),
        ("the Reducer, ready in any order", under_way.reducer),
    )
    either = (
        ("the same tensor again and again", under_way.again, 2),
        ("sums, means and maxima by both routes", under_way.unequal, 1),
        ("tensors that overlap", under_way.overlap, 0),
        ("two streams", under_way.streams, 0),
        ("CUDA graphs", under_way.captured, 3),
        ("memory that NCCL knows", under_way.in_known_memory, 0),
        ("memory that all ranks allocate together", under_way.in_windows, 0),
    )
    return (
        *(Case(name=name, body=body, against=HOST, nodes=2) for name, body in compressed),
        *(
            Case(name=name, body=body, against=HOST, nodes=2, few=True, powers=powers)
            for name, body, powers in either
        ),
    )
