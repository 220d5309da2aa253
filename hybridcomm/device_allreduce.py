"""The all-reduce on GPUs: what a call asks for -> a plan -> a program of this rank's device, cached by addresses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from hybridcomm import auto, collective_plans, policy, reduction
from hybridcomm import compress as compressors
from hybridcomm.device_coalesce import GroupedCall
from hybridcomm.device_exchanges import DeviceExchanges
from hybridcomm.device_plan import Buffer
from hybridcomm.device_reduction import factor_of
from hybridcomm.errors import UnsupportedError
from hybridcomm.lower_device import Places, lower_device
from hybridcomm.plan_wire import sent_nbytes
from hybridcomm.stream_provider import view_of

if TYPE_CHECKING:
    import torch

    from hybridcomm import _C
    from hybridcomm.bucket import Span
    from hybridcomm.compress import ByLink, Compressor
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.device_plan import DevicePlan
    from hybridcomm.plan import Plan
    from hybridcomm.reduction import Op
    from hybridcomm.residual import Residual
    from hybridcomm.residual_memory import DeviceResiduals
    from hybridcomm.topology import Topology

__all__ = ["DeviceAllreduce"]

_CACHED = 256
_UNNAMED = "tensor"


class DeviceAllreduce(DeviceExchanges):
    """One rank's part in it; `hybridcomm.device_context.DeviceContext` has the rest."""

    flat: bool
    _plans: OrderedDict[tuple[Any, ...], Plan]
    _residuals: DeviceResiduals

    @property
    def rank(self) -> int:
        return self.host.rank

    @property
    def topology(self) -> Topology:
        return self.host.topology

    def allreduce(
        self,
        t: Any,
        *,
        op: Op = "sum",
        compress: ByLink = None,
        residual: Residual | None = None,
        exchange: str = "auto",
        async_op: bool = False,
        residual_key: str = _UNNAMED,
        spans: Sequence[Span] | None = None,
        stream: Any = None,
        flat: bool | None = None,
    ) -> Any:
        """As `hybridcomm.allreduce`, of a tensor on the device (others are the host context's).

        ``stream``: that the tensor belongs to (torch's, cupy's or an address; default: the current one). ``flat``: as
        in `connect`, for this call. Fastest where tensors stay where they are: the operations of a call are made once
        per address.

        Raises `UnsupportedError` where no kernel is shipped for ``compress``, or sizes are not multiples of 16.
        """
        if not self.takes(t):
            return self.host.allreduce(
                t, op=op, compress=compress, residual=residual, exchange=exchange, async_op=async_op,
                residual_key=residual_key, spans=spans,
            )  # fmt: skip
        tensor = view_of(t, self.provider)
        dtype = self._dtype(tensor)
        name, factor = reduction.resolve(op)
        reduction.check(name, dtype)
        if factor is not None:
            factor, flat = factor_of(factor, tensor, dtype), True  # NCCL multiplies what goes into one call
        if self._batch is not None:
            plain = compress is None and residual is None and not async_op and stream is None
            fields = self._reduction(op, tensor)
            call = GroupedCall("all_reduce", tensor, tensor, tensor.numel(), fields)
            return self._batch.take(call, [t, tensor], plain=plain)
        codec, exchange = self._codec(compress, tensor.numel(), dtype, name, exchange)
        if codec is None and auto.is_auto(compressors.by_link(compress).inter_node):
            residual = None  # the policy's answer for this size is dense, now and later
        flat = self.flat if flat is None else flat
        key = ("allreduce", tensor.numel(), dtype, name, str(codec), codec, exchange, flat)
        plan = self._plan(
            key, lambda: self._plan_allreduce(tensor.numel(), dtype, name, codec, exchange, flat)
        )
        if codec is None and residual is not None:
            raise UnsupportedError("residual= needs compress=: a dense all-reduce leaves nothing behind")
        pair = self._staged(plan, codec, residual, residual_key, spans)
        where = (tensor.data_ptr(), *(() if pair is None else (each.data_ptr() for each in pair)))
        decay = 1.0 if residual is None else residual.decay
        program = self._program(
            (key, residual_key, where, decay, factor), plan, tensor, codec, pair, decay=decay, factor=factor
        )
        return self._start(
            program, [t, tensor, *(pair or ())], async_op, stream, residual_key, sent_nbytes(plan, self.rank)
        )

    def _codec(
        self, compress: ByLink, numel: int, dtype: str, op: str, exchange: str
    ) -> tuple[Compressor | None, str]:
        """(compressor between nodes, exchange), as asked for or by policy."""
        links = compressors.by_link(compress)
        if links.intra_node is not None:
            raise UnsupportedError("compress= inside nodes: GPUs of a node are summed dense")
        codec, exchange = auto.resolve(
            cast("DeviceContext", self), links.inter_node, numel=numel, dtype=dtype, op=op, exchange=exchange
        )
        if codec is not None:
            compressors.check_compressible(codec, dtype=dtype, op=op)
        return codec, exchange

    def _plan_allreduce(
        self, numel: int, dtype: str, op: str, codec: Compressor | None, exchange: str, flat: bool
    ) -> Plan:
        several = len(self.topology.nodes) > 1
        if flat and (codec is None or not several):
            return collective_plans.allreduce_flat(self.topology, numel, dtype=dtype, op=op)
        block = 1 if codec is None else codec.block
        align = block * policy.DENSE_ALIGN
        drawn = several and codec is not None and codec.spec.seeded  # by the host's steps, so in its chunks
        return collective_plans.allreduce(
            self.topology,
            numel,
            dtype=dtype,
            op=op,
            compressor=codec,
            exchange=exchange,
            chunk_elems=None if drawn else max(-(-numel // align), 1) * align,
            chunk_nbytes=self.host.chunk_nbytes,
        )

    def _plan(self, key: tuple[Any, ...], build: Any) -> Plan:
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = build()
            if len(self._plans) > _CACHED:
                self._plans.popitem(last=False)
        return found

    def _staged(
        self,
        plan: Plan,
        codec: Compressor | None,
        residual: Residual | None,
        key: str,
        spans: Sequence[Span] | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if residual is None or codec is None or plan.compressor == "none":  # no nodes to compress between
            return None
        compressors.check_feedback(codec, residual)
        if residual.momentum:
            raise UnsupportedError(
                "Residual(momentum=) on a GPU: its kernels do not tell what was sent, which leaves the velocity; take "
                "decay=, or keep momentum in the optimizer"
            )
        residual.place(self._residuals)
        regions = plan.residuals(self.rank)
        e_in: Any
        e_out: Any
        e_in, e_out = residual.stage(key, numel=plan.numel, regions=regions, spans=spans)
        if e_in is e_out:  # a second call before a commit: kernels take two buffers
            raise UnsupportedError(
                f"residual of {key!r}: a second call before commit(); on GPUs call commit() or rollback() between"
            )
        return e_in, e_out

    def _program(
        self,
        key: tuple[Any, ...],
        plan: Plan,
        tensor: torch.Tensor,
        codec: Compressor | None,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        decay: float,
        factor: float | None,
    ) -> tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]]:
        found = self._programs.get(key)
        if found is not None:
            self._programs.move_to_end(key)
            return found
        payloads = None
        if plan.compressor != "none" and codec is not None:
            from hybridcomm.device_codec import DevicePayloads
            from hybridcomm.kernels.cubins.load import find

            arch = self._engine.compute_capability
            payloads = DevicePayloads(
                plan,
                self.rank,
                codec,
                tensor,
                pair,
                memory=self.provider,
                find=lambda name: find(name, arch),
                decay=decay,
            )
        buffer = Buffer("tensor", tensor.data_ptr(), tensor.numel() * tensor.element_size())
        places = Places(tensor=buffer, comms=self._comms)
        text = f"rank {self.rank}: {plan.collective} of {plan.numel:,} {plan.dtype} ({plan.compressor})"
        lowered = lower_device(plan, self.rank, places, payloads, name=text, factor=factor)
        kept: Sequence[Any] = () if payloads is None else payloads.kept
        return self._remember(key, lowered, kept)
