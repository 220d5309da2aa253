"""Several collectives on GPUs as one: the calls of a block become one NCCL group, one launch on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridcomm.errors import UnsupportedError

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from hybridcomm.device_context import DeviceContext
    from hybridcomm.device_work import DeviceWork

__all__ = ["DeviceCoalescing", "GroupedCall"]


class GroupedCall(NamedTuple):
    """One NCCL operation of a group: flat tensors, ``numel`` elements of a rank's part, and what else NCCL is told."""

    kind: str
    source: torch.Tensor
    target: torch.Tensor
    numel: int
    fields: dict[str, Any]


class DeviceCoalescing:
    """What `DeviceContext.coalescing` returns: takes the calls made within it, and starts them as one at its end.

    As on hosts a block takes one collective, dtype and op; nothing is packed, since NCCL merges what is in one group.
    """

    def __init__(self, gpus: DeviceContext, *, async_op: bool) -> None:
        self._gpus, self._async_op = gpus, async_op
        self._calls: list[GroupedCall] = []
        self._tensors: list[Any] = []
        self.work: DeviceWork | None = None
        """The one handle of all calls; None while the block lasts, and of blocking or empty ones."""

    def __enter__(self) -> DeviceCoalescing:
        if self._gpus._batch is not None:
            raise UnsupportedError("coalescing() within coalescing(): end the outer block first")
        self._gpus._batch = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._gpus._batch = None
        if kind is None and self._calls:
            self.work = self._gpus._grouped(self._calls, self._tensors, self._async_op)

    def wait(self, stream: Any = None) -> bool:
        """``stream`` (default: the current one) goes on when all results are there; as `DeviceWork.wait`."""
        if self._gpus._batch is self:
            raise UnsupportedError("coalescing(): its calls run when the block ends; wait() after it")
        return self.work is None or self.work.wait(stream)

    def take(self, call: GroupedCall, tensors: Sequence[Any], *, plain: bool) -> None:
        """A call within the block; ``plain``: without a handle, a stream or compression of its own."""
        if not plain:
            self.refuse(f"{call.kind} with async_op=, stream=, compress= or residual=")
        if self._calls:
            first = self._calls[0]
            before, now = ((c.kind, c.source.dtype, sorted(c.fields.items())) for c in (first, call))
            if before != now:
                raise UnsupportedError(
                    f"coalescing(): {call.kind} of {call.source.dtype} after {first.kind} of {first.source.dtype}, or "
                    "of another op: one block takes calls of one collective, dtype and op"
                )
        self._calls.append(call)
        self._tensors += tensors

    def refuse(self, what: str) -> None:
        raise UnsupportedError(
            f"coalescing(): {what} cannot be a part of it; it takes dense allreduce, all_gather_into_tensor and "
            "reduce_scatter_tensor calls of tensors on GPUs, and async_op= as its own argument"
        )
