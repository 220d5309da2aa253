"""The command line of ``python -m hybridcomm.bench``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridcomm import compress as compressors
from hybridcomm import policy
from hybridcomm.auto import is_auto
from hybridcomm.bench.cases import COLLECTIVES
from hybridcomm.bench.inputs import DTYPES, OPS
from hybridcomm.errors import HybridCommError, UnsupportedError

__all__ = ["Options", "nbytes_of", "parse", "sizes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. Sizes in bytes; ``nproc`` None: a launcher has started the ranks."""

    begin: int
    end: int
    factor: float
    iters: int
    warmup: int
    checks: int
    collectives: tuple[str, ...]
    dtype: str
    op: str
    compress: str
    json: Path | None
    plot: Path | None
    nproc: int | None
    nodes: int | None
    probe: bool


def nbytes_of(text: str) -> int:
    """Bytes as nccl-tests writes them: 4096, 64K, 1M, 1G. Raises `argparse.ArgumentTypeError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.upper())
    if match is None or (nbytes := round(float(match[1]) * _UNITS[match[2]])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write bytes such as 4096, 64K, 1M or 1G")
    return nbytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hybridcomm.bench",
        description="Times and checks the collectives; columns and options are those of nccl-tests.",
    )
    add = parser.add_argument
    add("-b", "--minbytes", type=nbytes_of, default="4K", metavar="SIZE", help="smallest size (default 4K)")
    add("-e", "--maxbytes", type=nbytes_of, default="16M", metavar="SIZE", help="largest size (default 16M)")
    add("-f", "--stepfactor", type=float, default=4.0, metavar="X", help="from size to size (default 4)")
    add("-n", "--iters", type=int, default=20, metavar="N", help="timed calls of each size (default 20)")
    add("-w", "--warmup_iters", type=int, default=5, metavar="N", help="calls before them (default 5)")
    add(
        "-c",
        "--check",
        type=int,
        default=1,
        metavar="N",
        help="checked calls after them (default 1; 0: none)",
    )
    add("--collective", metavar="NAMES", help=f"comma-separated, of {', '.join(COLLECTIVES)} (default all)")
    add("--dtype", choices=DTYPES, default="float32", help="default float32")
    add("--op", choices=tuple(OPS), default="sum", help="of collectives that reduce (default sum)")
    add(
        "--compress",
        default="none",
        metavar="CODEC",
        help="such as topk:0.01 or int8, or auto; measures allreduce",
    )
    add("--probe", action="store_true", help="print alpha, beta, kernel costs and what auto decides")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--plot", type=Path, metavar="FILE", help="draw them into this file (.png, .svg); needs matplotlib")
    add("--nproc", type=int, metavar="N", help="start N ranks on this machine (without a launcher)")
    add("--nodes", type=int, metavar="M", help="spread them over M virtual nodes (default: one)")
    return parser


def _collectives(text: str | None, compress: str) -> tuple[str, ...]:
    if text is None:
        return ("allreduce",) if compress != "none" else tuple(COLLECTIVES)
    names = tuple(text.split(","))
    for name in names:
        if name not in COLLECTIVES:
            raise UnsupportedError(f"--collective {name}: there are {', '.join(COLLECTIVES)}")
        if compress != "none" and name != "allreduce":
            raise UnsupportedError(f"--compress {compress} acts on allreduce, not on {name}")
    return names


def _check(options: Options) -> None:
    """Raises for what cannot act, before any rank is started."""
    if options.begin > options.end:
        raise UnsupportedError(f"-b {options.begin} is above -e {options.end}")
    if options.factor <= 1:
        raise UnsupportedError(f"-f {options.factor:g}: must be above 1")
    if options.iters < 1 or options.warmup < 0 or options.checks < 0:
        raise UnsupportedError("-n must be at least 1, -w and -c at least 0")
    if options.nodes is not None and options.nproc is None:
        raise UnsupportedError("--nodes needs --nproc: under a launcher, that one lays out the nodes")
    if options.probe and options.plot is not None:
        raise UnsupportedError("--plot draws times over sizes: a --probe has none")
    if is_auto(options.compress):
        return
    codec = compressors.resolve(options.compress)
    if codec is not None:
        compressors.check_compressible(codec, dtype=options.dtype, op=options.op)


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options of ``argv`` (default: the process's); ends the process with a usage error."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        options = Options(
            begin=given.minbytes,
            end=given.maxbytes,
            factor=given.stepfactor,
            iters=given.iters,
            warmup=given.warmup_iters,
            checks=given.check,
            collectives=_collectives(given.collective, given.compress),
            dtype=given.dtype,
            op=given.op,
            compress=given.compress,
            json=given.json,
            plot=given.plot,
            nproc=given.nproc,
            nodes=given.nodes,
            probe=given.probe,
        )
        _check(options)
    except HybridCommError as error:
        parser.error(str(error))
    return options


def sizes(options: Options, *, multiple: int) -> list[int]:
    """Elements of each line, ascending: powers of the factor from ``begin`` to ``end``, rounded down to
    multiples of ``multiple`` elements; sizes that round to the same are measured once.
    """
    itemsize, found, nbytes = policy.itemsize(options.dtype), [], float(options.begin)
    while nbytes <= options.end:
        found.append(int(nbytes) // itemsize // multiple * multiple)
        nbytes *= options.factor
    return [numel for numel in dict.fromkeys(found) if numel > 0]
