"""A context in one process: ranks are threads, a collective is one run of the plan interpreter.

The n-th call of each rank meets the n-th call of all others, as on a real engine; calls that differ raise
`PlanMismatchError` on all ranks. Slow and simple: the oracle, not a transport.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hybridcomm import collective_plans as plans
from hybridcomm.bucket import Span
from hybridcomm.compress import ByLink, by_link, resolve
from hybridcomm.errors import AbortedError, HybridCommError, PlanMismatchError, StallError
from hybridcomm.plan import Plan
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.interpreter import Interpreter


class _Call:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.buffers: dict[int, np.ndarray[Any, Any]] = {}
        self.residuals: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
        self.wire: dict[int, int] = {}
        self.done = threading.Event()
        self.error: HybridCommError | None = None

    def run(self) -> None:
        interpreter = Interpreter(self.plan)
        try:
            interpreter.run([self.buffers[rank] for rank in range(len(self.buffers))], self.residuals)
        except Exception as error:
            self.error = HybridCommError(f"interpreter: {error!r}")
        self.wire = interpreter.wire_nbytes
        self.done.set()


class FakeWorld:
    """What the ranks of one fake job share."""

    def __init__(self, topology: Topology, timeout: float) -> None:
        self.topology, self.timeout = topology, timeout
        self.lock = threading.Lock()
        self.calls: list[_Call] = []
        self.aborted = False


class FakeWork:
    """Async handle; the result is written back when it is waited for."""

    def __init__(self, world: FakeWorld, call: _Call, rank: int, tensor: Any) -> None:
        self._world, self._call, self._rank, self._tensor = world, call, rank, tensor
        self.wire_nbytes = 0
        self.seconds = self.begun = 0.0

    def wait(self) -> None:
        if not self._call.done.wait(self._world.timeout):
            missing = tuple(set(range(self._world.topology.world_size)) - set(self._call.buffers))
            raise StallError(f"rank {self._rank}: ranks {missing} never joined", missing)
        if self._call.error is not None:
            raise self._call.error
        result = self._call.buffers[self._rank]
        if isinstance(self._tensor, torch.Tensor):
            self._tensor.copy_(torch.from_numpy(result))
        else:
            self._tensor[...] = result
        self.wire_nbytes = self._call.wire[self._rank]

    def is_completed(self) -> bool:
        return self._call.done.is_set()


class FakeContext:
    """One rank's view; ``issued`` lists (collective, numel, name) in the order of its calls."""

    def __init__(self, world: FakeWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.topology = world.topology
        self.world_size = world.topology.world_size
        self.issued: list[tuple[str, int, str]] = []

    def allreduce(
        self,
        tensor: Any,
        *,
        op: str = "sum",
        compress: ByLink = None,
        residual: Residual | None = None,
        exchange: str = "auto",
        async_op: bool = False,
        residual_key: str = "tensor",
        spans: Sequence[Span] | None = None,
    ) -> Any:
        array, links = _numpy(tensor), by_link(compress)
        plan = plans.allreduce(
            self.topology,
            array.size,
            dtype=str(array.dtype),
            op=op,
            compressor=resolve(links.inter_node),
            intra=links.intra_node,
            exchange=exchange,
            bucket=zlib.crc32(residual_key.encode()),  # equal buckets differ by name, as in the engine's tags
        )
        staged = None
        regions = plan.residuals(self.rank)
        if residual is not None and any(regions.values()):
            staged = residual.stage(residual_key, numel=array.size, regions=regions, spans=spans)
        return self._issue(plan, tensor, array, async_op=async_op, staged=staged, name=residual_key)

    def empty(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype)

    def broadcast(self, tensor: Any, src: int, *, async_op: bool = False) -> Any:
        array = _numpy(tensor)
        plan = plans.broadcast(self.topology, array.size, dtype=str(array.dtype), root=src)
        return self._issue(plan, tensor, array, async_op=async_op)

    def barrier(self) -> None:
        array = np.ones(1, np.int64)
        self._issue(plans.barrier(self.topology), array, array.copy(), async_op=False)

    def abort(self) -> None:
        """Ends every call that is under way, on all ranks."""
        with self._world.lock:
            self._world.aborted = True
            for call in self._world.calls:
                if not call.done.is_set():
                    call.error = AbortedError("a rank aborted")
                    call.done.set()

    def _issue(
        self,
        plan: Plan,
        tensor: Any,
        array: np.ndarray[Any, Any],
        *,
        async_op: bool,
        staged: Any = None,
        name: str = "tensor",
    ) -> Any:
        world, place = self._world, len(self.issued)
        self.issued.append((plan.collective, array.size, name))
        with world.lock:
            if world.aborted:
                raise AbortedError(f"rank {self.rank}: a rank aborted")
            if place == len(world.calls):
                world.calls.append(_Call(plan))
            call = world.calls[place]
            call.buffers[self.rank] = array
            if staged is not None:
                call.residuals[self.rank] = staged
            if call.plan.digest != plan.digest and call.error is None:
                call.error = PlanMismatchError(
                    f"call {place}: rank {self.rank} {self.issued[-1]}, others {call.plan.collective} "
                    f"of {call.plan.numel}"
                )
                call.done.set()
            elif len(call.buffers) == self.world_size and call.error is None:
                call.run()
        work = FakeWork(world, call, self.rank, tensor)
        if async_op:
            return work
        work.wait()
        return tensor


def _numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """A copy as numpy; bfloat16 as float32, which holds it (sums of exact inputs are exact in both)."""
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().reshape(-1)
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy().copy()
    return np.array(tensor).reshape(-1)


def make_fake_contexts(topology: Topology, timeout: float = 20.0) -> list[FakeContext]:
    world = FakeWorld(topology, timeout)
    return [FakeContext(world, rank) for rank in range(topology.world_size)]
