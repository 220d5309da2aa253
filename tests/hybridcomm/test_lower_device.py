"""Plans lowered for GPUs, over a grid: each wait is needed, none is missing, and what ranks do fits together."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hybridcomm import compress, device_comms, policy
from hybridcomm.device_codec import DevicePayloads
from hybridcomm.device_context import DeviceContext
from hybridcomm.device_draws import seed_of
from hybridcomm.device_plan import COLLECTIVES, START, Buffer, DevicePlan, Operation
from hybridcomm.errors import PlanError
from hybridcomm.kernels.cubins.load import Image, find
from hybridcomm.kernels.device_tensors import make_header
from hybridcomm.lower_device import Places, lower_device
from hybridcomm.topology import Topology

TOPOLOGIES = ((4,), (2, 2), (1, 1, 1, 1), (2, 2, 2), (3, 1, 2), (1, 4), (8,) * 8)
CODECS = (
    "topk:0.01", "topk:0.01+sign", "topk:0.01+int8", "gtop1", "gtopk:0.01",
    "int8", "int4", "sign1", "fp8", "fp16", "bf16",
    "randk:0.01", "powersgd:1", "powersgd:2", "powersgd:4",
)  # fmt: skip
EVEN, UNEVEN = 3 * (1 << 14), 16 * 1201


class Memory:
    """The device's is the host's."""

    def empty(self, nbytes: int) -> torch.Tensor:
        whole = torch.empty(nbytes + 256, dtype=torch.uint8)
        begin = -whole.data_ptr() % 256
        return whole[begin : begin + nbytes]

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        copy = self.empty(data.numel() * data.element_size()).view(data.dtype)
        return copy.copy_(data)


@functools.cache
def image(name: str) -> Image:
    return find(name, 90)


def communicators(topology: Topology) -> list[tuple[int, ...]]:
    rounds = device_comms.groups_of(topology)
    return [tuple(range(topology.world_size)), *(group for members in rounds for group in members)]


def lowered(
    topology: Topology,
    rank: int,
    numel: int,
    codec: str | None,
    exchange: str = "auto",
    *,
    flat: bool = False,
) -> tuple[DevicePlan, Any]:
    """A rank's operations, and what their memory is; communicators are numbered alike on all ranks."""
    resolved = compress.resolve(codec)
    context = cast(
        Any, SimpleNamespace(topology=topology, host=SimpleNamespace(chunk_nbytes=policy.MAX_CHUNK_NBYTES))
    )
    plan = DeviceContext._plan_allreduce(context, numel, "float32", "mean", resolved, exchange, flat)
    memory = Memory()
    tensor = memory.empty(4 * numel).view(torch.float32)
    payloads = None
    if plan.compressor != "none" and resolved is not None:
        total = max(sum(region.numel for regions in plan.residuals(rank).values() for region in regions), 1)
        pair = memory.empty(4 * total).view(torch.float32), memory.empty(4 * total).view(torch.float32)
        payloads = DevicePayloads(plan, rank, resolved, tensor, pair, memory=memory, find=image)
    groups = communicators(topology)
    places = Places(
        tensor=Buffer("tensor", tensor.data_ptr(), 4 * numel),
        comms={group: i for i, group in enumerate(groups) if rank in group},
    )
    return lower_device(plan, rank, places, payloads), (tensor, payloads)


def policies(nodes: tuple[int, ...]) -> Iterator[tuple[int, str | None, str, bool]]:
    """(numel, codec, exchange, flat)"""
    for numel in (EVEN, UNEVEN, 4099):
        yield numel, None, "auto", True
        yield numel, None, "auto", False
    if len(nodes) > 1:
        for codec in CODECS if len(nodes) < 8 else CODECS[:2]:
            for numel in (EVEN, UNEVEN):
                yield numel, codec, "gather", False
                if not codec.startswith("gtopk"):
                    yield numel, codec, "two_stage", False


def plans(nodes: tuple[int, ...]) -> Iterator[tuple[str, list[DevicePlan]]]:
    """Of every policy: the plans of all ranks; of many ranks, those of one node and of a shard's owners."""
    topology = Topology.from_sizes(nodes)
    ranks = [r for r in range(topology.world_size) if topology.world_size <= 8 or r < 8 or r % 8 == 0]
    for numel, codec, exchange, flat in policies(nodes):
        text = f"{nodes} {numel} {codec} {exchange} flat={flat}"
        made = [lowered(topology, rank, numel, codec, exchange, flat=flat) for rank in ranks]
        yield text, [plan for plan, _ in made]


def without(operations: Sequence[Operation], place: int, wait: int) -> list[Operation]:
    less = [*operations]
    less[place] = replace(less[place], after=tuple(each for each in less[place].after if each != wait))
    return less


@pytest.mark.parametrize("nodes", TOPOLOGIES, ids=str)
def test_no_wait_is_missing_and_none_can_go(nodes: tuple[int, ...]) -> None:
    """The control of each: without it the check raises; and one more is listed."""
    for text, of_ranks in plans(nodes):
        for plan in of_ranks:
            assert plan.check() == [], text
            for place, op in enumerate(plan.operations):
                for wait in op.after:
                    with pytest.raises(PlanError):
                        replace(plan, operations=tuple(without(plan.operations, place, wait))).check()
            last = len(plan.operations) - 1
            if START not in plan.operations[last].after:
                more = [*plan.operations]
                more[last] = replace(more[last], after=(START, *more[last].after))
                assert replace(plan, operations=tuple(more)).check() == [(last, START)], text


def calls(plan: DevicePlan) -> Iterator[list[Operation]]:
    """NCCL's operations, those of a group together."""
    group: list[Operation] = []
    for op in plan.operations:
        if op.kind not in COLLECTIVES:
            continue
        if group and (op.group == -1 or op.group != group[-1].group):
            yield group
            group = []
        group.append(op)
    if group:
        yield group


@pytest.mark.parametrize("nodes", TOPOLOGIES[:-1], ids=str)
def test_what_ranks_call_fits_together_and_comes_to_an_end(nodes: tuple[int, ...]) -> None:
    """Calls of a communicator are alike, sends meet receives; one call at a time goes on until all are over."""
    groups = communicators(Topology.from_sizes(nodes))
    for text, of_ranks in plans(nodes):
        queues = {rank: list(calls(plan)) for rank, plan in enumerate(of_ranks)}
        numbers: dict[tuple[int, ...], int] = defaultdict(int)
        come: dict[Any, list[tuple[int, Operation]]] = defaultdict(list)
        waits: dict[int, list[Any]] = {rank: [] for rank in queues}
        while any(queues.values()):
            moved = False
            for rank, queue in queues.items():
                if not queue:
                    continue
                if not waits[rank]:
                    waits[rank] = [_meeting(groups, numbers, rank, op) for op in queue[0]]
                    for key, op in zip(waits[rank], queue[0], strict=True):
                        come[key].append((rank, op))
                    moved = True
                if all(len(come[key]) == key[-1] for key in waits[rank]):
                    queue.pop(0)
                    waits[rank] = []
                    moved = True
            assert moved, f"{text}: a standstill"
        for key, members in come.items():
            assert len({_said(op) for _, op in members}) == 1, f"{text}: {key}"


def _meeting(
    groups: Sequence[tuple[int, ...]], numbers: dict[tuple[int, ...], int], rank: int, op: Operation
) -> Any:
    """What a call takes part in, and how many have to come."""
    if op.kind in ("send", "receive"):
        peer = groups[op.comm][op.peer]
        pair = (rank, peer) if op.kind == "send" else (peer, rank)
        place = (op.comm, *pair, int(op.kind == "send"))
        numbers[place] += 1
        return op.comm, *pair, numbers[place], 2
    numbers[op.comm, rank] += 1
    return op.comm, numbers[op.comm, rank], len(groups[op.comm])


def _said(op: Operation) -> tuple[Any, ...]:
    if op.kind in ("send", "receive"):
        return op.count, op.dtype
    return op.kind, op.count, op.dtype, op.op, op.divisor, op.peer


def test_the_tail_begins_where_payloads_are_decoded() -> None:
    plan, _ = lowered(Topology.from_sizes((2, 2)), 0, EVEN, "topk:0.01", "gather")
    words = [op.word for op in plan.operations]
    assert plan.operations[plan.tail].word == "decompress"
    assert "decompress" not in words[: plan.tail]
    assert set(words[plan.tail :]) == {"decompress", "gather"}
    assert f"tail={plan.tail}" in plan.text
    assert len(plan.text.splitlines()) == 1 + len(plan.operations)


def test_programs_keep_no_tensor_of_the_callers() -> None:
    """A cached program would keep it on the device."""
    plan, (tensor, payloads) = lowered(Topology.from_sizes((2, 1)), 0, EVEN, "bf16", "gather")
    kept = {each.untyped_storage().data_ptr() for each in payloads.kept}
    assert tensor.untyped_storage().data_ptr() not in kept
    inside = [buffer for buffer in plan.buffers if buffer.name not in ("tensor", "e_in", "e_out")]
    holds = [
        (each.data_ptr(), each.data_ptr() + each.numel() * each.element_size()) for each in payloads.kept
    ]
    assert all(any(a <= buffer.address and buffer.end <= b for a, b in holds) for buffer in inside)


@pytest.mark.parametrize("codec", ["powersgd:2", "randk:0.01"])
def test_a_call_has_headers_and_checksums_of_its_own_and_nothing_else(codec: str) -> None:
    plan, _ = lowered(Topology.from_sizes((2, 2)), 0, EVEN, codec, "two_stage")
    draws = plan.draws
    assert draws is not None
    (first, withdrawn), (second, others) = (draws.headers_of(call) for call in (7, 8))
    assert not torch.equal(first, second)
    assert all(withdrawn[step] != others[step] for step in withdrawn)
    for i, (step, numel) in enumerate(draws.encoded):
        seed = seed_of(plan.digest, 7, step)
        want = make_header(draws.spec, numel, plan.digest, torch.device("cpu"), seed=seed)
        assert torch.equal(first[64 * i : 64 * i + 64], want.template)
        assert withdrawn[step] == want.withdrawn
    made = draws.plan_of(plan, 1 << 40, withdrawn)
    assert made.check() == []
    copied = [op.source for op in made.operations if op.kind == "copy"]
    assert copied == [(1 << 40) + 64 * i for i in range(len(draws.encoded))]
    changed = [
        (op.step, _argument(new, "checksum"))
        for op, new in zip(plan.operations, made.operations, strict=True)
        if op.arguments != new.arguments
    ]
    assert changed == list(withdrawn.items())


def _argument(op: Operation, name: str) -> int:
    assert op.image is not None
    at = next(each.offset for each in op.image.parameters if each.name == name)
    return int.from_bytes(op.arguments[at : at + 8], "little", signed=True)
