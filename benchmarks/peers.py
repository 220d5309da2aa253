"""The peers of the library, each as one timed call: gloo, and torch DDP's communication hooks.

A hook is measured as its users meet it: in the backward of a real DDP model of one parameter, from which the
backward without communication (``no_sync``, measured in the same rounds) is taken off.
"""

# No postponed annotations here: DDP checks a hook's annotations by identity.
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "DdpHook",
    "GlooAllReduce",
    "HierarchicalGloo",
    "IntegerSums",
    "OneParameter",
    "Peer",
    "heavy_tailed",
    "integers",
    "naive_topk_hook",
]


class Peer(Protocol):
    """One line of the table. ``less_local``: the time of the local backward is taken off."""

    name: str
    less_local: bool

    def rewrite(self, turn: int) -> None:
        """Write this rank's input of call ``turn``; not timed."""

    def call(self) -> None:
        """The timed call; returns when the result is complete on this rank."""

    def check(self, turn: int) -> None:
        """Raise when the result of call ``turn`` is wrong; not timed."""

    def finish(self) -> None:
        """Checks over all calls; not timed."""


def integers(numel: int, rank: int) -> torch.Tensor:
    """Seeded whole numbers in -100..100, fp32: sums of up to 1000 ranks and 100 turns are exact."""
    generator = torch.Generator().manual_seed(7919 + rank)
    return torch.randint(-100, 101, (numel,), generator=generator, dtype=torch.int8).float()


def heavy_tailed(numel: int, rank: int) -> torch.Tensor:
    """Seeded fp32 values as uneven as gradients are: the cube of a normal variable."""
    generator = torch.Generator().manual_seed(104729 + rank)
    return torch.empty(numel).normal_(generator=generator).pow_(3)


class IntegerSums:
    """Tensors of one turn, ``calls`` of them: seeded whole numbers whose sum over the ranks is known."""

    def __init__(self, numel: int, calls: int = 1) -> None:
        ranks = range(dist.get_world_size())
        self._own = integers(numel, dist.get_rank())
        self._expected = torch.stack([integers(numel, rank) for rank in ranks]).sum(0)
        self.tensors = [torch.empty(numel) for _ in range(calls)]

    def rewrite(self, turn: int) -> None:
        """Another multiple for each turn and tensor, so that nothing left over from before can pass."""
        for place, tensor in enumerate(self.tensors):
            torch.mul(self._own, float(turn + place + 1), out=tensor)

    def check(self, name: str, turn: int) -> None:
        """Raise AssertionError unless every tensor holds the sum, exactly."""
        for place, tensor in enumerate(self.tensors):
            if not torch.equal(tensor, self._expected * float(turn + place + 1)):
                raise AssertionError(f"{name}: wrong sum in turn {turn}, call {place}")


class GlooAllReduce:
    """``torch.distributed.all_reduce`` over gloo, dense, results checked exactly."""

    name = "gloo all_reduce"
    less_local = False

    def __init__(self, numel: int, calls: int = 1) -> None:
        self._sums = IntegerSums(numel, calls)

    def rewrite(self, turn: int) -> None:
        """Another multiple of the seeded input for each turn."""
        self._sums.rewrite(turn)

    def call(self) -> None:
        """Blocking all-reduces, back to back."""
        for tensor in self._sums.tensors:
            dist.all_reduce(tensor)

    def check(self, turn: int) -> None:
        """Exact equality with the sum of all ranks' inputs."""
        self._sums.check(self.name, turn)

    def finish(self) -> None:
        """Nothing is kept between calls."""


class HierarchicalGloo(GlooAllReduce):
    """Gloo in three steps: to one leader per node, between the leaders, back inside the nodes."""

    name = "gloo, hierarchical"

    def __init__(self, numel: int, calls: int = 1) -> None:
        super().__init__(numel, calls)
        node, local = int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"])
        places: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(places, (node, local))
        nodes = sorted({where[0] for where in places})
        members = [[rank for rank, where in enumerate(places) if where[0] == n] for n in nodes]
        self._inside = [dist.new_group(ranks) for ranks in members][node]
        self._leaders = dist.new_group([ranks[0] for ranks in members])
        self._leader, self._leads = members[node][0], local == 0

    def call(self) -> None:
        """Blocking all-reduces, back to back."""
        for tensor in self._sums.tensors:
            dist.reduce(tensor, self._leader, group=self._inside)
            if self._leads:
                dist.all_reduce(tensor, group=self._leaders)
            dist.broadcast(tensor, self._leader, group=self._inside)


class OneParameter(torch.nn.Module):
    """A model whose gradient is its input."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        rows = 1 << max(0, (numel.bit_length() - 1) // 2)
        while numel % rows:
            rows //= 2
        self.weight = torch.nn.Parameter(torch.zeros(rows, numel // rows))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of weight x values."""
        return (self.weight * values).sum()


class DdpHook:
    """The backward of a DDP model of one parameter, in one bucket, with a hook (None: no communication)."""

    less_local = True

    def __init__(self, name: str, numel: int, hook: Callable[..., Any] | None, state: object = None) -> None:
        self.name = name
        model = OneParameter(numel)
        self._sync = hook is not None
        self._model = DistributedDataParallel(model, bucket_cap_mb=numel * 4 / 2**20 + 1, init_sync=False)
        if hook is not None:
            self._model.register_comm_hook(state, hook)
        self._weight = model.weight
        self._own = heavy_tailed(numel, dist.get_rank()).view_as(self._weight)
        self._values = torch.empty_like(self._own)
        self._loss = torch.zeros(())

    def rewrite(self, turn: int) -> None:
        """A new input and its forward pass; the old gradient is zeroed in place."""
        torch.mul(self._own, float(turn + 1), out=self._values)
        if self._weight.grad is not None:
            self._weight.grad.zero_()
        self._model.require_backward_grad_sync = self._sync
        self._loss = self._model(self._values)

    def call(self) -> None:
        """The backward, with the hook's communication inside."""
        self._loss.backward()

    def check(self, turn: int) -> None:
        """A gradient is there and finite; the hooks are lossy, so that is all that holds for each."""
        grad = self._weight.grad
        if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.any()):
            raise AssertionError(f"{self.name}: no gradient in turn {turn}")

    def finish(self) -> None:
        """Ranks that synchronised hold the same gradient."""
        if not self._sync or self._weight.grad is None:
            return
        mine = self._weight.grad.double().sum().reshape(1)
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise AssertionError(f"{self.name}: ranks hold different gradients")


def naive_topk_hook(ratio: float, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What is written first: torch.topk, all-gather of values and int64 indices, add; no residual."""
    buffer = bucket.buffer()
    world = dist.get_world_size()
    count = max(1, int(buffer.numel() * ratio))
    indices = torch.topk(buffer.abs(), count, sorted=False).indices
    values = buffer[indices]
    all_values = [torch.empty_like(values) for _ in range(world)]
    all_indices = [torch.empty_like(indices) for _ in range(world)]
    sent = [
        dist.all_gather(all_values, values, async_op=True),
        dist.all_gather(all_indices, indices, async_op=True),
    ]

    def add(gathered: torch.futures.Future[list[torch.futures.Future[object]]]) -> torch.Tensor:
        for future in gathered.value():
            future.value()  # raises what went wrong, before anything is made of it
        buffer.zero_()
        for some_indices, some_values in zip(all_indices, all_values, strict=True):
            buffer.index_add_(0, some_indices, some_values, alpha=1 / world)
        return buffer

    return torch.futures.collect_all([work.get_future() for work in sent]).then(add)


def hooks(numel: int) -> dict[str, Callable[[], DdpHook]]:
    """The hooks by the name they are asked for on the command line, each built only when asked for."""
    return {
        "local": lambda: DdpHook("local backward", numel, None),
        "ddp": lambda: DdpHook("DDP all_reduce hook", numel, default_hooks.allreduce_hook, dist.group.WORLD),
        "fp16": lambda: DdpHook(
            "DDP fp16_compress", numel, default_hooks.fp16_compress_hook, dist.group.WORLD
        ),
        "powersgd": lambda: DdpHook("DDP PowerSGD rank 1", numel, powersgd.powerSGD_hook, _powersgd_state()),
        "topk-naive": lambda: DdpHook("DDP naive top-k 1 %", numel, naive_topk_hook, 0.01),
    }


def _powersgd_state() -> powersgd.PowerSGDState:
    return powersgd.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
