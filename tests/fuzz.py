"""libFuzzer on every decoder and on the framings that read from the network: ``python -m tests.fuzz``, ``make fuzz``.

Needs clang. Each codec that the kernels have gets a target of its own (found by asking them), as do the frames of
data links, the handshake, the control channel and point-to-point messages: see tests/csrc/fuzz_*.cpp. The same is done
to copies of the sources with a bug planted, which must be found. Exit code 0 when all targets ran clean and every
planted bug was found.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hybridcomm.kernels.payload import Codec
from tests import native
from tests.fuzz_mutants import MUTANTS, Mutant

__all__ = ["CLANG", "Result", "Target", "fuzz", "hunt", "main", "prepare", "table"]

CLANG = shutil.which("clang++") or ""
FOLDER = native.ROOT / "build" / "fuzz"
SANITIZE = "fuzzer-no-link,address,undefined"
FRAMINGS = ("link", "handshake", "control", "messages")
# Freed memory is kept back to catch late uses of it; the default of 256 MiB outgrows the caches.
_ASAN = "quarantine_size_mb=4:detect_stack_use_after_return=0"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing to fuzz: a program of a build folder, its arguments, and the inputs it starts from."""

    name: str
    program: Path
    arguments: tuple[str, ...] = ()
    seeds: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run of a target came to; ``output`` is the end of what it printed."""

    name: str
    passed: bool
    executions: int
    seconds: float
    coverage: int = 0
    output: str = ""


def prepare(folder: Path = FOLDER, *, source: Path = native.ROOT) -> list[Target]:
    """Builds the fuzz programs and writes the seeds; the targets, decoders first."""
    if not CLANG:
        raise RuntimeError("fuzzing needs clang++: on Debian or Ubuntu, apt-get install clang")
    build = folder / "clang"
    native.configure(build, source=source, sanitize=SANITIZE, compiler=CLANG)
    native.build(build, "hybridcomm_fuzz")
    seeds = folder / "seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    subprocess.run([build / "hybridcomm_fuzz_seeds", seeds], check=True, timeout=120)
    codes = sorted(int(path.name) for path in seeds.iterdir())
    decoders = [
        Target(
            name=f"decode {Codec(code).name.lower()}",
            program=build / "hybridcomm_fuzz_decode",
            arguments=(f"--codec={code}",),
            seeds=seeds / str(code),
        )
        for code in codes
    ]
    return decoders + [Target(name=name, program=build / f"hybridcomm_fuzz_{name}") for name in FRAMINGS]


def run(target: Target, folder: Path, *limits: str, timeout: float) -> Result:
    """One target under libFuzzer's own ``limits``, such as ``-runs=1000``; inputs that crash are kept in ``folder``."""
    crashes = folder / "crashes"
    crashes.mkdir(parents=True, exist_ok=True)
    prefix = f"{crashes}/{target.name.replace(' ', '-')}-"
    # A single input may take long on a busy machine, but none may hang.
    options = ["-max_len=4096", "-timeout=60", "-rss_limit_mb=1500", "-print_final_stats=1"]
    command = [target.program, *target.arguments, *options, f"-artifact_prefix={prefix}", *limits]
    if target.seeds is not None:
        command.append(target.seeds)
    begin = time.monotonic()
    done = subprocess.run(
        command,
        env={**os.environ, "ASAN_OPTIONS": _ASAN},
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    return Result(
        name=target.name,
        passed=done.returncode == 0,
        executions=int(executed[1]) if executed else 0,
        seconds=time.monotonic() - begin,
        coverage=int(covered[-1]) if covered else 0,
        output="\n".join(done.stderr.splitlines()[-60:]),
    )


def fuzz(
    targets: Sequence[Target], *, seconds: float = 60, runs: int = 0, jobs: int = 2, folder: Path = FOLDER
) -> list[Result]:
    """Every target for ``seconds``, or for ``runs`` executions each where that is given; ``jobs`` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return [each.result() for each in start(pool, targets, seconds=seconds, runs=runs, folder=folder)]


def start(
    pool: Executor, targets: Sequence[Target], *, seconds: float, runs: int, folder: Path = FOLDER
) -> list[Future[Result]]:
    """As `fuzz`, in a pool that does other things too."""

    def one(target: Target) -> Result:
        limits = [f"-runs={runs}"] if runs else [f"-max_total_time={seconds:g}"]
        # Slower than this many a second is a hang of the whole.
        result = run(target, folder, *limits, timeout=300 + (runs / 100 if runs else seconds))
        speed = result.executions / max(result.seconds, 1e-3)
        verdict = "clean" if result.passed else "FAILED"
        print(
            f"{result.name:16} {result.executions:>12,} executions {result.seconds:6.0f} s "
            f"{speed:>9,.0f}/s  {result.coverage:>5} edges  {verdict}",
            flush=True,
        )
        return result

    return [pool.submit(one, target) for target in targets]


def plant(source: Path, mutant: Mutant) -> tuple[Path, str]:
    """Plants the bug in a copy of the sources: (the changed file, its text before)."""
    files = [path for path in sorted((source / mutant.folder).iterdir()) if path.suffix in (".cpp", ".h")]
    found = [(path, text) for path in files if mutant.before in (text := path.read_text())]
    if len(found) != 1 or found[0][1].count(mutant.before) != 1:
        raise RuntimeError(f"{mutant.what}: {mutant.before!r} is not there exactly once, so plant it anew")
    path, text = found[0]
    path.write_text(text.replace(mutant.before, mutant.after))
    return path, text


def hunt(mutants: Sequence[Mutant], *, seconds: float = 60, folder: Path = FOLDER) -> list[Result]:
    """The negative control: each planted bug must be found within ``seconds``; passed means found."""
    planted = folder / "planted"
    shutil.rmtree(planted, ignore_errors=True)
    source = native.copy_sources(planted / "source")
    results = []
    for mutant in mutants:
        path, text = plant(source, mutant)
        targets = {target.name: target for target in prepare(planted, source=source)}
        found = run(
            targets[mutant.target], planted, f"-max_total_time={seconds:g}", "-seed=1", timeout=300 + seconds
        )
        path.write_text(text)
        caught = not found.passed and found.executions > 0
        verdict = f"found after {found.executions:,} executions" if caught else "NOT FOUND"
        print(f"planted: {mutant.what}: {verdict}", flush=True)
        results.append(
            Result(
                name=mutant.what,
                passed=caught,
                executions=found.executions,
                seconds=found.seconds,
                output=found.output,
            )
        )
    return results


def table(results: Sequence[Result], planted: Sequence[Result]) -> str:
    """Markdown for the verification report."""
    lines = ["| target | executions | seconds | edges covered | outcome |", "|---|---:|---:|---:|---|"]
    lines += [
        f"| {r.name} | {r.executions:,} | {r.seconds:.0f} | {r.coverage} | {'clean' if r.passed else '**FAILED**'} |"
        for r in results
    ]
    if planted:
        lines += ["", "| planted bug | found after | seconds |", "|---|---:|---:|"]
    lines += [
        f"| {r.name} | {f'{r.executions:,} executions' if r.passed else '**not found**'} | {r.seconds:.0f} |"
        for r in planted
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each target (%(default)s)")
    parser.add_argument("--runs", type=int, default=0, help="executions of each target, instead of a time")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="TARGET", help="such as 'decode topk' or link; decoders, framings, none"
    )
    parser.add_argument(
        "--planted", choices=["none", "one", "all"], default="one", help="bugs to plant and find"
    )
    parser.add_argument("--markdown", type=Path, help="file for the table of results")
    options = parser.parse_args(arguments)
    try:
        targets = prepare()
    except RuntimeError as error:
        print(f"fuzz: nothing ran: {error}")
        return 2
    names = [target.name for target in targets]
    groups = {"none": [], "framings": list(FRAMINGS), "decoders": names[: -len(FRAMINGS)]}
    wanted = {name for asked in options.only or names for name in groups.get(asked, [asked])}
    if unknown := wanted - set(names):
        parser.error(f"no target {sorted(unknown)}; there are {names}, and {list(groups)}")
    chosen = [target for target in targets if target.name in wanted]
    mutants = MUTANTS[: {"none": 0, "one": 1, "all": len(MUTANTS)}[options.planted]]
    with ThreadPoolExecutor(options.jobs) as pool:
        running = start(pool, chosen, seconds=options.seconds, runs=options.runs)
        hunting = pool.submit(hunt, mutants)  # while the last targets run
        results, planted = [each.result() for each in running], hunting.result()
    for result in (*results, *planted):
        if not result.passed:
            print(f"\n== {result.name}\n{result.output}")
    if options.markdown is not None:
        options.markdown.write_text(table(results, planted) + "\n", encoding="utf-8")
    failed = [result.name for result in (*results, *planted) if not result.passed]
    total = sum(result.executions for result in results)
    outcome = f"FAILED: {', '.join(failed)}" if failed else "all clean"
    print(f"fuzz: {len(results)} targets, {total:,} executions, {len(planted)} planted bugs found; {outcome}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
