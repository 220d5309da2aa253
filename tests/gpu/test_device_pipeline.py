"""Pipelines on simulated GPUs: the host backend's bits after each step, and planted bugs that are noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from hybridcomm.topology import Topology
from model.config import ModelConfig
from tests.gpu.device_training import compared
from train import backend_hybrid
from train.batch import Packed
from train.config import TrainConfig
from train.pipeline import PipelineSchedule
from train.pipeline.runtime import Step
from train.pipeline.stages import PipelineRuntime

pytestmark = [pytest.mark.xdist_group("gpu-engine"), pytest.mark.timeout(600)]

CONFIG = TrainConfig(
    model=ModelConfig(dim=32, layers=4, max_len=16, dropout=0.1), pp=2, microbatches=4, outer="dp"
)


def scheduled(schedule: str, **changes: object) -> TrainConfig:
    chunks = 2 if schedule == "interleaved" else None
    return CONFIG.model_copy(update={"schedule": schedule, "chunks": chunks, **changes})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"])
def test_every_schedule_gives_the_cpus_bits(schedule: str) -> None:
    """A pipeline per node, and replicas of it on both, which reduce buckets in the cooldown."""
    results, reports = compared(scheduled(schedule), Topology.virtual(2, 2), steps=6, seed=4)
    assert results == [[]] * 4
    assert reports == []


def test_twenty_steps_give_the_cpus_bits() -> None:
    """The stages' replicas are within nodes, the pipelines span them."""
    results, reports = compared(
        scheduled("1f1b", outer="pp", compress="none"), Topology.virtual(2, 2), steps=20, seed=7
    )
    assert results == [[]] * 4
    assert reports == []


@contextmanager
def lists_of_hosts() -> Iterator[None]:
    """In no one order, which nobody has checked."""
    real = backend_hybrid.lower

    def lower(*given: Any, rendezvous: bool, **named: Any) -> PipelineSchedule:
        return real(*given, **named)

    with mock.patch.object(backend_hybrid, "lower", lower), mock.patch.object(backend_hybrid, "check"):
        yield


def one_room(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """All that a rank receives comes to the same memory."""
    rooms: dict[Any, Tensor] = {}

    def room(self: PipelineRuntime, batch: Packed, stage: int) -> Tensor:
        made = real(self, batch, stage)
        return rooms.setdefault((id(self), made.shape), made)

    return room


PLANTED: dict[str, Callable[[], Any]] = {
    "nobody waits for messages": lambda: mock.patch.object(Step, "wait", return_value=None),
    "what is received overwrites what is in use": lambda: mock.patch.object(
        PipelineRuntime, "room", one_room(PipelineRuntime.room)
    ),
    "lists of hosts": lists_of_hosts,
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_noticed(bug: str) -> None:
    with PLANTED[bug]():
        results, reports = compared(
            scheduled("gpipe"),
            Topology.virtual(1, 2),
            steps=2,
            seed=1,
            patience_ms=4000,
            return_exceptions=True,
        )
    assert results != [[]] * 2 or reports
    if bug == "lists of hosts":
        assert any(line.startswith("deadlock") for line in reports)
