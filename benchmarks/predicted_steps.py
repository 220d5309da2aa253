"""What an all-reduce should take on 8 nodes of 8 A100s, by link: ``python -m benchmarks.predicted_steps``.

Writes docs/predicted-steps.md; ``--print`` only prints it. Nothing is measured: see `benchmarks.predicted_model`. Which
codec ``compress="auto"`` picks, and from which link on none, is what its own policy decides from these figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path

from benchmarks.predicted_model import (
    DECODE_LAUNCHES,
    ENCODE_LAUNCHES,
    Cluster,
    Stages,
    flat,
    kernel_cost,
    route,
)
from benchmarks.table import table
from hybridcomm import auto, collective_plans, policy
from hybridcomm import compress as compressors
from hybridcomm.auto import Decision, Policy
from hybridcomm.compress import Compressor
from hybridcomm.cost import KernelCost
from hybridcomm.kernels.cubins.manifest import Manifest
from hybridcomm.probe import CANDIDATES, Figures

__all__ = ["BUCKETS", "CODECS", "NUMEL", "PAGE", "RATES", "Prediction", "page"]

PAGE = Path(__file__).parents[1] / "docs" / "predicted-steps.md"
CODECS = ("topk:0.01", "sign1", "int8")
RATES = (200, 100, 25, 10)  # Gbit/s
FASTER = (400, 800, 1600, 3200)
NUMEL = 1 << 24
"""Elements of the smaller bucket: the largest size that policy looks at itself, others are its multiples."""
BUCKETS = {"64 MiB": 1, "1 GiB": 16}
_HALVINGS = 3  # of the step between two rates in which a crossover lies


@dataclass(frozen=True, kw_only=True)
class _Remembering(Policy):
    """The policy as it is, but that each plan is simulated once, however many texts ask for it."""

    seen: dict[tuple[float | None, str, str], float] = field(compare=False, repr=False)

    def _predict(self, numel: int, codec: Compressor | None, exchange: str = "auto") -> float:
        key = self.figures.topology.inter_node.beta, str(codec), exchange
        if key not in self.seen:
            self.seen[key] = super()._predict(NUMEL, codec, exchange)
        return self.seen[key] * (numel / NUMEL)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """All that the page is made of. ``seen``: simulated s by beta, codec and exchange."""

    manifest: Manifest
    cluster: Cluster = field(default_factory=Cluster)
    seen: dict[tuple[float | None, str, str], float] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def codecs(self) -> tuple[Compressor, ...]:
        return tuple(codec for codec in map(compressors.resolve, CODECS) if codec is not None)

    @cached_property
    def chunk(self) -> int:
        """Elements of a compressed chunk, as policy cuts the smaller bucket (and all larger ones)."""
        return policy.chunk_elems(
            numel=NUMEL, dtype="float32", shards=self.cluster.per_node, align=1024, compressed=True
        )

    @cached_property
    def kernels(self) -> Mapping[str, KernelCost]:
        return {
            str(codec): kernel_cost(self.manifest, codec, self.cluster, self.chunk) for codec in self.codecs
        }

    def policy(self, gbit: float, texts: tuple[str, ...]) -> Policy:
        """That of ``compress="auto:..."`` with these candidates on a link of so many Gbit/s."""
        named = [codec for codec in map(compressors.resolve, texts) if codec is not None]
        figures = Figures(topology=self.cluster.topology(gbit), kernels=self.kernels)
        requested = f"{auto.AUTO}:{','.join(texts)}"
        return _Remembering(figures=figures, requested=requested, candidates=tuple(named), seen=self.seen)

    def decide(self, gbit: float, texts: tuple[str, ...] = CODECS, scale: int = 1) -> Decision:
        return self.policy(gbit, texts).decide(NUMEL * scale)

    def stages(self, gbit: float, codec: Compressor | None, exchange: str, scale: int) -> Stages:
        """Of the plan that runs: dense, or a codec with what policy says of its exchange."""
        topology = self.cluster.topology(gbit)
        plan = collective_plans.allreduce(topology, NUMEL, compressor=codec, exchange=exchange)
        return route(plan, codec, topology, self.kernels, scale)

    def crossover(self, text: str) -> tuple[float, float]:
        """Gbit/s: where ``auto:text`` still compresses, and where no longer; infinite where it always does."""
        rates = sorted((*RATES, *FASTER))
        last, beyond = 0.0, float("inf")
        for rate in rates:
            if self.decide(rate, (text,)).active == "none":
                beyond = rate
                break
            last = rate
        for _ in range(_HALVINGS if 0 < last < beyond < float("inf") else 0):
            middle = sqrt(last * beyond)
            if self.decide(middle, (text,)).active == "none":
                beyond = middle
            else:
                last = middle
        return last, beyond


# -- the page ----------------------------------------------------------------------------------------------

_TUNING = "NCCL's own cost model: src/graph/tuning.cc of NCCL 2.30.7, June 2026"
_HEAD = """# Predicted steps: all-reduces on 8 nodes of 8 A100s

**Every figure on this page is a *prediction*.** None was measured: no GPU was at hand. `python -m
benchmarks.predicted_steps` computes it and writes this page; a test does so again and compares. It says which part of a
step sets its time, and from which link on compression stops to pay; it cannot say how far a real cluster is from its
assumptions.

**Gbit/s are those of a node**, in each direction, and its eight GPUs share them: 200 Gbit/s are 3.1 GB/s for each GPU.
Machines made for training have a port of that speed for each GPU, which is 1600 here. README's advice to leave them to
NCCL does not contradict this page: what is saved there is a fraction of a millisecond to 64 MiB, before backward hides
any of it, and compression loses something.

## Assumptions
"""
_METHOD = """
What takes time, then:

- *Dense flat, NCCL*: one all-reduce of 64 ranks, the faster of ring and double binary tree in NCCL's cost model, fully
  pipelined. A ring of N ranks sends 2 (N - 1) / N of the bucket out of each node, a tree two of it.
- *Dense*, and the codecs: the plans of `hybridcomm.collective_plans` for this topology, with bytes counted from their
  steps. A reduce-scatter in the node, the exchange between the eight owners of each shard, an all-gather in the node.
  Payloads are gathered or, *(2)*, exchanged in two stages, whose second encoding is in the column of the exchange: what
  policy finds for these links. It prefers a gather, which loses less, until two stages take half of its time; so a
  slower link can take less time than a faster one.
- *Total*: the stages one after the other.
- *Simulated*: the same plan played by `hybridcomm.cost`, the figure that `compress="auto"` compares. Chunks overlap,
  and wait for each other where two nodes send to a third. That model was made for shared memory, where an all-gather
  writes once and reads seven times: of NVLink it counts 4 / 7 of the stage's time. A larger bucket than 64 MiB is a
  multiple of it, as for policy.
- *Against flat*: how many times as fast as NCCL's dense flat all-reduce the total is.
- *Picked*: by the hosts' `compress="auto:topk:0.01,sign1,int8"`, which compares with our dense plan. That of GPUs
  compares NCCL's own all-reduce, as it measures it, with the stages one after the other: *against flat*, measured.

Left out: framing, sums behind a dense exchange, contention between nodes, ranks that come late, and what a step of
training hides of all this behind its computation. Nor does time say what a codec loses: all of them need error
feedback, and of two stages the second loses once more.
"""
_ISSUES = "github.com/NVIDIA/nccl-tests/issues"


def _short(text: str, exchange: str = "") -> str:
    """A codec's text without its settings, marked where its payloads go in two stages."""
    name = "dense" if text == "none" else text.partition("/")[0]
    return name + (" (2)" if exchange == "two_stage" else "")


def assumptions(prediction: Prediction) -> str:
    """Every figure that the page rests on, and where it is from."""
    c, chunk = prediction.cluster, prediction.chunk * 4 >> 10
    launches = f"{ENCODE_LAUNCHES} to encode, {DECODE_LAUNCHES} to decode a chunk"
    rows = [
        ["nodes x GPUs", f"{c.nodes} x {c.per_node}", "chosen"],
        ["NVLink in the node, busbw", f"{c.nvlink / 1e9:.0f} GB/s",
         f"NCCL's maintainer of A100 with NVSwitch: {_ISSUES}/149, 5 July 2023; NCCL's topo.h counts 12 links of 20"],
        ["reduce-scatter, all-gather in it", "at that busbw", "assumed: a ring's all-reduce is one of each"],
        ["share of a link's line rate", f"{c.share:.0%}",
         f"24 A100s, InfiniBand, 96 of 100 GB/s: {_ISSUES}/119, 17 November 2022; of Ethernet, assumed"],
        ["and of that, with trees", f"{c.tree_share:.0%}", _TUNING],
        ["beginning of a collective", f"{c.base * 1e6:.1f} us", "likewise, protocol Simple"],
        ["hop in the node, ring and tree", f"{c.ring_hop * 1e6:.1f} and {c.tree_hop * 1e6:.1f} us", "likewise"],
        ["hop between nodes", f"{c.net_hop * 1e6:.1f} us", "likewise, without switches on the way"],
        ["hops of our exchange", "1; dense or in two stages 2", "assumed: each a group of sends and receives"],
        ["kernels", "of [the roofline](roofline.md)", "A100 80GB SXM, gradients and residuals of fp32; predicted"],
        ["further payloads to decode", "bytes and instructions once more", "the kernels' budgets"],
        ["launch of a kernel", f"{c.launch * 1e6:.1f} us, {launches}", "assumed: of a stream, one behind the other"],
        ["chunk of a compressed plan", f"{chunk} KiB", "policy of today"],
        ["auto compresses below", f"{auto.GAIN:.0%} of the dense time", "policy of today"],
        ["auto sends in two stages below", f"{policy.EXCHANGE_GAIN:.0%} of a gather's time", "policy of today"],
    ]  # fmt: skip
    return table(["assumption", "figure", "source"], rows)


def kernels(prediction: Prediction) -> str:
    """What the codecs cost, launches included."""
    rows = []
    for codec in prediction.codecs:
        cost = prediction.kernels[str(codec)]
        alone = ENCODE_LAUNCHES * prediction.cluster.launch / prediction.chunk
        rows.append(
            [
                str(codec),
                f"{codec.ratio(prediction.chunk):.1f}",
                f"{cost.encode * 1e12:.1f}",
                f"{(cost.encode - alone) * 1e12:.1f}",
                f"{cost.sum_of(prediction.cluster.nodes) * 1e12:.1f}",
                f"{cost.sum_of(1) * 1e12:.1f}",
            ]
        )
    header = [
        "*prediction*, ps per element",
        "ratio",
        "encode",
        "of it the kernel",
        f"decode {prediction.cluster.nodes}",
        "decode 1",
    ]
    return table(header, rows)


def _row(name: str, stages: Stages, simulated: float, against: float, picked: bool) -> list[str]:
    parts = (stages.reduce, stages.compress, stages.exchange, stages.decompress, stages.gather, stages.total)
    return [
        name,
        f"{stages.wire / 1e6:,.1f}",
        *(f"{part * 1e3:,.2f}" if part else "" for part in parts),
        f"{simulated * 1e3:,.2f}",
        f"{against:,.1f}",
        "picked" if picked else "",
    ]


def rows(prediction: Prediction, gbit: float, scale: int) -> Iterator[list[str]]:
    """Of one link: NCCL's, our dense plan, and one for each codec."""
    nccl = flat(prediction.cluster, gbit, NUMEL * 4 * scale)
    name, took = f"dense flat, NCCL ({nccl.how})", f"{nccl.seconds * 1e3:,.2f}"
    yield [name, f"{nccl.wire / 1e6:,.1f}", *[""] * 5, took, "", "1.0", ""]
    decision = prediction.decide(gbit, scale=scale)
    for codec in (None, *prediction.codecs):
        text = "none" if codec is None else str(codec)
        exchange = "auto" if codec is None else decision.exchanges[text]
        stages = prediction.stages(gbit, codec, exchange, scale)
        against = nccl.seconds / stages.total
        picked = decision.active == text
        yield _row(_short(text, exchange), stages, decision.seconds[text], against, picked)


def steps(prediction: Prediction, scale: int) -> str:
    header = [
        "*prediction*", "Gbit/s of a node", "MB out of a node", "reduce, ms", "compress", "exchange", "decompress",
        "gather", "total, ms", "simulated, ms", "against flat", "auto",
    ]  # fmt: skip
    lines = []
    for gbit in RATES:
        for name, *cells in rows(prediction, gbit, scale):
            lines.append([name, str(gbit), *cells])
    return table(header, lines)


def crossovers(prediction: Prediction) -> str:
    """What auto picks by link, and where each codec stops to pay."""
    rates = sorted((*RATES, *FASTER))
    others = [(text,) for text in CODECS if (text,) != CANDIDATES]
    lines = []
    for texts in (CANDIDATES, *others, CODECS):
        requested = "auto" if texts == CANDIDATES else f"auto:{','.join(texts)}"
        found = (prediction.decide(rate, texts) for rate in rates)
        picked = [_short(decision.active, decision.exchange) for decision in found]
        lines.append([f"`{requested}`", *picked, _where(prediction, texts[0]) if len(texts) == 1 else ""])
    header = ["*prediction*, by Gbit/s of a node", *map(str, rates), "dense from"]
    return table(header, lines)


def _where(prediction: Prediction, text: str) -> str:
    last, beyond = prediction.crossover(text)
    if not last:
        return f"below {beyond:,.0f}"
    return f"between {last:,.0f} and {beyond:,.0f}" if beyond < float("inf") else f"beyond {last:,.0f}"


def page(prediction: Prediction) -> str:
    """The page, in Markdown."""
    parts = [_HEAD, assumptions(prediction), _METHOD, "## Kernels\n", kernels(prediction)]
    parts.append(
        f"\nWith launches, in chunks of {prediction.chunk * 4 >> 10} KiB: on such a device they take longer than the\n"
        "kernels themselves. Larger chunks, or a captured graph, would save most of it.\n"
    )
    for name, scale in BUCKETS.items():
        parts += [f"## A bucket of {name}\n", steps(prediction, scale), ""]
    parts += ['## The crossover of `compress="auto"`\n', crossovers(prediction)]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted_steps", description=__doc__)
    parser.add_argument("--print", action="store_true", help="to standard output, not into docs/")
    arguments = parser.parse_args()
    text = page(Prediction(manifest=Manifest.read()))
    if arguments.print:
        print(text, end="")
    else:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
