"""Groups: every collective on every kind of subset, splits, several in flight, contradicting orders."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm import Residual, collective_plans
from hybridcomm.context import Context
from hybridcomm.errors import AbortedError, GroupError, PlanMismatchError
from hybridcomm.groups import Group
from hybridcomm.members import Members
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

NAMES = ["2x2", "3+2", "2+1+1"]
SUBSETS = {
    "2x2": [[0, 1], [2, 3], [0, 2], [0, 3], [1, 2], [3, 0, 1], [2], [3, 2, 1, 0], [0, 1, 2, 3]],
    "3+2": [[0, 1], [0, 2], [3, 4], [2, 3], [0, 4], [1, 2, 4], [4, 2, 0, 1], [3], [0, 1, 2, 3, 4]],
    "2+1+1": [[0, 1], [2, 3], [1, 3], [0, 1, 3], [3, 1, 2], [1], [2, 0, 1, 3]],
}
CHUNK_NBYTES = 16384
CASES = [(name, ranks) for name in NAMES for ranks in SUBSETS[name]]


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[str, list[Context]]]:
    with (
        engine_contexts(NAMED["2x2"], chunk_nbytes=CHUNK_NBYTES) as a,
        engine_contexts(NAMED["3+2"], chunk_nbytes=CHUNK_NBYTES) as b,
        engine_contexts(NAMED["2+1+1"], chunk_nbytes=CHUNK_NBYTES) as c,
    ):
        yield {"2x2": a, "3+2": b, "2+1+1": c}


def value(rank: int, world: int, numel: int, call: int) -> np.ndarray[Any, Any]:
    return exact_ints(rank=rank, numel=numel, world=world, call=call).astype(np.float32)


def total(world: int, numel: int, call: int) -> np.ndarray[Any, Any]:
    return exact_sum(numel=numel, world=world, call=call).astype(np.float32)


@pytest.mark.parametrize(("name", "members"), CASES)
def test_every_collective_on_every_kind_of_subset(
    worlds: dict[str, list[Context]], name: str, members: list[int]
) -> None:
    """Members only call; tensors of one step, of several chunks, and odd ones."""
    ranks = [worlds[name][rank] for rank in members]
    world = len(members)

    def body(ctx: Context) -> None:
        group = ctx.group(members)
        assert (group.rank, group.world_size) == (members.index(ctx.rank), world)
        for call, numel in enumerate([1, 1000, 40_001]):
            array = value(group.rank, world, numel, call)
            group.allreduce(array)
            assert array.tobytes() == total(world, numel, call).tobytes(), numel
            array = value(group.rank, world, numel, call)
            group.broadcast(array, world - 1)
            assert array.tobytes() == value(world - 1, world, numel, call).tobytes()
            out = np.full(numel * world, -1, np.float32)
            group.all_gather(out, value(group.rank, world, numel, call))
            want = [value(rank, world, numel, call) for rank in range(world)]
            assert out.tobytes() == np.concatenate(want).tobytes()
            part = np.full(numel, -1, np.float32)
            group.reduce_scatter(part, value(group.rank, world, numel * world, call))
            place = slice(group.rank * numel, (group.rank + 1) * numel)
            assert part.tobytes() == total(world, numel * world, call)[place].tobytes()
            group.barrier()
        if world > 1:
            peer, got = (group.rank + 1) % world, np.empty(5000, np.float32)
            work = group.isend(value(group.rank, world, 5000, 9), peer, 3)
            assert group.recv(got, (group.rank - 1) % world, 3) == (group.rank - 1) % world
            assert got.tobytes() == value((group.rank - 1) % world, world, 5000, 9).tobytes()
            work.wait(20)

    run_ranks(body, ranks)


def test_topology_of_members() -> None:
    job = NAMED["2+1+1"]
    assert str(Members((0, 1), job).topology) == "0,1"
    assert str(Members((3, 1, 0), job).topology) == "0|1,2"
    assert str(Members((2, 3), job).topology) == "0|1"
    assert Members((3, 1, 0), job).locals == (0, 1, 0)


def test_equal_shapes_differ_in_digest() -> None:
    """Of groups, and of the same ranks in another order; and never from run to run."""
    job = Topology.virtual(2, 3)
    plan = collective_plans.allreduce(Topology.virtual(1, 2), 100)
    groups = [(0, 1), (1, 0), (0, 2), (1, 2), (3, 4)]
    digests = [Members(ranks, job).digest_of(plan) for ranks in groups]
    assert len({*digests, plan.digest}) == len(groups) + 1
    assert digests == [Members(ranks, job).digest_of(plan) for ranks in groups]


def test_compressed_with_a_residual(worlds: dict[str, list[Context]]) -> None:
    """The law of error feedback holds within the group: what was applied plus what is left is what came in."""
    members, numel, steps = [4, 0, 3], 20_000, 4

    def body(ctx: Context) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        group, residual = ctx.group(members), Residual()
        given_in, applied = np.zeros(numel), np.zeros(numel)
        for step in range(steps):
            t = np.random.default_rng([ctx.rank, step]).standard_normal(numel).astype(np.float32)
            given_in += t
            group.allreduce(t, compress="topk:0.05", residual=residual)
            residual.commit()
            applied += t
        tail = np.zeros(numel, np.float32)
        for _ in range(60):
            t = np.zeros(numel, np.float32)
            group.allreduce(t, compress="topk:0.05", residual=residual)
            residual.commit()
            tail += t
        return given_in, applied + tail

    outcome = run_ranks(body, [worlds["3+2"][rank] for rank in members])
    want = sum(given_in for given_in, _ in outcome)
    for _, got in outcome:
        assert np.array_equal(got, outcome[0][1])
        assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
        assert not np.array_equal(got, np.zeros(numel))


def test_a_rank_outside_is_told(worlds: dict[str, list[Context]]) -> None:
    group = worlds["2x2"][0].group([1, 3])
    t = np.arange(4, dtype=np.float32)
    calls: list[Callable[[], Any]] = [
        lambda: group.allreduce(t),
        lambda: group.broadcast(t),
        lambda: group.all_gather(np.zeros(8, np.float32), t),
        lambda: group.reduce_scatter(np.zeros(2, np.float32), t),
        group.barrier,
        lambda: group.isend(t, 1),
        lambda: group.split(0),
        lambda: group.rank,
    ]
    for call in calls:
        with pytest.raises(GroupError, match=r"not in the group of ranks \[1, 3\]"):
            call()
    assert not group.is_member
    assert t.tolist() == [0, 1, 2, 3]
    for ranks in ([], [0, 0], [0, 4], [-1]):
        with pytest.raises(GroupError, match=r"0\.\.3"):
            worlds["2x2"][0].group(ranks)


@pytest.mark.parametrize("name", NAMES)
def test_split_by_color_and_key(worlds: dict[str, list[Context]], name: str) -> None:
    def body(ctx: Context) -> None:
        world = ctx.world_size
        halves = ctx.split(ctx.rank % 2, -ctx.rank)
        assert halves is not None
        assert halves.ranks == tuple(rank for rank in reversed(range(world)) if rank % 2 == ctx.rank % 2)
        t = np.full(1000, 10.0**ctx.rank)
        halves.allreduce(t)
        assert (t == sum(10.0**rank for rank in halves.ranks)).all()
        alone = halves.split(ctx.rank)
        assert alone is not None
        assert alone.ranks == (ctx.rank,)
        some = ctx.split(None if ctx.rank == 0 else -5, key=2)
        assert some is None if ctx.rank == 0 else some is not None and some.ranks == tuple(range(1, world))

    run_ranks(body, worlds[name])


def test_two_thousand_splits_leave_nothing_behind() -> None:
    """Descriptors, shared memory and the process's own memory, over splits that are used and dropped."""
    import gc
    import resource
    from pathlib import Path

    with engine_contexts(NAMED["2x2"]) as contexts:

        def splits(count: int) -> None:
            def body(ctx: Context) -> None:
                dice = random.Random(count)
                for _ in range(count):
                    colors = [dice.randrange(2) for _ in range(4)]
                    group = ctx.split(colors[ctx.rank], dice.choice([0, -ctx.rank]))
                    assert group is not None
                    t = np.ones(8, np.float32)
                    group.allreduce(t)
                    assert (t == group.world_size).all()

            run_ranks(body, contexts, timeout=100)
            gc.collect()

        def held() -> tuple[int, int]:
            return len(list(Path("/proc/self/fd").iterdir())), contexts[0]._engine.shared_nbytes()

        splits(200)
        before, peak = held(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        splits(1800)
        assert held() == before
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 8 << 10, "KiB, over 7200 groups"


def test_groups_end_with_their_context() -> None:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:

        def body(rank: int) -> None:
            group = contexts[rank].group([0, 1])
            group.allreduce(np.ones(3))
            contexts[rank].close()
            with pytest.raises(AbortedError, match="closed"):
                group.allreduce(np.ones(3))
            with pytest.raises(AbortedError, match="closed"):
                group.isend(np.ones(3), 1 - rank)

        assert each_rank(body, 2) == [None] * 2


GROUPS = {
    "2x2": [(0, 1), (1, 2), (3, 0, 2), (0, 1, 2, 3), (2, 3), (1,)],
    "3+2": [(0, 1, 2), (4, 2), (0, 3), (1, 4, 3), (0, 1, 2, 3, 4), (2, 1)],
    "2+1+1": [(0, 1), (3, 1), (2, 3), (0, 2, 1), (3, 2, 1, 0)],
}


class Machine:
    """One rank's part of a random program over overlapping groups, drawn alike on all ranks from the seed."""

    def __init__(self, ctx: Context, name: str, seed: int) -> None:
        self.ctx, self.dice = ctx, random.Random(seed)
        self.own = random.Random(1000 * seed + ctx.rank)
        self.groups = [ctx.group(ranks) for ranks in GROUPS[name]]
        self.open: list[tuple[Any, Any, np.ndarray[Any, Any]]] = []

    def run(self, calls: int) -> None:
        for call in range(calls):
            group = self.dice.choice(self.groups)
            kind = self.dice.choice(["allreduce", "broadcast", "all_gather", "message"])
            numel, root = self.dice.choice([0, 1, 97, 5000, 40_000]), self.dice.randrange(group.world_size)
            later, other = self.dice.random() < 0.7, self.dice.randrange(group.world_size)
            if group.is_member:
                getattr(self, f"_{kind}")(group, call, numel, root, later, other)
            while self.open and self.own.random() < 0.3:
                self.settle(self.own.randrange(len(self.open)))
        while self.open:
            self.settle(0)

    def settle(self, index: int) -> None:
        work, got, want = self.open.pop(index)
        if work is not None:
            work.wait(30)
        assert got.tobytes() == want.tobytes()

    def _allreduce(self, group: Group, call: int, numel: int, _: int, later: bool, __: int) -> None:
        t = value(group.rank, group.world_size, numel, call)
        self.open.append((group.allreduce(t, async_op=later), t, total(group.world_size, numel, call)))

    def _broadcast(self, group: Group, call: int, numel: int, root: int, later: bool, _: int) -> None:
        t = value(group.rank, group.world_size, numel, call)
        want = value(root, group.world_size, numel, call)
        self.open.append((group.broadcast(t, root, async_op=later), t, want))

    def _all_gather(self, group: Group, call: int, numel: int, _: int, later: bool, __: int) -> None:
        out = np.full(numel * group.world_size, -1, np.float32)
        own = value(group.rank, group.world_size, numel, call)
        every = [value(rank, group.world_size, numel, call) for rank in range(group.world_size)]
        self.open.append((group.all_gather(out, own, async_op=later), out, np.concatenate(every)))

    def _message(self, group: Group, call: int, numel: int, src: int, later: bool, dst: int) -> None:
        if src == dst or group.rank not in (src, dst):
            return
        want = value(src, group.world_size, numel, call)
        t = want.copy() if group.rank == src else np.full(numel, -1, np.float32)
        tag = call % 3  # messages of one tag must not be mixed up
        work = group.isend(t, dst, tag) if group.rank == src else group.irecv(t, src, tag)
        self.open.append((work, t, want))


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=6)
def test_random_programs_over_overlapping_groups(
    worlds: dict[str, list[Context]], name: str, seed: int
) -> None:
    run_ranks(lambda ctx: Machine(ctx, name, seed).run(40), worlds[name])


def contradiction(topology: Topology, orders: list[list[tuple[int, ...]]], numel: int = 1000) -> list[Any]:
    """Every rank issues asynchronous all-reduces of the groups in its order; outcomes by rank."""
    with engine_contexts(topology, timeout=20.0) as contexts:
        everybody = threading.Barrier(topology.world_size)

        def body(rank: int) -> None:
            works = []
            contexts[rank].barrier()  # connects
            everybody.wait(20)  # nobody is in it any more: a peer's failure would end it
            try:
                for ranks in orders[rank]:
                    t = np.ones(numel + 8 * len(ranks) + sum(ranks), np.float32)
                    works.append(contexts[rank].group(ranks).allreduce(t, async_op=True))
                for work in works:
                    assert work is not None
                    work.wait(15)
            finally:
                everybody.wait(20)

        return each_rank(body, topology.world_size)


@pytest.mark.parametrize("name", ["1x3", "3x1"])
@pytest.mark.parametrize("numel", [100, 100_000])
def test_overlapping_groups_in_other_orders_are_named(name: str, numel: int) -> None:
    topology = Topology.virtual(1, 3) if name == "1x3" else Topology.virtual(3, 1)
    pair, all_ranks = (0, 1), (0, 1, 2)
    outcome = contradiction(topology, [[pair, all_ranks], [all_ranks, pair], [all_ranks]], numel)
    errors = [error for error in outcome if isinstance(error, PlanMismatchError)]
    assert errors, outcome
    assert any(str(numel + 17) in str(e) and str(numel + 27) in str(e) for e in errors), [
        str(e) for e in errors
    ]
    assert contradiction(topology, [[pair, all_ranks], [pair, all_ranks], [all_ranks]], numel) == [None] * 3


@pytest.mark.parametrize("name", ["1x3", "3x1", "2+1"])
def test_a_circle_over_three_groups_is_found_at_once(name: str) -> None:
    """A: ab, ca  B: bc, ab  C: ca, bc. No two ranks see a wrong message; and in one order it is no circle."""
    topology = {"1x3": [3], "3x1": [1, 1, 1], "2+1": [2, 1]}[name]
    ab, bc, ca = (0, 1), (1, 2), (2, 0)
    outcome = contradiction(Topology.from_sizes(topology), [[ab, ca], [bc, ab], [ca, bc]])
    assert all(isinstance(error, PlanMismatchError) for error in outcome), outcome
    named = [str(error) for error in outcome if "contradicting orders" in str(error)]
    assert named, outcome
    for text in named:
        assert len({members for members in ("0, 1", "1, 2", "2, 0") if f"over ranks {members}" in text}) == 2
    assert contradiction(Topology.from_sizes(topology), [[ab, ca], [ab, bc], [bc, ca]]) == [None] * 3


def test_waiting_for_a_late_rank_is_no_circle() -> None:
    """Negative control of the chase: everybody waits for a rank that computes, longer than a chase takes."""
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(ctx: Context) -> None:
            if ctx.rank == 3:
                time.sleep(2.5)
            for ranks in [(0, 1), (1, 2), (2, 3), (0, 1, 2, 3)]:
                if ctx.rank in ranks:
                    ctx.group(ranks).allreduce(np.ones(10))

        run_ranks(body, contexts)
