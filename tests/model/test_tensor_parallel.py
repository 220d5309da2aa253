"""Sharded = unsharded: a decoder over 1, 2, 3 and 4 ranks, loss, gradients and weights; planted bugs are noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import model.scores
import model.vocab
from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from hybridcomm.topology import Topology
from model import linear, tensor_parallel
from model.config import ModelConfig
from model.sharding import join_states, partial_parameters, shard_state, shardings
from model.tensor_parallel import KEEP, Pair, TensorParallel, check_alike, gather_state, sum_partial_gradients
from tests.engine_ranks import engine_contexts
from tests.model.parallel import CONFIG, FEW_HEADS, Decoder, batch, bound, build, built
from tests.ranks import run_ranks


def trained(decoder: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step, the partial ones summed."""
    loss = decoder.loss(batch())
    loss.backward()
    sum_partial_gradients(decoder, decoder.tp)
    return loss.detach(), {name: p.grad for name, p in decoder.named_parameters()}


def errors(
    contexts: list[Context], size: int, *, sequence: bool, dtype: str, config: ModelConfig = CONFIG
) -> dict[str, float]:
    """By what multiple of the bound the loss and each whole gradient differ from one rank's.

    Infinite for what all ranks must have alike, and have not, bit for bit.
    """
    kind = getattr(torch, dtype)
    ranks = built(contexts, size, lambda tp: build(tp, config, dtype=kind), sequence=sequence)
    results = run_ranks(lambda context: trained(ranks[context.rank]), contexts[:size])
    found = [grads | {"loss": loss} for loss, grads in results]
    whole = join_states(found, ranks[0])
    split = shardings(ranks[0])
    loss, grads = trained(build(config=config, dtype=kind))
    out = {}
    for name, exact in (grads | {"loss": loss}).items():
        alike = name in split or all(torch.equal(each[name], whole[name]) for each in found)
        error = float((whole[name] - exact).abs().max()) / bound(exact, dtype, config)
        out[name] = error if alike else float("inf")
    return out


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("config", [CONFIG, FEW_HEADS], ids=["tied", "few heads, untied"])
@pytest.mark.parametrize(
    ("size", "sequence"), [(1, False), (2, False), (2, True), (3, True), (4, False), (4, True)]
)
def test_sharded_equals_unsharded(
    contexts: list[Context], size: int, sequence: bool, config: ModelConfig, dtype: str
) -> None:
    found = errors(contexts, size, sequence=sequence, dtype=dtype, config=config)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("sequence", [False, True])
def test_any_group_will_do(sequence: bool) -> None:
    """Ranks of two nodes, in an order of their own."""
    members = [3, 0, 1]
    with engine_contexts(Topology.virtual(2, 2)) as job:
        chosen = [job[member] for member in members]
        ranks = [build(TensorParallel(group=context.group(members), sequence=sequence)) for context in chosen]
        results = run_ranks(lambda context: trained(ranks[members.index(context.rank)]), chosen)
    loss, grads = trained(build())
    whole = join_states([found for _, found in results], ranks[0])
    assert float((results[0][0] - loss).abs()) <= bound(loss, "float64")
    for name, exact in grads.items():
        assert float((whole[name] - exact).abs().max()) <= bound(exact, "float64"), name


@pytest.mark.parametrize(("size", "sequence"), [(1, False), (3, False), (4, True)])
def test_states_are_parts_of_the_whole(contexts: list[Context], size: int, sequence: bool) -> None:
    """One seed draws the same weights at any size; a checkpoint of one fits the other, both ways."""
    whole = build(config=FEW_HEADS).state_dict()
    ranks = built(contexts, size, lambda tp: build(tp, FEW_HEADS), sequence=sequence)
    gathered = run_ranks(
        lambda context: gather_state(ranks[context.rank], ranks[context.rank].tp), contexts[:size]
    )
    for rank, decoder in enumerate(ranks):
        part = shard_state(whole, decoder, rank)
        assert {name: value.shape for name, value in part.items()} == {
            name: value.shape for name, value in decoder.state_dict().items()
        }
        assert all(torch.equal(part[name], value) for name, value in decoder.state_dict().items())
        assert gathered[rank].keys() == whole.keys()
        assert all(torch.equal(gathered[rank][name], value) for name, value in whole.items())


def test_partial_parameters_are_norms_and_the_text_projection(contexts: list[Context]) -> None:
    def names(sequence: bool) -> list[str]:
        (decoder, _) = built(contexts, 2, build, sequence=sequence)
        return list(partial_parameters(decoder))

    norms = [
        f"blocks.{layer}.{norm}.weight"
        for layer in (0, 1)
        for norm in ("attention_norm", "feed_forward_norm")
    ]
    assert names(False) == ["table.text_projection.weight"]
    assert names(True) == ["table.text_projection.weight", *norms, "final_norm.weight"]
    assert partial_parameters(build()) == {}


def test_ranks_that_are_not_alike_are_found(contexts: list[Context]) -> None:
    """On all of them, by name: another norm."""

    def checked(decoders: list[Decoder]) -> list[str]:
        def body(context: Context) -> str:
            try:
                check_alike(decoders[context.rank], decoders[context.rank].tp)
            except UnsupportedError as error:
                return str(error)
            return ""

        return run_ranks(body, contexts[:2])

    ranks = built(contexts, 2, build)
    assert checked(ranks) == ["", ""]
    with torch.no_grad():
        ranks[1].final_norm.weight[3] += 1
    assert all("differ in final_norm.weight: start" in text for text in checked(ranks))


def test_sequence_parallelism_of_one_rank_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="one alone"):
        TensorParallel(sequence=True)


_here, _joined_rightly = model.vocab.Items.here, model.scores._joined
HALF_GATHER = Pair(forward=tensor_parallel._all_gather, backward=tensor_parallel._own_part)


def off_by_one(self: model.vocab.Items, items: Tensor) -> tuple[Tensor, Tensor]:
    places, rows = _here(self, items)
    return places, (rows - int(self.tp.rank > 0)).clamp(min=0)


def not_joined(stats: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Adds up sums that stand below different maxima."""
    if tp.group is None:
        return _joined_rightly(stats, tp)
    alike = stats.clone()
    tp.group.broadcast(alike, 0)
    return _joined_rightly(torch.stack([alike[0], stats[1], stats[2]]), tp)


def without_norms(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in partial_parameters(module).items() if "norm" not in name}


BUGS: dict[str, tuple[bool, object, str, object]] = {
    "no all-reduce of an input's gradient": (False, linear, "COPY", KEEP),
    "no all-reduce of an output": (False, linear, "TOTAL", KEEP),
    "no all-reduce of the last hidden state's gradient": (False, model.scores, "COPY", KEEP),
    "no all-reduce of embeddings": (False, model.vocab, "TOTAL", KEEP),
    "tokens' gradients not summed": (True, linear, "GATHER", HALF_GATHER),
    "norms' gradients not summed": (True, tensor_parallel, "partial_parameters", without_norms),
    "no partial gradient summed": (False, tensor_parallel, "partial_parameters", lambda module: {}),
    "target off by one": (False, model.vocab.Items, "here", off_by_one),
    "maximum not joined": (False, model.scores, "_joined", not_joined),
}


@pytest.mark.parametrize("bug", BUGS)
def test_control_planted_bugs_are_noticed(
    contexts: list[Context], bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence, where, name, wrong = BUGS[bug]
    monkeypatch.setattr(where, name, wrong)
    found = errors(contexts, 2, sequence=sequence, dtype="float64")
    assert max(found.values()) > 1000, found
