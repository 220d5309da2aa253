"""What all collectives of a group of ranks share: the plan cache, the memory of a call, the way to the engine."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hybridcomm import _C, reduction
from hybridcomm.arrays import Array, View, view
from hybridcomm.errors import DataTypeError, UnsupportedError
from hybridcomm.lower import DTYPES, lower
from hybridcomm.memory import Memory, ScratchPool
from hybridcomm.reduction import Op
from hybridcomm.residual import NO_FEEDBACK, Staged
from hybridcomm.work import Work

if TYPE_CHECKING:
    from hybridcomm import auto
    from hybridcomm.coalesce import Coalescing
    from hybridcomm.compress import Compressor
    from hybridcomm.members import Members
    from hybridcomm.plan import Plan
    from hybridcomm.topology import Topology

__all__ = ["CollectivesBase", "check_dtypes", "note_written", "scale"]

_CACHED_PLANS = 256


class CollectivesBase:
    """One rank's part in the collectives of its group; the families of collectives derive from it."""

    def __init__(
        self,
        *,
        rank: int,
        topology: Topology,
        engine: _C.Engine,
        chunk_nbytes: int,
        members: Members | None = None,
    ) -> None:
        self.rank = rank
        self.topology = topology
        self.members = members  # None: all ranks of the job
        self.chunk_nbytes = chunk_nbytes
        self._engine = engine
        self._prepared = _C.PreparedCalls(
            engine
        )  # blocking, dense calls made before: the short way to the engine
        self._programs: OrderedDict[tuple[Any, ...], tuple[Plan, _C.Program]] = OrderedDict()
        self.policies: dict[str, auto.Policy] = {}  # of "auto" texts: see hybridcomm.auto
        self._running: deque[Work] = deque()  # keeps tensors alive when the caller drops its handle
        self._scratch = ScratchPool()
        self._batch: Coalescing | None = None  # that takes the calls at the moment

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def local_rank(self) -> int:
        return self.topology.local_rank(self.rank)

    @property
    def node_rank(self) -> int:
        return self.topology.node_of(self.rank)

    def _memory(self, dtype: str) -> Memory:
        return Memory(dtype=dtype, pool=self._scratch)

    def _views(self, arrays: Sequence[Array] | None, name: str, *, like: View, written: bool) -> list[View]:
        """One view per rank of a caller's list, all of the dtype of ``like``."""
        if not isinstance(arrays, (list, tuple)):
            raise UnsupportedError(
                f"{name}: expected a list of one array per rank, got {type(arrays).__name__}"
            )
        if len(arrays) != self.world_size:
            raise UnsupportedError(
                f"{name} holds {len(arrays)} arrays; {self.world_size} ranks need one each"
            )
        views = [view(array, f"{name}[{rank}]", written=written) for rank, array in enumerate(arrays)]
        for rank, each in enumerate(views):
            check_dtypes((f"{name}[{rank}]", each), ("the other tensor", like))
        return views

    def _equal_parts(self, whole: View, part: View, names: tuple[str, str]) -> list[View]:
        """One view per rank of ``whole``, each as long as ``part``."""
        check_dtypes((names[0], whole), (names[1], part))
        if whole.numel != part.numel * self.world_size:
            raise UnsupportedError(
                f"{names[0]} has {whole.numel} elements; with {part.numel} in {names[1]} and "
                f"{self.world_size} ranks it needs {part.numel * self.world_size}"
            )
        return whole.split([part.numel] * self.world_size)

    @staticmethod
    def _operation(op: Op, dtype: str) -> tuple[str, float | None]:
        """(canonical name, factor) of ``op``, which must be one that ``dtype`` takes."""
        name, factor = reduction.resolve(op)
        reduction.check(name, dtype)
        if factor is not None:
            reduction.check_factor(factor, dtype)
        return name, factor

    def _program(
        self, key: tuple[Any, ...], build: Callable[[], Plan], *active: Compressor | None
    ) -> tuple[Plan, _C.Program]:
        if self._batch is not None:
            self._batch.refuse(str(key[0]))
        found = self._programs.get(key)
        if found is None:
            plan = build()
            found = self._programs[key] = (plan, lower(plan, self.rank, *active, members=self.members))
            if len(self._programs) > _CACHED_PLANS:
                self._programs.popitem(last=False)
        else:
            self._programs.move_to_end(key)
        return found

    def _launch(
        self,
        program: _C.Program,
        memory: Memory,
        async_op: bool,
        *,
        staged: Staged | None = None,
        name: int = 0,
        timeout_s: float = 0.0,
    ) -> Work | None:
        e_in, e_out = (0, 0) if staged is None else (staged.e_in.ctypes.data, staged.e_out.ctypes.data)
        feedback = NO_FEEDBACK if staged is None else staged.feedback
        address, pieces = memory.table()
        where = (address, e_in, e_out, self._prepared.stamp(program, name), pieces, timeout_s)
        for array in memory.written:
            note_written(array)
        if not async_op:
            self._engine.run(program, *where, feedback)
            memory.finish()
            return None
        tensors = [*memory.written, *memory.kept, *(() if staged is None else staged.arrays)]
        work = Work(self._engine.submit(program, *where, feedback), tensors, finish=memory.finish)
        while self._running and self._running[0].is_completed():
            self._running.popleft()
        self._running.append(work)
        return work


def scale(dtype: str, address: int, numel: int, factor: float | None) -> None:
    """Multiplies elements in place, for a premul_sum."""
    if factor is not None and numel:
        _C.scale(DTYPES.index(dtype), address, numel, factor)


def check_dtypes(left: tuple[str, View], right: tuple[str, View]) -> None:
    if left[1].dtype != right[1].dtype:
        raise DataTypeError(
            f"{left[0]} is {left[1].dtype}, {right[0]} is {right[1].dtype}: they must be the same"
        )


def note_written(array: Array) -> None:
    """Tells autograd that the engine writes a tensor's memory, so that a stale use of it raises."""
    if hasattr(array, "is_inference") and not array.is_inference():
        from torch.autograd.graph import increment_version

        increment_version(array)
