"""The collectives of a group of ranks: from a caller's arrays to a plan, and from the plan to the engine.

In: arrays, the operation, the compressor. Out: a program of the group's plan cache, run on its engine.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridcomm import _C, auto, collective_plans, reduction
from hybridcomm import compress as compressors
from hybridcomm.arrays import Array, View, view
from hybridcomm.errors import DataTypeError, UnsupportedError
from hybridcomm.lower import DTYPES, lower
from hybridcomm.reduction import Op
from hybridcomm.residual import Residual
from hybridcomm.work import Work

if TYPE_CHECKING:
    from hybridcomm.bucket import Span
    from hybridcomm.compress import Compress, Compressor
    from hybridcomm.plan import Plan
    from hybridcomm.topology import Topology

__all__ = ["Collectives", "Op"]

_CACHED_PLANS = 256
_UNNAMED = "tensor"


class Collectives:
    """What a rank can do together with the others of its group."""

    def __init__(self, *, rank: int, topology: Topology, engine: _C.Engine, chunk_nbytes: int) -> None:
        self.rank = rank
        self.topology = topology
        self.chunk_nbytes = chunk_nbytes
        self._engine = engine
        self._prepared = _C.PreparedCalls(
            engine
        )  # blocking, dense calls made before: the short way to the engine
        self._programs: OrderedDict[tuple[Any, ...], tuple[Plan, _C.Program]] = OrderedDict()
        self.policies: dict[str, auto.Policy] = {}  # of "auto" texts: see hybridcomm.auto
        self._running: deque[Work] = deque()  # keeps tensors alive when the caller drops its handle

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def local_rank(self) -> int:
        return self.topology.local_rank(self.rank)

    @property
    def node_rank(self) -> int:
        return self.topology.node_of(self.rank)

    # -- collectives ---------------------------------------------------------------------------------------

    def allreduce(
        self,
        t: Array,
        *,
        op: Op = "sum",
        compress: Compress = None,
        residual: Residual | None = None,
        exchange: str = "auto",
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
        plain = plain and exchange == "auto"
        if plain and self._prepared.run(t, op):
            return None
        target = view(t)
        name, factor = self._operation(op, target.dtype)
        links = compressors.by_link(compress)
        compressor, exchange = auto.resolve(
            self, links.inter_node, numel=target.numel, dtype=target.dtype, op=name, exchange=exchange
        )
        active = (compressor, links.intra_node)
        if active == (None, None) and auto.is_auto(links.inter_node):
            residual = None  # the policy's answer for this size is dense, now and later
        if active == (None, None) and residual is not None:
            raise UnsupportedError("residual= needs compress=: a dense all-reduce leaves nothing behind")
        for codec in active:
            if codec is not None:
                compressors.check_compressible(codec, dtype=target.dtype, op=name)
        plan, program = self._program(
            ("allreduce", target.numel, target.dtype, name, *map(str, active), exchange),
            lambda: self._plan_allreduce(target.numel, target.dtype, name, active, exchange),
            *active,
        )
        _scale(target, factor)
        e_in = e_out = None
        if residual is not None:
            regions = plan.residuals(self.rank)
            e_in, e_out = residual.stage(residual_key, numel=target.numel, regions=regions, spans=spans)
        if plain and factor is None:
            self._prepared.remember(t, op, program)
        tensor = zlib.crc32(residual_key.encode()) if residual_key != _UNNAMED else 0
        return self._launch(program, target, async_op, residual=(e_in, e_out), name=tensor)

    all_reduce = allreduce

    def broadcast(self, t: Array, root: int = 0, *, async_op: bool = False) -> Work | None:
        """Copies rank ``root``'s ``t`` into every rank's ``t``."""
        target = view(t)
        _, program = self._program(
            ("broadcast", target.numel, target.dtype, root),
            lambda: collective_plans.broadcast(
                self.topology, target.numel, root=root, dtype=target.dtype, chunk_nbytes=self.chunk_nbytes
            ),
        )
        return self._launch(program, target, async_op)

    def all_gather(self, out: Array, t: Array, *, async_op: bool = False) -> Work | None:
        """Gathers every rank's ``t`` into ``out`` (world_size x t.numel() elements, by rank) on all ranks."""
        target, own = view(out, "out"), view(t)
        self._check_parts(whole=target, part=own, names=("out", "t"))
        _flat(out)[self.rank * own.numel : (self.rank + 1) * own.numel] = _flat(t)
        _, program = self._program(
            ("all_gather", target.numel, target.dtype),
            lambda: collective_plans.all_gather(
                self.topology, target.numel, dtype=target.dtype, chunk_nbytes=self.chunk_nbytes
            ),
        )
        return self._launch(program, target, async_op)

    def reduce_scatter(self, out: Array, t: Array, *, op: Op = "sum", async_op: bool = False) -> Work | None:
        """Reduces ``t`` (world_size x out.numel() elements) over all ranks; rank r gets part r in ``out``.

        ``t`` is left as it was: the partial sums live in a copy.
        """
        own, whole = view(out, "out"), view(t)
        self._check_parts(whole=whole, part=own, names=("t", "out"))
        name, factor = self._operation(op, whole.dtype)
        scratch = t.detach().clone() if hasattr(t, "detach") else t.copy()
        _scale(view(scratch), factor)
        _, program = self._program(
            ("reduce_scatter", whole.numel, whole.dtype, name),
            lambda: collective_plans.reduce_scatter(
                self.topology, whole.numel, dtype=whole.dtype, op=name, chunk_nbytes=self.chunk_nbytes
            ),
        )

        def copy_out() -> None:
            begin = self.rank * own.numel
            _flat(out)[:] = _flat(scratch)[begin : begin + own.numel]

        return self._launch(program, view(scratch), async_op, finish=copy_out, keep=(out,))

    def barrier(self, *, async_op: bool = False) -> Work | None:
        """Returns on no rank before every rank has entered."""
        _, program = self._program(("barrier",), lambda: collective_plans.barrier(self.topology))
        return self._launch(program, view(np.zeros(1, np.int64)), async_op)

    def plan_allreduce(
        self,
        numel: int,
        *,
        dtype: str = "float32",
        op: Op = "sum",
        compress: Compress = None,
        exchange: str = "auto",
    ) -> Plan:
        """The plan that `allreduce` would run for such a tensor: print it, check it, compare digests."""
        name, _ = self._operation(op, dtype)
        links = compressors.by_link(compress)
        compressor, exchange = auto.resolve(
            self, links.inter_node, numel=numel, dtype=dtype, op=name, exchange=exchange
        )
        return self._plan_allreduce(numel, dtype, name, (compressor, links.intra_node), exchange)

    def _plan_allreduce(
        self,
        numel: int,
        dtype: str,
        op: str,
        active: tuple[Compressor | None, Compressor | None],
        exchange: str,
    ) -> Plan:
        return collective_plans.allreduce(
            self.topology,
            numel,
            dtype=dtype,
            op=op,
            compressor=active[0],
            intra=active[1],
            exchange=exchange,
            chunk_nbytes=self.chunk_nbytes,
        )

    @staticmethod
    def _operation(op: Op, dtype: str) -> tuple[str, float | None]:
        """(canonical name, factor) of ``op``, which must be one that ``dtype`` takes."""
        name, factor = reduction.resolve(op)
        reduction.check(name, dtype)
        if factor is not None and dtype.startswith(("int", "uint")) and factor != int(factor):
            raise UnsupportedError(f"premul_sum({factor}) of {dtype}: an integer tensor needs a whole factor")
        return name, factor

    def _check_parts(self, *, whole: View, part: View, names: tuple[str, str]) -> None:
        if whole.dtype != part.dtype:
            raise DataTypeError(
                f"{names[0]} is {whole.dtype}, {names[1]} is {part.dtype}: they must be the same"
            )
        if whole.numel != part.numel * self.world_size:
            raise UnsupportedError(
                f"{names[0]} has {whole.numel} elements; with {part.numel} in {names[1]} and "
                f"{self.world_size} ranks it needs {part.numel * self.world_size}"
            )

    def _program(
        self, key: tuple[Any, ...], build: Callable[[], Plan], *active: Compressor | None
    ) -> tuple[Plan, _C.Program]:
        found = self._programs.get(key)
        if found is None:
            plan = build()
            found = self._programs[key] = (plan, lower(plan, self.rank, *(active or (None,))))
            if len(self._programs) > _CACHED_PLANS:
                self._programs.popitem(last=False)
        else:
            self._programs.move_to_end(key)
        return found

    def _launch(
        self,
        program: _C.Program,
        target: View,
        async_op: bool,
        *,
        residual: tuple[Any, Any] = (None, None),
        name: int = 0,
        finish: Callable[[], None] | None = None,
        keep: Sequence[Array] = (),
    ) -> Work | None:
        e_in, e_out = residual
        addresses = (
            target.address,
            0 if e_in is None else e_in.ctypes.data,
            0 if e_out is None else e_out.ctypes.data,
            name,
        )
        _note_written(target.owner)
        if not async_op:
            self._engine.run(program, *addresses)
            if finish is not None:
                finish()
            return None
        tensors = [target.owner, *keep, *(e for e in residual if e is not None)]
        work = Work(self._engine.submit(program, *addresses), tensors, finish=finish)
        while self._running and self._running[0].is_completed():
            self._running.popleft()
        self._running.append(work)
        return work


def _scale(target: View, factor: float | None) -> None:
    if factor is not None:
        _C.scale(DTYPES.index(target.dtype), target.address, target.numel, factor)


def _flat(array: Array) -> Any:
    return array.detach().view(-1) if hasattr(array, "detach") else array.reshape(-1)


def _note_written(array: Array) -> None:
    """Tells autograd that the engine writes a tensor's memory, so that a stale use of it raises."""
    if hasattr(array, "is_inference") and not array.is_inference():
        from torch.autograd.graph import increment_version

        increment_version(array)
