"""``python -m hybridcomm.selftest``: device kernels and the GPU engine on this machine's GPUs, checked and timed.

    python -m hybridcomm.selftest                                kernels, then the engine, on one GPU
    python -m hybridcomm.selftest --nproc 4                      on four, which it starts itself
    torchrun --nproc-per-node 4 -m hybridcomm.selftest engine    under any launcher, on one node or several
    python -m hybridcomm.selftest engine --nproc 4 --dry-run     says what would run; needs no GPU
    python -m hybridcomm.selftest kernels                        kernels alone

Exit code 0: all is right; 1: something is wrong; 2: nothing was checked, for there is no GPU. The output is made to be
pasted into a report.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridcomm.bench.options import nbytes_of
from hybridcomm.errors import HybridCommError, UnsupportedError
from hybridcomm.launch import launch
from hybridcomm.selftest import engine, kernels
from hybridcomm.topology import Topology

__all__ = ["main"]

_WHAT = ("all", "engine", "kernels")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hybridcomm.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for name, told in (
        ("all", "kernels, then engine; what is run without a command"),
        ("engine", "the GPU engine: conformance, orders, times"),
        ("kernels", "device kernels against the oracle, byte for byte, and their speed"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument(
            "--device",
            type=int,
            help="number of the GPU (default 0; under a launcher, the rank's)",
        )
        if name == "kernels":
            _add_kernels(command)
        else:
            _add_engine(command)
    return parser


def _add_kernels(command: argparse.ArgumentParser) -> None:
    command.add_argument("--numel", type=int, default=1 << 24, help="elements that are timed (default 2^24)")
    command.add_argument("--only", nargs="+", default=list(kernels.SPECS), help="codecs (default: all)")
    command.add_argument(
        "--jit", action="store_true", help="Triton's compiler instead of what was built ahead"
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    add, default = command.add_argument, engine.Options()
    add(
        "--nproc",
        type=int,
        metavar="N",
        help="start N ranks on this machine, a GPU each (without a launcher)",
    )
    add(
        "--nodes",
        type=int,
        nargs="+",
        default=(),
        metavar="M",
        help="virtual nodes, a run for each number (default: as it is; a single node also as two, and one per rank)",
    )
    add("--only", nargs="+", default=default.codecs, metavar="CODEC", help="codecs (default: all)")
    add("--numel", type=int, default=default.numel, help="elements of an all-reduce, a multiple of 4096")
    add("--seeds", type=int, default=default.seeds, help=f"orders of the stress (default {default.seeds})")
    add(
        "--sizes",
        type=nbytes_of,
        nargs="*",
        default=default.sizes,
        help="bytes to time, as 64K 16M; none: no times",
    )
    add("--rounds", type=int, default=default.rounds, help=f"timed rounds (default {default.rounds})")
    add("--timeout", type=float, default=default.timeout, help="s until a stall is an error (default 60)")
    add(
        "--abort", action="store_true", help="end with an abort on one rank, of which the others have to hear"
    )
    add("--report", type=Path, metavar="FILE", help="write the report to this file, too")
    add("--dry-run", action="store_true", help="list what would run, and run nothing; needs no GPU")


def _options(given: argparse.Namespace) -> engine.Options:
    world = given.nproc or int(os.environ.get("WORLD_SIZE", "1"))
    if given.numel < 4096 or given.numel % 4096:
        raise UnsupportedError(f"--numel {given.numel}: must be a multiple of 4096")
    if given.seeds < 0 or given.rounds < 1 or not given.timeout > 0:
        raise UnsupportedError("--seeds must be at least 0, --rounds at least 1, --timeout above 0")
    for count in given.nodes:
        if not 1 <= count <= world:
            raise UnsupportedError(f"--nodes {count}: must be between 1 and the {world} ranks")
    unknown = [codec for codec in given.only if codec not in kernels.SPECS]
    if unknown:
        raise UnsupportedError(
            f"--only {' '.join(unknown)}: kernels are shipped for {', '.join(kernels.SPECS)}"
        )
    return engine.Options(
        nodes=tuple(given.nodes),
        codecs=tuple(given.only),
        numel=given.numel,
        seeds=given.seeds,
        sizes=tuple(given.sizes),
        rounds=given.rounds,
        timeout=given.timeout,
        abort=given.abort,
        report=given.report,
    )


def _no_gpu() -> str:
    """Why there is nothing to check; "" where there is a GPU."""
    try:
        import torch
    except ImportError:
        return "torch is not installed: nothing was checked; pip install torch"
    if not torch.cuda.is_available():
        return (
            "no CUDA device: nothing was checked; --dry-run says what would be, docs/architecture.md what was checked "
            "without one"
        )
    return ""


def _kernels(device: int) -> tuple[int, str]:
    """Exit code and output of the kernels' self-test on this rank."""
    from hybridcomm import default

    print("kernels ...", file=sys.stderr, flush=True)
    taken = io.StringIO()
    try:
        with contextlib.redirect_stdout(taken):
            code = kernels.run(kernels.SPECS, device=device, numel=1 << 24, jit=False)
    except HybridCommError as error:
        return 1, f"{taken.getvalue()}{type(error).__name__}: {error}\n"
    finally:
        default.shutdown()
    return code, taken.getvalue()


def _run(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    device = int(os.environ.get("LOCAL_RANK", "0")) if given.device is None else given.device
    if given.what == "kernels":
        return kernels.run(given.only, device=device, numel=given.numel, jit=given.jit)
    options, launched = _options(given), "RANK" in os.environ
    if given.dry_run:
        if int(os.environ.get("RANK", "0")) == 0:
            world = given.nproc or int(os.environ.get("WORLD_SIZE", "1"))
            nodes = int(os.environ.get("HYBRIDCOMM_NODES", "1"))
            print(engine.listing(Topology.even(nodes, world), options))
        return 0
    if why := _no_gpu():
        print(why)
        return 2
    if given.nproc is not None:
        if given.device is not None:
            raise UnsupportedError("--device with --nproc: each rank has the GPU of its number")
        if launched:
            raise UnsupportedError("--nproc: a launcher has started this rank already (RANK is set)")
        return launch(["-m", "hybridcomm.selftest", *_forwarded(arguments)], nproc=given.nproc)
    done = _kernels(device) if given.what == "all" else None
    return engine.run(options, device=device, kernels=done)


def _forwarded(arguments: Sequence[str]) -> list[str]:
    """Without --nproc, which is for this process alone."""
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word == "--nproc":
            next(rest)
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0] not in _WHAT and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "all")
    parser = _parser()
    try:
        return _run(parser.parse_args(arguments), arguments)
    except UnsupportedError as error:
        parser.error(str(error))
    except HybridCommError as error:
        print(f"python -m hybridcomm.selftest: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
