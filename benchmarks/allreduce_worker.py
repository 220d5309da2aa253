"""What each rank of ``bench_allreduce`` runs: all peers in turn in every round; rank 0 prints JSON lines."""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist

import hybridcomm
from benchmarks.ours import ours
from benchmarks.peers import GlooAllReduce, HierarchicalGloo, Peer, hooks
from benchmarks.timing import Timing, link_bytes, slowest

_WARMUP = 3  # PowerSGD starts compressing in its third call
_DENSE = ("gloo", "gloo-hierarchical", "ours")  # those that know back-to-back calls


def _build(names: Sequence[str], numel: int, calls: int) -> dict[str, Peer]:
    makers: dict[str, Callable[[], Peer]] = {
        "gloo": lambda: GlooAllReduce(numel, calls),
        "gloo-hierarchical": lambda: HierarchicalGloo(numel, calls),
        **hooks(numel),
        **ours(numel, calls),
    }
    wanted = list(names)
    if any(name in hooks(numel) or name == "ours-reducer" for name in wanted) and "local" not in wanted:
        wanted.append("local")
    return {name: makers[name]() for name in wanted}


def _turn(peer: Peer, turn: int) -> tuple[float, int]:
    """(seconds, bytes this node sent) of one call on this rank."""
    peer.rewrite(turn)
    dist.barrier()
    sent = link_bytes()
    begin = time.perf_counter()
    peer.call()
    seconds = time.perf_counter() - begin
    dist.barrier()  # others may still be sending from this node
    sent = link_bytes() - sent
    peer.check(turn)
    return seconds, sent


def _measure(names: Sequence[str], numel: int, rounds: int, calls: int) -> dict[str, object]:
    peers = _build(names, numel, calls)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    sent: dict[str, list[int]] = {name: [] for name in peers}
    engine: dict[str, int] = {}
    gc.disable()
    for turn in range(_WARMUP + rounds):
        for name, peer in peers.items():
            before = getattr(peer, "wire_nbytes", 0)
            took, moved = _turn(peer, turn)
            if turn >= _WARMUP:
                seconds[name].append(took)
                sent[name].append(moved)
                engine[name] = engine.get(name, 0) + getattr(peer, "wire_nbytes", 0) - before
    for peer in peers.values():
        peer.finish()
    times = {name: slowest(values) for name, values in seconds.items()}
    local = Timing.of(times["local"]).median / 1e3 if "local" in times else 0.0
    lines = []
    for name, peer in peers.items():
        per_turn = calls if name in _DENSE else 1
        counted = _over_nodes(sum(sent[name])) / rounds / per_turn
        own = _over_ranks(engine[name]) / rounds / per_turn
        per_call = [seconds / per_turn for seconds in times[name]]
        timing = Timing.of(per_call, minus=local if peer.less_local and name != "local" else 0.0)
        line = {"key": name, "name": peer.name, "counted_bytes": counted, "engine_bytes": own or None}
        lines.append({**line, "ms": asdict(timing)})
    return {"numel": numel, "rounds": rounds, "calls": calls, "lines": lines}


def _over_ranks(value: int) -> int:
    total = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def _over_nodes(value: int) -> int:
    """Sum of one value per node: the first rank of each node speaks for it."""
    return _over_ranks(value if os.environ["LOCAL_RANK"] == "0" else 0)


def main() -> None:
    """Measure every size; rank 0 prints one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--sizes", type=float, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--calls", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    hybridcomm.init()
    for mebibytes in arguments.sizes:
        result = _measure(
            arguments.peers.split(","), round(mebibytes * 2**18), arguments.rounds, arguments.calls
        )
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
        gc.collect()
    hybridcomm.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
