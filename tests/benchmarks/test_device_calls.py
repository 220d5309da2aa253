"""What would be timed on a GPU runs, and makes what it should: a PTX executor stands in for it, numpy for cupy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.bench_device_kernels import Summary
from benchmarks.device_calls import CODECS, PAYLOADS, STEPS, Calls
from hybridcomm.kernels import parse
from hybridcomm.kernels.triton import launch_bucket
from tests.kernels.ptx_run import PtxRun

NUMEL = 8192


def calls() -> Calls:
    return Calls(device=torch.device("cpu"), numel=NUMEL, run=PtxRun(arch=90), cupy=np)


# gtopk's passes read what earlier ones wrote, which the executor has to be told: `test_selftest_kernels` does.
@pytest.mark.parametrize("codec", [codec for codec in CODECS if not codec.startswith("gtopk")])
def test_every_step_runs_ours_and_torchs(codec: str) -> None:
    made = calls()
    for step in STEPS:
        assert isinstance(made.run, PtxRun)
        before = len(made.run.launches)
        ours = made.ours(step, codec)
        assert ours is not None
        launched = len(made.run.launches)
        assert launched > before, "payloads are made by the kernels themselves"
        ours()
        assert any(step in kernel.name for kernel, _, _ in made.run.launches[launched:]), step
        made.torch(step, codec)()


@pytest.mark.parametrize("step", ["pack", "unpack"])
def test_buckets_are_moved_by_what_is_shipped(step: str) -> None:
    made = calls()
    assert isinstance(made.run, PtxRun)
    tensors: list[torch.Tensor] = []
    layout = launch_bucket.layout

    def seen(given: list[torch.Tensor], offsets: list[int]) -> launch_bucket.Bucket:
        tensors.extend(given)
        return layout(given, offsets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_bucket, "layout", seen)
        call = made.bucket(step, "ours")
    made.run.beside = tensors
    call()
    assert [kernel.name for kernel, _, _ in made.run.launches] == [f"bucket_{step}_fp32"]
    made.bucket(step, "torch")()


def test_bytes_are_those_that_have_to_move() -> None:
    payload = parse("int8").nbytes(NUMEL)
    assert calls().moved("encode", "int8") == 12 * NUMEL + payload
    assert calls().moved("decode", "int8") == 8 * NUMEL + PAYLOADS * payload
    assert calls().moved("reencode", "int8") == 8 * NUMEL + (PAYLOADS + 1) * payload
    assert calls().copy()[1] == 8 * NUMEL


def test_cupys_selection_keeps_what_it_does_not_send(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, e_in, e_out = (torch.arange(1.0, NUMEL + 1), torch.ones(NUMEL), torch.zeros(NUMEL))
    given = iter((grad, e_in, e_out))
    monkeypatch.setattr(Calls, "_random", lambda _: next(given))
    calls().select_by_cupy()()
    k = NUMEL // 100
    assert torch.equal(e_out[:-k], (grad + e_in)[:-k])
    assert not e_out[-k:].any()


def test_a_summary_has_the_best_peer_and_the_limit() -> None:
    summary = Summary()
    summary.ms = {("encode int8", "torch"): 3.0, ("encode int8", "ours"): 0.5, ("encode int8", "cupy"): 2.0}
    summary.moved, summary.copied = {"encode int8": 1000}, 4000.0
    assert summary.rows() == [["encode int8", "3.000", "2.000", "0.500", "4.0", "0.250", "2.00"]]
