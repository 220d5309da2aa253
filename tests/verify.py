"""The long run, ``make verify``: everything, property tests under more seeds, sanitizers; writes a dated report.

``python -m tests.verify [--only NAME ...] [--fuzz-runs N] [--report FILE]``; exit code 0 when every step passed. The
report is written after each step, which is stamped with the commit it ran on. Steps that are in it already and are not
run again stay while nothing that they are about has changed since. A report goes stale: `tests.verify_report` says by
how much.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.verify_report import REPORT, ROOT, Outcome, git, kept, report

__all__ = ["STEPS", "main"]

SEEDS = 5
SOAK_OPERATIONS = 10_000
FUZZ_RUNS = 10_000_000
DECODERS = {
    "casts": ("fp16", "bf16", "fp8"),
    "quantisers": ("int8", "int4", "sign1"),
    "blocks": ("topk", "gtop1"),
    "shards": ("gtopk", "randk", "powersgd"),
}
"""Steps that fuzz decoders, a quarter of an hour each, and the codecs of each."""
EVERYTHING = (".", ":(exclude)docs/verify-report.md")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to run, given where Markdown for the report may be written; returns (passed, what was printed).

    ``about``: what the outcome depends on, as git's pathspecs.
    """

    what: str
    run: Callable[[argparse.Namespace, Path], tuple[bool, str]]
    about: tuple[str, ...] = EVERYTHING


def run(command: list[str], env: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Runs a command in the checkout; whether it ended well, and what it printed (also shown as it comes)."""
    print("$", *command, flush=True)
    text = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout or ():
        print(line, end="", flush=True)
        text.append(line)
    return process.wait() == 0, "".join(text)


def pytest(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[bool, str]:
    return run([sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", *arguments], env)


def properties() -> tuple[bool, str]:
    """Hypothesis draws other examples under each seed."""
    results = [pytest("-m", "hypothesis", f"--hypothesis-seed={seed}") for seed in range(1, SEEDS + 1)]
    return all(passed for passed, _ in results), "".join(text for _, text in results)


def training() -> tuple[bool, str]:
    passed, text = run([sys.executable, "-m", "train.run"])
    lines = [line for line in text.splitlines() if "NDCG@10" in line and "popularity" in line]
    return passed, text + (" ".join(re.sub("[│┃]", " ", lines[-1]).split()) if lines else "no result")


def sanitizers(*tests: str) -> tuple[bool, str]:
    return pytest(*(f"tests/hybridcomm/{test}" for test in tests), env={"HYBRIDCOMM_SANITIZERS": "1"})


def fuzz_step(what: str, *targets: str, about: tuple[str, ...], planted: str = "none") -> Step:
    def fuzz(options: argparse.Namespace, details: Path) -> tuple[bool, str]:
        command = [sys.executable, "-m", "tests.fuzz", "--runs", str(options.fuzz_runs), "--only", *targets]
        command += ["--planted", planted, "--jobs", str(len(os.sched_getaffinity(0)))]
        return run([*command, "--markdown", str(details)])

    return Step(what=what, run=fuzz, about=(*about, "tests/fuzz.py"))


def soak() -> tuple[bool, str]:
    return run([sys.executable, "-m", "tests.soak", "--operations", str(SOAK_OPERATIONS)])


def libraries(details: Path) -> tuple[bool, str]:
    return run([sys.executable, "-m", "tests.gpu.real_libraries", "--markdown", str(details)])


DEVICE = ("kernels/triton", "kernels/cuda", "kernels/cubins", "kernels/device*.py", "kernels/instructions.py")
DECODING = (
    ":(glob)kernels/**/*.cpp",
    ":(glob)kernels/**/*.h",
    "CMakeLists.txt",
    "tests/csrc/codec_table.h",
    "tests/csrc/fuzz.h",
    ":(glob)tests/csrc/fuzz_decode.*",
    "tests/csrc/fuzz_seeds.cpp",
)
"""All that programs which fuzz decoders are made of: nothing of the engine is among it."""
NATIVE = (
    *DECODING,
    ":(glob)hybridcomm/csrc/**",
    ":(exclude)hybridcomm/csrc/bind*",
    ":(exclude)hybridcomm/csrc/gpu_*",  # in none of the programs
    "tests/csrc",
)
LIBRARY = (
    "hybridcomm",
    "kernels",
    "CMakeLists.txt",
    ":(glob)tests/*.py",
    "tests/csrc",
    "tests/hybridcomm",
    *(f":(exclude){path}" for path in DEVICE),
    ":(exclude)tests/verify*.py",
    ":(exclude)tests/hybridcomm/test_engine_source_mutants.py",  # a step of its own
)
STEPS: dict[str, Step] = {
    "lint": Step(what="format, lint, types, import directions", run=lambda *_: run(["make", "lint"])),
    "tests": Step(what="the whole suite", run=lambda *_: pytest()),
    "properties": Step(what=f"property tests under {SEEDS} more seeds", run=lambda *_: properties()),
    "training": Step(what="the default training run", run=lambda *_: training()),
    "engine": Step(
        what="engine and kernels as C++ programs under ASan, UBSan and TSan, the Python module under ASan and UBSan",
        run=lambda *_: sanitizers("test_sanitizers.py"),
        about=LIBRARY,
    ),
    "bugs": Step(
        what="bugs planted in the engine's source, each found by its C++ test program",
        run=lambda *_: sanitizers("test_engine_source_mutants.py"),
        about=(*NATIVE, "tests/hybridcomm/test_engine_source_mutants.py"),
    ),
    **{
        name: fuzz_step(
            f"libFuzzer with ASan and UBSan on the decoders of {', '.join(codecs)}",
            *(f"decode {codec}" for codec in codecs),
            about=DECODING,
        )
        for name, codecs in DECODERS.items()
    },
    "framings": fuzz_step("likewise on all that is read from the network", "framings", about=NATIVE),
    "planted": fuzz_step(
        "bugs planted in decoders and framings, which fuzzing must find",
        "none",
        about=(*NATIVE, "tests/fuzz_mutants.py"),
        planted="all",
    ),
    "mutants": Step(
        what="bugs planted in the device kernels' PTX, executed on the CPU",
        run=lambda *_: pytest("tests/kernels/test_device_mutants.py", env={"HYBRIDCOMM_MUTANTS": "25"}),
        about=("kernels", "tests/kernels", "tests/ptx"),
    ),
    "orders": Step(
        what="bugs planted in the GPU engine, C++ and Python, on simulated devices; sound code under 200 seeds",
        run=lambda *_: pytest("tests/gpu/test_engine_mutants.py", env={"HYBRIDCOMM_MUTANTS": "1"}),
        about=(
            ":(glob)hybridcomm/csrc/*gpu*",
            "hybridcomm/csrc/common.*",
            ":(glob)hybridcomm/*device*.py",
            ":(glob)hybridcomm/re*.py",
            ":(glob)kernels/device*.py",
            "tests/gpu",
        ),
    ),
    "libraries": Step(
        what="real libraries without a device: NCCL of nine wheels, CUDA's driver, cupy's streams",
        run=lambda _, details: libraries(details),
        about=(
            ":(glob)hybridcomm/csrc/gpu_*",
            "hybridcomm/csrc/common.*",
            "tests/gpu/*.py",
            "tests/gpu/loader.cpp",
        ),
    ),
    "soak": Step(
        what=f"{SOAK_OPERATIONS:,} random operations, exact, nothing left behind",
        run=lambda *_: soak(),
        about=LIBRARY,
    ),
}


def perform(name: str, options: argparse.Namespace) -> Outcome:
    print(f"\n=== {name}: {STEPS[name].what}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        details = Path(folder) / "details.md"
        passed, text = STEPS[name].run(options, details)
        markdown = details.read_text(encoding="utf-8") if details.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["(nothing printed)"]
    summary = re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]).strip("= ").replace("|", "/")
    return Outcome(
        name=name,
        commit=git("rev-parse", "HEAD"),
        passed=passed,
        seconds=time.monotonic() - begin,
        summary=summary.replace(str(ROOT), "."),
        tail="" if passed else "\n".join(lines[-30:]).replace(str(ROOT), "."),
        details=markdown.strip(),
    )


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def facts() -> dict[str, str]:
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout
    changed = (
        ", with uncommitted changes"
        if git("status", "--porcelain", "--untracked-files=no", *EVERYTHING)
        else ""
    )
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "numpy")]
    return {
        "date": today(),
        "commit": (git("rev-parse", "HEAD") or "not in a git checkout") + changed,
        "processor": f"{processor[1] if processor else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.release()}, root: {'yes' if os.geteuid() == 0 else 'no'}",
        "software": f"Python {platform.python_version()}, {', '.join(versions)}, {compiler.splitlines()[0]}",
        "real data": "yes" if os.environ.get("HYBRIDCOMM_DATA") else "no (HYBRIDCOMM_DATA is not set)",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verify", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), help="steps to run")
    parser.add_argument(
        "--fuzz-runs", type=int, default=FUZZ_RUNS, help="executions per fuzz target (%(default)s)"
    )
    parser.add_argument("--report", type=Path, default=REPORT, help="file to write")
    options = parser.parse_args()
    about = facts()
    page = options.report.read_text(encoding="utf-8") if options.report.exists() else ""
    about_steps = {name: step.about for name, step in STEPS.items()}
    what = {name: step.what for name, step in STEPS.items()}
    clean = "uncommitted" not in about["commit"]
    outcomes = {outcome.name: outcome for outcome in kept(page, about_steps) if clean}
    for name in options.only:
        outcomes[name] = perform(name, options)
        every = [outcomes[step] for step in STEPS if step in outcomes]
        options.report.write_text(
            report({**about, "date": today()}, every, what),
            encoding="utf-8",
        )
    failed = [outcome.name for outcome in outcomes.values() if not outcome.passed]
    print(f"\n{options.report.name}: {f'FAILED: {failed}' if failed else 'all steps passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
