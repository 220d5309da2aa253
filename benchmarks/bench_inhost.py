"""In-host all-reduce, peers beside ours: ``pytest benchmarks/bench_inhost.py``; rank 0 holds the fixture.

Peers are gloo and the MPI libraries that are installed; the limit is the memory's: every byte read once and written
once, by threads that find their inputs in their own caches, and (rewritten) by threads of which each has just written
its ranks' inputs, as they are before every call of ours. Figures are ms per call; each rank rewrites its input before
every call, which is not in the figure.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import native
from benchmarks.inhost import PEERS, Case, Team

_SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20]
_RANKS = [2, 4]
_ENGINE_NBYTES = 4 << 10


@pytest.fixture(scope="module", params=_RANKS, ids=["2-ranks", "4-ranks"])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """A team per number of ranks, kept for all cases of it."""
    group = Team(request.param)
    yield group
    group.close()


def _note(benchmark: BenchmarkFixture, ranks: int, peer: str, nbytes: int, ms: float) -> None:
    benchmark.group = f"{ranks} ranks {nbytes >> 10} KiB"
    benchmark.extra_info.update(ranks=ranks, peer=peer, nbytes=nbytes, ms_per_call=ms)


@pytest.mark.parametrize("nbytes", _SIZES, ids=lambda n: f"{n >> 10}KiB")
@pytest.mark.parametrize("peer", PEERS)
def test_allreduce(benchmark: BenchmarkFixture, team: Team, peer: str, nbytes: int) -> None:
    """One cell of the table."""
    case = Case.of(peer, nbytes)
    runner = team.start(case)
    benchmark.pedantic(runner.batch, setup=runner.prepare, rounds=case.rounds, warmup_rounds=case.warmup)
    runner.check()
    net = (benchmark.stats.stats.median - runner.rewriting()) / case.batch
    _note(benchmark, team.world_size, peer, nbytes, net * 1e3)


@pytest.mark.parametrize("nbytes", _SIZES, ids=lambda n: f"{n >> 10}KiB")
@pytest.mark.parametrize("ranks", _RANKS)
@pytest.mark.parametrize("peer", native.mpis())
def test_mpi(benchmark: BenchmarkFixture, peer: str, ranks: int, nbytes: int) -> None:
    """A peer without Python: timed inside its own processes, as ours are."""
    case = Case.of(peer, nbytes)
    ms: list[float] = []

    def measure() -> None:
        ms.append(native.mpi_allreduce_ms(peer, ranks, nbytes=nbytes, batch=case.batch, rounds=case.rounds))

    benchmark.pedantic(measure, rounds=1)
    _note(benchmark, ranks, peer, nbytes, ms[0])


@pytest.mark.parametrize("ranks", _RANKS)
def test_engine_alone(benchmark: BenchmarkFixture, ranks: int) -> None:
    """What Python adds is the difference to the line above."""
    ms: list[float] = []
    benchmark.pedantic(lambda: ms.append(native.engine_latency_ms(ranks, _ENGINE_NBYTES)), rounds=1)
    _note(benchmark, ranks, "engine", _ENGINE_NBYTES, ms[0])


@pytest.mark.parametrize("ranks", _RANKS)
def test_floor(benchmark: BenchmarkFixture, ranks: int) -> None:
    """The limit, for all sizes."""
    found: dict[int, tuple[float, float]] = {}
    benchmark.pedantic(lambda: found.update(native.floor_ms(ranks, _SIZES)), rounds=1)
    benchmark.extra_info.update(ranks=ranks, floor_ms=found)
