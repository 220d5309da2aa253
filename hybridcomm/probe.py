"""Measures what policy decides by: alpha and beta of each link class, and what codecs cost on this processor.

1. Inside the nodes, all at once: an all-reduce of each node. Between them: one of an owner per node. A size of
   256 B, and five larger ones as the time allows.
2. alpha and beta are those with which the cost model (`hybridcomm.cost`) takes as long as was measured: the
   model is homogeneous in both, so alpha comes from the smallest size and beta from the median of the slopes
   between all pairs of larger ones (Theil 1950, Sen 1968), which a few disturbed samples do not move.
3. Kernels run on all ranks at once, as they do in training, on more memory than a cache holds.
4. Rank 0's figures are broadcast: a policy that reads them answers alike on all ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hybridcomm import collective_plans
from hybridcomm import compress as compressors
from hybridcomm.compress import Compressor
from hybridcomm.cost import KernelCost
from hybridcomm.errors import UnsupportedError
from hybridcomm.plan import Plan, Step
from hybridcomm.residual import Residual
from hybridcomm.topology import Link, Topology

if TYPE_CHECKING:
    from hybridcomm.collectives import Collectives

__all__ = ["CANDIDATES", "Figures", "fit_link", "probe"]

CANDIDATES = ("topk:0.01",)
"""What is worth measuring without being asked for."""

_SMALL = 64  # elements: its bandwidth term is nothing beside alpha
_GUESS = 1 << 16  # elements of the call that tells which sizes the budget allows
_LEAST, _LARGEST = 1 << 13, 1 << 22  # elements of the largest size: 32 KiB on a very slow link, else 16 MiB
_SHARE = 16  # of the budget, for one call of the largest size: all sizes together take 16 times as long
_KERNEL_NUMEL = 1 << 20
_KERNEL_SECONDS = 0.04
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Measured figures, equal on all ranks: ``topology`` with its links, ``kernels`` by compressor text."""

    topology: Topology
    kernels: Mapping[str, KernelCost] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for name in ("intra_node", "inter_node"):
            link: Link = getattr(self.topology, name)
            if link.alpha is None or link.beta is None:
                lines.append(f"{name}: no such link")
                continue
            speed = f"{1e-9 / link.beta:.3f} GB/s" if link.beta else "too fast to measure"
            lines.append(
                f"{name}: alpha {link.alpha * 1e6:.1f} us, beta {link.beta * 1e9:.4f} ns/B ({speed})"
            )
        for text, cost in self.kernels.items():
            figures = (cost.encode, cost.clear, cost.decode)
            encode, clear, decode = (f"{value * 1e9:.3f}" for value in figures)
            each = f"encode {encode}, clear {clear}, decode {decode} ns/element"
            lines.append(f"{text}: {each}, {cost.call * 1e6:.1f} us per call")
        return "\n".join(lines)


def probe(context: Collectives, *, codecs: Sequence[str | Compressor] = (), budget: float = 1.0) -> Figures:
    """Measures the links of ``context`` and the kernels of ``codecs``; about ``budget`` s per link class.

    Collective: all ranks call it alike, with nothing else in flight, and get the same figures. Raises
    `UnsupportedError` for a budget that is not positive, `CompressorError` for an unknown codec.
    """
    if not budget > 0:
        raise UnsupportedError(f"budget={budget}: must be a positive number of seconds")
    topology, limit = context.topology, context.chunk_nbytes
    near = far = Link()
    if topology.K > 1:
        near = _probe_link(context, lambda n: _inside_nodes(topology, n, limit), budget)
    if len(topology.nodes) > 1:
        far = _probe_link(context, lambda n: _between_nodes(topology, n, limit), budget)
    resolved = map(compressors.resolve, codecs)
    measured = replace(topology, intra_node=near, inter_node=far)
    kernels = {str(codec): _probe_codec(context, codec, measured) for codec in resolved if codec is not None}
    return Figures(topology=measured, kernels=kernels)


def fit_link(plans: Sequence[Plan], seconds: Sequence[float]) -> Link:
    """The link with which the model takes ``seconds`` for ``plans`` of ascending size, the first a small one."""
    alphas = [_modelled(plan, alpha=1.0, beta=0.0) for plan in plans]
    betas = [_modelled(plan, alpha=0.0, beta=1.0) for plan in plans]
    slopes = [
        (seconds[j] - seconds[i]) / (betas[j] - betas[i])
        for j in range(1, len(plans))
        for i in range(1, j)
        if betas[j] > betas[i]
    ]
    beta = max(statistics.median(slopes), 0.0) if slopes else 0.0
    return Link(alpha=max((seconds[0] - beta * betas[0]) / alphas[0], 0.0), beta=beta)


def _modelled(plan: Plan, *, alpha: float, beta: float) -> float:
    link = Link(alpha=alpha, beta=beta)
    return plan.cost(replace(plan.topology, intra_node=link, inter_node=link))


def _probe_link(context: Collectives, build: Callable[[int], Plan], budget: float) -> Link:
    small, guess = build(_SMALL), build(_GUESS)
    alone, guessed = _time_plan(context, small, _SMALL), _time_plan(context, guess, _GUESS)
    affordable = int(budget / _SHARE / guessed * _GUESS)  # elements of the largest size
    largest = min(max(affordable, _LEAST), _LARGEST)
    sizes = [largest * eighths // 8 for eighths in (1, 2, 4, 6, 8)]
    plans = [build(numel) for numel in sizes]
    seconds = [_time_plan(context, plan, numel) for plan, numel in zip(plans, sizes, strict=True)]
    return fit_link([small, *plans], [alone, *seconds])


def _time_plan(context: Collectives, plan: Plan, numel: int) -> float:
    target, memory = np.zeros(numel, np.float32), context._memory("float32")
    memory.place(0, numel, target.ctypes.data)
    memory.kept.append(target)
    _, program = context._program(("probe", plan.digest), lambda: plan)
    call = partial(context._launch, program, memory, False)
    return _slowest(context, call, batch=20 if numel == _SMALL else 1)


def _slowest(context: Collectives, call: Callable[[], object], *, batch: int) -> float:
    """Median s per call on the rank where it is longest; small calls go back to back, ``batch`` of them."""
    times = []
    for _ in range(_ROUNDS + 1):
        context.barrier()
        begin = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - begin) / batch)
    every = np.zeros(context.world_size)
    context.all_gather_into_tensor(every, np.array([statistics.median(times[1:])]))
    return _agreed(context, [float(every.max())])[0]


def _agreed(context: Collectives, values: Sequence[float]) -> list[float]:
    """Rank 0's values, on all ranks."""
    figures = np.array(values, np.float64)
    context.broadcast(figures, 0)
    return [float(value) for value in figures]


def _probe_kernel(context: Collectives, codec: Compressor) -> KernelCost:
    from hybridcomm.kernels import host

    rng = np.random.default_rng(0)
    grad = rng.standard_normal(_KERNEL_NUMEL, np.float32) ** 3
    e_in, e_out, out = (np.zeros_like(grad) for _ in range(3))
    payload = np.zeros(codec.nbytes(_KERNEL_NUMEL), np.uint8)
    calls: list[Callable[[], object]] = [
        lambda: host.encode(codec.spec, grad, e_in, e_out, payload),
        lambda: host.decode(codec.spec, [payload], out),
        lambda: host.decode(codec.spec, [payload] * 3, out),
    ]
    context.barrier()
    encode, one, three = (_mean_of(call) / _KERNEL_NUMEL for call in calls)
    decode = max((three - one) / 2, 0.0)
    figures = _agreed(context, [encode, max(one - decode, 0.0), decode])
    return KernelCost(encode=figures[0], clear=figures[1], decode=figures[2])


def _probe_codec(context: Collectives, codec: Compressor, measured: Topology) -> KernelCost:
    """The kernels, and what a small compressed call takes beyond its prediction."""
    kernel = _probe_kernel(context, codec)
    if len(measured.nodes) == 1:
        return kernel
    plan = context.plan_allreduce(codec.block, compress=codec)
    tensor, residual = np.ones(codec.block, np.float32), Residual()

    def call() -> None:
        context.allreduce(tensor, compress=codec, residual=residual)
        residual.commit()
        tensor.fill(1.0)

    seconds = _slowest(context, call, batch=20)
    return replace(kernel, call=max(seconds - plan.cost(measured, kernels={str(codec): kernel}), 0.0))


def _mean_of(call: Callable[[], object]) -> float:
    """s per call over several time slices: where ranks outnumber cores, waiting for one is part of the cost."""
    call()
    begin, calls, spent = time.perf_counter(), 0, 0.0
    while spent < _KERNEL_SECONDS:
        call()
        calls += 1
        spent = time.perf_counter() - begin
    return spent / calls


# -- plans of one link class alone -------------------------------------------------------------------------


def _between_nodes(topology: Topology, numel: int, limit: int) -> Plan:
    """An all-reduce of the owners of shard 0, one per node."""
    small = collective_plans.allreduce(Topology.virtual(len(topology.nodes), 1), numel, chunk_nbytes=limit)
    return _renamed(topology, [(small, topology.owners(0))])


def _inside_nodes(topology: Topology, numel: int, limit: int) -> Plan:
    """An all-reduce of each node by itself, all at the same time."""
    parts = []
    for ranks in topology.nodes:
        if len(ranks) > 1:
            node = Topology.virtual(1, len(ranks))
            parts.append((collective_plans.allreduce(node, numel, chunk_nbytes=limit), ranks))
    return _renamed(topology, parts)


def _renamed(topology: Topology, parts: Sequence[tuple[Plan, Sequence[int]]]) -> Plan:
    """The parts' plans beside each other, in which rank i of a part is ``ranks[i]`` of ``topology``."""
    steps: list[Step] = []
    for plan, ranks in parts:
        first = len(steps)
        steps += [
            replace(
                step,
                id=step.id + first,
                group=tuple(ranks[rank] for rank in step.group),
                root=ranks[step.root],
                after=tuple(before + first for before in step.after),
            )
            for step in plan.steps
        ]
    return replace(parts[0][0], topology=topology.without_links(), steps=tuple(steps))
