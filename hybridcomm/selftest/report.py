"""The self-test's report: markdown, made to be pasted into an issue."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcomm.bench.report import header, line
from hybridcomm.selftest.runner import FAILED, LEFT_OUT, NOT_RUN, PASSED, Result

if TYPE_CHECKING:
    from hybridcomm.selftest.rank import Rank
    from hybridcomm.selftest.timings import Exposed, Table

__all__ = ["Timed", "facts", "text", "verdict"]

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What was measured on one layout. ``notes``: what was not, and why."""

    layout: str
    tables: tuple[Table, ...] = ()
    steps: tuple[Exposed, ...] = ()
    notes: tuple[str, ...] = ()


def facts(rank: Rank) -> dict[str, str]:
    """Of this rank: host, GPU, and the libraries that are loaded; values as the report shows them."""
    import torch

    import hybridcomm

    engine = rank.device._engine
    return {
        "hybridcomm": hybridcomm.__version__,
        "Python, torch": f"{platform.python_version()}, {torch.__version__} for CUDA {torch.version.cuda}",
        "driver": f"{_driver()}; CUDA {engine.cuda_version} ({engine.cuda_path})",
        "NCCL": f"{engine.nccl_version} ({engine.nccl_path})",
        "NCCL beyond 2.18": ", ".join(engine.newer) or "nothing",
        "GPU": f"{rank.torch.name}, sm_{engine.compute_capability}",
        "host": socket.gethostname(),
    }


def _driver() -> str:
    try:
        return _DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: ").strip()
    except (OSError, IndexError):
        return f"no {_DRIVER}"


def topology_matrix() -> str:
    """``nvidia-smi topo -m`` of this host; "" where there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run(
            [command, "topo", "-m"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""


def verdict(results: Sequence[Result]) -> str:
    """One line."""
    count = Counter(result.status for result in results)
    good = not count[FAILED] and not count[NOT_RUN] and count[PASSED]
    parts = ", ".join(f"{count[status]} {status.lower()}" for status in (PASSED, FAILED, NOT_RUN, LEFT_OUT))
    return f"{'PASSED' if good else 'FAILED'}: {parts}"


def text(
    results: Sequence[Result],
    timed: Sequence[Timed],
    every: Sequence[Mapping[str, str] | None],
    *,
    kernels: Sequence[Mapping[str, Any] | None] = (),
    layouts: Sequence[str],
) -> str:
    """The whole report. ``every``: `facts` of each rank; ``kernels``: code and output of each rank's kernels."""
    parts = [
        f"# hybridcomm self-test: {verdict(results)}",
        f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}; {len(every)} ranks; layouts: {', '.join(layouts) or 'none'}",
        _machines(every),
        *_kernels(kernels),
        _failures(results),
        _cases(results),
        *(_timed(each) for each in timed),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machines(every: Sequence[Mapping[str, str] | None]) -> str:
    """What all ranks have alike once, what differs by rank."""
    known = [each for each in every if each]
    if not known:
        return "No rank has come so far that its GPU and libraries are known."
    names = list(known[0])
    alike = [name for name in names if len({each.get(name) for each in known}) == 1]
    rows = [f"| {name} | {known[0][name]} |" for name in alike]
    for rank, each in enumerate(every):
        others = [f"{name} {each[name]}" for name in names if name not in alike] if each else ["has not said"]
        if others:
            rows.append(f"| rank {rank} | {'; '.join(others)} |")
    matrix = topology_matrix()
    table = "\n".join(["| | |", "|---|---|", *rows])
    return f"{table}\n\n```\n{matrix}\n```" if matrix else table


def _kernels(said: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Rank 0's output, and that of ranks that are not right."""
    shown = [(rank, each) for rank, each in enumerate(said) if each and (rank == 0 or each["code"])]
    return [f"## Kernels, rank {rank}\n\n```\n{each['text'].rstrip()}\n```" for rank, each in shown]


def _failures(results: Sequence[Result]) -> str:
    wrong = [result for result in results if result.status == FAILED]
    blocks = [
        f"**{each.case}**, nodes {each.layout}\n\n```\n" + "\n".join(each.reasons) + "\n```" for each in wrong
    ]
    return "\n\n".join(["## Failures", *blocks]) if blocks else ""


def _cases(results: Sequence[Result]) -> str:
    """A row per case, a column per layout."""
    layouts = list(dict.fromkeys(result.layout for result in results))
    cells = {(result.case, result.layout): result for result in results}
    against = {result.case: result.against for result in results}
    rows = [
        "| case | compared with | " + " | ".join(f"nodes {_escaped(layout)}" for layout in layouts) + " |",
        "|---|---|" + "---|" * len(layouts),
    ]
    ran = {result.case for result in results if result.status != LEFT_OUT}
    for case in dict.fromkeys(result.case for result in results):
        if case in ran:
            row = (_cell(cells.get((case, layout))) for layout in layouts)
            rows.append(f"| {case} | {against[case]} | " + " | ".join(row) + " |")
    return "\n\n".join(["## Cases", "\n".join(rows), *_left_out([r for r in results if r.case not in ran])])


def _left_out(results: Sequence[Result]) -> list[str]:
    """A line for each reason, of cases that ran on no layout."""
    reasons: dict[str, dict[str, None]] = {}
    for result in results:
        reasons.setdefault("; ".join(result.reasons), {})[result.case] = None
    return [f"Left out ({why}): {'; '.join(cases)}." for why, cases in reasons.items()]


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.status in (LEFT_OUT, NOT_RUN):
        return f"{result.status}: {_escaped('; '.join(result.reasons))}"
    return f"{result.status}, {result.seconds:.2f} s"


def _escaped(words: str) -> str:
    return words.replace("|", "\\|")


def _timed(timed: Timed) -> str:
    lines = []
    for table in timed.tables:
        lossy = bool(table.rows) and table.rows[0].busbw is None
        lines += [f"# {table.title}", header(compressed=lossy), *(line(row) for row in table.rows), "#"]
    for step in timed.steps:
        share = step.exposed / step.step if step.step else 0.0
        lines.append(
            f"# a Reducer's step, {step.numel} parameters, {step.compress}: backward and communication "
            f"{step.step * 1e3:.3f} ms, of which exposed {step.exposed * 1e3:.3f} ms ({share:.0%})"
        )
    lines += [f"# {note}" for note in timed.notes]
    return f"## Times, nodes {timed.layout}\n\n```\n" + "\n".join(lines) + "\n```" if lines else ""
