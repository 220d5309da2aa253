"""The training stack on simulated GPUs: ``train.run``'s backend and the Reducer, and the CPU's bits after each step."""

from __future__ import annotations

from typing import Any

import pytest

from hybridcomm.topology import Topology
from model.config import ModelConfig
from tests.gpu.device_training import compared
from train.config import TrainConfig
from train.errors import ConfigError

pytestmark = pytest.mark.xdist_group("gpu-engine")

CONFIG = TrainConfig(model=ModelConfig(dim=32, layers=2, max_len=16, dropout=0.1))


@pytest.mark.parametrize("compress", ["topk:0.01", "int8"])
def test_a_training_gives_the_cpus_bits(compress: str) -> None:
    config = CONFIG.model_copy(update={"compress": compress})
    results, reports = compared(config, Topology.virtual(2, 2), steps=20, seed=4)
    assert results == [[]] * 4
    assert reports == []


@pytest.mark.parametrize(
    "options",
    [
        {"pp": 2, "split_head": True},
        {"comm": "ddp", "compress": "none"},
        {"emulate": 0.1},
    ],
)
def test_what_does_not_go_with_gpus_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"cuda|GPU"):
        TrainConfig(device="cuda", **options)
