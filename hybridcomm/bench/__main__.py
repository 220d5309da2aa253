"""Starts the ranks where no launcher has; each rank measures, rank 0 prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import hybridcomm
from hybridcomm.auto import AUTO, is_auto, policy_of
from hybridcomm.bench import report
from hybridcomm.bench.cases import COLLECTIVES, Case
from hybridcomm.bench.measure import Row, measure
from hybridcomm.bench.options import Options, parse, sizes
from hybridcomm.context import Context
from hybridcomm.errors import HybridCommError, UnsupportedError
from hybridcomm.launch import launch

__all__ = ["main"]


def _forwarded(argv: Sequence[str]) -> list[str]:
    """``argv`` without --nproc and --nodes, which are for this process alone."""
    kept: list[str] = []
    rest = iter(argv)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in ("--nproc", "--nodes"):
            kept.append(word)
        elif not equals:
            next(rest)
    return kept


def _start(options: Options, argv: Sequence[str]) -> int:
    if options.nproc is None:
        raise UnsupportedError("no launcher has started this process: give --nproc (and --nodes)")
    command = ["-m", "hybridcomm.bench", *_forwarded(argv)]
    return launch(command, nproc=options.nproc, nodes=options.nodes)


def _activity(context: Context, options: Options) -> str:
    """Requested -> active, so that a codec that cannot act does not go unnoticed."""
    if options.compress == "none":
        return "# compress: none"
    if is_auto(options.compress):
        return _comment(
            policy_of(context, options.compress).table([4 * n for n in sizes(options, multiple=1)])
        )
    plan = context.plan_allreduce(1 << 20, op="sum", compress=options.compress)
    why = "" if plan.compressor != "none" else ": one node, nothing crosses a slow link"
    return f"# compress: requested {options.compress} -> active {plan.compressor}{why}"


def _run(options: Options) -> int:
    """This rank's part; the exit code is 1 where a result was wrong."""
    rows: list[Row] = []
    with hybridcomm.Context.connect() as context:

        def say(text: str) -> None:
            if context.rank == 0:
                print(text, flush=True)

        say(f"# hybridcomm {hybridcomm.__version__}, {context.world_size} ranks on nodes {context.topology}")
        say(
            f"# nThread 1 iters {options.iters} warmup {options.warmup} check {options.checks}; time: median call"
        )
        say("# on the slowest rank, its input rewritten before; bandwidths in 10^9 bytes/s")
        if options.probe:
            return _probe(context, options, say)
        say(_activity(context, options))
        for name in options.collectives:
            say(f"#\n# {name}\n{report.header(compressed=options.compress != 'none')}")
            for numel in sizes(options, multiple=context.world_size if COLLECTIVES[name].parts else 1):
                case = Case(
                    collective=name,
                    numel=numel,
                    dtype=options.dtype,
                    op=options.op,
                    compress=options.compress,
                )
                counts = {"iters": options.iters, "warmup": options.warmup, "checks": options.checks}
                rows.append(measure(context, case, **counts))
                say(report.line(rows[-1]))
        if options.compress == "none":
            say(report.footer(rows))
        if context.rank == 0:
            _write(options, rows, context)
    return 1 if any(row.wrong for row in rows) else 0


def _probe(context: Context, options: Options, say: Callable[[str], None]) -> int:
    requested = options.compress if options.compress != "none" else AUTO
    policy = policy_of(context, requested if is_auto(requested) else f"{AUTO}:{requested}")
    figures, nbytes = policy.figures, [4 * numel for numel in sizes(options, multiple=1)]
    say(f"{_comment(str(figures))}\n#\n{policy.table(nbytes)}")
    if context.rank == 0 and options.json is not None:
        about = {
            "version": hybridcomm.__version__,
            "topology": str(figures.topology),
            "kernels": {text: asdict(cost) for text, cost in figures.kernels.items()},
            "decisions": [asdict(policy.decide(n // 4)) for n in nbytes],
        }
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    return 0


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in text.splitlines())


def _write(options: Options, rows: Sequence[Row], context: Context) -> None:
    if options.json is not None:
        about = {"version": hybridcomm.__version__, "topology": str(context.topology)}
        report.write_json(options.json, rows, world_size=context.world_size, **about)
    if options.plot is not None:
        report.write_plot(options.plot, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a wrong result or an error of the library, 2 for a wrong call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    launched = "RANK" in os.environ
    try:
        if options.plot is not None:
            report.check_plot()
        if launched and options.nproc is not None:
            raise UnsupportedError("--nproc: a launcher has started this rank already (RANK is set)")
        return _run(options) if launched else _start(options, arguments)
    except UnsupportedError as error:
        print(f"python -m hybridcomm.bench: error: {error}", file=sys.stderr)
        return 2
    except HybridCommError as error:
        print(f"python -m hybridcomm.bench: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
