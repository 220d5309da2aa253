"""Runs one command on every rank, as one job: it ends as a whole, in time, with every rank's output kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from benchmarks.cluster.errors import RankFailure

__all__ = ["Job", "RankCommand", "Result"]

_GRACE = 5.0
"""Seconds the other ranks get, after one failed, to end by themselves with an error of their own."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left.

    By rank: ``exit_codes`` (negative: signal), ``stdout`` and ``stderr`` as text. By node: ``tx_bytes``,
    ``rx_bytes`` and ``tx_packets`` of its link, from the kernel's interface counters. ``seconds`` of the run,
    ``failed`` the rank that failed first (None: no rank did), ``timed_out``.
    """

    exit_codes: list[int]
    stdout: list[str]
    stderr: list[str]
    seconds: float
    tx_bytes: list[int]
    rx_bytes: list[int]
    tx_packets: list[int]
    failed: int | None = None
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Whether every rank ended with 0, in time."""
        return not self.timed_out and not any(self.exit_codes)

    def check(self) -> Result:
        """Return self, or raise RankFailure naming the rank that failed first, with its last lines."""
        if self.ok:
            return self
        if self.failed is None:
            tails = "\n".join(f"rank {r}: {_tail(self, r, 3)}" for r in range(len(self.exit_codes)))
            raise RankFailure(f"the run had not ended after {self.seconds:.0f} s and was killed\n{tails}")
        rank = self.failed
        message = (
            f"rank {rank} ended with {self.exit_codes[rank]} and the run was ended\n{_tail(self, rank, 20)}"
        )
        raise RankFailure(message, rank)


def _tail(result: Result, rank: int, lines: int) -> str:
    text = result.stderr[rank].strip() or result.stdout[rank].strip()
    return "\n".join(text.splitlines()[-lines:])


@dataclass(frozen=True, kw_only=True)
class RankCommand:
    """One rank's command line and environment, ready to start."""

    argv: Sequence[str]
    env: dict[str, str]


class Job:
    """The processes of one run.

    ``kill_inside`` kills all processes of the nodes; ``live`` prints lines as they come: ``"all"`` with rank,
    ``"first"`` rank 0's only, as they are.
    """

    def __init__(
        self, commands: Sequence[RankCommand], kill_inside: Callable[[], None], *, live: str = "none"
    ) -> None:
        self._kill_inside = kill_inside
        self._live = live
        self._out: list[list[str]] = [[] for _ in commands]
        self._err: list[list[str]] = [[] for _ in commands]
        self._pumps: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        self.failed: int | None = None
        self.timed_out = False
        try:
            for rank, command in enumerate(commands):
                self._start(rank, command)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int, command: RankCommand) -> None:
        process = subprocess.Popen(
            list(command.argv),
            env=command.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._processes.append(process)
        for source, lines, sink in (
            (process.stdout, self._out[rank], sys.stdout),
            (process.stderr, self._err[rank], sys.stderr),
        ):
            assert source is not None
            pump = threading.Thread(target=self._pump, args=(rank, source, lines, sink), daemon=True)
            pump.start()
            self._pumps.append(pump)

    def _pump(self, rank: int, source: IO[str], lines: list[str], sink: IO[str]) -> None:
        with source:
            for line in source:
                lines.append(line)
                if self._live == "all":
                    print(f"[{rank}] {line}", end="", file=sink, flush=True)
                elif self._live == "first" and rank == 0:
                    print(line, end="", file=sink, flush=True)

    def wait(self, timeout: float) -> list[int]:
        """Exit codes once all ended; kills what is left ``_GRACE`` after a failure, or at the timeout."""
        begin = time.monotonic()
        deadline = begin + timeout
        while None in [process.poll() for process in self._processes]:
            if self.failed is None:
                bad = [rank for rank, process in enumerate(self._processes) if process.returncode]
                if bad:
                    self.failed = bad[0]
                    deadline = min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() > deadline:
                self.timed_out = self.failed is None
                break
            time.sleep(0.01)
        else:
            self.failed = next((rank for rank, p in enumerate(self._processes) if p.returncode), self.failed)
        self.kill()
        for pump in self._pumps:
            pump.join(timeout=5)
        return [process.returncode for process in self._processes]

    def kill(self) -> None:
        """Kill every rank that runs, with all it started: inside first, so that parents reap."""
        self._kill_inside()
        end = time.monotonic() + 2
        while None in [process.poll() for process in self._processes] and time.monotonic() < end:
            time.sleep(0.005)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def output(self) -> tuple[list[str], list[str]]:
        """(stdout, stderr) of every rank so far."""
        return ["".join(lines) for lines in self._out], ["".join(lines) for lines in self._err]
