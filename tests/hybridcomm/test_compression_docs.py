"""The examples of docs/compression.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import hybridcomm
from hybridcomm.compression_policy import ROLES
from hybridcomm.schedule import Schedule
from tests.engine_ranks import engine_contexts
from tests.hybridcomm.exact_models import ExactNet
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

PAGE = (Path(__file__).parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_custom_compressor_conforms_and_trains_in_forty_lines() -> None:
    source = next(text for text in EXAMPLES if "class BlockSign" in text)
    assert len(source.splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(source, names)  # check_compressor runs in it

    def rank(context: Any) -> float:
        target = torch.arange(1000, dtype=torch.float32)
        value, residual = torch.zeros(1000), hybridcomm.Residual()
        for _ in range(300):
            gradient = (value - target) * (context.rank + 1)
            context.allreduce(gradient, op="mean", compress=names["BlockSign"](), residual=residual)
            residual.commit()
            value -= 0.05 * gradient
        return float((value - target).norm() / target.norm())

    with engine_contexts(NAMED["2x2"]) as contexts:
        left = run_ranks(rank, contexts)
    assert len(set(left)) == 1
    assert left[0] < 0.1, "feedback reaches the target; a compressor that sends nothing stays at 1"


def test_the_policy_and_the_schedule_are_what_the_page_says() -> None:
    model = ExactNet()
    names: dict[str, Any] = {"hybridcomm": hybridcomm, "model": model}
    source = next(text for text in EXAMPLES if "CompressionPolicy(" in text)
    exec(source.partition("reducer =")[0], names)
    assert [str(rule.compress).partition("/")[0] for rule in names["policy"].rules] == [
        "none",
        "none",
        "topk:0.001",
        "topk:0.01",
    ]
    source = next(text for text in EXAMPLES if text.startswith("compress = Schedule"))
    first, second = source.splitlines()
    exec(first, names)
    schedule = names["compress"]
    exec(second, names)
    assert schedule == Schedule.of(names["compress"])
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(ROLES)


def test_the_mapping_by_link_class_is_taken() -> None:
    source = next(text for text in EXAMPLES if "intra_node" in text)

    def rank(context: Any) -> str:
        names = {"hybridcomm": hybridcomm, "model": ExactNet(), "ctx": context, "policy": "topk:0.2/b32"}
        exec(source, names)
        return str(names["reducer"].table())  # type: ignore[attr-defined]

    with engine_contexts(NAMED["2x2"]) as contexts:
        rows = run_ranks(rank, contexts)[0].splitlines()
    assert "int8" in rows[1]
    assert "to owners, dense back" in rows[1]
    assert "topk:0.2/b32/k6/v11 + dense" in rows[2]
