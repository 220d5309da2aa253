"""What the device kernels' machine code lets one expect of them on three GPUs: ``python -m benchmarks.roofline``.

Writes docs/roofline.md from the figures in the manifest of the cubins; ``--print`` only prints it. Nothing is measured:
see `hybridcomm.kernels.cubins.roof`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.table import table
from hybridcomm.kernels import spec
from hybridcomm.kernels.cubins import roof
from hybridcomm.kernels.cubins.gpu import GPUS, LATENCY, Gpu
from hybridcomm.kernels.cubins.manifest import Manifest
from hybridcomm.kernels.cubins.roof import DRAM, ISSUE, OVERHEAD
from hybridcomm.kernels.cuda import powersgd
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["page"]

PAGE = Path(__file__).parents[1] / "docs" / "roofline.md"
SHARE = 0.85  # of the roof: what instructions are counted against
GOALS = {
    str(spec.parse(text)): share
    for text, share in (("gtop1", 0.85), ("sign1", 0.85), ("int8", 0.85), ("topk", 0.75))
}
"""By codec, in its default settings: top-k with int8 or signs for its values has none."""

_HEAD = """# Roofline: what to expect on a GPU

**Every rate on this page is a *prediction*.** None was measured: no GPU was at hand. `python -m benchmarks.roofline`
computes it from the machine code in `kernels/cubins/artefacts/` and writes this page; a test compares the two.

## Assumptions
"""

_METHOD = f"""
- **Memory**: the kernel's byte budget per element, {OVERHEAD} times what must move, at {DRAM:.0%} of the data sheet's
  bandwidth (an assumption; copies reach about that), less where the resident blocks have fewer bytes of loads under way
  than bandwidth x {LATENCY * 1e9:.0f} ns of loaded latency (Little's law).
- **Instructions**: SASS of the cubin, static, per element; loops over payloads as often as there are payloads, two
  where there can be more. Where loops hang on the data, or a program runs one case of several, it is the PTX that
  threads execute, as the tests' executor counts it (values drawn from a normal distribution;
  `kernels/cubins/executed.json`), in the mix of the static code. PTX is more than the machine code made of it.
- **Tails**: what whole programs leave of a region is one program of another kernel (`..._tail`), which has no row here.
- **Pipes**: results per clock and SM as in the CUDA C++ Programming Guide, "Arithmetic Instructions"; for 10.0 as for
  9.0. {ISSUE:.0%} of the issue slots and of each pipe are used at best. *alu*: 32-bit integers, logic, comparisons,
  minima; *fp32*: additions and multiplications; *imad*: integer multiplications, and moves that the compiler makes of
  them; *xu*: conversions, bit counts, reductions of a warp; *lsu*: memory, shuffles. Branches and the uniform path take
  issue slots only.
- **Time** per element is the longest of these: memory, issue, each pipe. They overlap fully. Left out: launch, the last
  wave of blocks, bank conflicts, barriers, contention of atomics.
- **Roof**: the data sheet's bandwidth over the bytes that must be moved. *Share* is the predicted rate over that roof.
"""

_ORDER = f"""## Sums in an order

powersgd's payload says in which order its sums are formed, so that all ranks have the same bits. From that follows how
long encoding a region takes at least: the additions that wait for each other, {roof.ADD} cycles each (Jia et al. 2018,
arXiv 1804.06826, for Volta; taken for the later ones too). `right` adds all rows one by one, on 512 threads per rank;
`orthonormal` adds a sixteenth of them in each of its dot products, on 16 threads. What is streamed comes on top (see
the tables above), and so do launches. Microseconds, and in brackets Gelements/s; on several streams, each region has
its own:
"""
_AFFORD = f"""## What an element may cost

Instructions per element, and in brackets those of *alu*, for which there is time at {SHARE:.0%} of the roof. With
fewer, memory sets the rate. The rows are encoders that read a gradient and a residual and write one, and such that
read two payloads in the gradient's place:
"""

_HALVES = """
A B200 has 2.4 times the memory of an H100, and 1.2 times its instructions: with bf16 on both sides an encoder may cost
half of what it may there, and one that adds two payloads and encodes their sum, which moves less and computes more,
less than that. It is work in 32 bits, however narrow an element is in memory, as sums and residuals are fp32 by the
format: to widen, to add, to look for the largest, to narrow the new residual. One kernel with a goal costs too much:
top-k's of a sum with a bf16 residual, as its threshold and its records take the same work whatever the types. It
encodes a rank's own shard of a two-stage exchange, of M nodes' an Mth part of what was encoded before it.

Loads and stores of gradients and residuals have 128 bits. Codes of payloads are loaded by the thread that has their
elements, in 32 bits (int8 beside fp32) or 64 (beside bf16): whole sectors by a warp, and nothing is exchanged.
"""
_OTHERS = """These touch no array as a whole, normally nothing at all, or have as many programs for any region; or they
form a sum of payloads in the cache, so that device memory says little of their time:"""


def goal(kernel: DeviceKernel) -> float | None:
    """The share of the roof that a kernel's codec is to reach, if there is a goal for it."""
    return GOALS.get(kernel.codec)


def _cards(gpus: list[Gpu]) -> str:
    header = ["", *(gpu.name for gpu in gpus)]
    rows: list[list[str]] = [
        ["memory, GB/s", *(f"{gpu.bandwidth / 1e9:,.0f}" for gpu in gpus)],
        ["SMs", *(str(gpu.sms) for gpu in gpus)],
        ["clock, GHz", *(f"{gpu.clock / 1e9:g}" for gpu in gpus)],
        ["issue slots, threads per clock and SM", *(str(gpu.issue) for gpu in gpus)],
        *([f"{pipe}, likewise", *(str(gpu.rates[pipe]) for gpu in gpus)] for pipe in gpus[0].rates),
        ["registers per SM", *(str(gpu.registers) for gpu in gpus)],
        ["warps, blocks per SM", *(f"{gpu.warps}, {gpu.blocks}" for gpu in gpus)],
        ["shared memory per SM, KiB", *(str(gpu.shared // 1024) for gpu in gpus)],
        ["loads under way per SM to fill the memory, KB", *(f"{gpu.in_flight / 1e3:.1f}" for gpu in gpus)],
    ]
    return table(header, rows)


def _rates(manifest: Manifest, gpu: Gpu) -> str:
    rows = []
    for entry in manifest.entries:
        kernel = entry.kernel
        for build in entry.builds:
            if build.arch != gpu.arch or not roof.streamed(kernel, build) or kernel.tail:
                continue
            predicted, wanted = roof.predict(kernel, build), goal(kernel)
            met = (
                "" if wanted is None else f"{wanted:.0%}: {'met' if predicted.share >= wanted else 'missed'}"
            )
            rows.append(
                [
                    kernel.name,
                    f"{kernel.budget.nbytes:.2f}",
                    f"{roof.work(kernel, build)['issue']:.1f}",
                    f"{roof.resident(kernel, build).share:.0%}",
                    f"{predicted.rate / 1e9:,.0f}",
                    f"{predicted.share:.0%}",
                    predicted.limit,
                    met,
                ]
            )
    header = [
        "*prediction*",
        "bytes",
        "instructions",
        "occupancy",
        "Gelements/s",
        "share of the roof",
        "limit",
        "goal",
    ]
    return table(header, rows)


def _in_order() -> str:
    rows = []
    for nrows in (512, 32768):
        for each in powersgd.SPECS:
            numel, additions = nrows * each.block, roof.in_order(each.rank, nrows)
            seconds = [additions * roof.ADD / gpu.clock for gpu in GPUS.values()]
            rows.append(
                [
                    f"powersgd:{each.rank}",
                    f"{numel * 4 >> 20} MiB",
                    f"{additions:,}",
                    *(f"{1e6 * least:,.1f} ({numel / least / 1e9:,.0f})" for least in seconds),
                ]
            )
    header = ["*prediction*", "region", "additions in a row", *(gpu.name for gpu in GPUS.values())]
    return table(header, rows)


def _afford() -> str:
    rows = [
        [what, f"{nbytes:g}", *(f"{all_:.0f} ({alu:.0f})" for all_, alu in _times(nbytes))]
        for what, nbytes in (
            ("fp32", 12),
            ("bf16, residual fp32", 10),
            ("bf16", 6),
            ("two of int8, residual bf16", 7),
            ("two of sign1 or top-k, residual bf16", 4.4),
        )
    ]
    return table(["*prediction*", "bytes", *(gpu.name for gpu in GPUS.values())], rows)


def _times(nbytes: float) -> list[tuple[float, float]]:
    return [
        (roof.affordable(gpu, nbytes, "issue", SHARE), roof.affordable(gpu, nbytes, "alu", SHARE))
        for gpu in GPUS.values()
    ]


def _not_streaming(manifest: Manifest) -> str:
    names = [
        e.kernel.name
        for e in manifest.entries
        if not roof.streamed(e.kernel, e.builds[0]) and not e.kernel.tail
    ]
    if not names:
        return ""
    listed = "\n".join(f"- `{name}`" for name in names)
    return f"\n## Not predicted\n\n{_OTHERS}\n\n{listed}\n"


def page(manifest: Manifest) -> str:
    """The page, in Markdown."""
    gpus = list(GPUS.values())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.toolchain.items()))
    parts = [_HEAD, _cards(gpus), _METHOD]
    parts += [f"## {gpu.name}\n\n{_rates(manifest, gpu)}\n" for gpu in gpus]
    parts += [_AFFORD, _afford(), _HALVES, _ORDER, _in_order()]
    return "\n".join(parts) + _not_streaming(manifest) + f"\nBuilt with {versions}.\n"


def main() -> int:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--print", action="store_true", help="to standard output, not into docs/roofline.md")
    arguments = parser.parse_args()
    text = page(Manifest.read())
    if arguments.print:
        print(text, end="")
    else:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
