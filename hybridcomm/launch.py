"""``python -m hybridcomm.launch --nproc 4 --nodes 2 -m train.run``: ranks on this machine, on virtual nodes.

For trying things out on one machine; across machines use torchrun, SLURM or Kubernetes. Ranks meet in a
temporary directory, so no port is needed. When a rank fails, the others get a few seconds to say what they
saw (their collectives raise, naming the culprit) and are then ended; the exit code is the first failing
rank's.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from hybridcomm.errors import UnsupportedError

__all__ = ["launch", "main"]

_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def launch(
    command: Sequence[str], *, nproc: int, nodes: int | None = None, env: Mapping[str, str] | None = None
) -> int:
    """Runs ``command`` (an argument list after ``python``) as ``nproc`` ranks; returns the exit code.

    ``nodes``: virtual nodes to spread them over (default: what the machine is, one node). Raises
    `UnsupportedError` for counts that do not fit.
    """
    if nproc < 1:
        raise UnsupportedError(f"--nproc {nproc}: must be at least 1")
    if nodes is not None and not 1 <= nodes <= nproc:
        raise UnsupportedError(f"--nodes {nodes}: must be between 1 and the {nproc} ranks of --nproc")
    with tempfile.TemporaryDirectory(prefix="hybridcomm-") as directory:
        job = _Job(command, nproc, _environment(directory, nproc, nodes, env))
        with job:
            return job.wait()


def _environment(
    directory: str, nproc: int, nodes: int | None, env: Mapping[str, str] | None
) -> dict[str, str]:
    environment = {**os.environ, **(env or {})}
    environment.update(HYBRIDCOMM_STORE=directory, WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    environment.pop("HYBRIDCOMM_NODES", None)
    if nodes is not None:
        environment["HYBRIDCOMM_NODES"] = str(nodes)
    return environment


class _Job:
    def __init__(self, command: Sequence[str], nproc: int, environment: Mapping[str, str]) -> None:
        self._argv, self._nproc, self._environment = [sys.executable, *command], nproc, environment
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._signal = 0
        self._handlers: dict[int, object] = {}
        self._epoll = select.epoll()
        self._running: dict[int, int] = {}  # pidfd -> rank

    def __enter__(self) -> _Job:
        # A signal that comes just before epoll sleeps must wake it as well: a handler in Python is too late.
        self._awake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._awake, select.EPOLLIN)
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: the caller's own handlers stay
                break
        self._old_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False) if self._handlers else -1
        for rank in range(self._nproc):
            self._start(rank)
        return self

    def _start(self, rank: int) -> None:
        environment = {**self._environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        self._ranks.append(
            subprocess.Popen(self._argv, env=environment, preexec_fn=_die_with_parent)  # noqa: PLW1509
        )
        try:
            descriptor = os.pidfd_open(self._ranks[-1].pid)
        except OSError as error:
            raise UnsupportedError(
                f"hybridcomm.launch needs pidfd_open (Linux 5.3): {error}; start the ranks with torchrun"
            ) from error
        self._running[descriptor] = rank
        self._epoll.register(descriptor, select.EPOLLIN)

    def __exit__(self, *_: object) -> None:
        self._end(signal.SIGTERM, 2.0)
        self._end(signal.SIGKILL, 5.0)
        if self._handlers:
            signal.set_wakeup_fd(self._old_wake)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._epoll.close()
        for descriptor in (self._awake, self._wake, *self._running):
            os.close(descriptor)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _ended(self, limit: float | None = None) -> list[tuple[int, int]]:
        """Waits for ranks to end, ``limit`` s at most, or for a signal: (rank, code) in the order they ended.

        epoll's ready list is FIFO: descriptors stand in it in the order they became ready, and a pidfd does when
        its process ends. So the first to fail is known even when several have ended before this process ran.
        """
        ended = []
        for descriptor, _ in self._epoll.poll(limit):
            if descriptor == self._awake:
                os.read(self._awake, 4096)
                continue
            rank = self._running.pop(descriptor)
            self._epoll.unregister(descriptor)
            os.close(descriptor)
            ended.append((rank, self._ranks[rank].wait()))
        return ended

    def wait(self) -> int:
        """Until all ranks ended, one failed, or a signal came."""
        while self._running:
            ended = self._ended()
            if self._signal:
                self._end(signal.Signals(self._signal), _GRACE_S)
                return 128 + self._signal
            for rank, code in ended:
                if code:
                    return self._after_failure(rank, code)
        return 0

    def _after_failure(self, rank: int, code: int) -> int:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if code != 2:  # usage errors have said all there is to say
            print(f"hybridcomm.launch: rank {rank} {how}", file=sys.stderr, flush=True)
        deadline = time.monotonic() + _GRACE_S
        while self._running and not self._signal and (left := deadline - time.monotonic()) > 0:
            self._ended(left)
        return code if code > 0 else 128 - code

    def _end(self, number: int, limit: float) -> None:
        for rank in self._running.values():
            self._ranks[rank].send_signal(number)
        deadline = time.monotonic() + limit
        while self._running and (left := deadline - time.monotonic()) > 0:
            self._ended(left)


def _die_with_parent() -> None:
    """A killed launcher (kill -9) takes its ranks along."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _command_begin(arguments: Sequence[str]) -> int:
    """Where the launcher's own options end."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("--"):
        place += 1 if "=" in arguments[place] or arguments[place] == "--help" else 2
    return place


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybridcomm.launch", description=__doc__)
    parser.add_argument("--nproc", type=int, required=True, help="ranks to start")
    parser.add_argument(
        "--nodes", type=int, default=None, help="virtual nodes to spread them over (default: one)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script.py ARGS, or -m module ARGS")
    arguments = list(sys.argv[1:] if argv is None else argv)
    # argparse would take the command's -m for an option of its own: it only sees what stands before the command.
    split = _command_begin(arguments)
    options = parser.parse_args(arguments[:split])
    options.command = arguments[split:]
    if not options.command:
        parser.error("nothing to run: give a script, or -m and a module")
    try:
        return launch(options.command, nproc=options.nproc, nodes=options.nodes)
    except UnsupportedError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
