"""The handle of an asynchronous collective."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hybridcomm import _C
from hybridcomm.arrays import Array
from hybridcomm.errors import StallError

if TYPE_CHECKING:
    import torch

__all__ = ["Work"]


class Work:
    """An all-reduce, or another collective, that may still be running.

    The tensors it works on stay alive until it is done, even if the handle is dropped. Read the result after
    `wait`. Works of one context finish in the order of their calls.
    """

    def __init__(
        self, work: _C.Work, tensors: Sequence[Array], *, finish: Callable[[], None] | None = None
    ) -> None:
        self._work, self._tensors, self._finish = work, tensors, finish
        self.begun = time.perf_counter()  # when it was queued
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until the result is in place; returns True.

        ``timeout`` in s bounds this wait (default: only the context's stall timeout does). Raises what the
        collective failed with, or `StallError` when ``timeout`` passed first (the collective goes on).
        """
        if not self._work.wait(1e9 if timeout is None else timeout):
            raise StallError(f"the collective was not done after {timeout} s; it goes on, so wait() again")
        with self._lock:
            finish, self._finish = self._finish, None
            if finish is not None:
                finish()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._work.is_completed()

    @property
    def wire_nbytes(self) -> int:
        """Bytes this rank sent to other nodes for it, framing included; 0 until it is done, and for messages."""
        return self._work.wire_nbytes

    @property
    def seconds(self) -> float:
        """How long the engine worked on it, waiting for peers included; 0 until it is done."""
        return self._work.seconds

    def get_future(self) -> torch.futures.Future[Any]:
        """A torch future of the list of tensors, completed by a thread that waits for this work."""
        import torch

        future: torch.futures.Future[Any] = torch.futures.Future()

        def complete() -> None:
            try:
                self.wait()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(list(self._tensors))

        threading.Thread(target=complete, name="hybridcomm-future", daemon=True).start()
        return future
