"""The collectives of a group of ranks: from a caller's arrays to a plan, and from the plan to the engine.

In: arrays, the operation, the compressor. Out: a program of the group's plan cache, run on its engine.

    collectives_base.py     plan cache, launch        collectives_reduce.py   reduce, reduce_scatter
    memory.py, parted.py    whose memory is where     collectives_copy.py     broadcast, all_gather, gather, ...
    coalesce.py             several calls as one      here                    allreduce, barriers
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridcomm import auto, collective_plans
from hybridcomm import compress as compressors
from hybridcomm.arrays import Array, view
from hybridcomm.coalesce import Coalescing
from hybridcomm.collectives_base import scale
from hybridcomm.collectives_copy import Copies
from hybridcomm.collectives_reduce import Reductions
from hybridcomm.errors import StallError, UnsupportedError
from hybridcomm.reduction import Op

if TYPE_CHECKING:
    from hybridcomm.bucket import Span
    from hybridcomm.compress import ByLink, Compressor
    from hybridcomm.plan import Plan
    from hybridcomm.residual import Residual
    from hybridcomm.work import Work

    _Active = tuple[Compressor | None, Compressor | None]

__all__ = ["Collectives", "Op"]

_UNNAMED = "tensor"


class Collectives(Reductions, Copies):
    """What a rank can do together with the others of its group."""

    def allreduce(
        self,
        t: Array,
        *,
        op: Op = "sum",
        compress: ByLink = None,
        residual: Residual | None = None,
        exchange: str = "auto",
        async_op: bool = False,
        residual_key: str = _UNNAMED,
        spans: Sequence[Span] | None = None,
    ) -> Work | None:
        """Reduces ``t`` over all ranks, in place; see `hybridcomm.allreduce`.

        ``residual_key`` and ``spans`` name the tensor and its parameters within ``residual``, for callers
        that keep one `Residual` for many buckets. The name rides in every header too, so that ranks which mix
        up tensors of one shape get an error.
        """
        plain = compress is None and residual is None and residual_key is _UNNAMED and not async_op
        plain = plain and exchange == "auto"
        if plain and self.again(t, op):
            return None
        if self._batch is not None:
            self._batch.allreduce(t, op, plain=plain)
            return None
        target = view(t)
        name, factor = self._operation(op, target.dtype)
        active, exchange = self._active(compress, target.numel, target.dtype, name, exchange)
        compressing = [codec for codec in active if codec is not None]
        if not compressing and auto.is_auto(compressors.by_link(compress).inter_node):
            residual = None  # the policy's answer for this size is dense, now and later
        if not compressing and residual is not None:
            raise UnsupportedError("residual= needs compress=: a dense all-reduce leaves nothing behind")
        for codec in compressing:
            compressors.check_compressible(codec, dtype=target.dtype, op=name)
            if residual is not None:
                compressors.check_feedback(codec, residual)
        plan, program = self._program(
            ("allreduce", target.numel, target.dtype, name, *map(str, active), active, exchange),
            lambda: self._plan_allreduce(target.numel, target.dtype, name, active, exchange),
            *active,
        )
        scale(target.dtype, target.address, target.numel, factor)
        staged = None
        if residual is not None:
            regions = plan.residuals(self.rank)
            staged = residual.prepare(residual_key, numel=target.numel, regions=regions, spans=spans)
        # A lazily conjugated view looks plain to the short way.
        if plain and factor is None and not target.dtype.startswith("complex"):
            self._prepared.remember(t, op, program)
        memory = self._memory(target.dtype)
        memory.place(0, target.numel, target.address)
        memory.write_to(target)
        tensor = zlib.crc32(residual_key.encode()) if residual_key != _UNNAMED else 0
        return self._launch(program, memory, async_op, staged=staged, name=tensor)

    all_reduce = allreduce

    def again(self, t: Array, op: Op) -> bool:
        """Reduces ``t`` as a plain blocking call did an array like it before; False: there was none, nothing is done.

        The short way: what else there is to look at takes as long as a small all-reduce.
        """
        return self._prepared.run(t, op)

    def plan_allreduce(
        self,
        numel: int,
        *,
        dtype: str = "float32",
        op: Op = "sum",
        compress: ByLink = None,
        exchange: str = "auto",
    ) -> Plan:
        """The plan that `allreduce` would run for such a tensor: print it, check it, compare digests."""
        name, _ = self._operation(op, dtype)
        active, exchange = self._active(compress, numel, dtype, name, exchange)
        return self._plan_allreduce(numel, dtype, name, active, exchange)

    def _active(
        self, compress: ByLink, numel: int, dtype: str, op: str, exchange: str
    ) -> tuple[_Active, str]:
        """(compressors between nodes and inside a node, exchange) of a call."""
        links = compressors.by_link(compress)
        codec, exchange = auto.resolve(
            self, links.inter_node, numel=numel, dtype=dtype, op=op, exchange=exchange
        )
        return (codec, links.intra_node), exchange

    def _plan_allreduce(self, numel: int, dtype: str, op: str, active: _Active, exchange: str) -> Plan:
        return collective_plans.allreduce(
            self.topology,
            numel,
            dtype=dtype,
            op=op,
            compressor=active[0],
            intra=active[1],
            exchange=exchange,
            chunk_nbytes=self.chunk_nbytes,
        )

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
