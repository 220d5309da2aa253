"""Several small collectives as one: their tensors are packed into one message, large ones stay where they lie."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridcomm import collective_plans
from hybridcomm.arrays import Array, View, view
from hybridcomm.collectives_base import scale
from hybridcomm.errors import UnsupportedError
from hybridcomm.parted import Parted
from hybridcomm.reduction import Op

if TYPE_CHECKING:
    from types import TracebackType

    from hybridcomm.collectives import Collectives
    from hybridcomm.device_coalesce import DeviceCoalescing
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.device_work import DeviceWork
    from hybridcomm.work import Work

__all__ = ["PACKED_NBYTES", "Coalescing"]

PACKED_NBYTES = 64 * 1024
"""Up to here a tensor is copied into the common message: twice a copy costs less than a message of its own."""


class Coalescing:
    """What `hybridcomm.coalescing` returns: takes the calls made within it, and runs them as one at its end."""

    def __init__(self, collectives: Collectives, *, async_op: bool) -> None:
        self._collectives, self._async_op = collectives, async_op
        self._kind: tuple[str, str, Op] | None = None  # collective, dtype, op
        self._tensors: list[View] = []
        self._parted: list[Parted] = []
        self._gpus: DeviceCoalescing | None = None  # who takes the calls instead, where tensors lie on GPUs
        self.work: Work | DeviceWork | None = None
        """The one handle of all calls; None while the block lasts, and of blocking or empty ones."""

    def __enter__(self) -> Coalescing:
        if self._collectives._batch is not None:
            raise UnsupportedError("coalescing() within coalescing(): end the outer block first")
        self._take_calls(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._take_calls(None)
        if self._gpus is not None:
            self._gpus.__exit__(kind, _, __)
            self.work = self._gpus.work
        if kind is None and self._kind is not None:
            self.work = self._run(*self._kind)

    def _take_calls(self, batch: Coalescing | None) -> None:
        self._collectives._batch = batch
        self._collectives._prepared.paused = batch is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until all results are in place; as `Work.wait`, and of tensors on GPUs as `DeviceWork.wait`."""
        if self._collectives._batch is self:
            raise UnsupportedError("coalescing(): its calls run when the block ends; wait() after it")
        if self._gpus is not None:
            return self._gpus.wait()
        return self.work is None or self.work.wait(timeout)

    def on_gpus(self, gpus: DeviceContext) -> None:
        """The block's calls are of tensors there: these take them."""
        if self._kind is not None:
            raise UnsupportedError("coalescing(): tensors of the host and of GPUs need a block each")
        if self._gpus is None:
            self._gpus = gpus.coalescing(async_op=self._async_op)
            self._gpus.__enter__()

    # -- what the calls within the block come to ------------------------------------------------------------

    def allreduce(self, t: Array, op: Op, *, plain: bool) -> None:
        if not plain:
            self.refuse("allreduce with compress=, residual= or async_op=")
        target = view(t)
        self._collectives._operation(op, target.dtype)
        self._join("allreduce", target.dtype, op)
        self._tensors.append(target)

    def all_gather(self, entries: Sequence[Parted], *, async_op: bool) -> None:
        if async_op:
            self.refuse("all_gather with async_op=")
        self._join("all_gather", entries[0].own.dtype, "none")
        self._parted += entries

    def reduce_scatter(self, entries: Sequence[Parted], op: Op, *, async_op: bool) -> None:
        if async_op:
            self.refuse("reduce_scatter with async_op=")
        self._collectives._operation(op, entries[0].own.dtype)
        self._join("reduce_scatter", entries[0].own.dtype, op)
        self._parted += entries

    def refuse(self, what: str) -> None:
        raise UnsupportedError(
            f"coalescing(): {what} cannot be a part of it; it takes dense allreduce, all_gather and "
            "reduce_scatter calls, and async_op= as its own argument"
        )

    def _join(self, collective: str, dtype: str, op: Op) -> None:
        if self._gpus is not None:
            raise UnsupportedError("coalescing(): tensors of the host and of GPUs need a block each")
        kind = (collective, dtype, op)
        if self._kind is not None and self._kind != kind:
            raise UnsupportedError(
                f"coalescing(): {collective}({op}) of {dtype} after {self._kind[0]}({self._kind[2]}) of "
                f"{self._kind[1]}: one block takes calls of one collective, dtype and op"
            )
        self._kind = kind

    # -- at its end ----------------------------------------------------------------------------------------

    def _run(self, collective: str, dtype: str, op: Op) -> Work | None:
        # Rides in every header: a block never meets a single call, or a block of other sizes, of the same sum.
        shapes = [each.numel for each in self._tensors] + [list(each.sizes) for each in self._parted]
        name = zlib.crc32(repr(shapes).encode())
        if collective == "allreduce":
            return self._allreduce(dtype, op, name)
        small = [each for each in self._parted if _fits(each.parts)]
        large = [each for each in self._parted if not _fits(each.parts)]
        if collective == "all_gather":
            return self._collectives._all_gather(large, self._async_op, packed=small, name=name)
        return self._collectives._reduce_scatter(large, op, self._async_op, packed=small, name=name)

    def _allreduce(self, dtype: str, op: Op, name: int) -> Work | None:
        ctx = self._collectives
        small = [each for each in self._tensors if _fits([each])]
        large = [each for each in self._tensors if not _fits([each])]
        sizes = (*([sum(each.numel for each in small)] if small else []), *(each.numel for each in large))
        op_name, factor = ctx._operation(op, dtype)
        _, program = ctx._program(
            ("allreduce of several", sizes, dtype, op_name),
            lambda: collective_plans.allreduce(
                ctx.topology,
                sum(sizes),
                dtype=dtype,
                op=op_name,
                segments=sizes if len(sizes) > 1 else None,
                chunk_nbytes=ctx.chunk_nbytes,
            ),
        )
        for each in self._tensors:
            scale(dtype, each.address, each.numel, factor)
        memory = ctx._memory(dtype)
        memory.write_to(*self._tensors)
        memory.pack(0, small)
        at = sizes[0] if small else 0
        for each in large:
            memory.place(at, each.numel, each.address)
            at += each.numel
        return ctx._launch(program, memory, self._async_op, name=name)


def _fits(parts: Sequence[View]) -> bool:
    return sum(part.nbytes for part in parts) <= PACKED_NBYTES
