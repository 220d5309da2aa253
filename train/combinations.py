"""Which options of a training go together: what the command refuses and why; the documentation prints this table.

Whatever is not refused here works, and is tested pair by pair. Queues of weight gradients take checkpointed, compiled
and autocast blocks as they are, so a split backward refuses nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.errors import ConfigError

if TYPE_CHECKING:
    from train.config import TrainConfig

__all__ = ["ALTERNATIVES", "FEATURES", "REFUSED", "SPLIT_BACKWARD", "check", "features", "table"]

SPLIT_BACKWARD = ("zb-h1", "zbv", "dualpipev")
"""Schedules that put weight gradients off (I and W); the others do both at once (B)."""

FEATURES = {
    "autocast": "`--autocast bf16`",
    "checkpoint": "`--checkpoint`",
    "compile": "`--compile`",
    "zero": "`--zero 1`",
    "compress": "`--compress`",
    "tp": "`--tp`",
    "sequence": "`--sequence`",
    "pp": "`--pp`, one backward",
    "split": "`--pp`, split backward",
    "ddp": "`--comm ddp`",
}
"""What a training may use, and how the table calls it. One backward: gpipe, 1f1b, interleaved."""

_WHOLE = "--comm ddp has the whole model on each rank: leave out --tp and --pp"
_PAIRS = {
    ("ddp", "tp"): _WHOLE,
    ("ddp", "sequence"): _WHOLE,
    ("ddp", "pp"): _WHOLE,
    ("ddp", "split"): _WHOLE,
    (
        "ddp",
        "zero",
    ): "--zero 1 acts on replicas of --comm hybridcomm: DDP, the peer, keeps its optimizer whole",
    (
        "ddp",
        "compress",
    ): "--comm ddp cannot use --compress; pass --compress none (and perhaps --wire.ddp-hook)",
}
REFUSED = {frozenset(pair): reason for pair, reason in _PAIRS.items()}
"""Pairs of features that do not go together, and why."""

ALTERNATIVES = frozenset(("pp", "split"))
"""Answers to one question, that of the schedule."""


def features(config: TrainConfig) -> set[str]:
    """Which of `FEATURES` a configuration uses."""
    split = config.pipeline in SPLIT_BACKWARD
    used = {
        "autocast": config.autocast != "none",
        "checkpoint": config.checkpoint,
        "compile": config.compile,
        "zero": config.zero > 0,
        "compress": config.compress != "none",
        "tp": config.tp > 1,
        "sequence": config.sequence,
        "pp": config.pp > 1 and not split,
        "split": config.pp > 1 and split,
        "ddp": config.comm == "ddp",
    }
    return {name for name, uses in used.items() if uses}


def check(config: TrainConfig) -> None:
    """Raises `ConfigError`, which says why, where two options do not go together."""
    used = features(config)
    for pair, reason in REFUSED.items():
        if pair <= used:
            raise ConfigError(reason)


def table() -> str:
    """Markdown: who goes with whom, and below it why not."""
    names = list(FEATURES)
    lines = [
        "| | " + " | ".join(FEATURES[name] for name in names[1:]) + " |",
        "|---|" + "---|" * (len(names) - 1),
    ]
    for row, name in enumerate(names[:-1]):
        cells = [
            "" if column <= row else _cell({name, other}) for column, other in enumerate(names[1:], start=1)
        ]
        lines.append(f"| {FEATURES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(_reasons(), start=1))]
    )


def _reasons() -> list[str]:
    return list(dict.fromkeys(REFUSED.values()))


def _cell(pair: set[str]) -> str:
    if pair == ALTERNATIVES:
        return "–"
    reason = REFUSED.get(frozenset(pair))
    return "yes" if reason is None else f"no ({_reasons().index(reason) + 1})"
