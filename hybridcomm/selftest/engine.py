"""The GPU engine on real GPUs: the cases of the tests, stress of the order, times beside NCCL's own, one report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcomm.errors import HybridCommError
from hybridcomm.selftest.board import Board
from hybridcomm.selftest.kernels import SPECS
from hybridcomm.topology import Topology

if TYPE_CHECKING:
    from hybridcomm.bootstrap import World
    from hybridcomm.selftest.gpu import Gpu
    from hybridcomm.selftest.rank import Rank
    from hybridcomm.selftest.report import Timed
    from hybridcomm.selftest.runner import Runner

__all__ = ["Options", "conduct", "layouts", "listing", "run"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run. ``nodes``: numbers of virtual nodes, a layout each (empty: see `layouts`); ``numel``: elements of an
    all-reduce; ``seeds``: how many orders; ``sizes``: bytes that are timed (empty: nothing is); ``timeout``: s without
    progress after which a collective fails; ``abort``: end with an abort on one rank."""

    nodes: tuple[int, ...] = ()
    codecs: tuple[str, ...] = SPECS
    numel: int = 1 << 16
    seeds: int = 50
    sizes: tuple[int, ...] = (1 << 16, 1 << 20, 1 << 24, 1 << 26)
    rounds: int = 11
    timeout: float = 60.0
    watch: float = 0.1
    abort: bool = False
    report: Path | None = None


def layouts(detected: Topology, nodes: Sequence[int]) -> list[Topology]:
    """The topologies to run on: as detected, and where that is one node, as two virtual ones and as one per rank, since
    nothing is compressed inside a node. ``nodes``: those instead."""
    world = detected.world_size
    if nodes:
        return [Topology.even(count, world) for count in dict.fromkeys(nodes)]
    counts = [2, world] if len(detected.nodes) == 1 and world > 1 else []
    return [detected, *(Topology.even(count, world) for count in dict.fromkeys(counts))]


def listing(detected: Topology, options: Options) -> str:
    """What would run, and what would be left out why."""
    from hybridcomm.selftest.cases import conformance, ending

    cases = [*conformance(options.codecs, numel=options.numel, seeds=range(options.seeds))]
    lines, total = [], 0
    for topology in layouts(detected, options.nodes):
        told = [(case, case.why_not(topology.world_size, len(topology.nodes))) for case in cases]
        running = [case for case, why in told if not why]
        total += len(running)
        lines.append(f"nodes {topology}: {len(running)} of {len(cases)} cases")
        lines += [
            f"  {case.name}: {f'left out, {why}' if why else f'against {case.against}'}" for case, why in told
        ]
    if options.abort:
        total += 1
        lines.append(f"at the end: {ending().name}")
    timed = ", ".join(str(size) for size in options.sizes)
    lines.append(f"timed: {f'sizes of {timed} bytes, {options.rounds} rounds' if timed else 'nothing'}")
    return "\n".join([*lines, f"dry run: nothing was run; {total} cases would be"])


def run(options: Options, *, device: int, kernels: tuple[int, str] | None = None) -> int:
    """This process's part, on GPU number ``device``; the exit code of `__main__`."""
    from hybridcomm.bootstrap import find_world
    from hybridcomm.selftest.gpu import TorchGpu, nccl_peer

    def peer(world: World, gpu: Gpu, timeout: float) -> AbstractContextManager[Callable[[Any], object]]:
        return nccl_peer(world, gpu.device, timeout)

    world = find_world(timeout=options.timeout)
    return conduct(world, TorchGpu(device), options, peer=peer, kernels=kernels)


def conduct(
    world: World,
    gpu: Gpu,
    options: Options,
    *,
    peer: Any = None,
    kernels: tuple[int, str] | None = None,
    out: Callable[[str], None] = print,
) -> int:
    """All of it on this rank, as on all others; 0: all is right, 1: something is not, which rank 0's report says.

    ``peer``: (world, gpu, timeout) -> a context with another library's all-reduce in place; None: none is timed.
    ``kernels``: exit code and output of this rank's kernels. ``out``: takes rank 0's report.
    """
    run_ = _Run(world, gpu, options, peer=peer, kernels=kernels)
    try:
        return run_.all(out)
    except HybridCommError as error:  # the board's: there is nobody to agree with any more
        print(f"python -m hybridcomm.selftest: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        run_.runner.disconnect(abort=True)


class _Run:
    """One rank's."""

    def __init__(
        self, world: World, gpu: Gpu, options: Options, *, peer: Any, kernels: tuple[int, str] | None
    ) -> None:
        from hybridcomm.selftest.runner import Runner

        self.world, self.gpu, self.options, self.peer = world, gpu, options, peer
        self.board = Board(world, patience=3 * options.timeout)
        self.runner: Runner = Runner(
            world, gpu, self.board, timeout=options.timeout, watch=options.watch, say=_progress
        )
        self.kernels = None if kernels is None else {"code": kernels[0], "text": kernels[1]}
        self.timed: list[Timed] = []
        self.every: list[Any] = [None] * world.world_size

    def all(self, out: Callable[[str], None]) -> int:
        from hybridcomm.selftest.cases import conformance, ending
        from hybridcomm.selftest.report import facts, text

        options, runner = self.options, self.runner
        said = self.board.exchange(self.kernels) if self.kernels is not None else []
        chosen: list[Topology] = []
        first = Topology.even(options.nodes[0], self.world.world_size) if options.nodes else None
        if runner.connect(first):
            assert runner.rank is not None  # noqa: S101 (connected)
            self.every = self.board.exchange(facts(runner.rank))
            chosen = layouts(runner.rank.host.topology, options.nodes)
        cases = conformance(options.codecs, numel=options.numel, seeds=range(options.seeds))
        for i, topology in enumerate(chosen):
            if i and not self._reconnected(topology):
                continue
            runner.run(cases)
            if options.sizes:
                self._time(first=i == 0)
        if options.abort and chosen and (runner.rank is not None or self._reconnected(chosen[-1])):
            runner.last(ending())
        runner.disconnect()
        wrong = any(result.bad for result in runner.results) or any(
            each and each["code"] == 1 for each in said
        )
        if self.world.rank == 0:
            shown = [str(each) for each in chosen]
            report = text(runner.results, self.timed, self.every, kernels=said, layouts=shown)
            out(report)
            if options.report is not None:
                options.report.write_text(report)
        return int(wrong)

    def _reconnected(self, topology: Topology) -> bool:
        self.runner.disconnect()
        return self.runner.connect(topology)

    def _time(self, *, first: bool) -> None:
        """Times of this layout: verbs and the peer once, codecs where they act."""
        from hybridcomm.selftest import timings
        from hybridcomm.selftest.report import Timed

        options = self.options

        def measured(rank: Rank) -> Timed:
            sizes, rounds, notes = options.sizes, options.rounds, []
            topology = rank.host.topology
            tables, steps = [], []
            if first:
                tables += timings.dense(rank, sizes, rounds)
                more, why = self._peer(rank)
                tables += more
                notes += [why] if why else []
            codecs = options.codecs if len(topology.nodes) > 1 else ()
            for codec in codecs:
                tables += timings.compressed(rank, codec, sizes, rounds)
            for compress in (None, *codecs[:1]):
                steps.append(timings.exposed(rank, compress, max(sizes) // 4, rounds))
            return Timed(layout=str(topology), tables=tuple(tables), steps=tuple(steps), notes=tuple(notes))

        found = self.runner.measure(measured)
        if found is not None:
            self.timed.append(found)

    def _peer(self, rank: Rank) -> tuple[list[Any], str]:
        """The peer's table, or why there is none."""
        from hybridcomm.selftest import timings

        if self.peer is None:
            return [], "no peer was timed"
        try:
            with self.peer(self.world, self.gpu, self.options.timeout) as allreduce:
                return timings.peer(rank, allreduce, self.options.sizes, self.options.rounds), ""
        except RuntimeError as error:  # of torch.distributed's, too
            return [], f"no peer was timed: {error}"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
