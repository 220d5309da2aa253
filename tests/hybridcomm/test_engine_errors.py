"""Ranks that disagree get an error, not a hang, and all of them learn: ranks as threads, every topology."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hybridcomm
from hybridcomm.errors import AbortedError, HybridCommError, PeerLostError, PlanMismatchError, StallError
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.strategies import NAMED

MANY = [name for name in NAMED if NAMED[name].world_size > 1]
SHORT_S = 1.0
"""A stall timeout for tests that wait for it."""

Call = Callable[[Any], object]


def zeros(numel: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.zeros(numel, dtype)


DISAGREEMENTS: dict[str, tuple[Call, Call]] = {
    "numel": (lambda c: c.allreduce(zeros(1000)), lambda c: c.allreduce(zeros(1001))),
    "dtype": (lambda c: c.allreduce(zeros(1000)), lambda c: c.allreduce(zeros(1000, "int32"))),
    "op": (lambda c: c.allreduce(zeros(1000)), lambda c: c.allreduce(zeros(1000), op="mean")),
    "collective": (
        lambda c: c.allreduce(zeros(960)),
        lambda c: c.all_gather(zeros(960 * c.world_size), zeros(960)),
    ),
    "root": (lambda c: c.broadcast(zeros(1000), 0), lambda c: c.broadcast(zeros(1000), 1)),
    "empty": (lambda c: c.allreduce(zeros(0)), lambda c: c.allreduce(zeros(1000))),
    "order": (
        lambda c: (c.allreduce(zeros(1000)), c.allreduce(zeros(64, "int64"))),
        lambda c: (c.allreduce(zeros(64, "int64")), c.allreduce(zeros(1000))),
    ),
    "bucket": (
        lambda c: (c.allreduce(zeros(99), residual_key="a"), c.allreduce(zeros(99), residual_key="b")),
        lambda c: (c.allreduce(zeros(99), residual_key="b"), c.allreduce(zeros(99), residual_key="a")),
    ),
}


def outcomes(contexts: list[Any], calls: list[Call], *, then: int = 6) -> list[Any]:
    """Every rank's first error: of its call, or of the barriers after it (a root need not wait for readers)."""

    def body(rank: int) -> Any:
        try:
            calls[rank](contexts[rank])
            for _ in range(then):
                contexts[rank].barrier()
        except HybridCommError as error:
            return error
        return None

    return each_rank(body, len(contexts))


def assert_broken(contexts: list[Any]) -> None:
    for ctx in contexts:
        with pytest.raises(HybridCommError):
            ctx.allreduce(zeros(10))


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_disagreement_is_an_error_on_every_rank(name: str, what: str) -> None:
    topology = NAMED[name]
    common, odd = DISAGREEMENTS[what]
    culprit = topology.world_size - 1
    calls = [odd if rank == culprit else common for rank in range(topology.world_size)]
    with engine_contexts(topology) as contexts:
        begin = time.monotonic()
        errors = outcomes(contexts, calls)
        assert time.monotonic() - begin < 10, "they waited for a timeout instead of comparing headers"
        assert all(isinstance(error, PlanMismatchError) for error in errors), errors
        first_hand = [str(error) for error in errors if "this rank" in str(error)]
        assert first_hand, "nobody says what the ranks called"
        assert_broken(contexts)


@pytest.mark.parametrize("option", ["exchange", "intra_node"])
def test_ranks_with_another_exchange_or_compressor_inside_nodes_are_refused(option: str) -> None:
    def call(context: Any, odd: bool) -> None:
        intra = "topk:0.2" if odd and option == "intra_node" else "topk:0.1"
        exchange = "two_stage" if odd and option == "exchange" else "gather"
        context.allreduce(
            zeros(5000), compress={"inter_node": "topk", "intra_node": intra}, exchange=exchange
        )

    for culprit in (0, 3):
        calls: list[Call] = [lambda c, odd=rank == culprit: call(c, odd) for rank in range(4)]
        with engine_contexts(NAMED["2x2"]) as contexts:
            errors = outcomes(contexts, calls)
        assert all(isinstance(error, PlanMismatchError) for error in errors), errors


@pytest.mark.parametrize("name", [name for name in MANY if len(NAMED[name].nodes) > 1])
def test_compression_on_some_ranks_only(name: str) -> None:
    topology = NAMED[name]
    calls: list[Call] = [
        lambda c, rank=rank: c.allreduce(zeros(5000), compress=None if rank else "topk:0.1")
        for rank in range(topology.world_size)
    ]
    with engine_contexts(topology) as contexts:
        errors = outcomes(contexts, calls)
        assert all(isinstance(error, PlanMismatchError) for error in errors), errors
        assert any("topk" in str(error) for error in errors)


def test_control_agreeing_ranks_get_no_error() -> None:
    """Negative control of `outcomes`: the same calls on all ranks raise nothing."""
    with engine_contexts(NAMED["2x2"]) as contexts:
        for common, _ in DISAGREEMENTS.values():
            assert outcomes(contexts, [common] * 4, then=1) == [None] * 4


@pytest.mark.parametrize("name", ["1x4", "2x2", "4x1", "3+2"])
def test_a_rank_that_misses_a_call_is_named(name: str) -> None:
    """Also to ranks that do not wait for it themselves, but for another victim."""
    topology = NAMED[name]
    missing = topology.world_size - 1
    with engine_contexts(topology, timeout=SHORT_S) as contexts:

        def body(rank: int) -> Any:
            if rank == missing:
                time.sleep(SHORT_S + 2)
            try:
                contexts[rank].allreduce(zeros(100_000))
            except HybridCommError as error:
                return error
            return None

        errors = each_rank(body, topology.world_size)
        assert all(isinstance(error, StallError) for error in errors), errors
        assert all(error.missing == (missing,) for error in errors), [e.missing for e in errors]
        assert any("never entered" in str(error) for error in errors), errors
        assert_broken(contexts)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("leaver", [0, -1])
def test_a_rank_that_closes_early_is_named(name: str, leaver: int) -> None:
    topology = NAMED[name]
    world = topology.world_size
    leaver %= world
    with engine_contexts(topology) as contexts:

        def body(rank: int) -> Any:
            contexts[rank].allreduce(zeros(1000))
            if rank == leaver:
                contexts[rank].close()
                return None
            try:
                contexts[rank].allreduce(zeros(100_000))
            except HybridCommError as error:
                return error
            return None

        begin = time.monotonic()
        errors = each_rank(body, world)
        assert time.monotonic() - begin < 10
        assert errors.pop(leaver) is None
        assert all(isinstance(error, PeerLostError) and error.rank == leaver for error in errors), errors


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("call", ["blocking", "async"])
def test_abort_from_another_thread_wakes_all(name: str, call: str) -> None:
    topology = NAMED[name]
    world = topology.world_size
    with engine_contexts(topology) as contexts:

        def body(rank: int) -> Any:
            if rank == world - 1:  # the others wait for this one, which gives up
                time.sleep(0.3)
                contexts[rank].abort()
            try:
                if call == "blocking":
                    contexts[rank].allreduce(zeros(1000))
                else:
                    contexts[rank].allreduce(zeros(1000), async_op=True).wait()
            except HybridCommError as error:
                return error
            return None

        begin = time.monotonic()
        errors = each_rank(body, world)
        assert time.monotonic() - begin < 5
        assert all(isinstance(error, AbortedError) for error in errors), errors
        assert all(f"rank {world - 1}" in str(error) for error in errors[:-1]), errors
        assert_broken(contexts)


def test_abort_of_a_waiting_rank_ends_its_own_wait() -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> Any:
            if rank == 3:
                time.sleep(0.5)
                contexts[0].abort()  # as a watchdog thread of rank 0 would
                time.sleep(0.5)
            try:
                contexts[rank].allreduce(zeros(1000))
            except HybridCommError as error:
                return error
            return None

        errors = each_rank(body, 4)
        assert all(isinstance(error, AbortedError) for error in errors), errors


def test_abort_while_calls_succeed_reaches_the_peers() -> None:
    """The aborted rank's running call may end well before it is noticed: the peers must learn all the same."""
    with engine_contexts(NAMED["2+1"]) as contexts:

        def body(rank: int) -> Any:
            try:
                for step in range(100_000):
                    contexts[rank].allreduce(zeros(10))
                    if rank == 0 and step == 50:
                        contexts[0].abort()
            except HybridCommError as error:
                return error
            return None

        begin = time.monotonic()
        errors = each_rank(body, 3)
        assert time.monotonic() - begin < 10
        assert all(isinstance(error, AbortedError) for error in errors), errors


def test_later_calls_raise_the_first_error() -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:
        common, odd = DISAGREEMENTS["numel"]
        outcomes(contexts, [common, common, common, odd])
        for ctx in contexts:
            for call in (
                lambda c: c.allreduce(zeros(7)),
                lambda c: c.allreduce(zeros(7), async_op=True),
                lambda c: c.broadcast(zeros(7)),
                lambda c: c.barrier(),
            ):
                with pytest.raises(PlanMismatchError):
                    call(ctx)


def test_queued_works_fail_with_the_first_error() -> None:
    """The first may end well or be caught up in it; all after the disagreement fail, launched or not."""
    with engine_contexts(NAMED["1x4"]) as contexts:

        def attempt(fn: Callable[[], Any]) -> Any:
            try:
                return fn()
            except HybridCommError as error:
                return error

        def body(rank: int) -> list[Any]:
            numels = [100, 200 + (rank == 2), 300, 400]
            works = [attempt(lambda n=n: contexts[rank].allreduce(zeros(n), async_op=True)) for n in numels]
            return [attempt(work.wait) if hasattr(work, "wait") else work for work in works]

        for results in each_rank(body, 4):
            assert [type(result) for result in results[1:]] == [PlanMismatchError] * 3


def test_calls_after_close_raise() -> None:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:
        each_rank(lambda rank: contexts[rank].close(), 2)
        for ctx in contexts:
            ctx.close()  # idempotent
            with pytest.raises(AbortedError, match=r"init\(\)"):
                ctx.allreduce(zeros(3))


def test_module_functions_need_a_context() -> None:
    hybridcomm.shutdown()
    with pytest.raises(HybridCommError, match=r"hybridcomm\.init"):
        hybridcomm.allreduce(zeros(3))
