"""``python -m hybridcomm.selftest kernels``: device kernels on this machine's GPU, against the oracle, and their speed.

Exit code 0: all is right; 1: something is wrong; 2: nothing was checked, for there is no GPU. The output is made to be
pasted into a report.
"""

from __future__ import annotations

import argparse
import os
import sys

from hybridcomm.selftest import kernels

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybridcomm.selftest", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "kernels", help="device kernels against the oracle, byte for byte, and their speed"
    )
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    command.add_argument(
        "--device", type=int, default=rank, help="number of the GPU (default 0; under torchrun, the rank's)"
    )
    command.add_argument("--numel", type=int, default=1 << 24, help="elements that are timed (default 2^24)")
    command.add_argument("--only", nargs="+", default=list(kernels.SPECS), help="codecs (default: all)")
    command.add_argument(
        "--jit", action="store_true", help="Triton's compiler instead of what was built ahead"
    )
    options = parser.parse_args(argv)
    return kernels.run(options.only, device=options.device, numel=options.numel, jit=options.jit)


if __name__ == "__main__":
    sys.exit(main())
