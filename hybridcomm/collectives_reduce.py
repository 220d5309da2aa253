"""The collectives that combine the ranks' elements into one rank's, or parts of them: reduce, reduce_scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridcomm import collective_plans
from hybridcomm.arrays import Array, view
from hybridcomm.collectives_base import CollectivesBase, scale
from hybridcomm.errors import UnsupportedError
from hybridcomm.parted import Parted, place_scattered, sizes_of
from hybridcomm.reduction import Op

if TYPE_CHECKING:
    from hybridcomm.work import Work

__all__ = ["Reductions"]


class Reductions(CollectivesBase):
    """reduce, reduce_scatter."""

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
        self,
        entries: Sequence[Parted],
        op: Op,
        async_op: bool,
        *,
        packed: Sequence[Parted] = (),
        name: int = 0,
    ) -> Work | None:
        """Of ``packed`` tensors in one message, and of the others; inputs are left as they were."""
        if self._batch is not None:
            self._batch.reduce_scatter(entries, op, async_op=async_op)
            return None
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
