"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from hybridcomm.topology import Topology
from tests.engine_ranks import close_all, make_engine_contexts
from tests.fake_context import make_fake_contexts
from tests.floor import pytest_configure, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

# Where these are set pytest explains a failed comparison by a whole diff, also one that a test expects: for payloads of
# megabytes that takes minutes, and ends with the worker at the test's timeout.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)

# A shell's background job ignores interrupts, and so would ranks that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("untimed", deadline=None)  # other work on the machine must not fail a test
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Thousands of collected tests are no garbage: a collection that looks at them anew each time takes 0.3 s."""
    gc.collect()
    gc.freeze()


MakeContexts = Callable[[Topology], list[Any]]

FACTORIES: dict[str, MakeContexts] = {"fake": make_fake_contexts, "engine": make_engine_contexts}
"""Name -> factory of one context per rank; every test that takes ``make_contexts`` runs once per entry."""


@pytest.fixture(params=list(FACTORIES))
def make_contexts(request: pytest.FixtureRequest) -> Iterator[MakeContexts]:
    """``make_contexts(topology)``: a list of contexts, one per rank, for ranks that are threads."""
    made: list[list[Any]] = []

    def make(topology: Topology) -> list[Any]:
        made.append(FACTORIES[request.param](topology))
        return made[-1]

    yield make
    for contexts in made:
        close_all([context for context in contexts if hasattr(context, "close")])
