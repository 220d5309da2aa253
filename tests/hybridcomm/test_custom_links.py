"""Compressors written in Python in a two-stage exchange, beside a codec inside the node, and refused inside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hybridcomm.compress import LinkCompressors, by_link, resolve
from hybridcomm.custom import CustomCompressor, CustomSpec
from hybridcomm.errors import CompressorError
from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.compressed_calls import Oracle, by_engine, gradients, residual_of
from tests.hybridcomm.compressors import BlockSign, Half
from tests.hybridcomm.law import Step, gap, run
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks


class Reference:
    """A custom compressor as the interpreter takes codecs."""

    def __init__(self, compressor: CustomCompressor) -> None:
        self.spec = CustomSpec(compressor)

    def encode(self, grad: Any, e_in: Any, e_out: Any, digest: int, seed: int) -> Any:
        payload = np.zeros(self.spec.nbytes(grad.size), np.uint8)
        self.spec.encode_payload(grad, e_in, e_out, payload, digest)
        return payload

    def decode_add(self, payloads: Sequence[Any], out: Any, weight: float, digest: int) -> None:
        self.spec.decode_payloads(payloads, out, weight, digest)


@pytest.mark.parametrize("intra", [None, "topk:0.2/b64"])
@pytest.mark.parametrize("name", ["2x2", "2+1+1", "3x1"])
def test_two_stages_give_the_interpreters_bytes(name: str, intra: str | None) -> None:
    codec, numel, oracle = BlockSign(), 1000, Oracle()
    compress = {"inter_node": codec, "intra_node": intra}
    with engine_contexts(NAMED[name]) as contexts:
        residuals = [Residual() for _ in contexts]
        plan = contexts[0].plan_allreduce(numel, op="mean", compress=compress, exchange="two_stage")
        assert plan.exchange == "two_stage"
        for step in range(3):
            inputs = gradients(len(contexts), numel, seed=step)
            want = oracle.run(plan, inputs, codec=Reference(codec))
            got = by_engine(contexts, inputs, compress=compress, residuals=residuals, exchange="two_stage")
            assert [a.tobytes() for a in got] == [b.tobytes() for b in want], step
            for residual in residuals:
                residual.commit()
    assert oracle.residuals is not None
    for rank, residual in enumerate(residuals):
        assert residual_of(residual).tobytes() == oracle.residuals[rank].tobytes()


def test_the_law_holds_in_a_reducer() -> None:
    """A Half of integers is exact."""
    steps = [Step(), Step(passes=2), Step(spoilt="skip"), Step(spoilt="inf"), Step()]
    make = functools.partial(Reducer, exchange="two_stage")
    with engine_contexts(NAMED["2x2"]) as contexts:
        books = run_ranks(lambda context: run(context, steps, make=make, compress=Half()), contexts)
    assert [book.applied for book in books] == [3] * 4
    assert not any(np.any(difference) for difference in gap(books).values())


class FailsLater(BlockSign):
    """Raises when it has encoded so often."""

    def __init__(self, left: int) -> None:
        super().__init__("later")
        self.left = left

    def encode(self, grad: Any, e_in: Any, e_out: Any, payload: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("the table is full")
        super().encode(grad, e_in, e_out, payload)


def test_an_exception_in_the_second_stage_is_a_typed_error_on_every_rank() -> None:
    """Three slices are encoded for their owners first."""
    with engine_contexts(Topology.virtual(3, 1), timeout=10.0) as contexts:

        def rank(number: int) -> None:
            codec, tensor = FailsLater(3 if number == 2 else 9), np.ones(600, np.float32)
            contexts[number].allreduce(tensor, compress=codec, exchange="two_stage")
            contexts[number].barrier()

        errors = each_rank(rank, 3)
    assert all(isinstance(error, CompressorError) for error in errors), errors
    assert "custom:later:64 raised ValueError: the table is full" in str(errors[2])


def test_a_custom_compressor_inside_a_node_is_refused() -> None:
    for make in (
        lambda: by_link({"intra_node": BlockSign()}),
        lambda: LinkCompressors(inter_node="topk", intra_node=resolve(BlockSign())),
    ):
        with pytest.raises(CompressorError, match="between nodes only"):
            make()
