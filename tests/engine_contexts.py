"""Contexts of the real engine, one per rank, for ranks that are threads of this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridcomm.context import Context
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology
from tests.ranks import run_ranks


def make_engine_contexts(topology: Topology, folder: Path, timeout: float = 20.0) -> list[Any]:
    """Ranks meet through a store of files in ``folder`` (new); the caller closes them."""

    def connect(rank: int) -> Context:
        return Context.connect(
            topology,
            store=DirectoryStore(folder),
            rank=rank,
            world_size=topology.world_size,
            timeout=timeout,
        )

    return run_ranks(connect, list(range(topology.world_size)), timeout=timeout)
