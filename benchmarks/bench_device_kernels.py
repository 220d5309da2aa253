"""Device kernels on this machine's GPU, each beside its peers: ``pytest benchmarks/bench_device_kernels.py``.

Peers are what one would write in torch (`benchmarks.codec_peers`, for top-k around torch.topk), and cupy's selection
where cupy is installed. The limit is a copy of the same tensors in the same run: by its bytes per second, for the bytes
that a step has to move. Milliseconds from the call until the device has finished, medians. Without a GPU all of it is
skipped, and nothing of what docs/roofline.md predicts has been measured. The C++ twins of the kernels are timed by
``bench_kernels.py``.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.device_calls import CODECS, STEPS, Call, Calls
from benchmarks.table import table

NUMEL = 1 << 24
ROUNDS = 20


@pytest.fixture(scope="module")
def calls() -> Calls:
    """On the first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: device kernels are not timed here")
    from hybridcomm.kernels.cubins.driver import Driver
    from hybridcomm.kernels.cubins.launcher import on_cuda

    try:
        import cupy
    except ImportError:
        cupy = None
    place = torch.device("cuda", 0)
    torch.zeros(1, device=place)  # makes the context that the driver launches in
    major, minor = torch.cuda.get_device_capability(place)
    run = on_cuda(Driver(), 10 * major + minor, lambda: torch.cuda.current_stream(place).cuda_stream)
    return Calls(device=place, numel=NUMEL, run=run, cupy=cupy)


@pytest.fixture(scope="module")
def summary(request: pytest.FixtureRequest) -> Summary:
    """What was measured; the table is printed at the end."""
    made = Summary()
    request.config.pluginmanager.register(made)
    return made


class Summary:
    """(what, who) -> ms, and bytes per ms of a copy; printed as one table when all is done."""

    def __init__(self) -> None:
        self.ms: dict[tuple[str, str], float] = {}
        self.moved: dict[str, int] = {}
        self.copied = float("nan")

    def rows(self) -> list[list[str]]:
        """ms of each peer and ours, how many times faster ours is, and how many times slower than the limit."""
        made = []
        for what in dict.fromkeys(what for what, _ in self.ms):
            ours = self.ms.get((what, "ours"), float("nan"))
            peers = {who: self.ms[what, who] for who in ("torch", "cupy") if (what, who) in self.ms}
            limit = self.moved[what] / self.copied
            best = min(peers.values(), default=float("nan"))
            cells = [f"{peers[who]:.3f}" if who in peers else "" for who in ("torch", "cupy")]
            made.append(
                [what, *cells, f"{ours:.3f}", f"{best / ours:.1f}", f"{limit:.3f}", f"{ours / limit:.2f}"]
            )
        return made

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"device kernels, {NUMEL >> 20} Mi floats, ms")
        terminalreporter.write_line(
            table(["kernel", "torch", "cupy", "ours", "peer / ours", "limit", "x limit"], self.rows())
        )


def timed(benchmark: BenchmarkFixture, call: Call) -> float:
    """Median ms of a call that the device has finished."""

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(whole, rounds=ROUNDS, warmup_rounds=2)
    return float(benchmark.stats.stats.median) * 1e3


@pytest.fixture(scope="module", autouse=True)
def limit(calls: Calls, summary: Summary) -> None:
    """Bytes per ms of a copy, before all else."""
    call, nbytes = calls.copy()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    summary.copied = nbytes / sorted(times)[ROUNDS // 2]


@pytest.mark.parametrize("who", ["ours", "torch", "cupy"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("step", STEPS)
def test_codec(
    benchmark: BenchmarkFixture, calls: Calls, summary: Summary, step: str, codec: str, who: str
) -> None:
    """One cell of the table."""
    if who == "cupy" and (step != "encode" or not codec.startswith(("topk", "gtopk")) or calls.cupy is None):
        pytest.skip("cupy is not installed, or has nothing to compare with")
    call = calls.select_by_cupy() if who == "cupy" else getattr(calls, who)(step, codec)
    if call is None:
        pytest.skip(f"{codec} has no kernel that encodes a sum anew")
    what = f"{step} {codec}"
    summary.moved[what] = calls.moved(step, codec)
    summary.ms[what, who] = timed(benchmark, call)
    benchmark.extra_info.update(kernel_step=step, codec=codec, who=who, milliseconds=summary.ms[what, who])


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("step", ["pack", "unpack"])
def test_bucket(benchmark: BenchmarkFixture, calls: Calls, summary: Summary, step: str, who: str) -> None:
    """Into a bucket, and out of it."""
    what = f"{step} a bucket"
    summary.moved[what] = 8 * calls.numel
    summary.ms[what, who] = timed(benchmark, calls.bucket(step, who))
