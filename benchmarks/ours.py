"""The library's own lines in the tables: dense and compressed, straight through ``Context.allreduce``."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.distributed as dist

import hybridcomm
from benchmarks.peers import IntegerSums, OneParameter, Peer, heavy_tailed

__all__ = ["OursDense", "OursReducer", "OursTopK", "ours"]

_UNIT = 2.0**-24  # half a unit in the last place of fp32


class OursDense:
    """Dense sum, results checked exactly."""

    name = "hybridcomm dense"
    less_local = False

    def __init__(self, numel: int, context: hybridcomm.Context, calls: int = 1) -> None:
        self._context = context
        self._sums = IntegerSums(numel, calls)

    @property
    def wire_nbytes(self) -> int:
        """Bytes this rank has sent to other nodes, by the engine's count."""
        return self._context.counters()["wire_tx_bytes"]

    def rewrite(self, turn: int) -> None:
        """Another multiple of the seeded input for each turn."""
        self._sums.rewrite(turn)

    def call(self) -> None:
        """Blocking all-reduces, back to back."""
        for tensor in self._sums.tensors:
            self._context.allreduce(tensor, op="sum")

    def check(self, turn: int) -> None:
        """Exact equality with the sum of all ranks' inputs."""
        self._sums.check(self.name, turn)

    def finish(self) -> None:
        """Nothing is kept between calls."""


class OursTopK:
    """Compressed sum with error feedback, checked against the residual law over all calls."""

    less_local = False

    def __init__(self, numel: int, context: hybridcomm.Context, compress: str = "topk:0.01") -> None:
        self.name = f"hybridcomm {compress}"
        self._compress = compress
        self._context = context
        self._residual = hybridcomm.Residual()
        self._own = heavy_tailed(numel, context.rank)
        self._tensor = torch.empty(numel)
        self._applied = torch.zeros(numel, dtype=torch.float64)
        self._factor = 0.0

    @property
    def wire_nbytes(self) -> int:
        """Bytes this rank has sent to other nodes, by the engine's count."""
        return self._context.counters()["wire_tx_bytes"]

    def rewrite(self, turn: int) -> None:
        """Another multiple of the seeded input for each turn."""
        torch.mul(self._own, float(turn + 1), out=self._tensor)

    def call(self) -> None:
        """One blocking all-reduce, from gradient to sum and new residual."""
        self._context.allreduce(self._tensor, op="sum", compress=self._compress, residual=self._residual)

    def check(self, turn: int) -> None:
        """Finite and not all zero; adds to the books that ``finish`` closes."""
        self._residual.commit()
        if not bool(torch.isfinite(self._tensor).all()) or not bool(self._tensor.any()):
            raise AssertionError(f"{self.name}: no result in turn {turn}")
        self._applied += self._tensor
        self._factor += turn + 1

    def finish(self) -> None:
        """Law: the sum of all inputs is the sum of all results plus the nodes' residuals.

        The tolerance is the rounding of fp32: per call and element at most world_size + 3 additions of terms
        that are below the sum over calls and ranks of absolute inputs.
        """
        world, turns = self._context.world_size, self._calls()
        left = torch.zeros(len(self._applied))
        for key, part in self._residual.state_dict().items():
            left[_slice(key)] += torch.from_numpy(part)
        # One input at a time and in place: eight ranks of one machine share its memory.
        total = left.double()
        dist.all_reduce(total)
        total += self._applied
        size = torch.zeros(len(self._applied))
        for rank in range(world):
            values = heavy_tailed(len(size), rank)
            total.sub_(values, alpha=self._factor)
            size.add_(values.abs_(), alpha=self._factor)
        error = total.abs_().sub_(size, alpha=_UNIT * turns * (world + 3))
        if bool((error > 0).any()):
            worst = int(error.argmax())
            raise AssertionError(
                f"{self.name}: the residual law is off at element {worst}, {float(error[worst]):g} more than allowed"
            )

    def _calls(self) -> int:
        """Number of calls behind 1 + 2 + ... + n = factor."""
        return round(((8 * self._factor + 1) ** 0.5 - 1) / 2)


class OursReducer:
    """The backward of the hooks' model with our Reducer: like for like, bucket copies too."""

    name = "Reducer topk:0.01"
    less_local = True

    def __init__(self, numel: int, context: hybridcomm.Context) -> None:
        self._context = context
        model = OneParameter(numel)
        cap = numel * 4 / 2**20 + 1
        self._reducer = hybridcomm.Reducer(model, ctx=context, compress="topk:0.01", bucket_cap_mb=cap)
        self._model, self._weight = model, model.weight
        self._own = heavy_tailed(numel, context.rank).view_as(model.weight)
        self._values = torch.empty_like(self._own)
        self._loss = torch.zeros(())

    @property
    def wire_nbytes(self) -> int:
        """Bytes this rank has sent to other nodes, by the engine's count."""
        return self._context.counters()["wire_tx_bytes"]

    def rewrite(self, turn: int) -> None:
        """As for the hooks: a new input and its forward pass; the old gradient is zeroed in place."""
        torch.mul(self._own, float(turn + 1), out=self._values)
        if self._weight.grad is not None:
            self._weight.grad.zero_()
        self._loss = self._model(self._values)

    def call(self) -> None:
        """The backward, and the wait for the averaged gradient."""
        self._loss.backward()
        self._reducer.finalize()

    def check(self, turn: int) -> None:
        """A gradient is there and finite; commits the residual as an optimizer step would."""
        self._reducer.commit()
        grad = self._weight.grad
        if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.any()):
            raise AssertionError(f"{self.name}: no gradient in turn {turn}")

    def finish(self) -> None:
        """Nothing more: ``OursTopK`` closes the books of the same route."""


def _slice(key: str) -> slice:
    match = re.fullmatch(r".*\[(\d+):(\d+)\]", key)
    assert match is not None, key
    return slice(int(match[1]), int(match[2]))


def ours(numel: int, calls: int = 1) -> dict[str, Callable[[], Peer]]:
    """Our lines by the name they are asked for; they use the default context."""
    return {
        "ours": lambda: OursDense(numel, hybridcomm.default_context(), calls),
        "ours-reducer": lambda: OursReducer(numel, hybridcomm.default_context()),
        "ours-topk": lambda: OursTopK(numel, hybridcomm.default_context()),
    }
