"""A rank's part of a plan on a GPU, as a value: what runs on which stream, and what waits for what.

`hybridcomm.lower_device` makes it from a `Plan`; it can be printed, checked (`hybridcomm.device_check`) and handed to
the engine. Addresses are the device's. Operations are issued in the order in which they stand; those of one stream run
in it, and across streams only ``after`` orders them, by events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hybridcomm import _C
from hybridcomm.errors import DataTypeError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hybridcomm.device_draws import Draws
    from hybridcomm.kernels.cubins.load import Image

__all__ = ["COLLECTIVES", "START", "STREAMS", "Buffer", "DevicePlan", "Operation", "Touch", "nccl_type"]

START = -1
"""Among ``after``: what the caller's stream had done before."""

STREAMS = ("codec", "intra", "inter")
"""Kernels; NCCL inside nodes; NCCL between nodes, and of all ranks."""

COLLECTIVES = (
    "all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "send", "receive"
)  # fmt: skip
"""Kinds of operations that are NCCL's; the others are "launch", "copy" and "fill"."""


class Buffer(NamedTuple):
    """Device memory under a name: ``address``, ``nbytes``."""

    name: str
    address: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.address + self.nbytes


class Touch(NamedTuple):
    """Bytes ``[begin, end)`` of device memory that an operation reads, or writes."""

    begin: int
    end: int
    write: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One thing that is put on a stream.

    ``word``: of the route; ``step``: of the plan. ``group``: neighbours of one group (not -1) are one NCCL group.
    ``source``, ``target``: addresses; ``count``: elements of ``dtype``, or bytes ("copy", "fill"). ``comm``, ``peer``:
    index of a communicator, and a rank in it. ``divisor``, ``factor``: of a sum. ``image``, ``blocks``,
    ``arguments``: of a launch.
    """

    kind: str
    word: str
    stream: str
    step: int
    touches: tuple[Touch, ...]
    after: tuple[int, ...] = ()
    group: int = -1
    source: int = 0
    target: int = 0
    count: int = 0
    dtype: str = "uint8"
    op: str = "sum"
    divisor: int = 1
    factor: float | None = None
    comm: int = -1
    peer: int = -1
    image: Image | None = None
    blocks: int = 0
    arguments: bytes = b""

    def describe(self, name: Callable[[int], str]) -> str:
        """One line; ``name`` says what an address is."""
        after = ",".join("start" if at == START else str(at) for at in self.after) or "-"
        head = f"{self.word:10s} {self.stream:5s} step={self.step} after={after}"
        if self.image is not None:
            return f"{head} launch {self.image.name} blocks={self.blocks}"
        where = f"{name(self.source)} -> {name(self.target)}" if self.source else f"-> {name(self.target)}"
        if self.kind not in COLLECTIVES:
            return f"{head} {self.kind} {where} nbytes={self.count}"
        peer = f" peer={self.peer}" if self.peer >= 0 else ""
        mean = f" / {self.divisor}" if self.divisor != 1 else ""
        mean += "" if self.factor is None else f" * {self.factor:g}"
        group = f" group={self.group}" if self.group >= 0 else ""
        return f"{head} {self.kind} {where} {self.count} {self.dtype}{mean} comm={self.comm}{peer}{group}"


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """All operations of one rank. ``tail``: the first that may wait until the head of the next plan was issued.

    ``buffers``: all device memory that is touched. ``digest``: of the `Plan`, the same on all ranks. ``draws``: makes
    a call's plan of this one, which as it stands has no seeds.
    """

    name: str
    digest: int
    operations: tuple[Operation, ...]
    tail: int
    buffers: tuple[Buffer, ...]
    draws: Draws | None = None

    @property
    def text(self) -> str:
        """One line per operation, addresses by the names of their buffers."""
        head = f"{self.name} digest={self.digest:016x} tail={self.tail}\n"
        return head + "".join(f"{i} {op.describe(self._named)}\n" for i, op in enumerate(self.operations))

    def __str__(self) -> str:
        return self.text

    def _named(self, address: int) -> str:
        for buffer in self.buffers:
            if buffer.address <= address < buffer.end:
                return f"{buffer.name}+{address - buffer.address}"
        return f"{address:#x}"

    def check(self) -> list[tuple[int, int]]:
        """Raises `PlanError` where a wait is missing; returns those that are superfluous, as (operation, after)."""
        from hybridcomm.device_check import check_operations

        return check_operations(self.operations, self._named)

    def program(
        self, engine: _C.GpuEngine, streams: Sequence[int], dtypes: Callable[[str], int]
    ) -> _C.DeviceProgram:
        """As the engine takes it. ``streams``: the engine's, by `STREAMS`; ``dtypes``: NCCL's codes."""
        ops = [self._lowered(engine, op, streams[STREAMS.index(op.stream)], dtypes) for op in self.operations]
        return _C.DeviceProgram(
            digest=self.digest,
            name=self.name,
            ops=ops,
            tail=self.tail,
            memory=[(buffer.address, buffer.end) for buffer in self.buffers],
        )

    @staticmethod
    def _lowered(
        engine: _C.GpuEngine, op: Operation, stream: int, dtypes: Callable[[str], int]
    ) -> _C.DeviceOp:
        after = list(op.after)
        if op.image is not None:
            image = op.image
            function = engine.load(image.data, image.symbol, image.dynamic_shared)
            return _C.device_launch(
                stream=stream,
                step=op.step,
                after=after,
                function=function,
                blocks=op.blocks,
                threads=image.threads,
                shared_nbytes=image.dynamic_shared,
                arguments=op.arguments,
            )
        if op.kind not in (*COLLECTIVES, "copy", "fill"):
            raise PlanError(f"step {op.step}: no operation of a GPU is called {op.kind!r}")
        return _C.device_op(
            getattr(_C.DeviceKind, op.kind),
            stream=stream,
            step=op.step,
            after=after,
            group=op.group,
            source=op.source,
            target=op.target,
            count=op.count,
            comm=op.comm,
            peer=op.peer,
            dtype=dtypes(op.dtype) if op.kind in COLLECTIVES else 0,
            op=REDUCTIONS[op.op],
            divisor=op.divisor,
            factor=op.factor,
        )


REDUCTIONS = {"sum": 0, "product": 1, "max": 2, "min": 3}
"""ncclRedOp_t; a mean is a sum with a divisor, a premul_sum one with this rank's factor."""

NCCL_TYPES = {
    "int8": 0,
    "uint8": 1,
    "int32": 2,
    "int64": 4,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}
"""ncclDataType_t of the dtypes that it combines."""


def nccl_type(dtype: str) -> int:
    """NCCL's code; raises `DataTypeError` for a dtype that it has not."""
    try:
        return NCCL_TYPES[dtype]
    except KeyError:
        raise DataTypeError(f"{dtype} on a GPU: NCCL takes {', '.join(NCCL_TYPES)}") from None
