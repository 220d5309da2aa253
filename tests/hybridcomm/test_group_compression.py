"""Compressed collectives of groups: both exchanges, both classes of links, and seeds that other groups do not touch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from hybridcomm.compress import ByLink
from hybridcomm.context import Context
from hybridcomm.groups import Group
from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.compressed_calls import CODEC, Oracle, by_engine, gradients, held_back
from tests.hybridcomm.law import Step, gap, run
from tests.ranks import run_ranks

MEMBERS = ([4, 0, 3, 1], [5, 2, 3], [1, 0], [0, 1, 2, 3, 4, 5])
"""Of 3+2+1: another order of nodes and ranks; one rank a node; a single node; all, which is no whole job's call."""

COMPRESS: list[ByLink] = [
    CODEC,
    {"inter_node": CODEC, "intra_node": "topk:0.2/b128"},
    {"inter_node": "gtopk:0.1/b64", "intra_node": "randk:0.2"},
]


@pytest.fixture(scope="module")
def contexts() -> Iterator[list[Context]]:
    with engine_contexts(Topology.from_sizes([3, 2, 1]), chunk_nbytes=16384) as contexts:
        yield contexts


def group_of(contexts: list[Context], members: Sequence[int]) -> list[Group]:
    """Group rank -> the group as that rank has it."""
    return [contexts[rank].group(members) for rank in members]


@pytest.mark.parametrize("exchange", ["gather", "two_stage"])
@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("members", MEMBERS)
def test_a_group_gives_the_interpreters_bytes(members: list[int], compress: ByLink, exchange: str) -> None:
    with engine_contexts(Topology.from_sizes([3, 2, 1]), chunk_nbytes=16384) as contexts:
        ranks, numel = group_of(contexts, members), 5003
        plan = ranks[0].plan_allreduce(numel, op="mean", compress=compress, exchange=exchange)
        assert ranks[0].members is not None
        digest = ranks[0].members.digest_of(plan)
        steps = [gradients(len(ranks), numel, seed=step) for step in range(2)]
        Oracle().check_steps(ranks, plan, steps, digest=digest, compress=compress, exchange=exchange)


def test_law_in_a_group_over_a_skipped_step(contexts: list[Context]) -> None:
    ranks, numel = group_of(contexts, MEMBERS[0]), 2048
    residuals, seen, applied = [Residual() for _ in ranks], np.zeros(numel), np.zeros(numel)
    for step in range(6):
        dice = np.random.default_rng(step)
        inputs = [dice.integers(-3, 4, numel).astype(np.float32) for _ in ranks]
        update = by_engine(
            ranks, inputs, op="sum", compress=COMPRESS[1], residuals=residuals, exchange="two_stage"
        )[0]
        if step == 2:
            for residual in residuals:
                residual.rollback()
            continue
        for residual in residuals:
            residual.commit()
        seen += np.sum(inputs, axis=0, dtype=np.float64)
        applied += update
    left = held_back(residuals, numel)
    assert (seen == applied + left).all()
    assert np.abs(left).sum() > 0, "nothing was held back: the law was not tested"


def test_law_of_a_reducer_on_a_group(contexts: list[Context]) -> None:
    """Four ranks, so that quarters are exact."""
    steps = [Step(), Step(passes=2), Step(spoilt="skip"), Step(spoilt="inf"), Step()]

    def make(*args: Any, **options: Any) -> Reducer:
        return Reducer(*args, **options, exchange="two_stage")

    links = {"inter_node": "topk:0.1/b64", "intra_node": "topk:0.2/b64"}
    books = run_ranks(
        lambda group: run(group, steps, make=make, compress=links), group_of(contexts, MEMBERS[0])
    )
    assert [book.applied for book in books] == [3] * 4
    assert not any(np.any(difference) for difference in gap(books).values())
    ops = {key.rpartition("]")[2] for book in books for key in book.residual}
    assert ops == {"", " recompress", " compress_intra"}


def test_draws_of_a_group_do_not_depend_on_what_others_run() -> None:
    """Ranks 0 and 1 draw alike whether or not rank 1 had calls with rank 2 in between; another call draws anew."""
    inputs, runs = gradients(2, 4096, seed=1), []
    for others in (0, 3):
        with engine_contexts(Topology.virtual(3, 1)) as contexts:

            def body(rank: int, others: int = others, contexts: list[Context] = contexts) -> list[bytes]:
                pair, other = contexts[rank].group([0, 1]), contexts[rank].group([1, 2])
                out = []
                for _ in range(3):
                    for _ in range(others if rank > 0 else 0):
                        other.allreduce(np.ones(500, np.float32), compress="randk:0.1")
                    if rank < 2:
                        values = inputs[rank].copy()
                        pair.allreduce(values, compress="randk:0.1")
                        out.append(values.tobytes())
                return out

            first, second, third = each_rank(body, 3)
            assert first == second, (first, second)
            assert third == []
            runs.append(first)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3
