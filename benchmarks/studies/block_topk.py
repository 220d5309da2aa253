"""How much of a gradient block-wise top-k keeps, against exact top-k over everything: to choose block and k.

    python -m benchmarks.studies.gradients runs/gradients --data PATH --steps 120
    python -m benchmarks.studies.block_topk runs/gradients

Per rule: payload bytes against dense fp32; energy kept |C(x)|^2 / |x|^2 of single gradients; and, with error
feedback over the whole sequence, the share of the compensated gradient's energy that is delivered per step,
with exact and with quantised values, and the residual's size in gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.studies.gradients import load
from benchmarks.table import table

__all__ = ["RULES", "Rule", "Score", "compress", "score"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A selection and a quantiser; ``block`` 0 is one block of everything, ``bits`` 0 sends exact values."""

    block: int
    ratio: float = 0.01
    bits: int = 0
    record: float = 2.0
    """bytes of a record"""

    @property
    def name(self) -> str:
        where = f"block {self.block}, k {self.k(self.block)}" if self.block else "global exact"
        return f"{where}, {self.bits or 32}-bit"

    def k(self, block: int) -> int:
        return max(1, round(self.ratio * block))

    def compression(self, numel: int) -> float:
        """Dense fp32 bytes per payload byte, without the header."""
        block = self.block or numel
        return 4.0 * block / (self.record * self.k(block) + (1 if self.bits else 0))


RULES = (
    Rule(block=0, record=8.0),
    *(Rule(block=block, bits=17 - block.bit_length()) for block in (256, 512, 1024, 2048, 4096)),
    *(Rule(block=block, bits=8, record=(7 + block.bit_length()) / 8) for block in (1024, 4096)),
    Rule(block=4096, bits=4, ratio=10 / 1024),  # exactly the share of block 1024, k 10
    Rule(block=1024, bits=6, ratio=39 / 1024),  # as many bytes as the global rule
)


def _quantised(values: Floats, bits: int) -> Floats:
    """Rows of kept values at ``bits`` bits and one power-of-two scale a row, as docs/payload.md."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    exponent = np.frexp(np.where(largest > 0, largest, 1))[1] - 1  # floor(log2 largest)
    scale = np.exp2((exponent + 2 - bits).astype(np.float64))
    top = (1 << (bits - 1)) - 1
    return np.asarray(np.clip(np.rint(values / scale), -top, top) * scale, np.float32)


def compress(values: Floats, rule: Rule, *, quantise: bool = True) -> Floats:
    """C(values): zero where nothing is sent."""
    block = rule.block or values.size
    padded = np.zeros(-(-values.size // block) * block, np.float32)
    padded[: values.size] = values
    rows, k = padded.reshape(-1, block), rule.k(block)
    index = np.argpartition(-np.abs(rows), k - 1, axis=1)[:, :k]
    kept = np.take_along_axis(rows, index, axis=1)
    sent = np.zeros_like(rows)
    np.put_along_axis(sent, index, _quantised(kept, rule.bits) if quantise and rule.bits else kept, axis=1)
    return sent.reshape(-1)[: values.size]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over steps."""

    single: float
    """energy kept of a gradient alone, exact values"""
    exact: float
    """1 - |residual|^2 / |compensated|^2 in the steady state, exact values"""
    quantised: float
    """the same with quantised values"""
    residual: float
    """|residual| / |gradient| in the steady state"""


def _energy(values: Floats) -> float:
    return float(np.dot(values.astype(np.float64), values))


def _steady(gradients: Sequence[Floats], rule: Rule, *, quantise: bool) -> tuple[float, float]:
    residual = np.zeros_like(gradients[0])
    delivered, left = [], []
    for step, gradient in enumerate(gradients):
        compensated = gradient + residual
        residual = compensated - compress(compensated, rule, quantise=quantise)
        if step >= len(gradients) // 2:
            delivered.append(1 - _energy(residual) / _energy(compensated))
            left.append((_energy(residual) / _energy(gradient)) ** 0.5)
    return float(np.mean(delivered)), float(np.mean(left))


def score(gradients: Sequence[Floats], rule: Rule) -> Score:
    """What ``rule`` keeps of consecutive gradients of one node."""
    single = [
        _energy(compress(g, rule, quantise=False)) / _energy(g)
        for g in gradients[:: max(1, len(gradients) // 12)]
    ]
    exact, left = _steady(gradients, rule, quantise=False)
    quantised, left = _steady(gradients, rule, quantise=True) if rule.bits else (exact, left)
    return Score(single=float(np.mean(single)), exact=exact, quantised=quantised, residual=left)


def main() -> None:
    """The command of the module's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help=".npy files, one gradient a step")
    gradients = load(parser.parse_args().directory)
    print(f"{len(gradients)} gradients of {gradients[0].size} elements\n")
    rows = []
    for rule in RULES:
        s = score(gradients, rule)
        shares = [f"{100 * value:.1f} %" for value in (s.single, s.exact, s.quantised)]
        rows.append([rule.name, f"{rule.compression(gradients[0].size):.0f}x", *shares, f"{s.residual:.1f}"])
    print(table(["rule", "smaller", "single", "feedback, exact", "feedback, quantised", "residual"], rows))


if __name__ == "__main__":
    main()
