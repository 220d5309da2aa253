"""Shares of layers, shared optimizer state, both in pipelines, on simulated GPUs: the host's bits after each step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from hybridcomm.device_work import DeviceWork
from hybridcomm.topology import Topology
from tests.gpu.device_training import compared
from tests.gpu.test_device_pipeline import CONFIG

pytestmark = [pytest.mark.xdist_group("gpu-engine"), pytest.mark.timeout(600)]

MESHES: dict[str, dict[str, Any]] = {
    "tp": {"pp": 1, "tp": 2},
    "tp, tokens split": {"pp": 1, "tp": 2, "sequence": True},
    "pp and tp": {"tp": 2, "schedule": "1f1b", "outer": "pp"},
    "zero": {"pp": 1, "zero": 1},
    "pp and zero": {"schedule": "zbv", "outer": "pp", "zero": 1},
}
"""Of two nodes of two."""


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_cpus_bits(mesh: str) -> None:
    config = CONFIG.model_copy(update={"microbatches": 2, **MESHES[mesh]})
    results, reports = compared(config, Topology.virtual(2, 2), steps=6, seed=5)
    assert results == [[]] * 4
    assert reports == []


@pytest.mark.parametrize("mesh", ["tp", "zero"])
def test_a_stream_that_does_not_wait_is_noticed(mesh: str) -> None:
    config = CONFIG.model_copy(update={"microbatches": 2, **MESHES[mesh]})
    with mock.patch.object(DeviceWork, "wait", return_value=True):
        results, reports = compared(
            config, Topology.virtual(1, 2), steps=2, seed=5, patience_ms=4000, return_exceptions=True
        )
    assert results != [[]] * 2
    assert any(line.startswith("race") for line in reports)
