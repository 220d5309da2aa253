"""Wrong calls of the collectives are refused before anything is sent; ranks that disagree get an error, not a hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import hybridcomm
from hybridcomm.context import Context
from hybridcomm.errors import (
    DataTypeError,
    HybridCommError,
    PlanMismatchError,
    StallError,
    TopologyError,
    UnsupportedError,
)
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

WORLD = 4
Call = Callable[[Context], Any]


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def lists(numel: int = 2, count: int = WORLD, dtype: str = "float32") -> list[np.ndarray[Any, Any]]:
    return [np.zeros(numel, dtype) for _ in range(count)]


def gaps() -> np.ndarray[Any, Any]:
    return f32(4, 4)[:, ::2]


WRONG: dict[str, tuple[Call, type[Exception], str]] = {
    "no such root": (lambda c: c.reduce(f32(4), 4), TopologyError, "rank 4"),
    "no such destination": (lambda c: c.gather(f32(4), None, -1), TopologyError, "rank -1"),
    "no such source": (lambda c: c.scatter(f32(4), None, 9), TopologyError, "rank 9"),
    "no list at the root": (lambda c: c.gather(f32(2)), UnsupportedError, "gather_list"),
    "a list elsewhere": (lambda c: c.gather(f32(2), lists(), 1), UnsupportedError, "only rank 1"),
    "a short list": (lambda c: c.gather(f32(2), lists(count=3)), UnsupportedError, "holds 3"),
    "a list of other sizes": (lambda c: c.gather(f32(2), lists(3)), UnsupportedError, "3 elements"),
    "a list of another dtype": (
        lambda c: c.scatter(f32(2), lists(dtype="int64")),
        DataTypeError,
        "int64",
    ),
    "an array for a list": (lambda c: c.scatter(f32(2), f32(8)), UnsupportedError, "list"),
    "a gap in a list": (lambda c: c.gather(f32(8), [gaps(), *lists(8, 3)]), DataTypeError, "contiguous"),
    "a gap in an input": (lambda c: c.reduce(gaps()), DataTypeError, "contiguous"),
    "a conjugated view": (
        lambda c: c.broadcast(torch.ones(3, dtype=torch.complex64).conj()),
        DataTypeError,
        "conjugated",
    ),
    "a read-only output": (
        lambda c: c.all_gather_into_tensor(np.frombuffer(bytes(32), np.float32), f32(2)),
        DataTypeError,
        "read-only",
    ),
    "own part in all_gather": (lambda c: c.all_gather(lists(3), f32(2)), UnsupportedError, "3 elements"),
    "own part in reduce_scatter": (
        lambda c: c.reduce_scatter(f32(2), lists(3)),
        UnsupportedError,
        "3 elements",
    ),
    "bytes that combine": (
        lambda c: c.reduce(torch.ones(4).to(torch.float8_e5m2)),
        DataTypeError,
        "moved, never combined",
    ),
    "bits of floats": (
        lambda c: c.reduce_scatter(f32(1), f32(4), op="bxor"),
        UnsupportedError,
        "bitwise",
    ),
    "an odd all_to_all": (lambda c: c.all_to_all_single(f32(6), f32(6)), UnsupportedError, "multiple of 4"),
    "unequal all_to_all": (lambda c: c.all_to_all_single(f32(8), f32(4)), UnsupportedError, "equal"),
    "all_to_all of a scalar": (
        lambda c: c.all_to_all_single(torch.tensor(1.0), torch.tensor(1.0)),
        UnsupportedError,
        "dimensions",
    ),
    "splits that are too few": (
        lambda c: c.all_to_all_single(f32(4), f32(4), [4], None),
        UnsupportedError,
        "output_split_sizes",
    ),
    "splits of another sum": (
        lambda c: c.all_to_all_single(f32(4), f32(4), None, [1, 1, 1, 2]),
        UnsupportedError,
        "sum to the 4 rows",
    ),
    "a negative split": (
        lambda c: c.all_to_all_single(f32(4), f32(4), None, [2, 2, 1, -1]),
        UnsupportedError,
        ">= 0",
    ),
    "all_to_all of two dtypes": (
        lambda c: c.all_to_all(lists(), lists(dtype="int64")),
        DataTypeError,
        "int64",
    ),
    "all_to_all without lists": (lambda c: c.all_to_all(f32(4), f32(4)), UnsupportedError, "list"),
    "no time": (lambda c: c.monitored_barrier(0), UnsupportedError, "positive"),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Context]]:
    with engine_contexts(Topology.virtual(2, 2)) as contexts:
        yield contexts


@pytest.mark.parametrize("what", WRONG)
def test_wrong_calls_are_refused_before_anything_is_sent(ranks: list[Context], what: str) -> None:
    call, kind, text = WRONG[what]
    with pytest.raises(kind, match=text):
        call(ranks[0])

    def body(ctx: Context) -> None:
        array = np.ones(100, np.float32)
        ctx.allreduce(array)
        assert (array == WORLD).all()

    run_ranks(body, ranks)


def test_inputs_may_be_read_only_or_part_of_a_graph(ranks: list[Context]) -> None:
    def body(ctx: Context) -> None:
        fixed = np.frombuffer(np.float32([ctx.rank, 1]).tobytes(), np.float32)
        out = f32(2 * WORLD)
        ctx.all_gather_into_tensor(out, fixed)
        assert out.tolist() == [each for rank in range(WORLD) for each in (rank, 1)]
        grown = torch.ones(WORLD, requires_grad=True) * 2
        own = torch.zeros(1)
        version = own._version
        ctx.reduce_scatter_tensor(own, grown)
        assert own.item() == 2 * WORLD
        assert own._version > version, "autograd was not told"
        assert grown._version == 0

    run_ranks(body, ranks)


def two(first: Call, second: Call) -> Call:
    return lambda c: (first(c), second(c))


def at(rank: int, count: int, numel: int) -> Callable[[Context], Any]:
    return lambda c: lists(numel, count) if c.rank == rank else None


DISAGREEMENTS: dict[str, tuple[Call, Call]] = {
    "gather numel": (
        lambda c: c.gather(f32(8), at(0, c.world_size, 8)(c)),
        lambda c: c.gather(f32(9), at(0, c.world_size, 9)(c)),
    ),
    "gather dst": (
        lambda c: c.gather(f32(8), at(0, c.world_size, 8)(c)),
        lambda c: c.gather(f32(8), at(c.rank, c.world_size, 8)(c), c.rank),
    ),
    "scatter src": (
        lambda c: c.scatter(f32(8), at(0, c.world_size, 8)(c)),
        lambda c: c.scatter(f32(8), at(c.rank, c.world_size, 8)(c), c.rank),
    ),
    "broadcast src": (lambda c: c.broadcast(f32(8)), lambda c: c.broadcast(f32(8), c.rank)),
    "reduce dst": (lambda c: c.reduce(f32(900)), lambda c: c.reduce(f32(900), c.rank)),
    "reduce op": (lambda c: c.reduce(f32(900)), lambda c: c.reduce(f32(900), op="max")),
    "all_to_all numel": (
        lambda c: c.all_to_all_single(f32(c.world_size), f32(c.world_size)),
        lambda c: c.all_to_all_single(f32(2 * c.world_size), f32(2 * c.world_size)),
    ),
    "splits here, none there": (
        lambda c: c.all_to_all_single(f32(c.world_size), f32(c.world_size)),
        lambda c: c.all_to_all_single(f32(c.world_size), f32(c.world_size), [1] * c.world_size),
    ),
    "all_gather sizes": (
        lambda c: c.all_gather([f32(3 + r) for r in range(c.world_size)], f32(3 + c.rank)),
        lambda c: c.all_gather([f32(4 + r) for r in range(c.world_size)], f32(4 + c.rank)),
    ),
    "barriers": (lambda c: c.monitored_barrier(), lambda c: c.barrier()),
}


@pytest.mark.parametrize("name", ["1x4", "2x2", "2+1"])
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_disagreement_is_an_error_on_every_rank(name: str, what: str) -> None:
    topology = NAMED[name]
    common, odd = DISAGREEMENTS[what]

    def body(rank: int) -> Any:
        try:
            (odd if rank == topology.world_size - 1 else common)(contexts[rank])
            for _ in range(6):  # who only sends learns of it in a later call
                contexts[rank].barrier()
        except HybridCommError as error:
            return error
        return None

    with engine_contexts(topology) as contexts:
        begin = time.monotonic()
        errors = each_rank(body, topology.world_size)
    assert all(isinstance(error, HybridCommError) for error in errors), errors
    assert any(isinstance(error, PlanMismatchError) for error in errors), errors
    assert time.monotonic() - begin < 20


def test_all_ranks_see_wrong_splits_alike_and_go_on(ranks: list[Context]) -> None:
    def body(ctx: Context) -> None:
        given = [torch.ones(2) for _ in range(WORLD)]
        taken = [torch.ones(3 if (ctx.rank, r) == (1, 2) else 2) for r in range(WORLD)]
        with pytest.raises(PlanMismatchError, match="rank 2 sends 2 elements to rank 1, which expects 3"):
            ctx.all_to_all(taken, given)
        other = torch.float64 if ctx.rank == 3 else torch.float32
        same = [torch.ones(2, dtype=other) for _ in range(WORLD)]
        with pytest.raises(PlanMismatchError, match="rank 3 passes float64"):
            ctx.all_to_all([t.clone() for t in same], same)
        ctx.barrier()

    run_ranks(body, ranks)


@pytest.mark.parametrize("name", ["1x4", "2x2"])
@pytest.mark.parametrize("every", [False, True])
def test_monitored_barrier_names_who_did_not_come(name: str, every: bool) -> None:
    late = (1, 3)
    with engine_contexts(NAMED[name]) as contexts:

        def body(rank: int) -> Any:
            if rank in late:
                time.sleep(4.5)
                return None
            try:
                contexts[rank].monitored_barrier(timeout=1, wait_all_ranks=every)
            except StallError as error:
                return error
            return None

        errors = [error for rank, error in enumerate(each_rank(body, 4)) if rank not in late]
    assert all(isinstance(error, StallError) for error in errors), errors
    assert errors[0].missing == (late if every else late[:1])
    assert all(set(error.missing) <= set(late) and error.missing for error in errors), (
        "rank 0 is not to blame"
    )
    assert "1" in str(errors[0]).split("did not come")[0]


def test_module_level_verbs_in_a_world_of_one() -> None:
    """Positional arguments as torch's, on the default context."""
    hybridcomm.init()
    try:
        t = torch.arange(3.0)
        hybridcomm.all_reduce(t, "sum")
        hybridcomm.reduce(t, 0, "avg")
        hybridcomm.broadcast(t, 0)
        out = [torch.zeros(3)]
        hybridcomm.all_gather(out, t)
        hybridcomm.gather(t, out, 0)
        hybridcomm.scatter(out[0], [t], 0)
        hybridcomm.all_to_all(out, [t])
        hybridcomm.all_to_all_single(out[0], t, [3], [3])
        hybridcomm.reduce_scatter(out[0], [t], "max")
        hybridcomm.all_gather_into_tensor(out[0], t)
        hybridcomm.reduce_scatter_tensor(out[0], t)
        hybridcomm.monitored_barrier()
        hybridcomm.barrier()
        with hybridcomm.coalescing():
            hybridcomm.all_reduce(t)
        work = hybridcomm.broadcast(t, 0, None, True)
        assert work is not None
        assert work.wait()
        assert out[0].tolist() == t.tolist() == [0.0, 1.0, 2.0]
    finally:
        hybridcomm.shutdown()
