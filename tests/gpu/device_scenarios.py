"""What GPU ranks do together, each made to go wrong where a wait, an order or an owner is missing in the engine.

Every scenario checks its values by the host's context, or by sums that are exact, and runs under a seed and an eager
percentage, which say what the simulated devices do when. `wrongs` is empty for correct code under all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridcomm.errors import HybridCommError, PeerLostError, StallError
from hybridcomm.kernels import parse, reference
from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.gpu.device_lanes import lanes
from tests.gpu.device_ranks import Rank, gradient, run_devices
from tests.gpu.device_reductions import (
    CODEC,
    SMALL,
    again,
    all_differ,
    buckets,
    differ,
    numbers,
    overlap,
    put,
    streams,
    total,
    two_stage,
    unequal,
    uneven,
)
from tests.gpu.simulated import Fault, sim_library

__all__ = ["EAGER", "SCENARIOS", "Scenario", "wrongs"]

EAGER = (0, 60, 97)
"""Percent, as in `tests.gpu.simulation`."""
STALL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``nodes``: ranks of each; ``body`` says what is wrong. ``options``: of `run_devices`; ``expected``: a report."""

    nodes: tuple[int, ...]
    body: Callable[[Rank], list[str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    expected: str = ""


def wrongs(name: str, seed: int, eager_percent: int, timeout: float = 30.0) -> list[str]:
    """Values that are wrong, errors, and what the simulation has reported; ``timeout``: s, in which it has to end."""
    scenario = SCENARIOS[name]
    results, reports = run_devices(
        Topology.from_sizes(scenario.nodes),
        scenario.body,
        seed=seed,
        eager_percent=eager_percent,
        timeout=timeout,
        patience_ms=int(500 * timeout),
        return_exceptions=True,
        **scenario.options,
    )
    found: list[str] = []
    for rank, result in enumerate(results):
        each = [f"{type(result).__name__}: {result}"] if isinstance(result, BaseException) else result
        found += [f"rank {rank}: {what}" for what in each]
    if scenario.expected:
        found += [] if scenario.expected in reports else [f"not reported: {scenario.expected}"]
        reports = [line for line in reports if line != scenario.expected]
    return [*found, *reports]


def _messages(rank: Rank) -> list[str]:
    """Both ways at once, one way after another, and every collective that is one call."""
    device, world, me = rank.device, rank.device.world_size, rank.rank
    mine = numbers(96, me)
    out, into = rank.upload(mine), rank.upload(torch.zeros(96))
    left, right = (me - 1) % world, (me + 1) % world
    device.batch([(True, out, right), (False, into, left)]).wait()
    wrong = [*differ("a message", rank.download(into), numbers(96, left))]
    spread, mixed = rank.upload(torch.zeros(96)), rank.upload(torch.zeros(96))
    device.all_to_all_single(mixed, out)
    part = 96 // world
    shares = torch.cat([numbers(96, r)[me * part : (me + 1) * part] for r in range(world)])
    device.broadcast(spread if me else out, 0)
    gathered, own = rank.upload(torch.zeros(96 * world)), rank.upload(torch.zeros(part))
    device.all_gather_into_tensor(gathered, into)
    device.reduce_scatter_tensor(own, out)
    reduced = rank.upload(mine)
    device.reduce(reduced, 1)
    sums = total(rank, 96)
    want = [
        shares,
        numbers(96, 0) if me else torch.zeros(96),
        torch.cat([numbers(96, (r - 1) % world) for r in range(world)]),
        sums[me * part : (me + 1) * part],
        sums if me == 1 else mine,
    ]
    return wrong + all_differ(rank, [mixed, spread, gathered, own, reduced], want)


def _dropped(rank: Rank) -> list[str]:
    """Nobody keeps the tensors or the works; the last one tells that all was well."""
    for i in range(3):
        tensor = rank.upload(gradient(SMALL, rank.rank, i))
        rank.device.allreduce(tensor, compress=CODEC, residual=Residual(), residual_key=f"{i}", async_op=True)
        rank.device.allreduce(rank.upload(numbers(64, rank.rank)), async_op=True)
        del tensor
    last = rank.upload(numbers(64, rank.rank))
    rank.device.allreduce(last)
    return all_differ(rank, [last], [total(rank, 64)])


def _host_reads(rank: Rank) -> list[str]:
    """The host itself reads, behind `synchronize` and behind `is_completed`."""
    wrong = []
    for flat in (True, False):
        tensor = rank.torch.adopt(numbers(4096, rank.rank))
        work = rank.device.allreduce(tensor, flat=flat, async_op=True)
        if flat:
            work.synchronize()
        else:
            while not work.is_completed():
                if tensor.numel() == 4096:
                    work.wait()  # which also issues the tail
                time.sleep(0)
        rank.torch.reads(tensor)
        wrong += differ("read by the host", tensor, total(rank, 4096))
        rank.torch.drop(tensor)
    compressed, want = rank.torch.adopt(gradient(SMALL, rank.rank, 6)), gradient(SMALL, rank.rank, 6)
    rank.host.allreduce(want, compress="bf16")
    work = rank.device.allreduce(compressed, compress="bf16", async_op=True)
    if work.is_completed():
        wrong.append("it is over before its tail was put on a stream")
    work.synchronize()
    rank.torch.reads(compressed)
    wrong += differ("compressed, read by the host", compressed, want)
    rank.torch.drop(compressed)
    return wrong


def _captured(rank: Rank) -> list[str]:
    """Two graphs of all-reduces of the same tensors, one launched twice; eager ones before and behind."""
    dense, want = rank.upload(numbers(4096, rank.rank)), total(rank, 4096)
    compressed, source = (rank.upload(gradient(SMALL, rank.rank, 7)) for _ in range(2))
    eager = rank.upload(gradient(SMALL, rank.rank, 8))
    wanted = [gradient(SMALL, rank.rank, 7), gradient(SMALL, rank.rank, 8)]
    for each in wanted:
        rank.host.allreduce(each, compress="bf16")
    rank.device.allreduce(eager, compress="bf16", async_op=True)
    work = rank.device.allreduce(compressed, compress="bf16", async_op=True)
    work.wait()
    rank.device.allreduce(dense, async_op=True).wait()
    graphs = []
    for _ in range(2):
        with rank.torch.capture() as made:
            rank.torch.copy([compressed], [source])
            works = [rank.device.allreduce(dense, async_op=True)]
            works.append(rank.device.allreduce(compressed, compress="bf16", async_op=True))
            for each in works:
                each.wait()
        graphs += made
    for graph in (graphs[0], graphs[0], graphs[1]):
        rank.torch.replay(graph)
    behind = rank.upload(numbers(64, rank.rank))
    rank.device.allreduce(behind)
    want = want * rank.device.world_size**3
    wrong = all_differ(rank, [compressed, eager, dense, behind], [*wanted, want, total(rank, 64)])
    for graph in graphs:
        rank.torch.forget(graph)
    return wrong


def _memory(rank: Rank) -> list[str]:
    """Tensors in memory that NCCL knows, given back while a collective of them is under way."""
    wrong = []
    for i in range(2):
        tensor = rank.device.empty(SMALL)
        put(rank, [tensor], [gradient(SMALL, rank.rank, i)])
        want = gradient(SMALL, rank.rank, i)
        rank.host.allreduce(want, compress="bf16")
        rank.device.allreduce(tensor, compress="bf16", async_op=i == 1)
        if i == 0:
            wrong += all_differ(rank, [tensor], [want])
        del tensor
    return wrong


def _reducer(rank: Rank) -> list[str]:
    """Gradients of four buckets become complete in another order on each rank."""
    module = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(SMALL // 64, 64)) for _ in range(4))
    parameters = list(module)
    reducer = Reducer(module, ctx=rank.device, compress=CODEC, bucket_cap_mb=4 * SMALL / (1 << 20))
    on_host, wrong = Residual(), []
    for step in range(3):  # the third is the first for which no program has to be made
        given = [gradient(SMALL, rank.rank, 4 * step + i) for i in range(4)]
        for parameter, each in zip(parameters, given, strict=True):
            parameter.grad = rank.upload(each.view(-1, 64))
        for i in range(4):
            reducer.ready(parameters[(i + rank.rank) % 4])
        reducer.finalize()
        for layout in reducer.layouts:
            flat = torch.zeros(layout.numel)
            for span in layout.spans:
                flat[span.begin : span.end] = given[int(span.name)]
            rank.host.allreduce(flat, op="mean", compress=CODEC, residual=on_host, residual_key=layout.key)
            for span in layout.spans:
                got = rank.download(parameters[int(span.name)].grad).flatten()
                wrong += differ(f"gradient {span.name}", got, flat[span.begin : span.end])
        reducer.commit()
        on_host.commit()
    reducer.close()
    return wrong


def _payloads(rank: Rank) -> list[str]:
    """What goes over the wire is a payload by its own header, which the host's decoder takes."""
    tensor = rank.upload(gradient(SMALL, rank.rank, 10))
    rank.device.allreduce(tensor, compress="int8")
    spec, wrong = parse("int8"), []
    for _, plan, (scratch, *_) in rank.device._programs.values():
        nbytes = spec.nbytes(SMALL)
        for node in range(2):
            payload = rank.download(scratch[node * nbytes : (node + 1) * nbytes]).numpy()
            status = reference.check(spec, payload, SMALL, plan.digest)
            if status is not reference.Status.OK:
                wrong.append(f"value: payload of node {node}: {status}")
    return wrong


def _closed(rank: Rank) -> list[str]:
    """Whoever closes has waited for everything, tails included."""
    tensor, want = rank.torch.adopt(gradient(SMALL, rank.rank, 9)), gradient(SMALL, rank.rank, 9)
    rank.host.allreduce(want, compress="bf16")
    rank.device.allreduce(tensor, compress="bf16", async_op=True)
    rank.device.close()
    rank.torch.reads(tensor)
    wrong = [*differ("read behind the end", tensor, want)]
    rank.torch.drop(tensor)
    return wrong


def _means(rank: Rank) -> list[str]:
    """Of both dtypes, of all ranks and, by the route, of nodes: each has a factor of its own."""
    mine = numbers(4096, rank.rank)
    singles, doubles, routed = rank.upload(mine), rank.upload(mine.double()), rank.upload(mine)
    sums = total(rank, 4096)
    rank.device.allreduce(singles, op="mean", flat=True)
    rank.device.allreduce(doubles, op="mean", flat=True)
    rank.device.allreduce(routed, op="mean", flat=False)
    part, own = rank.upload(torch.zeros(1024)), sums[1024 * rank.rank : 1024 * (rank.rank + 1)]
    rank.device.reduce_scatter_tensor(part, rank.upload(mine), op="mean")
    wants = [sums / 4, (sums / 4).double(), sums / 4, own / 4]
    return all_differ(rank, [singles, doubles, routed, part], wants)


def _refused(rank: Rank) -> list[str]:
    """A group that NCCL refuses: everybody hears of it, and later calls of this thread are in no group."""
    out, into = rank.upload(torch.zeros(16)), rank.upload(torch.zeros(16))
    wrong = []
    try:
        rank.device._messages([(True, out, 1 - rank.rank), (False, into, 7)], False, None, [], "refused")
        wrong.append("nothing was raised")
    except HybridCommError:
        pass
    sim_library().ncclGroupEnd()
    return wrong


def _fails(fault: Fault, *wanted: type[Exception]) -> Callable[[Rank], list[str]]:
    """Something befalls the last all-reduce on rank 0, which no host waits for: its watchdog has to see it, and raises
    the first of what is wanted; the others raise any."""

    def body(rank: Rank) -> list[str]:
        if rank.rank == 0:
            rank.torch.simulation.inject(fault, device=0, communicator=0, operation=2)
        tensor = rank.upload(numbers(64, rank.rank))
        until = time.monotonic() + 10 * STALL_S
        try:
            work = [rank.device.allreduce(tensor, async_op=True) for _ in range(3)][-1]
            work.wait()
            while time.monotonic() < until and not work.is_completed():
                time.sleep(0.005)
        except wanted as error:
            rank.torch.synchronize()  # which comes back: what is stuck was aborted
            # Of what hangs, a rank may hear by its peer first.
            good = fault is Fault.HANGS or rank.rank > 0 or isinstance(error, wanted[0])
            return [] if good else [f"{type(error).__name__}, not {wanted[0].__name__}: {error}"]
        return [f"{' or '.join(kind.__name__ for kind in wanted)} is not raised"]

    return body


_WATCHED = {"watch": 0.02, "stall_s": STALL_S}

SCENARIOS: dict[str, Scenario] = {
    "buckets": Scenario(nodes=(2, 2), body=buckets),
    "buckets of unequal nodes": Scenario(nodes=(2, 1), body=buckets),
    "again": Scenario(nodes=(2, 2), body=again),
    "unequal": Scenario(nodes=(2, 1), body=unequal),
    "uneven shards": Scenario(nodes=(2, 2), body=uneven),
    "messages": Scenario(nodes=(2, 1), body=_messages),
    "pipeline": Scenario(nodes=(1, 1, 1), body=lanes("1f1b")),
    "split backward": Scenario(nodes=(2, 1), body=lanes("zb-h1")),
    "two-stage": Scenario(nodes=(1, 1, 1), body=two_stage),
    "overlap": Scenario(nodes=(1, 1), body=overlap),
    "streams": Scenario(nodes=(1, 1), body=streams),
    "dropped": Scenario(nodes=(1, 1), body=_dropped),
    "host reads": Scenario(nodes=(1, 1), body=_host_reads),
    "captured": Scenario(nodes=(1, 1), body=_captured),
    "memory": Scenario(nodes=(2, 1), body=_memory, options={"nccl": 22703}),
    "reducer": Scenario(nodes=(2, 1), body=_reducer),
    "payloads": Scenario(nodes=(1, 1), body=_payloads),
    "closed": Scenario(nodes=(2, 1), body=_closed),
    "refused": Scenario(nodes=(1, 1), body=_refused, expected="misuse: ncclGroupEnd without ncclGroupStart"),
    "means": Scenario(nodes=(2, 2), body=_means),
    "hangs": Scenario(nodes=(1, 1), body=_fails(Fault.HANGS, StallError, PeerLostError), options=_WATCHED),
    "lost": Scenario(
        nodes=(1, 1), body=_fails(Fault.REMOTE_ERROR, PeerLostError, StallError), options=_WATCHED
    ),
}
