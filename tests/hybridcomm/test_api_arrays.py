"""What may be passed to collectives: arrays, dtypes, options; everything else is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import hybridcomm
from hybridcomm.context import Context
from hybridcomm.errors import CompressorError, DataTypeError, TopologyError, UnsupportedError
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Context]]:
    with engine_contexts(Topology.virtual(2, 2)) as contexts:
        yield contexts


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def read_only() -> np.ndarray[Any, Any]:
    array = f32(4)
    array.setflags(write=False)
    return array


def grown() -> torch.Tensor:
    return torch.ones(4, requires_grad=True) * 2


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: [1.0, 2.0], "list"),
    "a scalar": (lambda: np.float32(1), "float32"),
    "strided numpy": (lambda: f32(4, 4)[:, ::2], "contiguous"),
    "fortran order": (lambda: np.asfortranarray(f32(3, 4)), "contiguous"),
    "strided torch": (lambda: torch.ones(4, 4).t(), "contiguous"),
    "read-only": (read_only, "read-only"),
    "other byte order": (lambda: np.ones(4, ">f4"), "byte order"),
    "a dtype of no engine": (lambda: np.ones(4, np.uint16), "uint16"),
    "bytes without sum": (lambda: torch.ones(4).to(torch.float8_e5m2), "moved, never combined"),
    "a device": (lambda: torch.ones(4, device="meta"), "meta"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout"),
    "an autograd graph": (grown, "detach"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arrays_that_cannot_be_taken(ranks: list[Context], what: str) -> None:
    make, text = REFUSED[what]
    with pytest.raises(DataTypeError, match=text):
        ranks[0].allreduce(make())


OPTIONS: dict[str, tuple[Callable[[Context], Any], type[Exception], str]] = {
    "op": (lambda c: c.allreduce(f32(4), op="median"), UnsupportedError, "median"),
    "bits of floats": (lambda c: c.allreduce(f32(4), op="bxor"), UnsupportedError, "bitwise"),
    "order of complex": (
        lambda c: c.allreduce(np.ones(4, np.complex64), op="max"),
        UnsupportedError,
        "complex",
    ),
    "bool mean": (lambda c: c.allreduce(np.ones(4, bool), op="avg"), UnsupportedError, "mean"),
    "factor of integers": (
        lambda c: c.allreduce(np.ones(4, np.int32), op=hybridcomm.premul_sum(0.5)),
        UnsupportedError,
        "whole factor",
    ),
    "compressed max": (lambda c: c.allreduce(f32(4), op="max", compress="topk"), UnsupportedError, "max"),
    "integer mean": (lambda c: c.allreduce(np.ones(4, np.int64), op="mean"), UnsupportedError, "mean"),
    "typo": (lambda c: c.allreduce(f32(4), compress="topkk"), CompressorError, "did you mean 'topk'"),
    "ratio": (lambda c: c.allreduce(f32(4), compress="topk:1.5"), CompressorError, "ratio"),
    "compressed dtype": (
        lambda c: c.allreduce(np.ones(4, np.float64), compress="topk"),
        DataTypeError,
        "float64",
    ),
    "residual alone": (
        lambda c: c.allreduce(f32(4), residual=hybridcomm.Residual()),
        UnsupportedError,
        "compress",
    ),
    "root": (lambda c: c.broadcast(f32(4), src=4), TopologyError, "rank 4"),
    "negative root": (lambda c: c.broadcast(f32(4), src=-1), TopologyError, "rank -1"),
    "gather size": (lambda c: c.all_gather(f32(7), f32(2)), UnsupportedError, "8"),
    "gather dtype": (lambda c: c.all_gather(f32(8), np.ones(2)), DataTypeError, "float64"),
    "scatter size": (lambda c: c.reduce_scatter(f32(2), f32(9)), UnsupportedError, "8"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_cannot_act(ranks: list[Context], what: str) -> None:
    call, kind, text = OPTIONS[what]
    with pytest.raises(kind, match=text):
        call(ranks[0])


def test_refusals_cost_nothing(ranks: list[Context]) -> None:
    """After all of the above on rank 0 alone, the ranks still agree: nothing was sent."""

    def body(ctx: Context) -> None:
        array = f32(100)
        ctx.allreduce(array)
        assert (array == 4).all()

    run_ranks(body, ranks)


def test_leaves_parameters_and_inference_tensors(ranks: list[Context]) -> None:
    def body(ctx: Context) -> None:
        leaf = torch.ones(10, requires_grad=True)
        ctx.allreduce(leaf)
        assert (leaf == 4).all()
        out = torch.zeros(3)
        ctx.reduce_scatter(out, torch.ones(12, requires_grad=True))
        assert (out == 4).all()
        with torch.inference_mode():
            value = torch.ones(10)
            ctx.allreduce(value)
            assert (value == 4).all()

    run_ranks(body, ranks)


def test_views_write_through_and_only_there(ranks: list[Context]) -> None:
    def body(ctx: Context) -> None:
        base = torch.ones(10, 10)
        ctx.allreduce(base[2:5])
        assert (base[2:5] == 4).all()
        assert base.sum() == 4 * 30 + 70

    run_ranks(body, ranks)


def test_autograd_notices_that_a_saved_tensor_was_overwritten(ranks: list[Context]) -> None:
    def body(ctx: Context) -> None:
        weight = torch.ones(4, requires_grad=True)
        saved = torch.ones(4)
        loss = (weight * saved).sum()
        ctx.allreduce(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    run_ranks(body, ranks)


def test_spellings_and_defaults() -> None:
    """all_reduce is allreduce; blocking calls return None; the module's functions use the last init's context."""
    assert hybridcomm.all_reduce is hybridcomm.allreduce
    ctx = hybridcomm.init(rank=0, world_size=1)
    array = f32(3)
    assert hybridcomm.allreduce(array) is None
    work = hybridcomm.allreduce(array, async_op=True)
    assert work is not None
    assert work.wait() is True
    assert hybridcomm.default_context() is ctx
    hybridcomm.shutdown()


def test_compression_inside_one_node_changes_nothing() -> None:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:

        def body(rank: int) -> None:
            array = np.arange(5000, dtype=np.float32)
            contexts[rank].allreduce(array, compress="topk:0.01", residual=hybridcomm.Residual())
            assert (array == 2 * np.arange(5000)).all()

        assert each_rank(body, 2) == [None] * 2
