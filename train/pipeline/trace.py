"""What one rank did in its latest steps, and when: slices on tracks, in s of this rank's clock.

instructions   each of the list, from when it had what it needs; then the optimizer
waits          for messages, head values, buckets: what is exposed
layers         collectives between the ranks that share a layer, as far as they were waited for (`TimedGroup`)
buckets        all-reduces, from when the engine came to them
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from hybridcomm.groups import Grouping

__all__ = ["TRACKS", "Recorder", "Slice", "TimedGroup"]

TRACKS = ("instructions", "waits", "layers", "buckets")


class Slice(NamedTuple):
    """``name`` is an instruction's text, or for waits that of what was waited for."""

    track: str
    name: str
    begin: float
    end: float


class Recorder:
    """Keeps the slices of the latest ``steps`` steps."""

    def __init__(self, steps: int = 8, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.steps: deque[list[Slice]] = deque(maxlen=steps)

    def begin(self) -> None:
        """A new step."""
        self.steps.append([])

    def add(self, track: str, name: str, begin: float, end: float) -> None:
        if self.steps:
            self.steps[-1].append(Slice(track, name, begin, end))


class TimedGroup:
    """A group whose collectives are timed: ``seconds`` is how long this rank has waited for them so far.

    An asynchronous one counts where it is waited for.
    """

    def __init__(self, group: Grouping, recorder: Recorder) -> None:
        self._group, self._recorder = group, recorder
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._group, name)
        if name not in ("allreduce", "all_gather", "reduce_scatter"):
            return found

        def timed(*args: Any, async_op: bool = False, **options: Any) -> Any:
            if async_op:
                return _TimedWork(found(*args, async_op=True, **options), self, name)
            return self.wait(name, lambda: found(*args, **options))

        return timed

    def wait(self, name: str, what: Callable[[], Any]) -> Any:
        begin = self._recorder.clock()
        out = what()
        end = self._recorder.clock()
        self.seconds += end - begin
        self._recorder.add("layers", name, begin, end)
        return out


class _TimedWork:
    def __init__(self, work: Any, group: TimedGroup, name: str) -> None:
        self._work, self._group, self._name = work, group, name

    def wait(self) -> None:
        self._group.wait(self._name, self._work.wait)
