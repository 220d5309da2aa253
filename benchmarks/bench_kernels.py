"""Host kernels of steps 4 and 6, every codec beside its peer: ``pytest benchmarks/bench_kernels.py``.

Peers are what one would write in torch (`benchmarks.codec_peers`). The limit is a plain pass over the same
memory in the same run: for step 4 one copy and one more read of 64 MiB, for step 6 one fill; the payload's own bytes
come on top. One pass with prefetching can beat a copy and a read one after the other, so a share below 1 is no error.
Everything on one thread, residual double-buffered; ms per call, medians of fixed rounds, and in the last
two columns the fastest round of ours and of the limit. ``-k int8`` takes one codec, ``-k encode`` one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.codec_peers import PEERS
from benchmarks.table import table
from hybridcomm.kernels import host, parse

NUMEL = 1 << 24
ROUNDS = 7
PAYLOADS = 2
STEPS = ("encode", "decode")
WHO = ("peer", *host.available_isas())

Call = Callable[[], object]


def _aligned(numel: int) -> npt.NDArray[np.float32]:
    store = np.zeros(4 * numel + 64, np.uint8)
    start = -store.ctypes.data % 64
    return store[start : start + 4 * numel].view(np.float32)


class Data:
    """A gradient and a residual of 64 MiB each, buffers, and what was measured: (step, codec, who) -> ms."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.grad, self.e_in, self.e_out, self.out = (_aligned(NUMEL) for _ in range(4))
        scale = np.exp(rng.standard_normal(NUMEL // 64, dtype=np.float32)).repeat(64)
        self.grad[:] = rng.standard_normal(NUMEL, dtype=np.float32) * scale  # uneven, as gradients are
        self.e_in[:] = rng.standard_normal(NUMEL, dtype=np.float32)
        self.medians: dict[tuple[str, str, str], float] = {}
        self.fastest: dict[tuple[str, str, str], float] = {}

    def limit(self, step: str) -> Call:
        if step == "encode":
            return lambda: (np.copyto(self.e_out, self.grad), np.max(self.e_in))
        return lambda: self.out.fill(0.0)

    def peer(self, step: str, codec: str) -> Call:
        grad, e_in, e_out, out = map(torch.from_numpy, (self.grad, self.e_in, self.e_out, self.out))
        peer = PEERS[codec]
        if step == "encode":
            return lambda: peer.encode(grad, e_in, e_out)
        code = peer.encode(grad, e_in, e_out)
        return lambda: (out.zero_(), [peer.decode_add(code, out) for _ in range(PAYLOADS)])

    def ours(self, step: str, codec: str, isa: str) -> Call:
        spec = parse(codec)
        payload = np.zeros(spec.nbytes(NUMEL), np.uint8)
        if step == "encode":
            return lambda: host.encode(spec, self.grad, self.e_in, self.e_out, payload, isa=isa)
        host.encode(spec, self.grad, self.e_in, self.e_out, payload)
        payloads = [payload.copy() for _ in range(PAYLOADS)]
        return lambda: host.decode(spec, payloads, self.out, 0.5, isa=isa)


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest) -> Iterator[Data]:
    """One thread for torch; the inputs are made once, the table is printed at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Data()
    request.config.pluginmanager.register(Summary(made))
    yield made
    torch.set_num_threads(before)


class Summary:
    """Prints one table a step when all is done."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for step in STEPS:
            terminalreporter.section(f"{step}, {NUMEL >> 20} Mi floats, one thread")
            terminalreporter.write_line(_table(step, self._data))


def _table(step: str, data: Data) -> str:
    """ms of peer and ours, how many times faster ours is, and how many times slower than the limit."""
    limit = data.medians.get((step, "", "limit"), float("nan"))
    best = host.available_isas()[-1]
    rows = []
    for codec, peer in PEERS.items():
        mine = {who: data.medians.get((step, codec, who), float("nan")) for who in WHO}
        if (step, codec, best) not in data.medians:
            continue
        ours, fastest = mine[best], data.fastest[step, codec, best]
        cells = [f"{mine[who]:.2f}" for who in WHO]
        share = [f"{mine['peer'] / ours:.1f}", f"{limit:.2f}", f"{ours / limit:.2f}"]
        share += [f"{fastest:.2f}", f"{data.fastest.get((step, '', 'limit'), float('nan')):.2f}"]
        rows.append([str(parse(codec)), peer.name, *cells, *share])
    return table(
        ["codec", "peer", "ms", *WHO[1:], "peer / ours", "limit", "x limit", "fastest", "of limit"], rows
    )


def _measure(benchmark: BenchmarkFixture, data: Data, key: tuple[str, str, str], call: Call) -> None:
    step, codec, who = key
    benchmark.group = f"{step} {codec} {NUMEL >> 20} Mi floats"
    benchmark.pedantic(call, rounds=3 if who == "peer" else ROUNDS, warmup_rounds=1)
    data.medians[key] = benchmark.stats.stats.median * 1e3
    data.fastest[key] = benchmark.stats.stats.min * 1e3
    benchmark.extra_info.update(kernel_step=step, codec=codec, who=who, milliseconds=data.medians[key])


@pytest.mark.parametrize("step", STEPS)
def test_limit(benchmark: BenchmarkFixture, data: Data, step: str) -> None:
    """What memory allows."""
    _measure(benchmark, data, (step, "", "limit"), data.limit(step))


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("codec", PEERS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.timeout(300)
def test_kernel(benchmark: BenchmarkFixture, data: Data, step: str, codec: str, who: str) -> None:
    """One cell of the table."""
    call = data.peer(step, codec) if who == "peer" else data.ours(step, codec, who)
    _measure(benchmark, data, (step, codec, who), call)
