"""A rank's GPU in a job: collectives of tensors that lie on it, over NCCL and the device kernels.

It stands beside the host's context, which brought the ranks together and still carries what is small. A gradient's
route is the plan's, as on hosts; where nothing is compressed, NCCL's own algorithms, which are hierarchical already,
take a tensor in one call ("flat").

    device_allreduce.py    a call -> plan -> program            lower_device.py   plan -> operations on streams
    device_collectives.py  what is one call of NCCL's           device_plan.py    these as a value; device_check.py
    device_exchanges.py    what is several in one group         device_comms.py   communicators
    device_codec.py        kernels of payloads, as launches     csrc/gpu_*        issuing, watchdog
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybridcomm import _C, device_comms
from hybridcomm.device_allreduce import DeviceAllreduce
from hybridcomm.device_coalesce import DeviceCoalescing
from hybridcomm.device_draws import of_call
from hybridcomm.device_plan import nccl_type
from hybridcomm.device_work import DeviceWork, handle_of
from hybridcomm.errors import DataTypeError, UnsupportedError
from hybridcomm.placing import on_gpu
from hybridcomm.residual_memory import DeviceResiduals
from hybridcomm.stream_provider import StreamProvider, TorchCuda

if TYPE_CHECKING:
    import torch

    from hybridcomm.auto import Policy
    from hybridcomm.context import Context
    from hybridcomm.device_plan import DevicePlan
    from hybridcomm.device_probe import Stopwatch
    from hybridcomm.groups import Grouping
    from hybridcomm.plan import Plan

__all__ = ["DeviceContext"]

_CACHED = 256
_WATCH_S = 0.1


class DeviceContext(DeviceAllreduce):
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
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.host, self.provider, self.flat, self.debug = host, provider, flat, debug
        self._engine, self._comms, self._streams = engine, comms, streams
        self._newer = frozenset(engine.newer)
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._programs: OrderedDict[tuple[Any, ...], tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]]] = (
            OrderedDict()
        )
        self._exchanges = OrderedDict()
        self._running: deque[DeviceWork] = deque()
        self._captured: list[Any] = []  # memory of programs in graphs, which may be launched at any time
        self._calls = self._first = 0
        self.policies: dict[str, Policy] = {}  # of "auto" texts: see hybridcomm.device_auto
        self.stopwatch: Stopwatch = stopwatch or (lambda call, _, __: provider.timed(call))
        self._batch: DeviceCoalescing | None = None  # that takes the calls at the moment
        self._residuals = DeviceResiduals(provider)

    @classmethod
    def connect(
        cls,
        host: Context,
        provider: StreamProvider | None = None,
        *,
        device: Any = None,
        flat: bool = True,
        watch: float = _WATCH_S,
        debug: bool = False,
        stopwatch: Stopwatch | None = None,
        copy_engines: bool | None = None,
    ) -> DeviceContext:
        """Loads CUDA and NCCL, and connects this rank's device to the others'; all ranks of ``host`` call it.

        ``provider``: whose streams and tensors (default: torch's, of ``device``, else its current one). ``flat``: what
        is not compressed is left to NCCL's own algorithms; False: it takes the plan's route, stage by stage. ``watch``:
        s between looks of the watchdog, which ends everything with a typed error where NCCL failed in the background,
        or something was not done within the context's timeout; 0: none. ``debug``: before each call ranks compare what
        they are about to do, which makes the host wait, and raise `PlanMismatchError` where they differ. ``stopwatch``:
        what ``compress="auto"`` measures with (default: the provider's events). ``copy_engines``: NCCL moves what lies
        in windows, as the Reducer's buckets do, by them where it can, and so leaves the processors to the computation
        (its NCCL_CTA_POLICY_ZERO, from 2.28 on); None: as HYBRIDCOMM_COPY_ENGINES says, else not.

        Raises `UnsupportedError`, on all ranks, where one has no such device or a library is missing or too old, or
        ranks differ in it.
        """
        from hybridcomm.gpu_libraries import nccl_files

        try:
            provider = TorchCuda(device) if provider is None else provider
            engine = _C.GpuEngine(
                device=provider.ordinal,
                streams=3,
                timeout_s=host.timeout,
                watch_s=watch,
                nccl_files=[str(path) for path in nccl_files()],
                host=host._engine,
                copy_engines=device_comms.uses_copy_engines(copy_engines),
            )
            facts = [f"NCCL {engine.nccl_version}", f"sm_{engine.compute_capability}", *engine.newer]
            side_by_side = device_comms.keeps_order(engine)
            facts += ["launches in order"] if side_by_side else []
            facts += ["copy engines"] if engine.copy_engines else []
        except Exception as error:
            device_comms.check_alike(host, [f"no GPU ({error})"])  # the others must not wait for this rank
            raise
        device_comms.check_alike(host, facts)
        comms = device_comms.connect(engine, host)
        # Else one stream for all of NCCL: kernels of two communicators that wait for each other may fill a device.
        streams = (0, 1, 2) if side_by_side else (0, 1, 1)
        made = cls(
            host, provider, engine, comms, streams=streams, flat=flat, debug=debug, stopwatch=stopwatch
        )
        made._first = host._engine.counters()["calls"]  # what is drawn goes on where the host's calls are
        return made

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        return self.host.world_size

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
            host,
            self.provider,
            self._engine,
            comms,
            streams=self._streams,
            flat=self.flat,
            debug=self.debug,
            stopwatch=self.stopwatch,
        )

    def describe(self) -> str:
        """One line for a log: libraries, and the route that tensors take."""
        gpu = self._engine
        beside = "beside" if self._streams[1] != self._streams[2] else "on one stream with"
        return (
            f"GPU {self.provider.ordinal} (sm_{gpu.compute_capability}), CUDA driver {gpu.cuda_version}, NCCL "
            f"{gpu.nccl_version} ({gpu.nccl_path}; {', '.join(gpu.newer) or 'nothing beyond 2.18'}); without compress= "
            "tensors go flat, by NCCL's own algorithms; with it hierarchically, compressed between nodes; stages in "
            f"nodes run {beside} those between them{', windows go by copy engines' * gpu.copy_engines}"
        )

    def empty(self, *size: Any, dtype: Any = None) -> torch.Tensor:
        """A tensor on the device, not cleared, in memory that NCCL knows: registered where this NCCL can.

        ``size`` as `torch.empty` takes it; default dtype float32. Any rank may call it alone.
        """
        return self._empty(size, dtype, ())

    def bucket(self, numel: int, *, dtype: Any = None) -> torch.Tensor:
        """As `empty`, by all ranks together: of as many elements, and in the same order, on each.

        So the memory can be one symmetric window of NCCL's (2.27), through which ranks of a node reach each other's and
        copy engines take the place of kernels (``copy_engines=``).
        """
        return self._empty((numel,), dtype, sorted(self._comms.values()))

    def _empty(self, size: tuple[Any, ...], dtype: Any, windows: Sequence[int]) -> torch.Tensor:
        import torch

        shape = torch.Size(
            size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        )
        dtype = torch.float32 if dtype is None else dtype
        nbytes = shape.numel() * dtype.itemsize
        memory = self._engine.allocate(max(nbytes, 1), windows)
        flat = self.provider.wrap(memory.address, memory.nbytes, memory)[:nbytes]
        return flat.view(dtype).view(shape)

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
        if self._batch is not None:
            self._batch.refuse(name)
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

    def takes(self, t: Any) -> bool:
        """Whether a call of such a tensor is this device's, and not the host's; one of another GPU is refused then."""
        return self.provider.owns(t) or on_gpu(t)

    def again(self, t: Any, op: Any) -> bool:
        """There is no short way on GPUs: see `hybridcomm.collectives.Collectives.again`."""
        return False

    def check_here(self, device: Any) -> None:
        """Raises `DataTypeError` for a name of another device than this one."""
        import torch

        wanted = torch.device(device)
        if wanted.index is not None and wanted != self.provider.device:
            raise DataTypeError(f"device={device!r}: this rank's GPU is {self.provider.device}")

    def coalescing(self, *, async_op: bool = False) -> DeviceCoalescing:
        """A block whose collectives run as one NCCL group at its end; see `hybridcomm.coalescing`."""
        return DeviceCoalescing(self, async_op=async_op)

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
