"""Real contexts for ranks that are threads of one process: shared memory inside a node, TCP between nodes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from hybridcomm import policy
from hybridcomm.context import Context
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology

TIMEOUT_S = 30.0
"""Stall timeout of contexts that no test expects to stall."""


def each_rank(fn: Callable[[int], Any], world: int, *, limit: float = 60.0) -> list[Any]:
    """Runs ``fn(rank)`` in one thread per rank; results by rank, an exception in the place of its result.

    Unlike `tests.ranks.run_ranks` nothing is aborted when a rank raises: the others must learn of it by
    themselves. A rank that has not ended after ``limit`` s fails the test.
    """
    results: list[Any] = [None] * world

    def body(rank: int) -> None:
        try:
            results[rank] = fn(rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(limit)
        if thread.is_alive():
            pytest.fail(f"rank {rank} hangs; so far: {results}")
    return results


def connect_each(
    topology: Topology,
    *,
    timeout: float = TIMEOUT_S,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
    single_copy: bool | None = True,
    directory: str | None = None,
) -> list[Any]:
    """One context per rank, or the error that rank got instead; they meet in ``directory`` (None: one that is gone)."""
    with tempfile.TemporaryDirectory(prefix="hybridcomm-test-") as passing:
        store = directory or passing
        return each_rank(
            lambda rank: Context.connect(
                topology,
                store=DirectoryStore(store),
                rank=rank,
                world_size=topology.world_size,
                timeout=timeout,
                chunk_nbytes=chunk_nbytes,
                single_copy=single_copy,
            ),
            topology.world_size,
        )


def make_engine_contexts(topology: Topology, **options: Any) -> list[Any]:
    """One context per rank; raises the first error of any."""
    contexts = connect_each(topology, **options)
    for context in contexts:
        if isinstance(context, BaseException):
            raise context
    return contexts


@contextmanager
def engine_contexts(topology: Topology, **options: Any) -> Iterator[list[Any]]:
    """As `make_engine_contexts`, closed at the end; until then ranks can meet again."""
    with tempfile.TemporaryDirectory(prefix="hybridcomm-test-") as directory:
        contexts = make_engine_contexts(topology, directory=directory, **options)
        try:
            yield contexts
        finally:
            close_all(contexts)


def close_all(contexts: Sequence[Any]) -> None:
    each_rank(lambda rank: contexts[rank].close(), len(contexts))
