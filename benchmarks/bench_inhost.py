"""In-host all-reduce, gloo beside ours: ``pytest benchmarks/bench_inhost.py``; rank 0 holds the fixture.

Figures are ms per call; each rank rewrites its input before every call, which is not in the figure.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.inhost import PEERS, Case, Team

_SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """A team per number of ranks, kept for all cases of it."""
    group = Team(request.param)
    yield group
    group.close()


@pytest.mark.parametrize("nbytes", _SIZES, ids=lambda n: f"{n >> 10}KiB")
@pytest.mark.parametrize("peer", PEERS)
def test_allreduce(benchmark: BenchmarkFixture, team: Team, peer: str, nbytes: int) -> None:
    """One line of the table."""
    case = Case.of(peer, nbytes)
    runner = team.start(case)
    benchmark.group = f"{team.world_size} ranks {nbytes >> 10} KiB"
    benchmark.pedantic(runner.batch, setup=runner.prepare, rounds=case.rounds, warmup_rounds=case.warmup)
    runner.check()
    net = (benchmark.stats.stats.median - runner.rewriting()) / case.batch
    benchmark.extra_info.update(ranks=team.world_size, peer=peer, nbytes=nbytes, ms_per_call=net * 1e3)
