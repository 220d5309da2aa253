"""Rules by name, role and size: which one decides, what buckets come of it, and what ranks must agree on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hybridcomm.compression_policy import ROLES, CompressionPolicy, ParameterFacts, Rule
from hybridcomm.errors import CompressorError, PlanMismatchError, UnsupportedError
from hybridcomm.reducer import Reducer
from hybridcomm.reducer_setup import choices_of, trainable
from hybridcomm.residual import Residual
from hybridcomm.schedule import Schedule
from tests.engine_ranks import engine_contexts
from tests.fake_context import make_fake_contexts
from tests.hybridcomm.compressors import Half
from tests.hybridcomm.exact_models import ExactNet, ternary_
from tests.hybridcomm.law import SMALL_MB, Step, gap, run
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

TOPK = "topk:0.1/b64"


class Block(nn.Module):
    """One of every role, with norms of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.dense = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.gate = nn.Parameter(torch.zeros(8))
        self.tied = nn.Linear(8, 16, bias=False)
        self.tied.weight = self.embed.weight
        ternary_(self)


ROLE_OF = {
    "embed.weight": "embedding",
    "norm.weight": "norm",
    "norm.bias": "norm",
    "rms.weight": "norm",
    "attention.in_proj_weight": "matrix",
    "attention.in_proj_bias": "bias",
    "attention.out_proj.weight": "matrix",
    "attention.out_proj.bias": "bias",
    "dense.weight": "matrix",
    "dense.bias": "bias",
    "conv.weight": "matrix",
    "conv.bias": "bias",
    "gate": "vector",
}


def chosen(policy: CompressionPolicy) -> dict[str, str]:
    module = Block()
    return {name: str(choice) for name, choice in choices_of(module, trainable(module), policy).items()}


def test_roles_come_from_the_module_tree() -> None:
    rules = tuple(Rule(role=role, compress=f"topk:0.{5 + i}/b16") for i, role in enumerate(ROLES))
    ratios = {f"topk:0.{5 + i}": role for i, role in enumerate(ROLES)}
    got = {
        name: ratios[text.partition("/")[0]] for name, text in chosen(CompressionPolicy(rules=rules)).items()
    }
    assert got == ROLE_OF


def test_a_plain_text_leaves_norms_biases_and_vectors_dense() -> None:
    compressed = {name for name, text in chosen(CompressionPolicy.of(TOPK)).items() if text != "none"}
    assert compressed == {name for name, role in ROLE_OF.items() if role in ("matrix", "embedding")}
    assert "none" not in chosen(CompressionPolicy(default=TOPK)).values()
    assert set(chosen(CompressionPolicy.of(None)).values()) == {"none"}


def test_the_first_rule_that_is_met_decides() -> None:
    policy = CompressionPolicy(
        rules=(
            Rule(match="norm.*", compress="topk:0.5/b16"),
            Rule(role="norm", compress=None),
            Rule(match="*.weight", min_numel=100, max_numel=150, compress=Schedule((0, None), (3, TOPK))),
        ),
        default="auto",
    )
    got = chosen(policy)
    assert got["norm.weight"].startswith("topk:0.5")
    assert got["rms.weight"] == "none"
    assert got["embed.weight"].startswith("none,topk:0.1")
    assert got["dense.weight"] == "auto"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule(match="*.nrom*", compress=None),), r'"match": "\*.nrom\*".* no effect: no parameter meets it'),
        ((Rule(min_numel=10**6, compress=TOPK),), '"min_numel": 1000000.* no parameter meets it'),
        (
            (Rule(role="norm", compress=None), Rule(match="rms.*", compress=TOPK)),
            '"rms.*rules before it decide about rms.weight',
        ),
    ],
)
def test_a_rule_without_effect_is_named(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        chosen(CompressionPolicy(rules=rules))
    fields = ("match", "role", "min_numel", "max_numel", "compress")
    relaxed = (Rule(optional=True, **{name: getattr(rule, name) for name in fields}) for rule in rules)
    chosen(CompressionPolicy(rules=tuple(relaxed)))


@pytest.mark.parametrize(
    "fields", [{"role": "weights"}, {"min_numel": -1}, {"min_numel": 5, "max_numel": 4}, {"compress": "topc"}]
)
def test_rules_are_checked_when_they_are_made(fields: dict[str, Any]) -> None:
    with pytest.raises(CompressorError):
        Rule(**{"compress": None, **fields})


RULES = st.builds(
    Rule,
    compress=st.sampled_from([None, TOPK, "auto", "none,topk:0.1@5"]),
    match=st.sampled_from(["*", "a*", "*.weight"]),
    role=st.sampled_from([None, *ROLES]),
    min_numel=st.integers(0, 50),
    max_numel=st.none() | st.integers(50, 100),
    optional=st.booleans(),
)


@given(rules=st.lists(RULES, max_size=4), default=st.sampled_from([None, TOPK, "auto"]))
def test_policies_survive_json(rules: list[Rule], default: str | None) -> None:
    policy = CompressionPolicy(rules=tuple(rules), default=default)
    assert CompressionPolicy.from_dict(json.loads(str(policy))) == policy


@given(
    rules=st.lists(RULES, max_size=4),
    facts=st.lists(
        st.builds(
            ParameterFacts,
            st.sampled_from(["a.weight", "b.weight", "a", "b.c"]),
            st.integers(0, 120),
            st.sampled_from(ROLES),
        ),
        unique_by=lambda fact: fact.name,
    ),
)
def test_assignment_is_a_linear_search(rules: list[Rule], facts: list[ParameterFacts]) -> None:
    policy = CompressionPolicy(rules=tuple(rules), default="topk:0.3")
    try:
        got = policy.assign(facts)
    except CompressorError:
        deciding = [next((r for r in rules if r.meets(fact)), None) for fact in facts]
        assert any(not rule.optional and all(rule is not each for each in deciding) for rule in rules)
        return
    for fact in facts:
        assert got[fact.name] == next((r.compress for r in rules if r.meets(fact)), policy.default)


@pytest.mark.parametrize(
    "data", [{"rules": [{"compress": None, "size": 3}]}, {"defualt": "topk"}, {"default": "x"}]
)
def test_what_is_no_policy_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(CompressorError):
        CompressionPolicy.from_dict(data)


# -- in a reducer ----------------------------------------------------------------------------------------------

MIXED = CompressionPolicy(
    rules=(
        Rule(role="bias", compress=None),
        Rule(role="embedding", compress=Schedule((0, None), (1, "topk:0.05/b128"), (3, Half()))),
        Rule(match="first.*", compress=TOPK),
    ),
    default="topk:0.2/b32",
)


def test_buckets_hold_one_kind_and_are_launched_alike_on_all_ranks() -> None:
    contexts = make_fake_contexts(NAMED["2x2"])

    def rank(ctx: Any) -> Any:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, compress=MIXED, bucket_cap_mb=SMALL_MB)
        kinds = {layout.names: layout.compress.partition("/")[0] for layout in reducer.layouts}
        before = len(ctx.issued)
        model.loss(ctx.rank, 0).backward()
        reducer.finalize()
        return kinds, [name for _, _, name in ctx.issued[before:]], [layout.key for layout in reducer.layouts]

    results = run_ranks(rank, contexts)
    assert all(result == results[0] for result in results)
    kinds, launched, keys = results[0]
    assert launched == keys
    assert kinds == {
        ("second.weight",): "topk:0.2",
        ("first.weight",): "topk:0.1",
        ("second.bias", "first.bias"): "none",
        ("embed.weight",): "none,topk:0.05",
    }


def test_the_law_holds_with_every_kind_at_once() -> None:
    steps = [Step(), Step(passes=2), Step(spoilt="inf"), Step(), Step(spoilt="skip"), Step(), Step()]
    with engine_contexts(NAMED["2x2"]) as contexts:
        books = run_ranks(lambda ctx: run(ctx, steps, compress=MIXED), contexts)
    assert not any(difference.any() for difference in gap(books).values())
    assert {key.partition("[")[0] for key in books[0].residual} <= {
        "embed.weight",
        "first.weight",
        "second.weight",
    }


def test_the_table_says_what_is_active_per_bucket() -> None:
    def rank(ctx: Any) -> str:
        return Reducer(ExactNet(), ctx=ctx, compress=MIXED, bucket_cap_mb=SMALL_MB).table()

    texts = run_ranks(rank, make_fake_contexts(NAMED["2x2"]))
    rows = [line.split() for line in texts[0].splitlines()]
    assert rows[2][:2] == ["inter_node", "policy"]
    assert rows[4][:-1] == ["0", "float32", "1", "0.00", *["topk:0.2/b32/k6/v11"] * 2]
    assert float(rows[4][-1]) > 1
    assert rows[5] == ["1", "float32", "2", "0.00", "none", "dense", "1.0"]
    assert rows[7][-2] == "dense"
    assert rows[7][-3].endswith("custom:half@3")
    alone = run_ranks(rank, make_fake_contexts(NAMED["1x1"]))[0].splitlines()
    assert "no peer (one node)" in alone[2]
    assert all(line.split()[-2:] == ["dense", "-"] for line in alone[4:-1])


def test_ranks_must_have_the_same_policy_and_feedback() -> None:
    def disagree(of_rank_1: dict[str, Any]) -> None:
        contexts = make_fake_contexts(NAMED["2x2"])

        def rank(ctx: Any) -> None:
            settings = of_rank_1 if ctx.rank == 1 else {"compress": MIXED}
            Reducer(ExactNet(), ctx=ctx, bucket_cap_mb=SMALL_MB, **settings)

        with pytest.raises(PlanMismatchError, match="1 ranks have other parameters, compress="):
            run_ranks(rank, contexts)

    disagree({"compress": CompressionPolicy(rules=MIXED.rules[:2], default="topk:0.2/b32")})
    disagree({"compress": MIXED, "residual": Residual(decay=0.5)})
    disagree({"compress": MIXED, "exchange": "two_stage"})
    disagree({"compress": {"inter_node": MIXED, "intra_node": "topk:0.5/b32"}})


def test_a_policy_by_link_class_compresses_inside_nodes_what_is_compressed_between_them() -> None:
    """Norms and biases stay dense on both classes of links, and the law holds with all residuals."""
    compress = {"inter_node": CompressionPolicy.of("topk:0.2/b32"), "intra_node": "topk:0.5/b32"}
    steps = [Step(), Step(passes=2), Step(spoilt="skip"), Step()]

    def make(*args: Any, **options: Any) -> Reducer:
        return Reducer(*args, **options, exchange="two_stage")

    with engine_contexts(NAMED["2x2"]) as contexts:
        books = run_ranks(lambda ctx: run(ctx, steps, make=make, compress=compress), contexts)
    assert not any(np.any(difference) for difference in gap(books).values())
    held = [key for book in books for key in book.residual]
    for op in ("", " recompress", " compress_intra"):
        assert any(key.endswith("]" + op) for key in held)
    assert not any("bias" in key for key in held)


def test_a_residual_without_anything_to_compress_is_refused() -> None:
    def rank(ctx: Any) -> None:
        policy = CompressionPolicy(rules=(Rule(role="bias", compress=None),))
        with pytest.raises(UnsupportedError, match="residual= has nothing to do"):
            Reducer(ExactNet(), ctx=ctx, compress=policy, residual=Residual())

    run_ranks(rank, make_fake_contexts(NAMED["2x2"]))
