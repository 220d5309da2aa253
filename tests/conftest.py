"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridcomm.topology import Topology
from tests.engine_contexts import make_engine_contexts
from tests.fake_context import make_fake_contexts
from tests.floor import pytest_configure, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401
from tests.ranks import run_ranks

MakeContexts = Callable[[Topology], list[Any]]


@pytest.fixture(params=["fake", "engine"])
def make_contexts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeContexts]:
    """``make_contexts(topology)``: a list of contexts, one per rank, for ranks that are threads.

    Every test that takes it runs twice: on the interpreter (the oracle) and on the real engine.
    """
    made: list[list[Any]] = []

    def make(topology: Topology) -> list[Any]:
        if request.param == "fake":
            return make_fake_contexts(topology)
        folder = tmp_path / f"store{len(made)}"
        folder.mkdir()
        made.append(make_engine_contexts(topology, folder))
        return made[-1]

    yield make
    for contexts in made:
        run_ranks(lambda context: context.close(), contexts, return_exceptions=True)
