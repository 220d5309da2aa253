"""Tests of the model: ranks are threads, so torch gets one thread for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hybridcomm.context import Context
from hybridcomm.topology import Topology
from tests.engine_ranks import engine_contexts


@pytest.fixture(scope="package", autouse=True)
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def contexts() -> Iterator[list[Context]]:
    """Four ranks of one node."""
    with engine_contexts(Topology.virtual(1, 4)) as made:
        yield made
