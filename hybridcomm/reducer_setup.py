"""What a Reducer does once: which parameters, in which buckets, agreed upon and equal on all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hybridcomm import policy
from hybridcomm.bucket import BucketLayout, ParameterSize, Span, plan_buckets
from hybridcomm.compress import Compress, LinkCompressors
from hybridcomm.errors import DataTypeError, PlanMismatchError, UnsupportedError

if TYPE_CHECKING:
    from hybridcomm.residual import Residual
    from hybridcomm.topology import Topology

__all__ = [
    "ContextLike",
    "WorkLike",
    "check_agreement",
    "check_exchange",
    "flat_buffer",
    "layouts_of",
    "sync_parameters",
    "trainable",
]


class WorkLike(Protocol):
    """What the reducer needs of an async handle."""

    def wait(self) -> object: ...

    @property
    def wire_nbytes(self) -> int: ...


class ContextLike(Protocol):
    """What the reducer needs of a context."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def topology(self) -> Topology: ...

    def allreduce(
        self,
        tensor: torch.Tensor,
        *,
        op: str = ...,
        compress: Compress = ...,
        residual: Residual | None = ...,
        exchange: str = ...,
        async_op: bool = ...,
        residual_key: str = ...,
        spans: Sequence[Span] | None = ...,
    ) -> Any: ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> Any: ...

    def empty(self, *size: int, dtype: Any) -> Any: ...


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that require gradients, by name, in registration order; a shared one once, by its first
    name.
    """
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise UnsupportedError("the module has no parameter that requires a gradient: nothing to reduce")
    devices = {p.device for p in found.values()}
    if len(devices) > 1:
        raise DataTypeError(
            f"parameters lie on several devices, {sorted(map(str, devices))}: one reducer takes one"
        )
    for name, p in found.items():
        if not p.is_floating_point() or dtype_name(p.dtype) not in policy.ITEMSIZE:
            raise DataTypeError(f"parameter {name!r} is {p.dtype}: gradients of this type cannot be reduced")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def layouts_of(
    parameters: Mapping[str, torch.nn.Parameter], block: int | None, bucket_cap_mb: float | None
) -> tuple[BucketLayout, ...]:
    """Buckets of up to ``bucket_cap_mb`` MiB (None: policy); of fp32 and whole blocks when compressed, else of the
    parameters' dtype.
    """
    sizes = [
        ParameterSize(name, p.numel(), dtype_name(p.dtype) if block is None else "float32")
        for name, p in parameters.items()
    ]
    total = sum(size.numel * policy.itemsize(size.dtype) for size in sizes)
    cap = policy.bucket_nbytes(total) if bucket_cap_mb is None else int(bucket_cap_mb * (1 << 20))
    pad_to = policy.DENSE_ALIGN if block is None else block
    return plan_buckets(sizes, cap_nbytes=cap, pad_to=pad_to)


def flat_buffer(ctx: ContextLike, layout: BucketLayout, device: torch.device) -> torch.Tensor:
    """The zeroed flat buffer of one bucket; on the host in memory that the node's ranks share."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    if device.type != "cpu":
        return torch.zeros(layout.numel, dtype=dtype, device=device)
    flat: torch.Tensor = ctx.empty(layout.numel, dtype=dtype)
    return flat.zero_()


def check_exchange(exchange: str, compress: LinkCompressors) -> str:
    """``exchange``, which must be known and have something to act on."""
    if exchange not in policy.EXCHANGES:
        raise UnsupportedError(f"exchange={exchange!r}: choose one of {', '.join(policy.EXCHANGES)}")
    if compress.inter_node is None and exchange != "auto":
        raise UnsupportedError(f"exchange={exchange!r} has nothing to do without compress= between nodes")
    return exchange


def check_agreement(ctx: ContextLike, layouts: Sequence[BucketLayout], setting: str) -> None:
    """All ranks must have planned the same buckets; raises `PlanMismatchError` on all if one has not."""
    text = f"{setting} " + " ".join(f"{layout.digest():x}" for layout in layouts)
    mine = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    first = torch.tensor([mine], dtype=torch.int64)
    ctx.broadcast(first, root=0)
    others = torch.tensor([int(first.item() != mine)], dtype=torch.int64)
    ctx.allreduce(others, op="sum")
    if others.item():
        raise PlanMismatchError(
            f"rank {ctx.rank}: {int(others.item())} ranks have other parameters, compress=, exchange= or "
            "bucket_cap_mb= than rank 0; build the same model with the same settings on every rank"
        )


def sync_parameters(ctx: ContextLike, module: torch.nn.Module) -> None:
    """Every rank starts from rank 0's parameters and buffers (masks and other odd dtypes stay)."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if dtype_name(tensor.dtype) not in policy.ITEMSIZE or not tensor.numel():
                continue
            flat = tensor.detach().reshape(-1)  # a copy where the tensor is not contiguous
            ctx.broadcast(flat, root=0)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))
