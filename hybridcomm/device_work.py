"""The handle of a collective on a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybridcomm.errors import StallError, UnsupportedError

if TYPE_CHECKING:
    from hybridcomm import _C
    from hybridcomm.stream_provider import StreamProvider

__all__ = ["DeviceWork", "handle_of"]


class DeviceWork:
    """An all-reduce, or another collective, on the engine's streams.

    `wait` makes a stream wait, and the host does not: what is put on that stream behind it finds the result. The
    tensors stay alive until the device is done, even if the handle is dropped.
    """

    def __init__(
        self,
        engine: _C.GpuEngine,
        work: _C.GpuWork,
        provider: StreamProvider,
        kept: Sequence[Any],
        *,
        wire_nbytes: int = 0,
    ) -> None:
        self._engine, self._work, self._provider, self._kept = engine, work, provider, kept
        self.wire_nbytes = wire_nbytes
        """Bytes that this rank's part of the plan sends to other nodes, framing of the network excluded."""
        self.begun = time.perf_counter()  # when it was issued
        self.seconds = 0.0  # the device's own time is not asked for: that would make the host wait

    def wait(self, stream: Any = None) -> bool:
        """``stream`` (torch's, cupy's or an address; default: the current one) goes on when the result is there.

        Raises what the engine has failed with.
        """
        self._engine.wait(self._work, self._provider.stream() if stream is None else handle_of(stream))
        return True

    def synchronize(self, timeout: float | None = None) -> None:
        """The host waits, at most ``timeout`` s (default: the context's).

        Raises `StallError` when that passed first: after the context's own timeout everything is aborted.
        """
        if not self._engine.synchronize(self._work, 1e9 if timeout is None else timeout):
            raise StallError(f"the collective was not done on the device after {timeout} s; it goes on")

    @property
    def captured(self) -> bool:
        """Whether it went into a graph, whose launches then run it: no host can wait for it."""
        return self._work.captured

    def is_completed(self) -> bool:
        """Whether the device is done with it. This alone drives nothing on, so that ranks may ask as they like: what
        has a second half is not done before somebody waits for it, or starts something else."""
        return self._engine.done(self._work)


def handle_of(stream: Any) -> int:
    """A CUstream's address: of torch's stream, cupy's, or an integer. Raises `UnsupportedError` for anything else."""
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    if isinstance(stream, int):
        return stream
    raise UnsupportedError(f"stream={stream!r}: pass torch's or cupy's stream, or a CUstream's address")
