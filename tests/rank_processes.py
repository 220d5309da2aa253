"""Ranks as real processes, started without the launcher, so that each one's end can be watched alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class RankProcesses:
    """The ranks of one job; ``logs[rank]`` holds what a rank printed, both streams."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait_for(self, rank: int, text: str, limit: float = 30.0) -> None:
        """Until a rank has printed ``text``."""
        deadline = time.monotonic() + limit
        while text not in self.log(rank):
            if time.monotonic() > deadline or self.processes[rank].poll() is not None:
                raise AssertionError(f"rank {rank} never printed {text!r}:\n{self.log(rank)}")
            time.sleep(0.01)

    def wait(self, limit: float = 60.0, *, but: Sequence[int] = ()) -> list[int | None]:
        """Exit codes by rank, once all ranks (``but`` these) have ended; fails after ``limit`` s."""
        deadline = time.monotonic() + limit
        for rank, process in enumerate(self.processes):
            if rank in but:
                continue
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} did not end in {limit} s:\n{self.log(rank)}") from None
        return [process.poll() for process in self.processes]


@contextmanager
def rank_processes(
    script: str,
    world: int,
    *,
    nodes: int | None = None,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    per_rank_env: Sequence[Mapping[str, str]] = (),
) -> Iterator[RankProcesses]:
    """Runs ``script`` (Python source) once per rank; ends whatever is left at the end, by process id."""
    with tempfile.TemporaryDirectory(prefix="hybridcomm-test-") as directory:
        base = {**os.environ, **(env or {}), "WORLD_SIZE": str(world), "PYTHONUNBUFFERED": "1"}
        base.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        (Path(directory) / "store").mkdir()
        base.setdefault("HYBRIDCOMM_STORE", str(Path(directory) / "store"))
        if nodes is not None:
            base["HYBRIDCOMM_NODES"] = str(nodes)
        logs = [Path(directory) / f"rank{rank}.log" for rank in range(world)]
        processes = []
        for rank in range(world):
            own = per_rank_env[rank] if per_rank_env else {}
            with logs[rank].open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", script, *args],
                        env={**base, "RANK": str(rank), **own},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd="/",
                    )
                )
        try:
            yield RankProcesses(processes, logs)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
