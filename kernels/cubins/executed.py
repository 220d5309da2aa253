"""What threads execute per element of each shipped kernel, as the tests' executor of PTX has counted it.

Counted in regions whose share of headers is that of a bucket, of values drawn from a normal distribution, with two
payloads of Triton's kernels and one of CUDA C++'s where payloads are read. `tests.kernels.executed` writes the file
and holds it to what it counts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from hybridcomm.kernels.cubins.errors import KernelError

__all__ = ["FILE", "instructions", "read"]

FILE = Path(__file__).with_name("executed.json")


@functools.cache
def read(path: Path = FILE) -> Mapping[str, Mapping[int, float]]:
    """Kernel -> architecture -> instructions of PTX per element."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {name: {int(arch): count for arch, count in row.items()} for name, row in rows.items()}


def instructions(name: str, arch: int) -> float:
    """Of one kernel as it was built for ``arch``.

    Raises:
        KernelError: it was not counted.
    """
    try:
        return read()[name][arch]
    except KeyError:
        raise KernelError(
            f"{name}, sm_{arch}: not in {FILE.name}; run `python -m tests.kernels.executed`"
        ) from None
