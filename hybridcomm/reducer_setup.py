"""What a Reducer does once: which parameters, in which buckets, agreed upon and equal on all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from hybridcomm import auto, policy
from hybridcomm import collective_plans as plans
from hybridcomm import compress as compressors
from hybridcomm.bucket import BucketLayout, ParameterSize, Span, plan_buckets
from hybridcomm.compress import ByLink, Compressor
from hybridcomm.compression_policy import Choice, CompressionPolicy, ParameterFacts
from hybridcomm.errors import DataTypeError, PlanMismatchError, UnsupportedError
from hybridcomm.groups import Grouping
from hybridcomm.placing import taking
from hybridcomm.schedule import Schedule
from hybridcomm.stream_provider import HOST_TENSORS, TensorMover

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

    from hybridcomm.plan import Region
    from hybridcomm.residual import Residual
    from hybridcomm.topology import Topology

__all__ = [
    "ChoiceByLink",
    "ContextLike",
    "WorkLike",
    "by_link",
    "check_agreement",
    "check_feedback",
    "check_links",
    "choices_of",
    "decided",
    "flat_buffer",
    "layouts_of",
    "mover",
    "placed",
    "places",
    "regions_of",
    "sync_parameters",
    "trainable",
]


ChoiceByLink = Choice | CompressionPolicy | Mapping[str, Choice | CompressionPolicy]
"""What a `Reducer` takes as ``compress=``."""


class WorkLike(Protocol):
    """What the reducer needs of an async handle."""

    def wait(self) -> object: ...

    @property
    def wire_nbytes(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def begun(self) -> float: ...


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
        compress: ByLink = ...,
        residual: Residual | None = ...,
        exchange: str = ...,
        async_op: bool = ...,
        residual_key: str = ...,
        spans: Sequence[Span] | None = ...,
    ) -> Any: ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> Any: ...

    def empty(self, *size: int, dtype: Any) -> Any: ...


def by_link(compress: ChoiceByLink) -> tuple[Choice | CompressionPolicy, Compressor | None]:
    """What ``compress=`` says of links between nodes, and of those inside; raises `CompressorError` as
    `compress.by_link` does.
    """
    if not isinstance(compress, Mapping):
        return compress, None
    inter = compress.get("inter_node")
    rest: dict[str, Any] = dict(compress)
    if "inter_node" in rest and not auto.is_auto(inter):
        rest["inter_node"] = None  # whatever it is: a policy's rules resolve it
    return inter, compressors.by_link(rest).intra_node


def check_links(exchange: str, intra: Compressor | None, compresses: bool) -> None:
    """Raises `UnsupportedError` for an unknown exchange, and where nothing is compressed between nodes."""
    if exchange not in policy.EXCHANGES:
        raise UnsupportedError(f"exchange={exchange!r}: choose one of {', '.join(policy.EXCHANGES)}")
    if exchange != "auto" and not compresses:
        raise UnsupportedError(f"exchange={exchange!r} has nothing to do without compress= between nodes")
    if intra is not None and not compresses:
        raise UnsupportedError(
            f"intra_node={intra} acts on buckets that are compressed between nodes, and none is: name inter_node too"
        )


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


def choices_of(
    module: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], policy: CompressionPolicy
) -> dict[str, str | Schedule]:
    """By parameter, the schedule or "auto" text that ``policy`` gives it."""
    owners: dict[str, torch.nn.Module] = {}
    for path, owner in module.named_modules():
        for leaf, _ in owner.named_parameters(recurse=False):
            owners[f"{path}.{leaf}" if path else leaf] = owner
    facts = [ParameterFacts(name, p.numel(), _role(name, p, owners[name])) for name, p in parameters.items()]
    return policy.assign(facts)


def _role(name: str, parameter: torch.nn.Parameter, owner: torch.nn.Module) -> str:
    leaf, kind = name.rpartition(".")[2], type(owner).__name__.lower()
    if "norm" in kind:
        return "norm"
    if "bias" in leaf and parameter.dim() <= 1:
        return "bias"
    if "embedding" in kind:
        return "embedding"
    return "matrix" if parameter.dim() >= 2 else "vector"


def layouts_of(
    parameters: Mapping[str, torch.nn.Parameter],
    choices: Mapping[str, str | Schedule],
    bucket_cap_mb: float | None,
    parts: int = 1,
) -> tuple[BucketLayout, ...]:
    """Buckets of up to ``bucket_cap_mb`` MiB (None: policy); fp32 where they may be compressed, else of the
    parameters' dtype. ``parts``: into how many equal ones, each of whole blocks, the context would cut them.
    """
    sizes = []
    for name, p in parameters.items():
        choice = choices[name]
        dense = isinstance(choice, Schedule) and not choice.codecs
        dtype = dtype_name(p.dtype) if dense else "float32"
        align = choice.align if isinstance(choice, Schedule) else policy.DENSE_ALIGN
        sizes.append(ParameterSize(name, p.numel(), dtype, "none" if dense else str(choice), align * parts))
    total = sum(size.numel * policy.itemsize(size.dtype) for size in sizes)
    cap = policy.bucket_nbytes(total) if bucket_cap_mb is None else int(bucket_cap_mb * (1 << 20))
    return plan_buckets(sizes, cap_nbytes=cap)


def decided(
    ctx: ContextLike, layouts: Sequence[BucketLayout], choices: Mapping[str, str | Schedule], exchange: str
) -> tuple[tuple[Schedule, str], ...]:
    """Each bucket's schedule, and the exchange of its calls.

    "auto" is decided here, once, by measured figures, the bucket's size and ``exchange``; its answer says which
    exchange it was predicted with.
    """
    found = []
    for layout in layouts:
        choice, way, context = choices[layout.names[0]], exchange, cast(Any, ctx)
        if isinstance(choice, str):
            numel = layout.numel
            codec, way = auto.resolve(
                context, choice, numel=numel, dtype="float32", op="mean", exchange=exchange
            )
            choice = Schedule((0, codec))
        found.append((choice, way))
    return tuple(found)


def check_feedback(residual: Residual, schedules: Sequence[Schedule]) -> None:
    """Raises `UnsupportedError` where a schedule asks of the residual what it cannot do."""
    for codec in [codec for schedule in schedules for codec in schedule.codecs]:
        compressors.check_feedback(codec, residual)
    dense = next((schedule for schedule in schedules if schedule.dense_later), None)
    if residual.momentum and dense is not None:
        raise UnsupportedError(
            f"Residual(momentum={residual.momentum:g}) cannot be kept up over the dense phase of {dense}: "
            "begin with a high ratio instead, such as topk:0.25"
        )


def regions_of(
    ctx: ContextLike, layout: BucketLayout, codec: Compressor, intra: Compressor | None, exchange: str
) -> dict[str, tuple[Region, ...]]:
    """Where this rank holds the residual of a bucket: the same in every phase that compresses."""
    plan = plans.allreduce(
        ctx.topology, layout.numel, op="mean", compressor=codec, intra=intra, exchange=exchange
    )
    return plan.residuals(ctx.rank)


def placed(ctx: ContextLike, parameter: torch.nn.Parameter) -> ContextLike:
    """``ctx``, or where a parameter lies on a GPU those of its ranks (`hybridcomm.placing`); all ranks call it."""
    found: ContextLike = taking(ctx, parameter) if isinstance(ctx, Grouping) else ctx
    return found


def mover(ctx: ContextLike, device: torch.device) -> TensorMover:
    """What moves gradients of parameters on ``device``: torch on the host, the context's provider on GPUs.

    Raises `DataTypeError` where the context is of another device.
    """
    provider = getattr(ctx, "provider", None)
    where = torch.device("cpu") if provider is None else provider.device
    if where != device:
        raise DataTypeError(
            f"parameters lie on {device}, the context reduces tensors on {where}: move the module, or connect that "
            "device with hybridcomm.init(device=...)"
        )
    moves: TensorMover = HOST_TENSORS if provider is None else provider
    return moves


def flat_buffer(ctx: ContextLike, layout: BucketLayout, moves: TensorMover) -> torch.Tensor:
    """The zeroed flat buffer of one bucket: in memory that the node's ranks share, or on the device."""
    make = getattr(ctx, "bucket", ctx.empty)  # all ranks come here, for the same buckets in the same order
    flat: torch.Tensor = make(layout.numel, dtype=getattr(torch, layout.dtype))
    moves.zero(flat)
    return flat


def places(
    parameters: Mapping[str, torch.nn.Parameter],
    layouts: Sequence[BucketLayout],
    flats: Sequence[torch.Tensor],
) -> dict[str, tuple[int, torch.Tensor]]:
    """By parameter, its bucket and the part of the flat buffer that is its gradient's, in its shape."""
    return {
        span.name: (layout.index, flat[span.begin : span.end].view(parameters[span.name].shape))
        for layout, flat in zip(layouts, flats, strict=True)
        for span in layout.spans
    }


def check_agreement(ctx: ContextLike, layouts: Sequence[BucketLayout], settings: str) -> None:
    """All ranks must have planned the same buckets under the same ``settings``; raises `PlanMismatchError` on all
    if one has not.
    """
    text = f"{settings} " + " ".join(f"{layout.digest():x}" for layout in layouts)
    mine = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    first = torch.tensor([mine], dtype=torch.int64)
    ctx.broadcast(first, 0)
    others = torch.tensor([int(first.item() != mine)], dtype=torch.int64)
    ctx.allreduce(others, op="sum")
    if others.item():
        raise PlanMismatchError(
            f"rank {ctx.rank}: {int(others.item())} ranks have other parameters, compress=, exchange= or "
            "bucket_cap_mb= than rank 0, or another Residual; build the same model with the same settings on every rank"
        )


def sync_parameters(ctx: ContextLike, module: torch.nn.Module) -> None:
    """Every rank starts from rank 0's parameters and buffers (masks and other odd dtypes stay)."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if dtype_name(tensor.dtype) not in policy.ITEMSIZE or not tensor.numel():
                continue
            flat = tensor.detach().reshape(-1)  # a copy where the tensor is not contiguous
            ctx.broadcast(flat, 0)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))


def loss_scale(scaler: GradScaler | None, schedules: Sequence[Schedule], rank: int) -> float:
    """The loss scale to take out of the gradients: residuals are kept in unscaled units."""
    if scaler is None or not scaler.is_enabled() or not any(schedule.codecs for schedule in schedules):
        return 1.0
    scale = float(scaler.get_scale())
    if scale <= 0 or float.hex(scale).partition("p")[0] != "0x1.0000000000000":
        raise UnsupportedError(
            f"rank {rank}: loss scale {scale} is no power of two, so dividing by it "
            "would round; use a power of two as init_scale, growth_factor=2.0 and backoff_factor=0.5"
        )
    return scale
