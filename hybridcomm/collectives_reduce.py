"""The collectives that combine the ranks' elements: allreduce, reduce, reduce_scatter."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridcomm import auto, collective_plans
from hybridcomm import compress as compressors
from hybridcomm.arrays import Array, view
from hybridcomm.collectives_base import CollectivesBase, scale
from hybridcomm.errors import UnsupportedError
from hybridcomm.parted import Parted, place_scattered, sizes_of
from hybridcomm.reduction import Op

if TYPE_CHECKING:
    from hybridcomm.bucket import Span
    from hybridcomm.compress import Compressor
    from hybridcomm.plan import Plan
    from hybridcomm.residual import Residual
    from hybridcomm.work import Work

__all__ = ["Reductions"]

_UNNAMED = "tensor"


class Reductions(CollectivesBase):
    """allreduce, reduce, reduce_scatter."""

    def allreduce(
        self,
        t: Array,
        *,
        op: Op = "sum",
        compress: str | Compressor | None = None,
        residual: Residual | None = None,
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
        if self._batch is not None:
            return self._batch.allreduce(t, op, plain=plain)
        if plain and self._prepared.run(t, op):
            return None
        target = view(t)
        name, factor = self._operation(op, target.dtype)
        compressor = auto.resolve(self, compress, numel=target.numel, dtype=target.dtype, op=name)
        if compressor is None and auto.is_auto(compress):
            residual = None  # the policy's answer for this size is dense, now and later
        if compressor is None and residual is not None:
            raise UnsupportedError("residual= needs compress=: a dense all-reduce leaves nothing behind")
        if compressor is not None:
            compressors.check_compressible(compressor, dtype=target.dtype, op=name)
        plan, program = self._program(
            ("allreduce", target.numel, target.dtype, name, str(compressor)),
            lambda: collective_plans.allreduce(
                self.topology,
                target.numel,
                dtype=target.dtype,
                op=name,
                compressor=compressor,
                chunk_nbytes=self.chunk_nbytes,
            ),
            compressor,
        )
        scale(target.dtype, target.address, target.numel, factor)
        e_in = e_out = None
        if residual is not None:
            regions = plan.residual_regions(self.rank)
            e_in, e_out = residual.stage(residual_key, numel=target.numel, regions=regions, spans=spans)
        # A lazily conjugated view looks plain to the short way.
        if plain and factor is None and not target.dtype.startswith("complex"):
            self._prepared.remember(t, op, program)
        memory = self._memory(target.dtype)
        memory.place(0, target.numel, target.address)
        memory.write_to(target)
        tensor = zlib.crc32(residual_key.encode()) if residual_key != _UNNAMED else 0
        return self._launch(program, memory, async_op, residual=(e_in, e_out), name=tensor)

    all_reduce = allreduce

    def plan_allreduce(
        self, numel: int, *, dtype: str = "float32", op: Op = "sum", compress: str | Compressor | None = None
    ) -> Plan:
        """The plan that `allreduce` would run for such a tensor: print it, check it, compare digests."""
        name, _ = self._operation(op, dtype)
        compressor = auto.resolve(self, compress, numel=numel, dtype=dtype, op=name)
        return collective_plans.allreduce(
            self.topology, numel, dtype=dtype, op=name, compressor=compressor, chunk_nbytes=self.chunk_nbytes
        )

    def reduce(self, t: Array, dst: int = 0, *, op: Op = "sum", async_op: bool = False) -> Work | None:
        """Reduces ``t`` over all ranks into rank ``dst``'s ``t``; the others' stay as they are."""
        target = view(t, written=self.rank == dst)
        name, factor = self._operation(op, target.dtype)
        plan, program = self._program(
            ("reduce", target.numel, target.dtype, name, dst),
            lambda: collective_plans.reduce(
                self.topology,
                target.numel,
                root=dst,
                dtype=target.dtype,
                op=name,
                chunk_nbytes=self.chunk_nbytes,
            ),
        )
        memory = self._memory(target.dtype)
        if self.rank == dst:
            memory.place(0, target.numel, target.address)
            memory.write_to(target)
            scale(target.dtype, target.address, target.numel, factor)
        else:
            memory.place(0, target.numel, target.address, writable=False)
            memory.keep(target)
            whole = [(0, target.numel)]
            memory.shield(plan.written_regions(self.rank) if factor is None else whole)
            if factor is not None:
                scale(target.dtype, memory.table()[0], target.numel, factor)
        return self._launch(program, memory, async_op)

    def reduce_scatter(
        self, out: Array, input_list: Sequence[Array] | Array, *, op: Op = "sum", async_op: bool = False
    ) -> Work | None:
        """Reduces ``input_list[r]`` over all ranks into rank r's ``out``; see `hybridcomm.reduce_scatter`."""
        if not isinstance(input_list, (list, tuple)):
            return self.reduce_scatter_tensor(out, input_list, op=op, async_op=async_op)
        own = view(out, "out")
        parts = self._views(input_list, "input_list", like=own, written=False)
        if parts[self.rank].numel != own.numel:
            raise UnsupportedError(
                f"input_list[{self.rank}] has {parts[self.rank].numel} elements, this rank's out {own.numel}"
            )
        return self._reduce_scatter([Parted(own=own, parts=tuple(parts))], op, async_op)

    def reduce_scatter_tensor(
        self, out: Array, t: Array, *, op: Op = "sum", async_op: bool = False
    ) -> Work | None:
        """Reduces ``t`` (world_size x out.numel() elements) over all ranks; rank r gets part r in ``out``."""
        own, whole = view(out, "out"), view(t, "t", written=False)
        parts = self._equal_parts(whole, own, ("t", "out"))
        return self._reduce_scatter([Parted(own=own, parts=tuple(parts))], op, async_op)

    def _reduce_scatter(
        self, entries: Sequence[Parted], op: Op, async_op: bool, *, packed: Sequence[Parted] = (), name: int = 0
    ) -> Work | None:
        """Of ``packed`` tensors in one message, and of the others; inputs are left as they were."""
        if self._batch is not None:
            return self._batch.reduce_scatter(entries, op, async_op=async_op)
        dtype = (*entries, *packed)[0].own.dtype
        op_name, factor = self._operation(op, dtype)
        if factor is not None:
            entries, packed = [], [*packed, *entries]  # a factor is for copies alone
        sizes = sizes_of(packed, entries)
        plan, program = self._program(
            ("reduce_scatter", sizes, dtype, op_name),
            lambda: collective_plans.reduce_scatter(
                self.topology,
                sum(map(sum, sizes)),
                dtype=dtype,
                op=op_name,
                segments=sizes,
                chunk_nbytes=self.chunk_nbytes,
            ),
        )
        memory = self._memory(dtype)
        place_scattered(memory, packed, entries, self.rank)
        memory.shield(plan.written_regions(self.rank))
        if factor is not None:
            scale(dtype, memory.table()[0], plan.numel, factor)
        return self._launch(program, memory, async_op, name=name)
