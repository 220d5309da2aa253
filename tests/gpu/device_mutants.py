"""Bugs planted in the Python half of the GPU engine: plans, contexts, the Reducer. Scenarios notice each.

What is planted in its C++ half: `tests.gpu.engine_mutants`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from hybridcomm import _C, device_allreduce, device_codec, device_collectives, device_comms, placing, verbs
from hybridcomm.device_coalesce import DeviceCoalescing
from hybridcomm.device_codec import DevicePayloads
from hybridcomm.device_context import DeviceContext
from hybridcomm.device_plan import DevicePlan, Operation
from hybridcomm.device_work import DeviceWork
from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.residual_memory import HOST
from tests.gpu.device_lanes import Lanes
from train.pipeline import passes
from train.pipeline.instructions import RECEIVE

__all__ = ["MUTANTS", "Planted"]

Patch = Any


def lowering(change: Callable[[DevicePlan, int], DevicePlan]) -> Patch:
    """Every plan that is lowered is changed, given its rank."""
    real = device_allreduce.lower_device

    def lower(plan: Any, rank: int, *given: Any, **named: Any) -> DevicePlan:
        return change(real(plan, rank, *given, **named), rank)

    return mock.patch.object(device_allreduce, "lower_device", lower)


def operations(change: Callable[[Operation], Operation], *, rank: int | None = None) -> Patch:
    def changed(plan: DevicePlan, of: int) -> DevicePlan:
        if rank not in (None, of):
            return plan
        return replace(plan, operations=tuple(change(op) for op in plan.operations))

    return lowering(changed)


def without_waits(word: str) -> Patch:
    return operations(lambda op: replace(op, after=()) if op.word == word else op)


def around(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """A method or function, which ``change`` gets first, then what was given."""
    real = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *given, **named: change(real, *given, **named))


def cut(op: Operation) -> Operation:
    return replace(op, count=op.count - 16) if op.kind == "all_gather" else op


def shorter(op: Operation) -> Operation:
    return replace(op, count=op.count - 16) if op.word == "reduce" else op


def next_root(op: Operation) -> Operation:
    return replace(op, peer=(op.peer + 1) % 2) if op.kind in ("reduce", "broadcast") else op


def ungrouped(op: Operation) -> Operation:
    return replace(op, group=-1)


def other_divisor(op: Operation) -> Operation:
    return replace(op, divisor=op.divisor + 1) if op.divisor > 1 else op


def no_fill(plan: DevicePlan, _: int) -> DevicePlan:
    """Nothing is cleared; the others keep their places."""
    nothing = [replace(op, count=16) if op.kind == "fill" else op for op in plan.operations]
    return replace(plan, operations=tuple(nothing))


def forgets_its_tensor(plan: DevicePlan, _: int) -> DevicePlan:
    return replace(plan, buffers=tuple(each for each in plan.buffers if each.name != "tensor"))


def no_tail(plan: DevicePlan, rank: int) -> DevicePlan:
    return replace(plan, tail=len(plan.operations)) if rank == 1 else plan


@contextmanager
def shared_scratch() -> Iterator[None]:
    """Payloads of all buckets lie in the same memory, of which nobody is told."""
    scratch: dict[tuple[int, int], torch.Tensor] = {}
    real = DevicePayloads.__init__

    def init(self: DevicePayloads, *given: Any, memory: Any, **named: Any) -> None:
        real(self, *given, memory=memory, **named)
        self._scratch = scratch.setdefault((id(memory), self._scratch.numel()), self._scratch)

    def buffers(self: DevicePayloads) -> tuple[Any, ...]:
        return tuple(each for each in told.fget(self) if each.name not in ("payloads", "workspace"))  # type: ignore[misc]

    told = DevicePayloads.buffers
    with (
        mock.patch.object(DevicePayloads, "__init__", init),
        mock.patch.object(DevicePayloads, "buffers", property(buffers)),
    ):
        yield
    scratch.clear()


@contextmanager
def three_streams() -> Iterator[None]:
    """Communicators within and between nodes are not ordered by a stream."""
    real = _C.GpuEngine

    def engine(**options: Any) -> Any:
        return real(**{**options, "streams": 3})

    def init(old: Any, self: DeviceContext, *given: Any, streams: Any, **named: Any) -> None:
        old(self, *given, streams=(0, 1, 2), **named)

    with mock.patch.object(_C, "GpuEngine", engine), around_init(DeviceContext, init):
        yield


def around_init(owner: Any, change: Callable[..., None]) -> Patch:
    real = owner.__init__

    def init(self: Any, *given: Any, **named: Any) -> None:
        change(real, self, *given, **named)

    return mock.patch.object(owner, "__init__", init)


def swaps_buckets(real: Any, self: DeviceContext, t: Any, **named: Any) -> Any:
    """Rank 1 keeps the first of two buckets back until it has launched the second."""
    if self.rank != 1 or not named.get("async_op"):
        return real(self, t, **named)
    held = getattr(self, "_held_back", None)
    if held is None:
        self._held_back = _Later(lambda: real(self, t, **named))  # type: ignore[attr-defined]
        return self._held_back  # type: ignore[attr-defined]
    work = real(self, t, **named)
    held.start()
    self._held_back = None  # type: ignore[attr-defined]
    return work


class _Later:
    def __init__(self, launch: Callable[[], Any]) -> None:
        self._launch, self._work = launch, None

    def start(self) -> None:
        self._work = self._launch()

    def wait(self) -> None:
        if self._work is None:
            self.start()
        self._work.wait()  # type: ignore[attr-defined]


class _Skipped:
    def wait(self) -> bool:
        return True


def skips_one(real: Any, self: DeviceContext, t: Any, **named: Any) -> Any:
    if self.rank == 1 and self._calls == 1:
        self._calls += 1
        return _Skipped()
    return real(self, t, **named)


def other_source(real: Any, self: DeviceContext, t: Any, src: int = 0, **named: Any) -> Any:
    return real(self, t, (src + 1) % self.world_size, **named)


def keeps_nothing(real: Any, self: DeviceWork, *given: Any, **named: Any) -> None:
    engine, work, provider, _ = given
    real(self, engine, work, provider, (), **named)


def ends_nothing(real: Any, self: DeviceContext) -> None:
    _left.append(self._engine)
    self._running.clear()
    self._programs.clear()


_left: list[Any] = []


def one_key(real: Any, self: DeviceContext, key: Any, *given: Any, **named: Any) -> Any:
    return real(self, key[:1], *given, **named)


def in_firing_order(real: Any, self: Reducer) -> None:
    """Rank 1 launches buckets as they fill."""
    if self.ctx.rank != 1:
        return real(self)
    for bucket in self._buckets:
        if bucket.state.name == "READY":
            bucket.advance(type(bucket.state).IN_FLIGHT)
            self._works.append(self._launch(bucket.layout))
    return None


def another_order(real: Any, topology: Any) -> Any:
    _order.append(None)
    found = real(topology)
    return found[::-1] if len(_order) % 4 == 1 else found


_order: list[None] = []


def swapped(real: Any, self: Residual, *given: Any, **named: Any) -> Any:
    """On devices alone."""
    pair = real(self, *given, **named)
    return pair if self._memory is HOST else pair[::-1]


def no_template(real: Any, *given: Any) -> Any:
    header = real(*given)
    header.template.zero_()
    return header


def untranslated(real: Any, group: Any, t: Any, peer: int, tag: int) -> Any:
    found = real(group, t, peer, tag)
    return found and (found[0], peer)


def of_all_ranks(real: Any, group: Any) -> Any:
    return real(placing._home(group))


def backwards(real: Any, self: DeviceContext, arrays: Any, name: str) -> Any:
    return real(self, arrays, name)[::-1]


def takes_one(real: Any, self: DeviceCoalescing, *given: Any, **named: Any) -> None:
    if not self._calls:
        real(self, *given, **named)


def reordered(real: Any, self: DeviceContext, calls: Any, *given: Any) -> Any:
    """On rank 1."""
    return real(self, calls[::-1] if self.rank else calls, *given)


def messages(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Patch:
    """Every message's operation is changed."""
    return mock.patch.object(
        device_collectives, "Operation", lambda **fields: Operation(**{**fields, **change(fields)})
    )


def drops_a_receive(real: Any, self: DeviceContext, given: Any, **named: Any) -> Any:
    """The third batch of rank 1 that receives."""
    self._batches = getattr(self, "_batches", 0) + any(not sends for sends, *_ in given)  # type: ignore[attr-defined]
    if self.rank == 1 and self._batches == 3:  # type: ignore[attr-defined]
        given = [each for each in given if each[0]] or [(True, given[0][1], given[0][2])]
    return real(self, given, **named)


def looks_at_its_own(real: Any, self: DeviceContext, wanted: Any, given: Any) -> bool:
    real(self, wanted, given)
    return len({part.numel() for part in (*wanted, *given)}) == 1


def swaps_sends(real: Any, self: Lanes) -> None:
    """The first stage's second value goes from where its third will be."""
    if self.rank.rank == 0:
        swap = {1: 2, 2: 1}
        self.batch[:] = [
            (
                entry,
                self.room(entry.op, swap.get(entry.microbatch, entry.microbatch))
                if entry.op == "SEND_F"
                else room,
            )
            for entry, room in self.batch
        ]
    real(self)


def one_room(real: Any, self: Lanes, op: str, microbatch: int) -> Any:
    """All that is received comes to the same buffer, whether or not what was there has been used."""
    return self.rooms["RECV_F"][0] if op in RECEIVE else real(self, op, microbatch)


class Planted(NamedTuple):
    """A scenario that should notice it, what plants it, and under how many seeds."""

    scenario: str
    patch: Callable[[], Patch]
    seeds: int = 4


def methods(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[], Patch]:
    return lambda: around(owner, name, change)


MUTANTS: dict[str, Planted] = {
    **{
        f"no waits of {word}": Planted(scenario, lambda word=word: without_waits(word))  # type: ignore[misc]
        for word, scenario in (
            ("compress", "streams"),
            ("exchange", "buckets of unequal nodes"),
            ("decompress", "buckets"),
            ("gather", "buckets"),
            ("reduce", "reducer"),
        )
    },
    "swapped buckets": Planted("buckets", methods(DeviceContext, "allreduce", swaps_buckets)),
    "a skipped collective": Planted("buckets", methods(DeviceContext, "allreduce", skips_one)),
    "a group's peers are taken for the job's": Planted(
        "verbs", lambda: around(verbs, "gpu_messages", untranslated)
    ),
    "a group's calls go to all ranks": Planted("verbs", lambda: around(placing, "gpus_of", of_all_ranks)),
    "lists are gathered backwards": Planted("verbs", methods(DeviceContext, "_parts", backwards)),
    "a block keeps its first call alone": Planted("coalesced", methods(DeviceCoalescing, "take", takes_one)),
    "coalesced calls are in no order": Planted("coalesced", methods(DeviceContext, "_grouped", reordered)),
    "a payload's end is not sent": Planted("buckets", lambda: operations(cut)),
    "one rank sums less": Planted("buckets", lambda: operations(shorter, rank=1)),
    "a wrong root of shards": Planted("uneven shards", lambda: operations(next_root)),
    "a wrong source": Planted("messages", methods(DeviceContext, "broadcast", other_source)),
    "messages in no group": Planted("two-stage", lambda: operations(ungrouped)),
    "messages do not wait for what is computed": Planted(
        "pipeline", lambda: messages(lambda _: {"after": ()})
    ),
    "messages of a batch are not grouped": Planted("pipeline", lambda: messages(lambda _: {"group": -1})),
    "nobody waits for a message": Planted("split backward", methods(DeviceWork, "wait", lambda *_: True)),
    "a rank takes its own parts for everybody's": Planted(
        "all-to-alls of the newest NCCL", methods(DeviceContext, "_agree_on_sizes", looks_at_its_own)
    ),
    "an older NCCL is taken for one with all-to-all": Planted(
        "all-to-alls",
        lambda: mock.patch.object(_C.GpuEngine, "newer", property(lambda _: ["ncclAlltoAll"])),
    ),
    "the last rank of a share is its root on one rank": Planted(
        "several roots",
        methods(
            device_comms, "_unique_ids", lambda real, gpu, ctx, _: real(gpu, ctx, [0, 2 - (ctx.rank == 1)])
        ),
    ),
    "what one rank allocates alone is a window": Planted(
        "windows", methods(DeviceContext, "empty", lambda _, self, *size: self.bucket(*size))
    ),
    "a rank's bucket is shorter": Planted(
        "windows",
        methods(DeviceContext, "bucket", lambda real, self, n: real(self, n + 16 * (self.rank == 1))),
    ),
    "a dropped receive": Planted("pipeline", methods(DeviceContext, "batch", drops_a_receive)),
    "swapped sends": Planted("pipeline", methods(Lanes, "start", swaps_sends)),
    "a buffer is received into again too early": Planted("split backward", methods(Lanes, "room", one_room)),
    "lists as for hosts": Planted(
        "pipeline",
        lambda: mock.patch.object(
            passes, "add_rendezvous", lambda schedule, _: passes.add_communication(schedule)
        ),
    ),
    "a wrong divisor": Planted("unequal", lambda: operations(other_divisor)),
    "nothing is cleared": Planted("two-stage", lambda: lowering(no_fill)),
    "a tail at another place on one rank": Planted("buckets", lambda: lowering(no_tail)),
    "programs do not say that they touch their tensor": Planted(
        "overlap", lambda: lowering(forgets_its_tensor)
    ),
    "tensors are let go early": Planted("dropped", lambda: around_init(DeviceWork, keeps_nothing)),
    "the engine is left": Planted("messages", methods(DeviceContext, "close", ends_nothing)),
    "one program for all addresses": Planted("buckets", methods(DeviceContext, "_program", one_key)),
    "nobody waits": Planted("streams", methods(DeviceWork, "wait", lambda *_: True)),
    "residuals are read before they are made": Planted(
        "buckets", methods(DeviceWork, "wait", lambda *_: True)
    ),
    "the host reads early": Planted("host reads", methods(DeviceWork, "synchronize", lambda *_: None)),
    "work is done as soon as it is asked": Planted(
        "host reads", lambda: mock.patch.object(DeviceWork, "is_completed", return_value=True)
    ),
    "residual buffers are swapped": Planted("buckets", methods(Residual, "stage", swapped)),
    "buckets share their scratch": Planted("buckets", shared_scratch),
    "headers are missing": Planted("payloads", lambda: around(device_codec, "make_header", no_template)),
    "communicators of two streams": Planted("buckets", three_streams, 30),
    "communicators are split in another order": Planted(
        "buckets of unequal nodes", methods(device_comms, "groups_of", another_order)
    ),
    "launches in firing order": Planted("reducer", methods(Reducer, "_launch_ready", in_firing_order)),
}
