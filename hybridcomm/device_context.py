"""A rank's GPU in a job: collectives of tensors that lie on it, over NCCL and the device kernels.

It stands beside the host's context, which brought the ranks together and still carries what is small. A gradient's
route is the plan's, as on hosts; where nothing is compressed, NCCL's own algorithms, which are hierarchical already,
take a tensor in one call ("flat").

    device_context.py   a call -> plan -> program            lower_device.py   plan -> operations on streams
    device_codec.py     kernels of payloads, as launches     device_plan.py    these as a value; device_check.py
    device_comms.py     communicators                        csrc/gpu_*        issuing, watchdog
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybridcomm import _C, collective_plans, device_comms, policy, reduction
from hybridcomm import compress as compressors
from hybridcomm.device_collectives import DeviceCollectives
from hybridcomm.device_draws import of_call
from hybridcomm.device_plan import Buffer, nccl_type
from hybridcomm.device_work import DeviceWork, handle_of
from hybridcomm.errors import UnsupportedError
from hybridcomm.lower_device import Places, lower_device
from hybridcomm.plan_wire import sent_nbytes
from hybridcomm.residual_memory import DeviceResiduals
from hybridcomm.stream_provider import StreamProvider, TorchCuda, view_of

if TYPE_CHECKING:
    import torch

    from hybridcomm.bucket import Span
    from hybridcomm.compress import ByLink, Compressor
    from hybridcomm.context import Context
    from hybridcomm.device_plan import DevicePlan
    from hybridcomm.groups import Grouping
    from hybridcomm.plan import Plan
    from hybridcomm.reduction import Op
    from hybridcomm.residual import Residual
    from hybridcomm.topology import Topology

__all__ = ["DeviceContext"]

_CACHED = 256
_WATCH_S = 0.1
_UNNAMED = "tensor"


class DeviceContext(DeviceCollectives):
    """One rank's device; made by `DeviceContext.connect`, by all ranks of a context together.

    Calls put work on the engine's streams behind what the caller's current stream holds, and return. Without
    ``async_op`` the current stream waits for the result; the host never does.
    """

    def __init__(
        self,
        host: Grouping,
        provider: StreamProvider,
        engine: _C.GpuEngine,
        comms: dict[tuple[int, ...], int],
        *,
        streams: tuple[int, int, int],
        flat: bool,
        debug: bool,
    ) -> None:
        self.host, self.provider, self.flat, self.debug = host, provider, flat, debug
        self._engine, self._comms, self._streams = engine, comms, streams
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._programs: OrderedDict[tuple[Any, ...], tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]]] = (
            OrderedDict()
        )
        self._exchanges = OrderedDict()
        self._running: deque[DeviceWork] = deque()
        self._captured: list[Any] = []  # memory of programs in graphs, which may be launched at any time
        self._calls = self._first = 0
        self._residuals = DeviceResiduals(provider)

    @classmethod
    def connect(
        cls,
        host: Context,
        provider: StreamProvider | None = None,
        *,
        flat: bool = True,
        watch: float = _WATCH_S,
        debug: bool = False,
    ) -> DeviceContext:
        """Loads CUDA and NCCL, and connects this rank's device to the others'; all ranks of ``host`` call it.

        ``provider``: whose streams and tensors (default: torch's, of its current device). ``flat``: what is not
        compressed is left to NCCL's own algorithms; False: it takes the plan's route, stage by stage. ``watch``: s
        between looks of the watchdog, which ends everything with a typed error where NCCL failed in the background,
        or something was not done within the context's timeout; 0: none. ``debug``: before each call ranks compare what
        they are about to do, which makes the host wait, and raise `PlanMismatchError` where they differ.

        Raises `UnsupportedError` where a library is missing or too old, or ranks differ in it.
        """
        from hybridcomm.gpu_libraries import nccl_files

        provider = TorchCuda() if provider is None else provider
        engine = _C.GpuEngine(
            device=provider.ordinal,
            streams=2,
            timeout_s=host.timeout,
            watch_s=watch,
            nccl_files=[str(path) for path in nccl_files()],
            host=host._engine,
        )
        facts = [f"NCCL {engine.nccl_version}", f"sm_{engine.compute_capability}", *engine.newer]
        device_comms.check_alike(host, facts)
        comms = device_comms.connect(engine, host)
        # One stream for all of NCCL: kernels of two communicators that wait for each other may fill a device.
        made = cls(host, provider, engine, comms, streams=(0, 1, 1), flat=flat, debug=debug)
        made._first = host._engine.counters()["calls"]  # what is drawn goes on where the host's calls are
        return made

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.host.rank

    @property
    def world_size(self) -> int:
        return self.host.world_size

    @property
    def topology(self) -> Topology:
        return self.host.topology

    @property
    def bucket_parts(self) -> int:
        """Buckets that can be cut into so many equal parts have shards alike, which NCCL moves in one call."""
        return self.topology.K

    def group(self, ranks: Sequence[int]) -> DeviceContext:
        """The devices of ``ranks``, which get the ranks 0, 1, ... in that order; its members call it together.

        It shares this context's streams, and its place in the order of calls. A rank that is not in it gets a handle
        that only its host's group, and so an error, comes out of.
        """
        host = self.host.group(ranks)
        comms = device_comms.connect(self._engine, host) if host.is_member else {}
        return type(self)(
            host, self.provider, self._engine, comms, streams=self._streams, flat=self.flat, debug=self.debug
        )

    def describe(self) -> str:
        """One line for a log: libraries, and the route that tensors take."""
        gpu = self._engine
        return (
            f"GPU {self.provider.ordinal} (sm_{gpu.compute_capability}), CUDA driver {gpu.cuda_version}, NCCL "
            f"{gpu.nccl_version} ({gpu.nccl_path}; {', '.join(gpu.newer) or 'nothing beyond 2.18'}); without compress= "
            "tensors go flat, by NCCL's own algorithms; with it hierarchically, compressed between nodes"
        )

    def empty(self, *size: Any, dtype: Any = None) -> torch.Tensor:
        """A tensor on the device, not cleared, in memory that NCCL knows: registered where this NCCL can.

        ``size`` as `torch.empty` takes it; default dtype float32.
        """
        import torch

        shape = torch.Size(
            size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        )
        dtype = torch.float32 if dtype is None else dtype
        nbytes = shape.numel() * dtype.itemsize
        memory = self._engine.allocate(max(nbytes, 1))
        flat = self.provider.wrap(memory.address, memory.nbytes, memory)[:nbytes]
        return flat.view(dtype).view(shape)

    # -- all-reduce ----------------------------------------------------------------------------------------

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
        if not self._is_ours(t):
            return self.host.allreduce(
                t, op=op, compress=compress, residual=residual, exchange=exchange, async_op=async_op,
                residual_key=residual_key, spans=spans,
            )  # fmt: skip
        tensor = view_of(t, self.provider)
        dtype = self._dtype(tensor)
        name, factor = reduction.resolve(op)
        reduction.check(name, dtype)
        if factor is not None:
            raise UnsupportedError("op=premul_sum on a GPU: multiply the tensor first")
        codec = self._codec(compress, dtype, name)
        flat = self.flat if flat is None else flat
        key = ("allreduce", tensor.numel(), dtype, name, str(codec), codec, exchange, flat)
        plan = self._plan(
            key, lambda: self._plan_allreduce(tensor.numel(), dtype, name, codec, exchange, flat)
        )
        if codec is None and residual is not None:
            raise UnsupportedError("residual= needs compress=: a dense all-reduce leaves nothing behind")
        pair = self._staged(plan, codec, residual, residual_key, spans)
        where = (tensor.data_ptr(), *(() if pair is None else (each.data_ptr() for each in pair)))
        program = self._program((key, residual_key, where), plan, tensor, codec, pair)
        return self._start(
            program, [t, tensor, *(pair or ())], async_op, stream, residual_key, sent_nbytes(plan, self.rank)
        )

    def _is_ours(self, t: Any) -> bool:
        return self.provider.owns(t) or (hasattr(t, "__dlpack_device__") and t.__dlpack_device__()[0] == 2)

    def _codec(self, compress: ByLink, dtype: str, op: str) -> Compressor | None:
        links = compressors.by_link(compress)
        if links.intra_node is not None:
            raise UnsupportedError("compress= inside nodes: GPUs of a node are summed dense")
        if isinstance(links.inter_node, str) and links.inter_node.partition(":")[0] == "auto":
            raise UnsupportedError(
                "compress='auto' on a GPU: nothing was measured there yet; name a compressor"
            )
        codec = compressors.resolve(links.inter_node)
        if codec is not None:
            compressors.check_compressible(codec, dtype=dtype, op=op)
        return codec

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
        if residual.momentum or residual.decay != 1.0:
            raise UnsupportedError("Residual(decay=, momentum=): on GPUs kernels are shipped without them")
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
                plan, self.rank, codec, tensor, pair, memory=self.provider, find=lambda name: find(name, arch)
            )
        buffer = Buffer("tensor", tensor.data_ptr(), tensor.numel() * tensor.element_size())
        places = Places(tensor=buffer, comms=self._comms)
        text = f"rank {self.rank}: {plan.collective} of {plan.numel:,} {plan.dtype} ({plan.compressor})"
        lowered = lower_device(plan, self.rank, places, payloads, name=text)
        kept: Sequence[Any] = () if payloads is None else payloads.kept
        return self._remember(key, lowered, kept)

    def _remember(
        self, key: tuple[Any, ...], lowered: DevicePlan, kept: Sequence[Any]
    ) -> tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]]:
        program = lowered.program(self._engine, self._streams, nccl_type)
        self._programs[key] = program, lowered, kept
        if len(self._programs) > _CACHED:
            self._programs.popitem(last=False)
        return self._programs[key]

    def _start(
        self,
        program: tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]],
        tensors: Sequence[Any],
        async_op: bool,
        stream: Any,
        name: str,
        wire_nbytes: int = 0,
        *,
        alike: bool = True,
    ) -> DeviceWork | None:
        compiled, lowered, kept = program
        producer = self.provider.stream() if stream is None else handle_of(stream)
        if lowered.draws is not None and self._engine.capturing(producer):
            raise UnsupportedError(f"{name}: draws anew in every call, which a graph cannot; use topk")
        self._calls += alike
        if alike and self.debug:
            device_comms.compare(self.host, self._calls, name, lowered)
        if lowered.draws is not None:
            lowered, headers = of_call(lowered, self._first + self._calls, self.provider, producer)
            compiled, kept = lowered.program(self._engine, self._streams, nccl_type), [*kept, headers]
        work = DeviceWork(
            self._engine,
            self._engine.start(compiled, producer),
            self.provider,
            [*tensors, *kept],
            wire_nbytes=wire_nbytes,
        )
        while self._running and self._running[0].is_completed():
            self._running.popleft()
        if work.captured:
            self._captured += kept
        else:
            self._running.append(work)
        if async_op:
            return work
        work.wait(producer)
        return None

    @staticmethod
    def _dtype(tensor: torch.Tensor) -> str:
        dtype = str(tensor.dtype).removeprefix("torch.")
        nccl_type(dtype)
        return dtype

    # -- end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits for what is under way, says goodbye to the peers, gives streams and communicators back. Idempotent.

        Ends its groups too; close the context, not a group.
        """
        try:
            self._engine.close()
        finally:
            self._running.clear()
            self._captured.clear()
            self._programs.clear()

    def abort(self) -> None:
        """Ends what is under way: here at once, on the others as NCCL tells them; all later calls raise."""
        self._engine.fail(f"rank {self.rank}: aborted by its caller")

    def __enter__(self) -> DeviceContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
