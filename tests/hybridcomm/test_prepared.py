"""The short way for calls made before: the same results, and everything out of the ordinary still gets its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.context import Context
from hybridcomm.errors import AbortedError, DataTypeError, HybridCommError
from hybridcomm.reduction import premul_sum
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts

NUMEL = 24


class Sub(torch.Tensor):
    """Not exactly a torch.Tensor."""


@pytest.fixture(scope="module")
def pair() -> Any:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:
        for make in (lambda: torch.ones(NUMEL), lambda: np.ones(NUMEL, np.float32)):
            assert each_rank(lambda rank, make=make: contexts[rank].allreduce(make()), 2) == [None, None]
            assert contexts[0]._prepared.run(np.ones(NUMEL + 1, np.float32), "sum") is False
        yield contexts


def takes_short_way(pair: list[Context], make: Callable[[], Any], op: Any = "sum") -> bool:
    """Whether both ranks took it; where one does, so does the other."""
    found = each_rank(lambda rank: pair[rank]._prepared.run(make(), op), 2)
    assert found in ([True, True], [False, False])
    return found == [True, True]


def test_plain_arrays_take_it(pair: list[Context]) -> None:
    assert takes_short_way(pair, lambda: torch.ones(NUMEL))
    assert takes_short_way(pair, lambda: torch.ones(4, 6))
    assert takes_short_way(pair, lambda: torch.ones(NUMEL + 2)[1:-1])
    assert takes_short_way(pair, lambda: np.ones((2, 12), np.float32))


ODD: dict[str, Callable[[], Any]] = {
    "strided": lambda: torch.ones(NUMEL, 2)[:, 0],
    "strided array": lambda: np.ones((NUMEL, 2), np.float32)[:, 0],
    "other byte order": lambda: np.ones(NUMEL, ">f4"),
    "read-only": lambda: np.frombuffer(bytes(4 * NUMEL), np.float32),
    "lazily negated": lambda: torch._neg_view(torch.ones(NUMEL)),
    "sparse": lambda: torch.ones(NUMEL).to_sparse(),
    "in a graph": lambda: torch.ones(NUMEL, requires_grad=True) * 2,
    "meta": lambda: torch.ones(NUMEL, device="meta"),
    "unaligned": lambda: np.frombuffer(bytearray(4 * NUMEL + 1), np.uint8)[1:].view(np.float32),
    "not an array": lambda: [1.0] * NUMEL,
}


@pytest.mark.parametrize("what", ODD)
def test_odd_ones_get_their_error(pair: list[Context], what: str) -> None:
    odd = ODD[what]()
    assert pair[0]._prepared.run(odd, "sum") is False
    with pytest.raises(DataTypeError):
        pair[0].allreduce(odd)


@pytest.mark.parametrize(
    "make", [lambda: torch.ones(NUMEL, requires_grad=True), lambda: torch.ones(NUMEL).as_subclass(Sub)]
)
def test_others_take_the_long_way_and_work(pair: list[Context], make: Callable[[], Any]) -> None:
    assert pair[0]._prepared.run(make(), "sum") is False

    def body(rank: int) -> Any:
        tensor = make()
        pair[rank].allreduce(tensor)
        return bool((tensor == 2).all())

    assert each_rank(body, 2) == [True, True]


def test_inference_tensors_work(pair: list[Context]) -> None:
    def body(rank: int) -> Any:
        with torch.inference_mode():
            tensor = torch.ones(NUMEL)
            pair[rank].allreduce(tensor)
            return bool((tensor == 2).all())

    assert each_rank(body, 2) == [True, True]


def test_operations_are_told_apart(pair: list[Context]) -> None:
    def body(rank: int) -> list[float]:
        values = []
        for _ in range(3):
            for op in ("sum", "mean", "max", premul_sum(3.0)):
                tensor = torch.full((NUMEL,), 2.0 * (rank + 1))
                pair[rank].allreduce(tensor, op=op)
                values.append(tensor[0].item())
        return values

    assert each_rank(body, 2) == [[6.0, 3.0, 4.0, 18.0] * 3] * 2


def test_autograd_is_told(pair: list[Context]) -> None:
    def body(rank: int) -> Any:
        weight = torch.ones(NUMEL, requires_grad=True)
        tensor = torch.ones(NUMEL)
        out = (weight * tensor).sum()
        pair[rank].allreduce(tensor)  # would change what backward needs
        try:
            out.backward()
        except RuntimeError as error:
            return "modified by an inplace operation" in str(error)
        return False

    assert each_rank(body, 2) == [True, True]


def test_errors_reach_the_caller() -> None:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:
        assert each_rank(lambda rank: contexts[rank].allreduce(torch.ones(NUMEL)), 2) == [None, None]
        contexts[0].abort()
        with pytest.raises(AbortedError):
            contexts[0].allreduce(torch.ones(NUMEL))
        with pytest.raises(AbortedError):
            contexts[1].allreduce(torch.ones(NUMEL))


@pytest.mark.parametrize("like", ["torch", "numpy"])
def test_the_second_message_of_a_dtype_goes_the_short_way(like: str) -> None:
    """What has been looked at through Python once is not again; both ways bring the same, and tell autograd."""
    with engine_contexts(Topology.virtual(1, 2)) as contexts:

        def make(value: int, dtype: str) -> Any:
            whole = np.full(300, value, dtype)
            return torch.from_numpy(whole) if like == "torch" else whole

        def body(rank: int) -> None:
            ctx = contexts[rank]
            for dtype in ("float32", "float64", "int64", "uint8"):
                for turn in range(3):
                    sent, got = make(turn + 1, dtype), make(0, dtype)
                    short = ctx._prepared.post(rank == 0, sent if rank == 0 else got, 1 - rank, 0, turn)
                    assert (short is None) == (turn == 0), (dtype, turn)
                    if short is not None:
                        assert short.wait(20)
                    elif rank == 0:
                        ctx.isend(sent, 1, turn).wait(20)
                    else:
                        ctx.irecv(got, 0, turn).wait(20)
                    assert rank == 0 or (got == turn + 1).all(), (dtype, turn)
                    assert rank == 0 or like == "numpy" or got._version == 1
            plain = make(1, "float32")
            odd = plain[::2]
            assert ctx._prepared.post(rank == 0, odd, 1 - rank, 0, 9) is None
            with pytest.raises(HybridCommError, match="contiguous"):
                ctx.isend(odd, 1 - rank)

        assert each_rank(body, 2) == [None] * 2
