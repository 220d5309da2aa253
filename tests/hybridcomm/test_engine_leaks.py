"""Connecting and closing again and again leaves no descriptor, thread or mapping; neither do errors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridcomm.context import Context
from hybridcomm.errors import BootstrapError, HybridCommError
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology
from tests.census import census
from tests.engine_ranks import connect_each, each_rank, engine_contexts

TOPOLOGY = Topology.from_sizes([2, 1])


def use(contexts: list[Any], *, fail: bool = False) -> None:
    def body(rank: int) -> None:
        array = np.ones(100 + (rank if fail else 0), np.float32)
        try:
            work = contexts[rank].allreduce(array, async_op=True)
            work.wait()
        except HybridCommError:
            assert fail

    assert each_rank(body, len(contexts)) == [None] * len(contexts)


def test_control_an_open_context_is_seen() -> None:
    before = census()
    with engine_contexts(TOPOLOGY) as contexts:
        use(contexts)
        assert all(now > then for now, then in zip(census(), before, strict=True))


@pytest.mark.parametrize("how", ["closed", "dropped", "failed"])
def test_cycles_leave_nothing(how: str) -> None:
    def cycle() -> None:
        contexts = connect_each(TOPOLOGY, chunk_nbytes=65536)
        use(contexts, fail=how == "failed")
        if how != "dropped":
            each_rank(lambda rank: contexts[rank].close(), 3)
        else:
            each_rank(lambda rank: contexts.__setitem__(rank, None), 3)

    cycle()
    before = census()
    for _ in range(200 if how == "closed" else 50):
        cycle()
    assert census() == before
    assert not [t for t in threading.enumerate() if t.name.startswith("hybridcomm")]


def test_failed_bootstraps_leave_nothing(tmp_path: Path) -> None:
    before = census()
    for _ in range(20):
        with pytest.raises(BootstrapError):
            Context.connect(store=DirectoryStore(tmp_path), rank=0, world_size=2, timeout=0.05)
    assert census() == before
