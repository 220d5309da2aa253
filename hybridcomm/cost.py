"""What a plan takes: its steps as tasks on ranks and links of measured speed, played by `hybridcomm.simulate`.

A step costs, in the model of Hockney (alpha + beta * nbytes) and with the streams of `hybridcomm.lower`:

    reduce, gather                    a hop through shared memory: half of beta where it is written, half
                                      where it is read; each rank has one processor, which does all of this
    exchange_*                        alpha + beta * nbytes, alone on the sender's way out and the receiver's
                                      way in; a node has one of each, shared by its ranks
    compress, recompress, decompress  the measured cost of the kernel per element, on the rank's processor

Left out: sums after an exchange, and the bounds of lanes and rings; both are small beside what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybridcomm import compress as compressors
from hybridcomm import policy
from hybridcomm.errors import PlanError
from hybridcomm.simulate import Schedule, Tasks

if TYPE_CHECKING:
    from hybridcomm.plan import Plan, Step
    from hybridcomm.topology import Link, Topology

__all__ = ["KernelCost", "plan_cost", "plan_schedule"]


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """Measured s per element of a codec: to encode; to clear the sum; to decode one payload into it.

    ``call``: s that a compressed call takes beyond what its plan is predicted to take, however small it is
    (its residual is looked up and staged).
    """

    encode: float
    clear: float
    decode: float
    call: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= value < float("inf") for value in (self.encode, self.clear, self.decode, self.call)):
            raise PlanError(f"{self}: costs are finite numbers of seconds >= 0")

    def sum_of(self, payloads: int) -> float:
        """s per element to clear a sum and decode so many payloads into it."""
        return self.clear + self.decode * payloads


def plan_cost(plan: Plan, topology: Topology, kernels: Mapping[str, KernelCost] | None = None) -> float:
    """Predicted s of ``plan`` on ``topology``, whose links hold measured alpha and beta.

    ``kernels``: cost by canonical text of the compressor; compressed plans need theirs. Raises `PlanError`
    where a figure that the plan needs was not measured. A pure function: equal arguments, equal answer.
    """
    call = 0.0 if plan.compressor == "none" else _kernel_of(plan.compressor, kernels).call
    return plan_schedule(plan, topology, kernels).makespan + call


def plan_schedule(
    plan: Plan, topology: Topology, kernels: Mapping[str, KernelCost] | None = None
) -> Schedule:
    """The simulated schedule behind `plan_cost`."""
    if topology.nodes != plan.topology.nodes:
        raise PlanError(f"a plan for {plan.topology} has no cost on {topology}: the ranks stand elsewhere")
    kernel, intra = (
        None if text == "none" else _kernel_of(text, kernels)
        for text in (plan.compressor, plan.intra_compressor)
    )
    model = _Model(plan=plan, topology=topology, kernel=kernel, intra=intra)
    for step in plan.steps:
        model.add(step)
    return model.tasks.schedule()


def _kernel_of(text: str, kernels: Mapping[str, KernelCost] | None) -> KernelCost:
    kernel = (kernels or {}).get(text)
    if kernel is None:
        raise PlanError(f"no kernel cost for {text}: measure it with hybridcomm.probe")
    return kernel


def _known(link: Link, name: str) -> tuple[float, float]:
    if link.alpha is None or link.beta is None:
        raise PlanError(f"link {name} was not measured: run hybridcomm.probe, or set its alpha and beta")
    return link.alpha, link.beta


def _ways(group: tuple[int, ...]) -> list[tuple[int, int]]:
    """(source, target), from everybody to everybody, first to the next, so that no way in is crowded."""
    return [
        (source, group[(place + hop) % len(group)])
        for hop in range(1, len(group))
        for place, source in enumerate(group)
    ]


@dataclass(kw_only=True)
class _Model:
    plan: Plan
    topology: Topology
    kernel: KernelCost | None
    intra: KernelCost | None = None
    tasks: Tasks = field(default_factory=Tasks)
    done: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (step, rank) -> tasks

    def __post_init__(self) -> None:
        codecs = map(compressors.resolve, (self.plan.compressor, self.plan.intra_compressor))
        sizes = [codec.nbytes if codec is not None else int for codec in codecs]
        self.payload_nbytes: Callable[[int], int] = sizes[0]
        self.offer_nbytes: Callable[[int], int] = sizes[1]
        self.itemsize = policy.itemsize(self.plan.dtype)

    def add(self, step: Step) -> None:
        method = getattr(self, f"_{step.op}", None)
        if method is None:
            raise PlanError(f"step {step.id}: the cost of {step.op} is not known")
        method(step)

    def _after(self, step: Step, *ranks: int) -> list[int]:
        return [task for before in step.after for rank in ranks for task in self.done.get((before, rank), ())]

    # -- inside the node -----------------------------------------------------------------------------------

    def _on_rank(
        self, rank: int, seconds: float, stream: Hashable, after: list[int], alpha: float = 0.0
    ) -> int:
        return self.tasks.add(
            seconds, latency=alpha, resources=(("processor", rank),), stream=(stream, rank), after=after
        )

    def _hop(self, step: Step) -> tuple[float, float]:
        alpha, beta = _known(self.topology.intra_node, "intra_node")
        nbytes = step.region.numel * self.itemsize
        return alpha, beta * (
            self.offer_nbytes(step.region.numel) if step.op == "reduce_payload" else nbytes
        ) / 2

    def _compress_intra(self, step: Step) -> None:
        assert self.intra is not None  # noqa: S101 (plan_schedule has looked)
        seconds = self.intra.encode * step.region.numel
        task = self._on_rank(step.root, seconds, "compress_intra", self._after(step, step.root))
        self.done[step.id, step.root] = [task]

    def _reduce_payload(self, step: Step) -> None:
        """As a reduce, of less, and decoded."""
        assert self.intra is not None  # noqa: S101 (plan_schedule has looked)
        self._reduce(step, self.intra.decode * step.region.numel)

    def _reduce(self, step: Step, extra: float = 0.0) -> None:
        alpha, half = self._hop(step)
        others = [rank for rank in step.group if rank != step.root]
        puts = []
        for rank in others:
            puts.append(self._on_rank(rank, half, ("put", step.root), self._after(step, rank), alpha))
            self.done[step.id, rank] = puts[-1:]
        after = [*self._after(step, step.root), *puts]
        self.done[step.id, step.root] = [
            self._on_rank(step.root, (half + extra) * len(others), "reduce", after)
        ]

    def _reduce_all(self, step: Step) -> None:
        alpha, half = self._hop(step)
        shares = {
            rank: self._on_rank(rank, half, "share", self._after(step, rank), alpha) for rank in step.group
        }
        for rank in step.group:
            seconds = half * (len(step.group) - 1)
            self.done[step.id, rank] = [self._on_rank(rank, seconds, "collect", list(shares.values()))]

    def _gather(self, step: Step) -> None:
        alpha, half = self._hop(step)
        publish = self._on_rank(step.root, half, "publish", self._after(step, step.root), alpha)
        self.done[step.id, step.root] = [publish]
        for rank in step.group:
            if rank != step.root:
                after = [*self._after(step, rank), publish]
                self.done[step.id, rank] = [self._on_rank(rank, half, ("get", step.root), after)]

    # -- between nodes -------------------------------------------------------------------------------------

    def _send(self, step: Step, source: int, target: int, nbytes: int, after: list[int]) -> int:
        alpha, beta = _known(self.topology.inter_node, "inter_node")
        way = (("out", self.topology.node_of(source)), ("in", self.topology.node_of(target)))
        stream = ("link", source, target)
        return self.tasks.add(beta * nbytes, latency=alpha, resources=way, stream=stream, after=after)

    def _exchange_reduce(self, step: Step) -> None:
        nbytes = step.region.numel * self.itemsize
        arrived = self._after(step, step.root)
        for rank in step.group:
            if rank != step.root:
                sent = self._send(step, rank, step.root, nbytes, self._after(step, rank))
                self.done[step.id, rank] = [sent]
                arrived = [*arrived, sent]
        self.done[step.id, step.root] = arrived

    def _exchange_gather(self, step: Step) -> None:
        nbytes, after = step.region.numel * self.itemsize, self._after(step, step.root)
        self.done[step.id, step.root] = after  # sending changes nothing here: nobody waits for it
        for rank in step.group:
            if rank != step.root:
                before = [*after, *self._after(step, rank)]
                self.done[step.id, rank] = [self._send(step, step.root, rank, nbytes, before)]

    def _exchange_reduce_all(self, step: Step) -> None:
        self._send_all(step, _ways(step.group), step.region.numel * self.itemsize)

    def _allreduce_flat(self, step: Step) -> None:
        raise PlanError(
            f"step {step.id}: an algorithm of NCCL's has no predicted time here; see docs/predicted-steps.md"
        )

    def _exchange_payload(self, step: Step) -> None:
        ways = [(source, target) for source, target in _ways(step.group) if step.root in (-1, target)]
        self._send_all(step, ways, self.payload_nbytes(step.region.numel))

    def _exchange_recompressed(self, step: Step) -> None:
        ways = [(source, target) for source, target in _ways(step.group) if source == step.root]
        self._send_all(step, ways, self.payload_nbytes(step.region.numel))

    def _send_all(self, step: Step, ways: list[tuple[int, int]], nbytes: int) -> None:
        """``nbytes`` go each of ``ways``; their senders wait for nothing."""
        arrived = {rank: self._after(step, rank) for rank in step.group}
        for source, target in ways:
            sent = self._send(step, source, target, nbytes, self._after(step, source))
            arrived[target] = [*arrived[target], sent]
        for rank, tasks in arrived.items():
            self.done[step.id, rank] = tasks

    # -- kernels -------------------------------------------------------------------------------------------

    def _compress(self, step: Step) -> None:
        assert self.kernel is not None  # noqa: S101 (plan_schedule has looked)
        seconds = self.kernel.encode * step.region.numel
        task = self._on_rank(step.root, seconds, "compress", self._after(step, step.root))
        self.done[step.id, step.root] = [task]

    def _recompress(self, step: Step) -> None:
        assert self.kernel is not None  # noqa: S101 (plan_schedule has looked)
        kernel = self.kernel.sum_of(len(self.topology.nodes)) + self.kernel.encode
        task = self._on_rank(
            step.root, kernel * step.region.numel, "recompress", self._after(step, step.root)
        )
        self.done[step.id, step.root] = [task]

    def _decompress(self, step: Step) -> None:
        assert self.kernel is not None  # noqa: S101 (plan_schedule has looked)
        payloads = 1 if self.plan.exchange == "two_stage" else len(self.topology.nodes)
        seconds = self.kernel.sum_of(payloads) * step.region.numel
        task = self._on_rank(step.root, seconds, "decompress", self._after(step, step.root))
        self.done[step.id, step.root] = [task]
