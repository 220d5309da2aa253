"""Stress of the order: buckets of seeded sizes, codecs, streams and delays under way together; and the controls.

All ranks issue the same calls in one order; when, and in which order they wait, is each rank's own. A control plants a
bug on one rank that the self-test has to notice: without it, a comparison that compares nothing would pass.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridcomm.errors import AbortedError, HybridCommError, PeerLostError, PlanMismatchError, StallError
from hybridcomm.residual import Residual
from hybridcomm.selftest.rank import Rank, all_differ, gradient, numbers, total
from hybridcomm.selftest.reductions import Body, same_residual

__all__ = ["Call", "aborted", "calls", "changed", "orders", "swapped"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One bucket. ``second``: on another stream than the first ones; ``residual``: with error feedback."""

    numel: int
    compress: str | None
    op: str
    flat: bool
    exchange: str
    residual: bool
    second: bool


def calls(seed: int, codecs: Sequence[str], *, nodes: int, numel: int) -> list[Call]:
    """What all ranks issue under ``seed``: two to seven calls, of up to ``numel`` elements, multiples of 16."""
    drawn = random.Random(seed)
    made = []
    count = drawn.randint(2, 7)
    turn = drawn.randint(1, count)  # from here on, on the second stream
    for i in range(count):
        compress = drawn.choice([None, *codecs]) if nodes > 1 and codecs else None
        again = compress is not None and not compress.startswith("gtopk")
        made.append(
            Call(
                numel=16 * drawn.randint(1, numel // 16),
                compress=compress,
                op=drawn.choice(["sum", "mean"]) if compress else drawn.choice(["sum", "max"]),
                flat=drawn.random() < 0.5,
                exchange=drawn.choice(["gather", "two_stage"]) if again else "auto",
                residual=compress is not None and drawn.random() < 0.5,
                second=i >= turn,
            )
        )
    return made


def orders(seeds: Sequence[int], codecs: Sequence[str], numel: int) -> Body:
    """`calls` of each seed, twice with the same tensors; the host's bits, residuals included."""

    def body(rank: Rank) -> list[str]:
        wrong = []
        for seed in seeds:
            chosen = calls(seed, codecs, nodes=len(rank.host.topology.nodes), numel=numel)
            wrong += [f"seed {seed}: {line}" for line in _Round(rank, seed, chosen).run()]
        return wrong

    return body


class _Round:
    """One seed's calls on one rank."""

    def __init__(self, rank: Rank, seed: int, chosen: Sequence[Call]) -> None:
        self.rank, self.chosen = rank, chosen
        self.own = random.Random(f"{seed} of {rank.rank}")
        self.tensors = [rank.upload(torch.zeros(call.numel)) for call in chosen]
        self.on_host, self.on_device = Residual(), Residual()

    def run(self) -> list[str]:
        wrong = []
        for step in range(2):  # in the second, programs are made, and no host waits
            wrong += [f"step {step}: {line}" for line in self._step(step)]
            for residual in (self.on_host, self.on_device):
                residual.commit() if step else residual.rollback()
        return wrong + same_residual(self.on_device, self.on_host)

    def _step(self, step: int) -> list[str]:
        rank = self.rank
        rank.align()
        want = [self._input(i, step) for i in range(len(self.chosen))]
        sources = [rank.upload(each) for each in want]
        for i, (call, each) in enumerate(zip(self.chosen, want, strict=True)):
            rank.host.allreduce(
                each,
                op=call.op,
                compress=call.compress,
                exchange=call.exchange,
                **self._kept(self.on_host, i),
            )
        first = [i for i, call in enumerate(self.chosen) if not call.second]
        works = self._issue(first, sources)
        with rank.torch.other_stream():
            works += self._issue([i for i, call in enumerate(self.chosen) if call.second], sources)
            self.own.shuffle(works)
            for work in works:
                self._dawdle()
                work.wait()
            return all_differ(rank, self.tensors, want)

    def _input(self, i: int, step: int) -> torch.Tensor:
        """Where nothing is compressed, integers: NCCL's order of sums is its own."""
        numel, turn = self.chosen[i].numel, 2 * i + step
        if self.chosen[i].compress is None:
            return numbers(numel, self.rank.rank + turn)
        return gradient(numel, self.rank.rank, turn)

    def _kept(self, residual: Residual, i: int) -> dict[str, Any]:
        return {"residual": residual, "residual_key": f"{i}"} if self.chosen[i].residual else {}

    def _issue(self, which: Sequence[int], sources: Sequence[torch.Tensor]) -> list[Any]:
        works = []
        for i in which:
            call = self.chosen[i]
            self._dawdle()
            self.rank.torch.copy([self.tensors[i]], [sources[i]])
            works.append(
                self.rank.device.allreduce(
                    self.tensors[i], op=call.op, compress=call.compress, exchange=call.exchange, flat=call.flat,
                    async_op=True, **self._kept(self.on_device, i),
                )
            )  # fmt: skip
        return works

    def _dawdle(self) -> None:
        """This rank's host, or its stream, is late."""
        if self.own.random() < 0.25:
            time.sleep(self.own.random() * 1e-3)
        if self.own.random() < 0.25:
            self.rank.torch.delay(self.own.randint(1, 500))


def changed(rank: Rank) -> list[str]:
    """Control: one element of the last rank's input is another; the comparison has to say so on every rank."""
    mine = numbers(4096, rank.rank)
    mine[1234] += rank.rank == rank.world - 1
    tensor = rank.upload(mine)
    rank.device.allreduce(tensor)
    noticed = all_differ(rank, [tensor], [total(rank, 4096)])
    return [] if noticed else ["a changed element was not noticed: the comparison compares nothing"]


def swapped(rank: Rank) -> list[str]:
    """Control: the last rank swaps two buckets, which ``debug=True`` has to report on every rank, and only then."""
    tensors = {name: rank.upload(numbers(256, rank.rank)) for name in ("first", "second")}
    own = "first" if rank.rank < rank.world - 1 else "second"
    rank.device.debug = True
    try:
        for name, tensor in tensors.items():
            rank.device.allreduce(tensor, residual_key=name)
        try:
            rank.device.allreduce(tensors[own], residual_key=own)
        except PlanMismatchError as error:
            return [] if repr(own) in str(error) else [f"PlanMismatchError does not name {own!r}: {error}"]
    finally:
        rank.device.debug = False
    return ["swapped buckets were not reported: no PlanMismatchError"]


def aborted(rank: Rank) -> list[str]:
    """The last rank aborts; every rank's calls raise a typed error within the timeout. Ends the context."""
    tensor = rank.upload(numbers(4096, rank.rank))
    rank.device.allreduce(tensor, async_op=True).synchronize()
    begin = time.monotonic()
    try:
        rank.host.barrier()  # which some may not have left yet when the last one aborts
        if rank.rank == rank.world - 1:
            rank.device.abort()
        while time.monotonic() < begin + 2 * rank.host.timeout:
            rank.device.allreduce(tensor, async_op=True).synchronize()
    except (AbortedError, PeerLostError, StallError):
        took = time.monotonic() - begin
        late = took > rank.host.timeout + 5
        return [f"it took {took:.1f} s to raise, with a timeout of {rank.host.timeout:g} s"] if late else []
    except HybridCommError as error:
        return [f"{type(error).__name__}, not AbortedError, PeerLostError or StallError: {error}"]
    return ["an abort on another rank raised nothing"]
