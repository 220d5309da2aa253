"""The collectives on GPUs that are one call of NCCL's, and messages between two ranks.

Tensors lie on this rank's device, are contiguous and of a dtype that NCCL has; they are read and written in place, and
what is not a result stays as it is. Messages are NCCL's: without tags, and a kernel on both sides, each of which waits
for the other. So all ranks call theirs in one order; a batch is one NCCL group, in which ranks may send to each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybridcomm.device_coalesce import GroupedCall
from hybridcomm.device_plan import START, Buffer, DevicePlan, Operation, Touch, nccl_type
from hybridcomm.device_reduction import fields_of, shared
from hybridcomm.errors import DataTypeError, GroupError, UnsupportedError
from hybridcomm.stream_provider import view_of

if TYPE_CHECKING:
    from collections import OrderedDict

    import torch

    from hybridcomm import _C
    from hybridcomm.device_coalesce import DeviceCoalescing
    from hybridcomm.device_work import DeviceWork
    from hybridcomm.groups import Grouping
    from hybridcomm.reduction import Op
    from hybridcomm.stream_provider import StreamProvider

__all__ = ["DeviceCollectives"]

_EXCHANGES = 4096  # programs, which hold no memory: activations come back to addresses where others were


class DeviceCollectives:
    """One rank's part in them; `hybridcomm.device_context.DeviceContext` has the rest."""

    host: Grouping
    provider: StreamProvider
    _batch: DeviceCoalescing | None
    _comms: dict[tuple[int, ...], int]
    _programs: OrderedDict[tuple[Any, ...], tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]]]
    _exchanges: OrderedDict[tuple[Any, ...], tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]]]
    _streams: tuple[int, int, int]
    _newer: frozenset[str]  # what NCCL has beyond 2.18, which is the same on all ranks

    if TYPE_CHECKING:
        _engine: _C.GpuEngine

        def _remember(
            self, key: tuple[Any, ...], lowered: DevicePlan, kept: Sequence[Any]
        ) -> tuple[_C.DeviceProgram, DevicePlan, Sequence[Any]]: ...

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
        ) -> DeviceWork | None: ...

        def takes(self, t: Any) -> bool: ...

        @staticmethod
        def _dtype(tensor: torch.Tensor) -> str: ...

    # -- of all ranks --------------------------------------------------------------------------------------

    def broadcast(self, t: Any, src: int = 0, *, async_op: bool = False, stream: Any = None) -> Any:
        """Copies rank ``src``'s ``t`` into every rank's ``t``."""
        if not self.takes(t):
            return self.host.broadcast(t, src, async_op=async_op)
        self._check_rank(src)
        tensor = view_of(t, self.provider)
        wrote = self.host.rank != src
        return self._one("broadcast", tensor, tensor, tensor.numel(), async_op, stream, wrote=wrote, peer=src)

    def reduce(
        self, t: Any, dst: int = 0, *, op: Op = "sum", async_op: bool = False, stream: Any = None
    ) -> Any:
        """Reduces ``t`` over all ranks into rank ``dst``'s ``t``; the others' stay as they are."""
        if not self.takes(t):
            return self.host.reduce(t, dst, op=op, async_op=async_op)
        self._check_rank(dst)
        tensor = view_of(t, self.provider)
        fields = self._reduction(op, tensor)
        wrote = self.host.rank == dst
        return self._one(
            "reduce", tensor, tensor, tensor.numel(), async_op, stream, wrote=wrote, peer=dst, **fields
        )

    def all_gather_into_tensor(self, out: Any, t: Any, *, async_op: bool = False, stream: Any = None) -> Any:
        """Gathers every rank's ``t`` into ``out`` (world_size x t.numel() elements, by rank) on all ranks.

        ``t`` may be this rank's part of ``out``.
        """
        if not self.takes(out):
            return self.host.all_gather_into_tensor(out, t, async_op=async_op)
        whole, own = view_of(out, self.provider, "out"), view_of(t, self.provider)
        self._check_parts(whole, own, "out", "t")
        return self._one("all_gather", own, whole, own.numel(), async_op, stream)

    def all_gather(self, out: Any, t: Any, *, async_op: bool = False, stream: Any = None) -> Any:
        """Copies every rank's ``t`` into ``out[rank]`` of all ranks; a list, or one tensor as above."""
        if not isinstance(out, (list, tuple)):
            return self.all_gather_into_tensor(out, t, async_op=async_op, stream=stream)
        if not self.takes(t):
            return self.host.all_gather(out, t, async_op=async_op)
        own, parts = view_of(t, self.provider), self._parts(out, "out")
        if parts[self.host.rank].numel() != own.numel() or any(part.dtype != own.dtype for part in parts):
            raise UnsupportedError("all_gather: out[rank] must have the dtype of t, and this rank's its size")
        calls = [("broadcast", own if r == self.host.rank else part, part, r) for r, part in enumerate(parts)]
        return self._several(calls, {}, async_op, stream, [*parts, own])

    def reduce_scatter(
        self, out: Any, input_list: Any, *, op: Op = "sum", async_op: bool = False, stream: Any = None
    ) -> Any:
        """Reduces ``input_list[r]`` over all ranks into rank r's ``out``; a list, or one tensor as below."""
        if not isinstance(input_list, (list, tuple)):
            return self.reduce_scatter_tensor(out, input_list, op=op, async_op=async_op, stream=stream)
        if not self.takes(out):
            return self.host.reduce_scatter(out, input_list, op=op, async_op=async_op)
        own, parts = view_of(out, self.provider, "out"), self._parts(input_list, "input_list")
        if parts[self.host.rank].numel() != own.numel() or any(part.dtype != own.dtype for part in parts):
            raise UnsupportedError(
                "reduce_scatter: inputs must have the dtype of out, and this rank's its size"
            )
        calls = [("reduce", part, own if r == self.host.rank else part, r) for r, part in enumerate(parts)]
        return self._several(calls, self._reduction(op, own), async_op, stream, [*parts, own])

    def reduce_scatter_tensor(
        self, out: Any, t: Any, *, op: Op = "sum", async_op: bool = False, stream: Any = None
    ) -> Any:
        """Reduces ``t`` (world_size x out.numel() elements) over all ranks; rank r gets part r in ``out``."""
        if not self.takes(out):
            return self.host.reduce_scatter_tensor(out, t, op=op, async_op=async_op)
        own, whole = view_of(out, self.provider, "out"), view_of(t, self.provider)
        self._check_parts(whole, own, "t", "out")
        fields = self._reduction(op, own)
        return self._one("reduce_scatter", whole, own, own.numel(), async_op, stream, **fields)

    def barrier(self) -> None:
        """Of the hosts: every rank has entered before one returns; devices are not waited for."""
        self.host.barrier()

    # -- messages ------------------------------------------------------------------------------------------

    def send(self, t: Any, dst: int, tag: int = 0, *, stream: Any = None) -> None:
        """As `isend`; the current stream goes on when ``t`` may be changed (with a host's tensor the host does)."""
        if not self.takes(t):
            return self.host.send(t, dst, tag)
        self.isend(t, dst, tag, stream=stream).wait(stream)
        return None

    def recv(self, t: Any, src: int, tag: int = 0, *, stream: Any = None) -> int:
        """As `irecv`; the current stream waits for it (with a host's tensor the host does). Returns ``src``."""
        if not self.takes(t):
            return self.host.recv(t, src, tag)
        self.irecv(t, src, tag, stream=stream).wait(stream)
        return src

    def isend(self, t: Any, dst: int, tag: int = 0, *, stream: Any = None) -> Any:
        """Sends ``t`` to rank ``dst``; ``t`` must stay as it is until the work is done.

        Raises `UnsupportedError` for a ``tag`` between devices: NCCL tells messages apart by their order alone.
        """
        if not self.takes(t):
            return self.host.isend(t, dst, tag)
        return self._message(True, t, dst, tag, stream)

    def irecv(self, t: Any, src: int, tag: int = 0, *, stream: Any = None) -> Any:
        """Receives into ``t``, of the size and dtype that were sent, from rank ``src``; raises as `isend`."""
        if not self.takes(t):
            return self.host.irecv(t, src, tag)
        return self._message(False, t, src, tag, stream)

    def _message(self, sends: bool, t: Any, peer: int, tag: int, stream: Any) -> Any:
        if tag:
            raise UnsupportedError(f"tag={tag}: messages between GPUs have none, only an order; leave it out")
        return self.batch([(sends, t, peer)], stream=stream)

    def batch(self, messages: Sequence[tuple[bool, Any, int]], *, stream: Any = None) -> Any:
        """Starts messages, (does it send, tensor, peer), as one: ranks may send to each other in it.

        Only ranks that it names take part. Where two of them meet for the first time the host waits, as NCCL connects
        them then.
        """
        found = [(sends, view_of(t, self.provider), peer) for sends, t, peer in messages]
        for _, _, peer in messages:
            self._check_rank(peer)
            if peer == self.host.rank:
                raise UnsupportedError(f"rank {peer} sends to itself: copy the tensor instead")
        return self._messages(found, True, stream, [t for _, t, _ in messages], "messages", alike=False)

    # -- one program each ----------------------------------------------------------------------------------

    def _one(
        self,
        kind: str,
        source: torch.Tensor,
        target: torch.Tensor,
        count: int,
        async_op: bool,
        stream: Any,
        *,
        wrote: bool = True,
        **fields: Any,
    ) -> Any:
        """A call of one NCCL operation of all ranks."""
        dtype = self._dtype(source)
        if self._batch is not None:
            if kind not in ("all_gather", "reduce_scatter"):
                self._batch.refuse(kind)
            plain = not async_op and stream is None
            return self._batch.take(
                GroupedCall(kind, source, target, count, fields), [source, target], plain=plain
            )
        where = source.data_ptr(), target.data_ptr()
        key = (kind, count, dtype, *where, *sorted(fields.items()))
        program = self._programs.get(key)
        if program is None:
            buffers = _buffers({"source": source, "target": target})
            touches = [
                Touch(at.address, at.end, wrote and at.name == "target") for at in buffers if at.nbytes
            ]
            operation = Operation(
                kind=kind,
                word="exchange",
                stream="inter",
                step=0,
                touches=tuple(touches),
                after=(START,),
                source=where[0],
                target=where[1],
                count=count,
                dtype=dtype,
                comm=self._comms[tuple(range(self.host.world_size))],
                **fields,
            )
            facts = f"{kind} {count} {dtype} {shared(fields)}"
            program = self._remember(
                key, _plan(self._text(kind, count, dtype), facts, [operation], buffers), ()
            )
        return self._start(program, [source, target], async_op, stream, kind)

    def _parts(self, arrays: Sequence[Any], name: str) -> list[torch.Tensor]:
        if len(arrays) != self.host.world_size:
            raise UnsupportedError(
                f"{name} holds {len(arrays)} tensors; {self.host.world_size} ranks need one each"
            )
        return [view_of(array, self.provider, f"{name}[{rank}]") for rank, array in enumerate(arrays)]

    def _several(
        self,
        calls: Sequence[tuple[str, torch.Tensor, torch.Tensor, int]],
        fields: dict[str, Any],
        async_op: bool,
        stream: Any,
        tensors: Sequence[Any],
    ) -> Any:
        """Rooted operations, (kind, source, target, root), as one NCCL group; only a root's target is written by a
        reduce, and all others' by a broadcast."""
        kind = calls[0][0]
        key = ("group", kind, *((s.data_ptr(), t.data_ptr(), t.numel(), t.dtype) for _, s, t, _ in calls))
        program = self._programs.get((*key, *sorted(fields.items())))
        if program is None:
            operations = []
            for i, (_, source, target, root) in enumerate(calls):
                wrote = (root == self.host.rank) == (kind == "reduce")
                size = target.numel() * target.element_size()
                touches = [Touch(target.data_ptr(), target.data_ptr() + size, wrote)]
                if source.data_ptr() != target.data_ptr():
                    touches = [
                        Touch(source.data_ptr(), source.data_ptr() + size, False),
                        Touch(target.data_ptr(), target.data_ptr() + size, True),
                    ]
                operations.append(
                    Operation(
                        kind=kind,
                        word="exchange",
                        stream="inter",
                        step=0,
                        touches=tuple(touches),
                        after=(START,) if i == 0 else (),
                        group=0,
                        source=source.data_ptr(),
                        target=target.data_ptr(),
                        count=target.numel(),
                        dtype=self._dtype(target),
                        comm=self._comms[tuple(range(self.host.world_size))],
                        peer=root,
                        **fields,
                    )
                )
            sizes = [target.numel() for _, _, target, _ in calls]
            facts = f"{kind} {sizes} {calls[0][2].dtype} {shared(fields)}"
            buffers = _buffers({f"{i}": t for i, t in enumerate(tensors)})
            made = _plan(self._text(kind, sum(sizes), ""), facts, operations, buffers)
            program = self._remember((*key, *sorted(fields.items())), made, ())
        return self._start(program, tensors, async_op, stream, kind)

    def _messages(
        self,
        messages: Sequence[tuple[bool, torch.Tensor, int]],
        async_op: bool,
        stream: Any,
        tensors: Sequence[Any],
        name: str,
        *,
        alike: bool = True,
    ) -> Any:
        """``alike``: all ranks of the group call it."""
        key = (name, *((sends, t.data_ptr(), t.numel(), t.dtype, peer) for sends, t, peer in messages))
        program = self._exchanges.get(key)
        if program is None:
            buffers = _buffers({f"{i}": t for i, (_, t, _) in enumerate(messages)})
            operations = [
                Operation(
                    kind="send" if sends else "receive",
                    word="exchange",
                    stream="inter",
                    step=0,
                    touches=(Touch(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), not sends),),
                    after=(START,) if i == 0 else (),
                    group=0,
                    source=t.data_ptr() if sends else 0,
                    target=t.data_ptr(),
                    count=t.numel(),
                    dtype=self._dtype(t),
                    comm=self._comms[tuple(range(self.host.world_size))],
                    peer=peer,
                )
                for i, (sends, t, peer) in enumerate(messages)
            ]
            # Ranks send different things: what they compare in debug mode is the name alone.
            lowered = _plan(self._text(name, len(messages), ""), name, operations, buffers)
            program = lowered.program(self._engine, self._streams, nccl_type), lowered, ()
            self._exchanges[key] = program
            if len(self._exchanges) > _EXCHANGES:
                self._exchanges.popitem(last=False)
        return self._start(program, tensors, async_op, stream, name, alike=alike)

    def _text(self, kind: str, count: int, dtype: str) -> str:
        return f"rank {self.host.rank}: {kind} of {count:,} {dtype}".rstrip()

    def _reduction(self, op: Op, tensor: torch.Tensor) -> dict[str, Any]:
        return fields_of(op, tensor, self._dtype(tensor), self.host.world_size)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.host.world_size:
            raise GroupError(f"rank {rank} is not in this group of ranks 0..{self.host.world_size - 1}")

    def _check_parts(self, whole: torch.Tensor, part: torch.Tensor, one: str, other: str) -> None:
        if whole.dtype != part.dtype:
            raise DataTypeError(f"{one} is {whole.dtype}, {other} is {part.dtype}: they must be the same")
        if whole.numel() != part.numel() * self.host.world_size:
            raise UnsupportedError(
                f"{one} has {whole.numel()} elements; with {part.numel()} in {other} and {self.host.world_size} ranks "
                f"it needs {part.numel() * self.host.world_size}"
            )


def _buffers(tensors: dict[str, torch.Tensor]) -> tuple[Buffer, ...]:
    return tuple(Buffer(name, t.data_ptr(), t.numel() * t.element_size()) for name, t in tensors.items())


def _plan(name: str, facts: str, operations: Sequence[Operation], buffers: tuple[Buffer, ...]) -> DevicePlan:
    digest = int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=8).digest(), "little")
    return DevicePlan(
        name=name, digest=digest, operations=tuple(operations), tail=len(operations), buffers=buffers
    )
