"""Host kernels of steps 4 and 6 beside their peers: ``pytest benchmarks/bench_kernels.py``.

Peers: the usual torch pipeline (add, abs, topk over everything, gather, scatter) and the numpy oracle. The
limit is what memory allows, measured in the same run: for step 4 one copy and one more read of 64 MiB, for
step 6 one fill. Everything on one thread; ms per call, medians of fixed rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.table import table
from hybridcomm.kernels import TopKSpec, host, reference

NUMEL = 1 << 24
ROUNDS = 7
SPEC = TopKSpec()
PAYLOADS = 2

Call = Callable[[], object]


def _aligned(numel: int) -> npt.NDArray[np.float32]:
    store = np.zeros(4 * numel + 64, np.uint8)
    start = -store.ctypes.data % 64
    return store[start : start + 4 * numel].view(np.float32)


class Data:
    """A gradient and a residual of 64 MiB each, buffers, and payloads to decode."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.grad, self.e_in, self.e_out, self.out = (_aligned(NUMEL) for _ in range(4))
        scale = np.exp(rng.standard_normal(NUMEL // 64, dtype=np.float32)).repeat(
            64
        )  # uneven, as gradients are
        self.grad[:] = rng.standard_normal(NUMEL, dtype=np.float32) * scale
        self.e_in[:] = rng.standard_normal(NUMEL, dtype=np.float32)
        self.payload = np.zeros(SPEC.nbytes(NUMEL), np.uint8)
        host.encode(SPEC, self.grad, self.e_in, self.e_out, self.payload)
        self.medians: dict[tuple[str, str], float] = {}
        self.payloads = [self.payload.copy() for _ in range(PAYLOADS)]

    def torch_encode(self) -> None:
        acc = torch.from_numpy(self.grad) + torch.from_numpy(self.e_in)
        index = torch.topk(acc.abs(), NUMEL // 100, sorted=False).indices
        sent = acc[index]
        rest = torch.from_numpy(self.e_out)
        rest.copy_(acc)
        rest[index] = 0.0
        self.sent = (index, sent)

    def torch_decode(self) -> None:
        out = torch.from_numpy(self.out)
        for _ in range(PAYLOADS):
            out.index_add_(0, self.sent[0], self.sent[1], alpha=0.5)


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
        self._medians = data.medians

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for step in sorted({step for step, _ in self._medians}):
            terminalreporter.section(f"{step}, {NUMEL >> 20} Mi floats, {SPEC}")
            terminalreporter.write_line(_table(step, self._medians))


def _table(step: str, medians: dict[tuple[str, str], float]) -> str:
    """ms, how many times slower than the limit, and how many times faster than torch."""
    mine = {who: ms for (of, who), ms in medians.items() if of == step}
    limit, peer = mine.get("limit", float("nan")), mine.get("torch.topk", float("nan"))
    rows = [[who, f"{ms:.2f}", f"{ms / limit:.2f}", f"{peer / ms:.1f}"] for who, ms in mine.items()]
    return table(["", "ms", "x limit", "torch / this"], rows)


def _encoders(data: Data) -> dict[str, Call]:
    def ours(isa: str) -> Call:
        return lambda: host.encode(SPEC, data.grad, data.e_in, data.e_out, data.payload, isa=isa)

    return {
        "limit": lambda: (np.copyto(data.e_out, data.grad), np.max(data.e_in)),
        "torch.topk": data.torch_encode,
        "numpy oracle": lambda: reference.encode(SPEC, data.grad, data.e_in, data.e_out, data.payload),
        **{isa: ours(isa) for isa in host.available_isas()},
    }


def _decoders(data: Data) -> dict[str, Call]:
    def ours(isa: str) -> Call:
        return lambda: host.decode(SPEC, data.payloads, data.out, 0.5, isa=isa)

    return {
        "limit": lambda: data.out.fill(0.0),
        "torch.topk": lambda: (data.out.fill(0.0), data.torch_decode()),
        "numpy oracle": lambda: (
            data.out.fill(0.0),
            reference.decode_add(SPEC, data.payloads, data.out, 0.5),
        ),
        **{isa: ours(isa) for isa in host.available_isas()},
    }


WHO = ["limit", "torch.topk", "numpy oracle", *host.available_isas()]


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("step", ["encode", "decode"])
@pytest.mark.timeout(300)
def test_kernel(benchmark: BenchmarkFixture, data: Data, step: str, who: str) -> None:
    """One line of the table."""
    if who == "torch.topk" and step == "decode":
        data.torch_encode()
    call = (_encoders if step == "encode" else _decoders)(data)[who]
    benchmark.group = f"{step} {NUMEL >> 20} Mi floats"
    rounds = 1 if who == "numpy oracle" else ROUNDS
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=min(rounds - 1, 1))
    data.medians[step, who] = benchmark.stats.stats.median * 1e3
    benchmark.extra_info.update(kernel_step=step, who=who, milliseconds=data.medians[step, who])
