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

from hybridcomm import device_comms
from hybridcomm.errors import AbortedError, DeviceError, HybridCommError, PeerLostError, StallError
from hybridcomm.kernels import parse, reference
from hybridcomm.residual import Residual
from hybridcomm.selftest.rank import all_differ, differ, numbers, total
from hybridcomm.selftest.under_way import (
    CODEC,
    SMALL,
    again,
    buckets,
    captured,
    in_known_memory,
    in_windows,
    overlap,
    reducer,
    streams,
    two_stage,
    unequal,
    uneven,
)
from hybridcomm.selftest.verbs import means, messages, scaled
from hybridcomm.topology import Topology
from tests.gpu.device_lanes import lanes
from tests.gpu.device_ranks import Rank, gradient, run_devices
from tests.gpu.device_verbs import all_to_alls, coalesced, verbs
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
    the first of what is wanted; the others raise any. A rank may hear by the other's host that it gave up first."""

    def body(rank: Rank) -> list[str]:
        if rank.rank == 0:
            rank.torch.simulation.inject(fault, device=0, communicator=0, operation=2)
        tensor = rank.upload(numbers(64, rank.rank))
        begin = time.monotonic()
        until = begin + 10 * STALL_S
        try:
            work = [rank.device.allreduce(tensor, async_op=True) for _ in range(3)][-1]
            work.wait()
            while time.monotonic() < until and not work.is_completed():
                time.sleep(0.005)
        except (*wanted, AbortedError) as error:
            late = fault is not Fault.HANGS and time.monotonic() - begin > 0.9 * STALL_S
            rank.torch.synchronize()  # which comes back: what is stuck was aborted
            good = fault is Fault.HANGS or rank.rank > 0 or isinstance(error, (wanted[0], AbortedError))
            return [] if good and not late else [f"{type(error).__name__}, not {wanted[0].__name__}: {error}"]
        return [f"{' or '.join(kind.__name__ for kind in wanted)} is not raised"]

    return body


def _broken(rank: Rank) -> list[str]:
    """Rank 1's device is lost, and nobody watches: its next call says so, and the others hear of it on the host."""
    tensor = rank.upload(numbers(64, rank.rank))
    try:
        rank.host.barrier()
        if rank.rank == 1:
            rank.torch.simulation.inject(Fault.BREAKS, device=1, operation=0)
            rank.torch.lost = True
            rank.device.allreduce(tensor)
        rank.host.barrier()
    except DeviceError as error:
        return [] if rank.rank == 1 and error.lost else [str(error)]
    except (AbortedError, PeerLostError):
        return ["not told as its own device's error"] if rank.rank == 1 else []
    return ["nothing is raised"]


def _copies(rank: Rank) -> list[str]:
    """All communicators of the rank, divided ones too, leave windows to copy engines."""
    rank.host.barrier()
    found, comms = rank.torch.simulation.by_copy_engines(rank.rank), len(rank.device._comms)
    wrong = [] if found == comms else [f"{found} of {comms} communicators go by copy engines"]
    return wrong + in_windows(rank)


def _rooted(rank: Rank) -> list[str]:
    """Ranks that meet at two roots, and then do what those of one do."""
    rank.device._comms = device_comms.connect(rank.device._engine, rank.host, per_root=2)
    roots = rank.torch.simulation.roots()
    return ([] if roots == 2 else [f"{roots} roots"]) + messages(rank)


def _told(rank: Rank) -> list[str]:
    """Rank 1's host gives up; rank 0's waits for nothing but its device, and must hear of it at once."""
    tensor = rank.upload(numbers(64, rank.rank))
    until = time.monotonic() + 2 * STALL_S
    try:
        rank.host.barrier()
        if rank.rank == 1:
            rank.host._engine.abort()
        work = rank.device.allreduce(tensor, async_op=True) if rank.rank == 0 else None
        while time.monotonic() < until and (work is None or not work.is_completed()):
            rank.device._engine.check()
            time.sleep(0.005)
    except AbortedError:
        return []
    rank.device.abort()
    return ["nobody says that rank 1 has given up"]


_WATCHED = {"watch": 0.02, "stall_s": STALL_S}

_NEWEST = {"nccl": 23007}

SCENARIOS: dict[str, Scenario] = {
    "buckets": Scenario(nodes=(2, 2), body=buckets),
    "buckets of unequal nodes": Scenario(nodes=(2, 1), body=buckets),
    "again": Scenario(nodes=(2, 2), body=again),
    "unequal": Scenario(nodes=(2, 1), body=unequal),
    "uneven shards": Scenario(nodes=(2, 2), body=uneven),
    "messages": Scenario(nodes=(2, 1), body=messages),
    "verbs": Scenario(nodes=(2, 2), body=verbs),
    "verbs of the newest NCCL": Scenario(nodes=(2, 2), body=verbs, options=_NEWEST),
    "all-to-alls": Scenario(nodes=(2, 1), body=all_to_alls),
    "all-to-alls of the newest NCCL": Scenario(nodes=(2, 1), body=all_to_alls, options=_NEWEST),
    "coalesced": Scenario(nodes=(2, 1), body=coalesced),
    "pipeline": Scenario(nodes=(1, 1, 1), body=lanes("1f1b")),
    "split backward": Scenario(nodes=(2, 1), body=lanes("zb-h1")),
    "two-stage": Scenario(nodes=(1, 1, 1), body=two_stage),
    "overlap": Scenario(nodes=(1, 1), body=overlap),
    "streams": Scenario(nodes=(1, 1), body=streams),
    "dropped": Scenario(nodes=(1, 1), body=_dropped),
    "host reads": Scenario(nodes=(1, 1), body=_host_reads),
    "captured": Scenario(nodes=(1, 1), body=captured),
    "memory": Scenario(nodes=(2, 1), body=in_known_memory, options={"nccl": 22703}),
    "windows": Scenario(nodes=(2, 1), body=in_windows, options=_NEWEST),
    "several roots": Scenario(nodes=(2, 1), body=_rooted, options=_NEWEST),
    "copy engines": Scenario(nodes=(2, 2), body=_copies, options={**_NEWEST, "copy_engines": True}),
    "reducer of the newest NCCL": Scenario(nodes=(2, 2), body=reducer, options=_NEWEST),
    "reducer": Scenario(nodes=(2, 1), body=reducer),
    "payloads": Scenario(nodes=(1, 1), body=_payloads),
    "closed": Scenario(nodes=(2, 1), body=_closed),
    "refused": Scenario(nodes=(1, 1), body=_refused, expected="misuse: ncclGroupEnd without ncclGroupStart"),
    "means": Scenario(nodes=(2, 2), body=means),
    "scaled": Scenario(nodes=(2, 1), body=scaled),
    "hangs": Scenario(nodes=(1, 1), body=_fails(Fault.HANGS, StallError, PeerLostError), options=_WATCHED),
    "told": Scenario(nodes=(1, 1), body=_told, options={**_WATCHED, "stall_s": 10 * STALL_S}),
    "broken": Scenario(nodes=(1, 1), body=_broken, options={"stall_s": 5 * STALL_S}),
    "lost": Scenario(
        nodes=(1, 1), body=_fails(Fault.REMOTE_ERROR, PeerLostError, StallError), options=_WATCHED
    ),
}
