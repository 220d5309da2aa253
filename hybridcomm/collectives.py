"""The collectives of a group of ranks: from a caller's arrays to a plan, and from the plan to the engine.

In: arrays, the operation, the compressor. Out: a program of the group's plan cache, run on its engine.

    collectives_base.py     plan cache, launch        collectives_reduce.py   allreduce, reduce, reduce_scatter
    memory.py, parted.py    whose memory is where     collectives_copy.py     broadcast, all_gather, gather, ...
    coalesce.py             several calls as one
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hybridcomm import collective_plans
from hybridcomm.coalesce import Coalescing
from hybridcomm.collectives_copy import Copies
from hybridcomm.collectives_reduce import Reductions
from hybridcomm.errors import StallError, UnsupportedError
from hybridcomm.reduction import Op

if TYPE_CHECKING:
    from hybridcomm.work import Work

__all__ = ["Collectives", "Op"]


class Collectives(Reductions, Copies):
    """What a rank can do together with the others of its group."""

    def barrier(self, *, async_op: bool = False) -> Work | None:
        """Returns on no rank before every rank has entered."""
        _, program = self._program(("barrier",), lambda: collective_plans.barrier(self.topology))
        memory, token = self._memory("int64"), np.zeros(1, np.int64)
        memory.place(0, 1, token.ctypes.data)
        memory.kept.append(token)
        return self._launch(program, memory, async_op)

    def monitored_barrier(self, timeout: float | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names who did not come; see `hybridcomm.monitored_barrier`."""
        if timeout is not None and not timeout > 0:
            raise UnsupportedError(f"timeout={timeout}: must be a positive number of seconds")
        _, program = self._program(
            ("monitored_barrier",), lambda: collective_plans.monitored_barrier(self.topology)
        )
        memory, token = self._memory("uint8"), np.zeros(self.world_size, np.uint8)
        memory.place(0, token.size, token.ctypes.data)
        try:
            self._launch(program, memory, False, timeout_s=timeout or 0.0)
        except StallError as error:
            missing = error.missing if wait_all_ranks else error.missing[:1]
            raise StallError(
                f"monitored_barrier on rank {self.rank}: ranks {', '.join(map(str, missing))} did not come "
                f"[{error}]",
                missing,
            ) from error

    def coalescing(self, *, async_op: bool = False) -> Coalescing:
        """A block whose small collectives run as one at its end; see `hybridcomm.coalescing`."""
        return Coalescing(self, async_op=async_op)
