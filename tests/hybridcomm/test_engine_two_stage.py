"""The two-stage exchange on the engine: the interpreter's bytes, the residual law, values that are not finite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hybridcomm import _C, lower_payload
from hybridcomm.context import Context
from hybridcomm.errors import HybridCommError
from hybridcomm.lower_payload import PayloadLowering
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.engine_ranks import engine_contexts
from tests.hybridcomm.compressed_calls import CODEC, Oracle, by_engine, gradients, held_back, residual_of
from tests.hybridcomm.strategies import NAMED, two_stage

NAMES = ["2x2", "4x1", "3+2", "2+1+1", "3x1"]
SIZES = [1, 64, 129, 255, 256, 257, 5003]
"""Fewer blocks (of 64) than nodes; around the edges of blocks and slices; several of each."""

# -- the engine ----------------------------------------------------------------------------------------------


@pytest.fixture(params=NAMES, scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Context]]:
    with engine_contexts(NAMED[request.param], chunk_nbytes=4096) as contexts:
        yield contexts


@pytest.mark.parametrize("numel", SIZES)
def test_engine_gives_the_interpreters_bytes_over_steps(ranks: list[Context], numel: int) -> None:
    plan = ranks[0].plan_allreduce(numel, op="mean", compress=CODEC, exchange="two_stage")
    steps = [gradients(len(ranks), numel, seed=10 * numel + step) for step in range(3)]
    Oracle().check_steps(ranks, plan, steps, exchange="two_stage")


def test_memoryless_engine_gives_the_interpreters_bytes(ranks: list[Context]) -> None:
    inputs = gradients(len(ranks), 20_011, seed=5)
    plan = ranks[0].plan_allreduce(20_011, compress=CODEC, exchange="two_stage")
    want = Oracle().run(plan, inputs, with_residual=False)
    got = by_engine(ranks, inputs, op="sum", exchange="two_stage")
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]


def law_gap(contexts: list[Context], after: Callable[[Residual], None] = lambda _: None) -> float:
    """The largest difference of the law's two sides over steps of which every third is skipped."""
    world, numel = len(contexts), 2048
    residuals = [Residual() for _ in contexts]
    seen, applied = np.zeros(numel), np.zeros(numel)
    for step in range(8):
        dice = np.random.default_rng(step)
        inputs = [dice.integers(-3, 4, numel).astype(np.float32) for _ in range(world)]
        update = by_engine(contexts, inputs, op="sum", residuals=residuals, exchange="two_stage")[0]
        for residual in residuals:
            if step % 3 == 2:
                residual.rollback()
            else:
                residual.commit()
            after(residual)
        if step % 3 != 2:
            seen += np.sum(inputs, axis=0, dtype=np.float64)
            applied += update.astype(np.float64)
    assert any(
        key.endswith("recompress") and np.any(v) for r in residuals for key, v in r.state_dict().items()
    )
    return float(np.abs(seen - applied - held_back(residuals, numel)).max())


def test_law_with_both_residuals_is_an_equality(ranks: list[Context]) -> None:
    assert law_gap(ranks) == 0


@pytest.mark.parametrize(
    "settings",
    [{"decay": 0.5}, {"momentum": 0.5, "masking": False}, {"decay": 0.5, "momentum": 0.5, "masking": False}],
)
def test_laws_of_decay_and_momentum_hold_with_both_residuals(settings: dict[str, Any]) -> None:
    """Equality: halves of integers are exact. Both residuals decay; only what nodes send has a velocity."""
    decay, momentum, numel = settings.get("decay", 1.0), settings.get("momentum", 0.0), 1024
    put_in, applied, velocity = np.zeros(numel), np.zeros(numel), np.zeros(numel)
    with engine_contexts(NAMED["2+1+1"], chunk_nbytes=4096) as contexts:
        residuals = [Residual(**settings) for _ in contexts]
        for step in range(6):
            dice = np.random.default_rng(step)
            inputs = [dice.integers(-3, 4, numel).astype(np.float32) for _ in contexts]
            update = by_engine(contexts, inputs, op="sum", residuals=residuals, exchange="two_stage")[0]
            for residual in residuals:
                residual.commit()
            velocity = momentum * velocity + np.sum(inputs, axis=0)
            put_in, applied = decay * put_in + velocity, decay * applied + update
    left = held_back(residuals, numel)
    assert (put_in == applied + left).all()
    assert np.abs(left).sum() > 0, "nothing was held back: the law was not tested"


def forget_some(residual: Residual) -> None:
    """Planted bug: the second residual is dropped after each step, but for its last element."""
    for entry in residual._entries.values():
        entry.committed[entry.layout.size("recompress") : -1] = 0


def test_control_a_dropped_second_residual_breaks_the_law() -> None:
    with engine_contexts(NAMED["3x1"], chunk_nbytes=4096) as contexts:
        assert law_gap(contexts, forget_some) > 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_nonfinite_value_passes_both_stages_and_leaves_both_residuals(
    ranks: list[Context], poison: float
) -> None:
    world, numel = len(ranks), 10_000
    residuals, inputs = [Residual() for _ in ranks], gradients(world, numel, seed=3)
    by_engine(ranks, inputs, residuals=residuals, exchange="two_stage")
    for residual in residuals:
        residual.commit()
    before = [residual_of(residual).tobytes() for residual in residuals]
    inputs[world - 1][numel // 2] = poison
    plan = ranks[0].plan_allreduce(numel, compress=CODEC, exchange="two_stage")
    spoilt = next(
        s.region for s in plan.steps if s.op == "recompress" and s.region[0] <= numel // 2 < s.region[1]
    )
    for result in by_engine(ranks, inputs, residuals=residuals, exchange="two_stage"):
        assert np.isnan(result[slice(*spoilt)]).all()
        assert np.isnan(result).sum() == spoilt.numel < numel
    for residual in residuals:
        residual.commit()  # not even a careless caller gets NaN into a residual
        assert np.isfinite(residual_of(residual)).all()
    again = [Residual() for _ in ranks]
    by_engine(ranks, gradients(world, numel, seed=3), residuals=again, exchange="two_stage")
    for residual in again:
        residual.commit()
    by_engine(ranks, inputs, residuals=again, exchange="two_stage")
    for residual, old in zip(again, before, strict=True):
        residual.rollback()
        assert residual_of(residual).tobytes() == old


@pytest.mark.parametrize("exchange", ["gather", "two_stage"])
def test_many_shards_on_one_rank_do_not_run_out_of_scratch(
    monkeypatch: pytest.MonkeyPatch, exchange: str
) -> None:
    """A rank that owns six shards has more than 16 chunks under way: in a ring of 16 one overwrites another."""
    topology, numel = Topology.from_sizes([6, 1]), 120_000
    inputs = gradients(7, numel, seed=4)
    plan = two_stage(topology, numel, exchange=exchange, chunk_elems=1024)
    want = Oracle().run(plan, inputs, with_residual=False)
    with engine_contexts(topology, chunk_nbytes=4096) as contexts:
        got = by_engine(contexts, inputs, op="sum", exchange=exchange)
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]
    monkeypatch.setattr(lower_payload, "most_held", lambda *_: 1)
    with engine_contexts(topology, chunk_nbytes=4096, timeout=1.0) as contexts:
        try:
            got = by_engine(contexts, inputs, op="sum", exchange=exchange)
        except HybridCommError:
            return
        assert [a.tobytes() for a in got] != [b.tobytes() for b in want]


# -- planted bugs --------------------------------------------------------------------------------------------


def second_reads_the_first_residual(lowering: Any) -> None:
    lowering.residual_offset["recompress"] = dict.fromkeys(lowering.residual_offset["recompress"], 0)


def mutate_decode(change: Callable[[Any, Any, dict[str, Any]], None]) -> Callable[[Any], None]:
    def apply(lowering: Any) -> None:
        add = lowering._add

        def mutated(kind: _C.Kind, stream: Any, step: Any, **options: Any) -> int:
            if kind == _C.Kind.decode:
                change(lowering, step, options)
            return int(add(kind, stream, step, **options))

        lowering._add = mutated

    return apply


def divide_twice(lowering: Any, step: Any, options: dict[str, Any]) -> None:
    if step.op == "recompress":
        options["divisor"] = lowering.plan.topology.world_size


def keep_the_sum(lowering: Any, step: Any, options: dict[str, Any]) -> None:
    """The slice's owner decodes what it added, and not what it sent on."""
    if step.op == "recompress":
        lowering.summed = step.region, options["sources"]
    elif getattr(lowering, "summed", (None,))[0] == step.region:
        options["sources"] = lowering.summed[1]


def add_one_payload_less(_: Any, step: Any, options: dict[str, Any]) -> None:
    if step.op == "recompress":
        options["sources"] = options["sources"][1:]


def pass_the_first_payload_on(lowering: Any) -> None:
    """The slice's owner adds and encodes nothing, and sends its own payload to all."""

    def recompress(step: Any) -> None:
        payloads = lowering.payloads[step.region]
        payloads.second, payloads.held = payloads.own, [payloads.at(payloads.own)]
        lowering.done_by[step.id] = lowering._after(step)

    lowering._recompress = recompress


MUTANTS: dict[str, Callable[[Any], None]] = {
    "nothing is encoded anew": pass_the_first_payload_on,
    "the second residual is the first": second_reads_the_first_residual,
    "divided in both stages": mutate_decode(divide_twice),
    "a slice's owner keeps its exact sum": mutate_decode(keep_the_sum),
    "a node's payload is left out": mutate_decode(add_one_payload_less),
}


@pytest.mark.parametrize("what", [None, *MUTANTS])
def test_mutants_differ_from_the_interpreter(monkeypatch: pytest.MonkeyPatch, what: str | None) -> None:
    prepare = PayloadLowering._prepare_payloads

    def mutated(self: Any, *args: Any) -> int:
        end = prepare(self, *args)
        if what is not None:
            MUTANTS[what](self)
        return end

    monkeypatch.setattr(PayloadLowering, "_prepare_payloads", mutated)
    numel, oracle, good = 600, Oracle(), True
    with engine_contexts(NAMED["3x1"]) as contexts:
        residuals = [Residual() for _ in contexts]
        plan = contexts[0].plan_allreduce(numel, op="mean", compress=CODEC, exchange="two_stage")
        for step in range(3):
            inputs = gradients(3, numel, seed=step)
            got = by_engine(contexts, inputs, residuals=residuals, exchange="two_stage")
            good &= [a.tobytes() for a in got] == [b.tobytes() for b in oracle.run(plan, inputs)]
    assert good is (what is None)


def test_slow_ranks_change_no_bits() -> None:
    inputs = gradients(4, 9_000, seed=9)
    with engine_contexts(NAMED["2+1+1"], chunk_nbytes=4096) as contexts:
        begin = time.monotonic()
        runs = {
            tuple(a.tobytes() for a in by_engine(contexts, inputs, exchange="two_stage", jitter=jitter))
            for jitter in range(5)
        }
        assert time.monotonic() > begin
    assert len(runs) == len(set(runs.pop())) == 1
