"""Ranks as threads of one process: collects every rank's result or error, and never hangs."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

from hybridcomm.errors import AbortedError, PeerLostError, StallError

T = TypeVar("T")


def run_ranks(
    fn: Callable[[Any], T],
    contexts: Sequence[Any],
    *,
    timeout: float = 60.0,
    return_exceptions: bool = False,
) -> list[Any]:
    """Runs ``fn(context)`` in one thread per rank; results by rank.

    When a rank raises, all contexts are aborted, so that the others end too; then the error that came first
    is raised (one that is not a mere consequence, if there is one). ``return_exceptions``: errors take the
    place of results instead. A rank still running after ``timeout`` s fails the test, with its stack.
    """
    results: list[Any] = [None] * len(contexts)
    errors: list[tuple[int, BaseException]] = []

    def body(rank: int, context: Any) -> None:
        try:
            results[rank] = fn(context)
        except BaseException as error:
            results[rank] = error
            errors.append((rank, error))
            for each in contexts:
                if hasattr(each, "abort"):
                    each.abort()

    threads = [
        threading.Thread(target=body, args=(rank, context), name=f"rank{rank}", daemon=True)
        for rank, context in enumerate(contexts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        timeout = max(timeout, 0.1) if not thread.is_alive() else 0.1
    hung = [thread for thread in threads if thread.is_alive()]
    if hung:
        frames = sys._current_frames()
        stacks = [
            f"{thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
            for thread in hung
            if thread.ident in frames
        ]
        pytest.fail("ranks hang:\n" + "\n".join(stacks))
    if errors and not return_exceptions:
        causes = [e for _, e in errors if not isinstance(e, (AbortedError, PeerLostError, StallError))]
        raise (causes or [e for _, e in errors])[0]
    return results
