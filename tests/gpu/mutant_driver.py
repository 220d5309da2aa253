"""Runs scenarios with planted bugs, each in a process of its own, forked from one that has imported everything.

    python -m tests.gpu.mutant_driver LIBSIM < jobs

A job is a line of JSON, and so is its answer: (name, what was found, seconds). The first finding ends a job. One that
does not end is killed, which is a finding too.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import NamedTuple

from hybridcomm.topology import Topology
from tests.gpu import simulation
from tests.native import ROOT

__all__ = ["Job", "findings"]

LIMIT_S = 30.0  # of a scenario, one order
HANG_S = 8.0  # of a scenario with a bug; others take one second


class Job(NamedTuple):
    """``module``: the GPU engine to use ("": the installed one); ``planted``: of `tests.gpu.device_mutants`, or "".

    ``orders``: seeds, with eager percentages. ``bug``: it is expected to end early.
    """

    name: str
    module: str
    planted: str
    scenarios: tuple[str, ...]
    orders: tuple[tuple[int, int], ...]
    bug: bool = True


def findings(library: Path, jobs: Sequence[Job]) -> dict[str, list[str]]:
    """By name, what is found; also printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.mutant_driver", str(library)],
        input="\n".join(json.dumps(job) for job in jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for name, found, seconds in answers:
        print(f"{seconds:6.1f} s  {name}: {'; '.join(line.splitlines()[0] for line in found[:2])}")
    if done.returncode or len(answers) != len(jobs):
        raise RuntimeError(f"{len(answers)} of {len(jobs)} jobs ran:\n{done.stderr[-4000:]}")
    return {name: found for name, found, _ in answers}


def _found(job: Job) -> list[str]:
    from tests.gpu.device_mutants import MUTANTS
    from tests.gpu.device_scenarios import wrongs
    from tests.gpu.engine_build import install

    if job.module:
        install(Path(job.module))
    with MUTANTS[job.planted].patch() if job.planted else nullcontext():
        for (seed, eager), name in product(job.orders, job.scenarios):
            found = wrongs(name, seed, eager, *([HANG_S] if job.bug else []))
            if found:
                return [f"{name}, seed {seed}, eager {eager}", *found[:8]]
    return []


def _run(job: Job) -> list[str]:
    """What is found, by a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = _found(job)
        except BaseException as error:
            said = [f"{type(error).__name__}: {error}"]
        os.write(writing, json.dumps([line[:2000] for line in said]).encode())
        os._exit(0)
    os.close(writing)
    answered = select.select([reading], [], [], LIMIT_S * len(job.orders) * len(job.scenarios))[0]
    answer = os.read(reading, 1 << 16) if answered else b""
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not answered:
        return ["it does not end"]
    found: list[str] = json.loads(answer) if answer else [f"it ends by signal {os.WTERMSIG(status)}"]
    return found


def main() -> None:
    simulation.library = lambda: Path(sys.argv[1])  # type: ignore[assignment]
    from tests.gpu import device_mutants, device_scenarios  # noqa: F401  (with all that they import, once)
    from tests.gpu.simulated import Simulation
    from tests.hybridcomm.test_lower_device import lowered

    Simulation().register_shipped_kernels()
    lowered(Topology.from_sizes((1, 1)), 0, 1 << 13, "topk:0.01")  # which imports much when it is first asked
    gc.collect()
    gc.freeze()  # each simulation collects: not over all that was imported
    for line in sys.stdin:
        job, begin = Job(*json.loads(line)), time.monotonic()
        found = _run(job)
        print(json.dumps([job.name, found, round(time.monotonic() - begin, 2)]), flush=True)


if __name__ == "__main__":
    main()
