"""Compressors written in Python on the engine: results, errors on every rank, refusal, and the interpreter's end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hybridcomm import Residual, collective_plans, compress
from hybridcomm.custom import CustomSpec
from hybridcomm.errors import CompressorError, HybridCommError, PayloadError, PlanMismatchError
from hybridcomm.lower import CODECS
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.compressors import BlockSign, Half
from tests.hybridcomm.law import Step, gap, run
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

PAIR = Topology.virtual(2, 1)


def gradient(rank: int, step: int, numel: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([rank, step]).standard_normal(numel).astype(np.float32)


@pytest.mark.parametrize("name", ["2x1", "2x2", "2+1+1"])
@pytest.mark.parametrize("async_op", [False, True])
def test_results_are_those_of_the_protocol(name: str, async_op: bool) -> None:
    """Two steps with feedback: sums of the node sums' decoded parts, the same bits on all ranks."""
    topology, numel = {**NAMED, "2x1": PAIR}[name], 1000
    codec = BlockSign()

    def rank(context: Any) -> list[np.ndarray[Any, Any]]:
        residual, out = Residual(), []
        for step in range(2):
            tensor = gradient(context.rank, step, numel)
            work = context.allreduce(tensor, op="mean", compress=codec, residual=residual, async_op=async_op)
            if work is not None:
                work.wait()
            residual.commit()
            out.append(tensor)
        return out

    with engine_contexts(topology) as contexts:
        results = run_ranks(rank, contexts)
    plan = collective_plans.allreduce(topology, numel, op="mean", compressor=compress.resolve(codec))
    regions = [(step.region.begin, step.region.end) for step in plan.steps if step.op == "exchange_payload"]
    left = {node: np.zeros(numel, np.float32) for node in range(len(topology.nodes))}
    for step in range(2):
        want = np.zeros(numel, np.float32)
        for begin, end in regions:
            for node, ranks in enumerate(topology.nodes):
                total = gradient(ranks[0], step, numel)[begin:end]
                for other in ranks[1:]:
                    total = total + gradient(other, step, numel)[begin:end]
                body = np.zeros(codec.nbytes(end - begin), np.uint8)
                codec.encode(total, left[node][begin:end].copy(), left[node][begin:end], body)
                codec.decode_add([body], want[begin:end], float(np.float32(1 / topology.world_size)))
        for result in results:
            assert np.array_equal(result[step], want)


def test_the_law_holds_in_a_reducer() -> None:
    """BlockSign's means are not dyadic, so within roundings; a Half of integers is exact."""
    with engine_contexts(NAMED["2x2"]) as contexts:
        steps = [Step(), Step(passes=2), Step(spoilt="skip"), Step(spoilt="inf"), Step()]
        books = run_ranks(lambda context: run(context, steps, compress=Half()), contexts)
    assert [book.applied for book in books] == [3] * 4
    assert not any(np.any(difference) for difference in gap(books).values())


class Fails(BlockSign):
    """Raises in one of its methods where it is told to."""

    def __init__(self, where: str, error: type[BaseException] = ValueError) -> None:
        super().__init__("fails")
        self.where, self.error = where, error

    def encode(self, grad: Any, e_in: Any, e_out: Any, payload: Any) -> None:
        if self.where == "encode":
            raise self.error("the table is full")
        super().encode(grad, e_in, e_out, payload)

    def decode_add(self, payloads: Sequence[Any], out: Any, weight: float) -> None:
        if self.where == "decode":
            raise self.error("the table is full")
        super().decode_add(payloads, out, weight)


@pytest.mark.parametrize("where", ["encode", "decode"])
@pytest.mark.parametrize("async_op", [False, True])
def test_an_exception_is_a_typed_error_on_every_rank(where: str, async_op: bool) -> None:
    with engine_contexts(NAMED["2x2"], timeout=10.0) as contexts:

        def rank(number: int) -> None:
            codec = Fails(where if number == 2 else "nowhere")
            tensor = gradient(number, 0, 5000)
            work = contexts[number].allreduce(tensor, compress=codec, async_op=async_op)
            if work is not None:
                work.wait()
            contexts[number].barrier()  # a rank that was done before learns of it here

        errors = each_rank(rank, 4)
    assert all(isinstance(error, CompressorError) for error in errors), errors
    assert "rank 2, step" in str(errors[2])
    assert "custom:fails:64 raised ValueError: the table is full" in str(errors[2])
    assert all("compressor of rank 2 raised" in str(errors[rank]) for rank in (0, 1, 3)), errors


def test_an_interrupt_goes_to_its_caller_and_ends_the_job() -> None:
    with engine_contexts(PAIR, timeout=10.0) as contexts:

        def rank(number: int) -> None:
            codec = Fails("encode" if number == 1 else "nowhere", KeyboardInterrupt)
            contexts[number].allreduce(gradient(number, 0, 500), compress=codec)

        errors = each_rank(rank, 2)
    assert isinstance(errors[1], KeyboardInterrupt)
    assert isinstance(errors[0], HybridCommError)


def test_ranks_with_different_compressors_are_refused() -> None:
    with engine_contexts(PAIR, timeout=10.0) as contexts:

        def rank(number: int) -> None:
            codec = BlockSign("blocksign" if number else "other")
            contexts[number].allreduce(gradient(number, 0, 500), compress=codec)

        errors = each_rank(rank, 2)
    assert all(isinstance(error, PlanMismatchError) for error in errors), errors


def test_values_that_are_not_finite_reach_all_ranks_and_leave_the_residual() -> None:
    def rank(context: Any) -> tuple[Any, Any, Any]:
        residual = Residual()
        context.allreduce(gradient(context.rank, 0, 300), compress=BlockSign(), residual=residual)
        residual.commit()
        before = residual.state_dict()
        tensor = gradient(context.rank, 1, 300)
        tensor[7] = np.inf if context.rank == 1 else 0
        context.allreduce(tensor, compress=BlockSign(), residual=residual)
        residual.commit()
        return tensor, before, residual.state_dict()

    with engine_contexts(PAIR) as contexts:
        results = run_ranks(rank, contexts)
    for number, (tensor, before, after) in enumerate(results):
        assert np.isnan(tensor).all()
        same = all(np.array_equal(before[key], after[key]) for key in before)
        assert same == (number == 1), "who sent the flag keeps its residual; the caller rolls the others back"


@pytest.mark.parametrize("at", [0, 6, 24, 32, 40, 63, 64, 100])
def test_a_changed_payload_is_refused_before_anything_is_written(at: int) -> None:
    spec = CustomSpec(BlockSign())
    payload, out = np.zeros(spec.nbytes(200), np.uint8), np.full(200, 3, np.float32)
    spec.encode_payload(gradient(0, 0, 200), None, None, payload, 5)
    good = payload.copy()
    payload[at] ^= 0x40
    with pytest.raises(PayloadError, match="payload 1 is not what custom:blocksign:64 and the plan say"):
        spec.decode_payloads([good, payload], out, 1.0, 5)
    assert (out == 3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "a b"}, "letters, digits"),
        ({"block": 0}, "block=0"),
        ({"contraction": 2.0}, "contraction=2"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    codec = BlockSign()
    vars(codec).update(change)
    with pytest.raises(CompressorError, match=message):
        compress.resolve(codec)
    with pytest.raises(CompressorError, match="pass the CustomCompressor itself"):
        compress.resolve("custom:blocksign")
    assert CODECS.index("custom") == 12


_ENDING = """
import sys, threading
import numpy as np
import hybridcomm
from hybridcomm.store import DirectoryStore
from tests.hybridcomm.compressors import BlockSign

def rank(number):
    context = hybridcomm.Context.connect(
        hybridcomm.Topology.virtual(2, 1), store=DirectoryStore(sys.argv[1]), rank=number, world_size=2, timeout=20)
    contexts.append(context)
    for _ in range(3):
        works.append(context.allreduce(np.ones(200_000, np.float32), compress=BlockSign(), async_op=True))

contexts, works = [], []
threads = [threading.Thread(target=rank, args=(n,)) for n in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("ends with", sum(not work.is_completed() for work in works) > 0)
"""


def test_the_interpreter_ends_while_works_are_in_flight(tmp_path: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENDING, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ends with True" in done.stdout
    assert done.stderr == ""
