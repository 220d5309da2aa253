"""What GPU ranks do together, each made to go wrong where a wait, an order or an owner is missing in the engine.

Every scenario checks its values by the host's context, or by sums that are exact, and runs under a seed and an eager
percentage, which say what the simulated devices do when. `wrongs` is empty for correct code under all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridcomm.errors import HybridCommError, PeerLostError, StallError
from hybridcomm.kernels import parse, reference
from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, gradient, run_devices
from tests.gpu.simulated import Fault, sim_library

__all__ = ["EAGER", "SCENARIOS", "Scenario", "wrongs"]

CODEC = "topk:0.01"
SMALL = 1 << 13
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


def _differ(what: str, got: torch.Tensor, want: torch.Tensor) -> Iterator[str]:
    if not torch.equal(got, want):
        yield f"value: {what}, {int((got != want).sum())} of {want.numel()} elements"


def _all_differ(rank: Rank, tensors: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> list[str]:
    pairs = enumerate(zip(tensors, want, strict=True))
    return [line for i, (t, w) in pairs for line in _differ(f"tensor {i}", rank.download(t), w)]


def _numbers(numel: int, rank: int) -> torch.Tensor:
    """Small integers, whose sums are exact in any order."""
    return (torch.arange(numel) % 7 - 3 + rank).to(torch.float32)


def _total(rank: Rank, numel: int) -> torch.Tensor:
    return sum((_numbers(numel, other) for other in range(rank.device.world_size)), torch.zeros(numel))


def _put(rank: Rank, tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    sources = [rank.upload(each) for each in values]
    rank.torch.copy(tensors, sources)
    rank.torch.synchronize()  # before the sources go


def _buckets(rank: Rank) -> list[str]:
    """Three under way together with a residual; the same tensors in each step, one of which is rolled back."""
    sizes = (SMALL, SMALL, 2 * SMALL)
    on_host, on_device, wrong = Residual(), Residual(), []
    tensors = [rank.upload(torch.zeros(numel)) for numel in sizes]
    for step in range(3):
        want = [gradient(numel, rank.rank, 3 * step + i) for i, numel in enumerate(sizes)]
        _put(rank, tensors, want)
        works = []
        for i, tensor in enumerate(tensors):
            shared = {"op": "mean", "compress": CODEC, "residual_key": f"{i}"}
            rank.host.allreduce(want[i], residual=on_host, **shared)
            works.append(rank.device.allreduce(tensor, residual=on_device, async_op=True, **shared))
        for work in works if rank.rank % 2 else reversed(works):  # the order of waits is a rank's own
            work.wait()
        wrong += _all_differ(rank, tensors, want)
        for residual in (on_host, on_device):
            residual.rollback() if step == 1 else residual.commit()
    kept, wanted = on_device.state_dict(), on_host.state_dict()
    return wrong + [f"value: residual {k}" for k in wanted if not (kept[k] == wanted[k]).all()]


def _again(rank: Rank) -> list[str]:
    """The same tensor several times, nobody waiting in between; the last wait is for all of them."""
    compressed = rank.upload(gradient(SMALL, rank.rank, 1))
    dense = rank.upload(_numbers(4096, rank.rank))
    want, works = gradient(SMALL, rank.rank, 1), []
    for flat in (True, False, True):
        rank.host.allreduce(want, compress="bf16")
        works.append(rank.device.allreduce(compressed, compress="bf16", async_op=True))
        works.append(rank.device.allreduce(dense, flat=flat, async_op=True))
    for work in works[-2:]:
        work.wait()
    factor = rank.device.world_size**2
    return _all_differ(rank, [compressed, dense], [want, _total(rank, 4096) * factor])


def _unequal(rank: Rank) -> list[str]:
    """Nodes of unequal size; routes beside NCCL's own algorithm, sums beside means."""
    tensors = [rank.upload(_numbers(4096, rank.rank)) for _ in range(3)]
    rank.device.allreduce(tensors[0], flat=True, async_op=True)
    rank.device.allreduce(tensors[1], flat=False, async_op=True)
    rank.device.allreduce(tensors[2], flat=False, op="max", async_op=True)
    compressed, want = rank.upload(gradient(SMALL, rank.rank, 2)), gradient(SMALL, rank.rank, 2)
    rank.host.allreduce(want, op="mean", compress="int8")
    works = [rank.device.allreduce(compressed, op="mean", compress="int8", async_op=True)]
    works += [rank.device.allreduce(tensors[0], op="mean", async_op=True)]
    for work in works:
        work.wait()
    for tensor in tensors[1:]:
        rank.device.allreduce(tensor, op="max")
    total = _total(rank, 4096)
    most = _numbers(4096, rank.device.world_size - 1)
    got = rank.download(tensors[0])
    wrong = [] if torch.allclose(got, total, rtol=1e-6, atol=1e-5) else ["value: a mean of sums"]
    return wrong + _all_differ(rank, [*tensors[1:], compressed], [total, most, want])


def _uneven(rank: Rank) -> list[str]:
    """Shards of unequal size: reduces and broadcasts of their own instead of one call for all."""
    dense, compressed = rank.upload(_numbers(4099, rank.rank)), rank.upload(torch.zeros(3 * 4096))
    wrong = []
    for step in range(2):
        want = gradient(3 * 4096, rank.rank, step)
        source = rank.upload(want)
        rank.host.allreduce(want, op="mean", compress=CODEC)
        rank.torch.copy([compressed], [source])
        works = [rank.device.allreduce(compressed, op="mean", compress=CODEC, async_op=True)]
        works.append(rank.device.allreduce(dense, flat=False, async_op=True))
        for work in works:
            work.wait()
        wrong += _all_differ(rank, [compressed], [want])
    return wrong + _all_differ(rank, [dense], [_total(rank, 4099) * rank.device.world_size])


def _messages(rank: Rank) -> list[str]:
    """Both ways at once, one way after another, and every collective that is one call."""
    device, world, me = rank.device, rank.device.world_size, rank.rank
    numbers = _numbers(96, me)
    out, into = rank.upload(numbers), rank.upload(torch.zeros(96))
    left, right = (me - 1) % world, (me + 1) % world
    device.batch([(True, out, right), (False, into, left)]).wait()
    wrong = [*_differ("a message", rank.download(into), _numbers(96, left))]
    spread, mixed = rank.upload(torch.zeros(96)), rank.upload(torch.zeros(96))
    device.all_to_all_single(mixed, out)
    part = 96 // world
    shares = torch.cat([_numbers(96, r)[me * part : (me + 1) * part] for r in range(world)])
    device.broadcast(spread if me else out, 0)
    gathered, own = rank.upload(torch.zeros(96 * world)), rank.upload(torch.zeros(part))
    device.all_gather_into_tensor(gathered, into)
    device.reduce_scatter_tensor(own, out)
    reduced = rank.upload(numbers)
    device.reduce(reduced, 1)
    total = _total(rank, 96)
    want = [
        shares,
        _numbers(96, 0) if me else torch.zeros(96),
        torch.cat([_numbers(96, (r - 1) % world) for r in range(world)]),
        total[me * part : (me + 1) * part],
        total if me == 1 else numbers,
    ]
    return wrong + _all_differ(rank, [mixed, spread, gathered, own, reduced], want)


def _two_stage(rank: Rank) -> list[str]:
    """Payloads to a root, their sum encoded anew, with both residuals; two tensors under way."""
    on_host, on_device, wrong = Residual(), Residual(), []
    tensors = [rank.upload(torch.zeros(3 * SMALL)) for _ in range(2)]
    for step in range(2):
        want = [gradient(3 * SMALL, rank.rank, 2 * step + i) for i in range(2)]
        _put(rank, tensors, want)
        works = []
        for i, tensor in enumerate(tensors):
            shared = {"op": "mean", "compress": "int8", "exchange": "two_stage", "residual_key": f"{i}"}
            rank.host.allreduce(want[i], residual=on_host, **shared)
            works.append(rank.device.allreduce(tensor, residual=on_device, async_op=True, **shared))
        for work in works:
            work.wait()
        wrong += _all_differ(rank, tensors, want)
        on_host.commit()
        on_device.commit()
    return wrong


def _overlap(rank: Rank) -> list[str]:
    """Programs whose memory overlaps, each begun while the one before is under way; halves have a tail, too."""
    numel = 2 * SMALL
    whole = rank.upload(gradient(numel, rank.rank, 3))
    want = gradient(numel, rank.rank, 3)
    works = []
    for part, compress in ((slice(0, numel), "bf16"), (slice(0, SMALL), "bf16"), (slice(SMALL, numel), "fp16"),
                           (slice(0, numel), None), (slice(0, SMALL), "bf16")):  # fmt: skip
        rank.host.allreduce(want[part], compress=compress, op="mean")
        works.append(rank.device.allreduce(whole[part], compress=compress, op="mean", async_op=True))
    works[-1].wait()
    works[2].wait()
    return _all_differ(rank, [whole], [want])


def _streams(rank: Rank) -> list[str]:
    """A result that another stream waits for, and a tensor that another stream makes; the second round has programs
    that are made, for which the host does not wait."""
    first, second = (rank.upload(torch.zeros(SMALL)) for _ in range(2))
    copies = [rank.upload(torch.zeros(SMALL)) for _ in range(2)]
    wrong = []
    for step in range(2):
        want = [gradient(SMALL, rank.rank, 4 + 2 * step + i) for i in range(2)]
        sources = [rank.upload(each) for each in want]
        for each in want:
            rank.host.allreduce(each, compress=CODEC)
        rank.torch.copy([first], sources[:1])
        work = rank.device.allreduce(first, compress=CODEC, async_op=True)
        with rank.torch.other_stream() as other:
            work.wait(other)
            rank.torch.copy([copies[0], second], [first, sources[1]])
            rank.device.allreduce(second, compress=CODEC, stream=other)
            rank.torch.copy(copies[1:], [second])
        wrong += _all_differ(rank, copies, want)
    return wrong


def _dropped(rank: Rank) -> list[str]:
    """Nobody keeps the tensors or the works; the last one tells that all was well."""
    for i in range(3):
        tensor = rank.upload(gradient(SMALL, rank.rank, i))
        rank.device.allreduce(tensor, compress=CODEC, residual=Residual(), residual_key=f"{i}", async_op=True)
        rank.device.allreduce(rank.upload(_numbers(64, rank.rank)), async_op=True)
        del tensor
    last = rank.upload(_numbers(64, rank.rank))
    rank.device.allreduce(last)
    return _all_differ(rank, [last], [_total(rank, 64)])


def _host_reads(rank: Rank) -> list[str]:
    """The host itself reads, behind `synchronize` and behind `is_completed`."""
    wrong = []
    for flat in (True, False):
        tensor = rank.torch.adopt(_numbers(4096, rank.rank))
        work = rank.device.allreduce(tensor, flat=flat, async_op=True)
        if flat:
            work.synchronize()
        else:
            while not work.is_completed():
                if tensor.numel() == 4096:
                    work.wait()  # which also issues the tail
                time.sleep(0)
        rank.torch.reads(tensor)
        wrong += _differ("read by the host", tensor, _total(rank, 4096))
        rank.torch.drop(tensor)
    compressed, want = rank.torch.adopt(gradient(SMALL, rank.rank, 6)), gradient(SMALL, rank.rank, 6)
    rank.host.allreduce(want, compress="bf16")
    work = rank.device.allreduce(compressed, compress="bf16", async_op=True)
    if work.is_completed():
        wrong.append("it is over before its tail was put on a stream")
    work.synchronize()
    rank.torch.reads(compressed)
    wrong += _differ("compressed, read by the host", compressed, want)
    rank.torch.drop(compressed)
    return wrong


def _captured(rank: Rank) -> list[str]:
    """Two graphs of all-reduces of the same tensors, one launched twice; eager ones before and behind."""
    dense, want = rank.upload(_numbers(4096, rank.rank)), _total(rank, 4096)
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
    behind = rank.upload(_numbers(64, rank.rank))
    rank.device.allreduce(behind)
    want = want * rank.device.world_size**3
    wrong = _all_differ(rank, [compressed, eager, dense, behind], [*wanted, want, _total(rank, 64)])
    for graph in graphs:
        rank.torch.forget(graph)
    return wrong


def _memory(rank: Rank) -> list[str]:
    """Tensors in memory that NCCL knows, given back while a collective of them is under way."""
    wrong = []
    for i in range(2):
        tensor = rank.device.empty(SMALL)
        _put(rank, [tensor], [gradient(SMALL, rank.rank, i)])
        want = gradient(SMALL, rank.rank, i)
        rank.host.allreduce(want, compress="bf16")
        rank.device.allreduce(tensor, compress="bf16", async_op=i == 1)
        if i == 0:
            wrong += _all_differ(rank, [tensor], [want])
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
                wrong += _differ(f"gradient {span.name}", got, flat[span.begin : span.end])
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
    wrong = [*_differ("read behind the end", tensor, want)]
    rank.torch.drop(tensor)
    return wrong


def _means(rank: Rank) -> list[str]:
    """Of both dtypes, of all ranks and, by the route, of nodes: each has a factor of its own."""
    numbers = _numbers(4096, rank.rank)
    singles, doubles, routed = rank.upload(numbers), rank.upload(numbers.double()), rank.upload(numbers)
    sums = _total(rank, 4096)
    rank.device.allreduce(singles, op="mean", flat=True)
    rank.device.allreduce(doubles, op="mean", flat=True)
    rank.device.allreduce(routed, op="mean", flat=False)
    part, own = rank.upload(torch.zeros(1024)), sums[1024 * rank.rank : 1024 * (rank.rank + 1)]
    rank.device.reduce_scatter_tensor(part, rank.upload(numbers), op="mean")
    wants = [sums / 4, (sums / 4).double(), sums / 4, own / 4]
    return _all_differ(rank, [singles, doubles, routed, part], wants)


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
    """Something befalls the second all-reduce on rank 0, which nobody waits for: its watchdog has to see it, and raises
    the first of what is wanted; the others raise any."""

    def body(rank: Rank) -> list[str]:
        if rank.rank == 0:
            rank.torch.simulation.inject(fault, device=0, communicator=0, operation=1)
        tensor = rank.upload(_numbers(64, rank.rank))
        until = time.monotonic() + 10 * STALL_S
        try:
            work = [rank.device.allreduce(tensor, async_op=True) for _ in range(3)][-1]
            while time.monotonic() < until and not work.is_completed():
                time.sleep(0.005)
        except wanted as error:
            good = rank.rank > 0 or isinstance(error, wanted[0])
            return [] if good else [f"{type(error).__name__}, not {wanted[0].__name__}: {error}"]
        return [f"{' or '.join(kind.__name__ for kind in wanted)} is not raised"]

    return body


_WATCHED = {"watch": 0.02, "stall_s": STALL_S}

SCENARIOS: dict[str, Scenario] = {
    "buckets": Scenario(nodes=(2, 2), body=_buckets),
    "buckets of unequal nodes": Scenario(nodes=(2, 1), body=_buckets),
    "again": Scenario(nodes=(2, 2), body=_again),
    "unequal": Scenario(nodes=(2, 1), body=_unequal),
    "uneven shards": Scenario(nodes=(2, 2), body=_uneven),
    "messages": Scenario(nodes=(2, 1), body=_messages),
    "two-stage": Scenario(nodes=(1, 1, 1), body=_two_stage),
    "overlap": Scenario(nodes=(1, 1), body=_overlap),
    "streams": Scenario(nodes=(1, 1), body=_streams),
    "dropped": Scenario(nodes=(1, 1), body=_dropped),
    "host reads": Scenario(nodes=(1, 1), body=_host_reads),
    "captured": Scenario(nodes=(1, 1), body=_captured),
    "memory": Scenario(nodes=(2, 1), body=_memory, options={"nccl": 22703}),
    "reducer": Scenario(nodes=(2, 1), body=_reducer),
    "payloads": Scenario(nodes=(1, 1), body=_payloads),
    "closed": Scenario(nodes=(2, 1), body=_closed),
    "refused": Scenario(nodes=(1, 1), body=_refused, expected="misuse: ncclGroupEnd without ncclGroupStart"),
    "means": Scenario(nodes=(2, 2), body=_means),
    "hangs": Scenario(nodes=(1, 1), body=_fails(Fault.HANGS, StallError), options=_WATCHED),
    "lost": Scenario(
        nodes=(1, 1), body=_fails(Fault.REMOTE_ERROR, PeerLostError, StallError), options=_WATCHED
    ),
}
