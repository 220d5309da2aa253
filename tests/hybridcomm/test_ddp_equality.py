"""Dense gradients equal those of torch DDP over gloo, bit for bit on exact inputs, accumulation included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from hybridcomm.reducer import Reducer
from tests.conftest import MakeContexts
from tests.hybridcomm.exact_models import ExactNet
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def ours(ctx: Any) -> list[dict[str, torch.Tensor]]:
    model = ExactNet()
    reducer = Reducer(model, ctx=ctx, bucket_cap_mb=400 / (1 << 20))
    saved = []
    for step in range(3):
        model.zero_grad()
        if step == 1:
            with reducer.no_sync():
                model.loss(ctx.rank, 10 + step).backward()
        model.loss(ctx.rank, step).backward()
        reducer.finalize()
        saved.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return saved


@pytest.fixture(scope="module")
def ddp_gradients(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ddp")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-m",
        "tests.hybridcomm.ddp_worker",
        "4",
        str(folder / "store"),
        str(folder / "out"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded: list[dict[str, torch.Tensor]] = torch.load(folder / "out")
    return loaded


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("name", ["2x2", "4x1", "1x4", "2+1+1"])
def test_dense_reducer_equals_ddp(
    make_contexts: MakeContexts, ddp_gradients: list[dict[str, torch.Tensor]], name: str
) -> None:
    for saved in run_ranks(ours, make_contexts(NAMED[name])):
        for got, want in zip(saved, ddp_gradients, strict=True):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[key], want[key]) for key in want)
    assert any(bool(value.any()) for value in ddp_gradients[0].values())
