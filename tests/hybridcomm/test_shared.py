"""Tensors in shared memory, private ones that peers reach, staged copies: any mixture gives the same exact sums."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
import torch

import hybridcomm
from hybridcomm import _C
from hybridcomm.context import Context
from hybridcomm.errors import DataTypeError, SharedMemoryError, UnsupportedError
from hybridcomm.lower import lower
from hybridcomm.plan import Plan, Region, Step
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology
from tests.engine_ranks import TIMEOUT_S, close_all, each_rank, engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.rank_processes import rank_processes

TOPOLOGIES = {"1x2": [2], "1x4": [4], "2x2": [2, 2], "2+1": [2, 1], "3+2": [3, 2]}
SIZES = (1, 17, 4096, 40_009, 300_001)


def connect(topology: Topology, staged: set[int], chunk_nbytes: int = 65536) -> list[Any]:
    """Contexts of threads; the ranks in ``staged`` neither reach other memory nor let others reach theirs."""
    with tempfile.TemporaryDirectory(prefix="hybridcomm-test-") as directory:
        found = each_rank(
            lambda rank: Context.connect(
                topology,
                store=DirectoryStore(directory),
                rank=rank,
                world_size=topology.world_size,
                timeout=TIMEOUT_S,
                chunk_nbytes=chunk_nbytes,
                single_copy=rank not in staged,
            ),
            topology.world_size,
        )
    for context in found:
        if isinstance(context, BaseException):
            raise context
    return found


@pytest.mark.parametrize("staged", ["none", "some", "all"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_mixtures_of_memory_are_exact(name: str, staged: str) -> None:
    topology = Topology.from_sizes(TOPOLOGIES[name])
    world = topology.world_size
    contexts = connect(topology, {"none": set(), "some": {0, 3}, "all": set(range(world))}[staged])

    def body(rank: int) -> None:
        for call, numel in enumerate(SIZES):
            array = np.empty(numel, np.float32)
            if (rank + call) % 2:  # a view that begins inside, so that the peers see an odd offset
                array = contexts[rank].empty(numel + 8, dtype=np.float32)[3 : numel + 3]
            for again in range(3):
                array[:] = exact_ints(rank=rank, numel=numel, world=world, call=call + again)
                contexts[rank].allreduce(array)
                want = exact_sum(numel=numel, world=world, call=call + again)
                np.testing.assert_array_equal(array, want.astype(np.float32))

    try:
        assert each_rank(body, world) == [None] * world
    finally:
        close_all(contexts)


@pytest.mark.parametrize("pays", [True, False])
def test_what_is_faster_is_measured_once(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(_C, "single_copy_pays", lambda: measured.append(1) or pays)
    with engine_contexts(Topology.virtual(1, 2), single_copy=None) as contexts:
        assert len(measured) == 2
        inner = each_rank(lambda rank: contexts[rank].connect_node(), 2)
        for context in [*contexts, *inner]:
            assert set(context.reach().values()) == {"same_process" if pays else "staged"}
        close_all(inner)
    with engine_contexts(Topology.virtual(2, 1), single_copy=None):
        assert len(measured) == 2  # alone on its node, a rank has nothing to measure


PROCESS = """
import numpy as np, os, sys
import hybridcomm
from hybridcomm import _C
from hybridcomm.topology import Topology
from tests.exact import exact_ints, exact_sum
sizes, staged = eval(sys.argv[1]), eval(sys.argv[2])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ctx = hybridcomm.init(Topology.from_sizes(sizes), timeout=20, single_copy=rank not in staged)
print("reach", sorted(set(ctx.reach().values())), flush=True)
for call, numel in enumerate((1, 17, 40_009, 1_000_003)):
    for dtype in (np.float32, np.int64, np.float16):
        array = np.empty(numel, dtype)
        if (rank + call) % 2:
            array = hybridcomm.empty(numel + 8, dtype=dtype)[3 : numel + 3]
        for again in range(2):
            call += 1
            name = np.dtype(dtype).name
            array[:] = exact_ints(rank=rank, numel=numel, world=world, call=call, dtype=name)
            ctx.allreduce(array)
            want = exact_sum(numel=numel, world=world, call=call, dtype=name)
            assert (array == want.astype(dtype)).all(), (numel, dtype, again)
    own = np.full(numel, rank + 1, np.float32)
    out = np.empty(numel * world, np.float32)
    ctx.all_gather(out, own)
    assert (out.reshape(world, numel) == np.arange(1, world + 1)[:, None]).all()
    got = np.empty(numel, np.float32)
    ctx.reduce_scatter(got, out)
    assert (got == world * (rank + 1)).all()
    ctx.broadcast(own, src=world - 1)
    assert (own == world).all()
hybridcomm.shutdown()
print("done", flush=True)
"""


@pytest.mark.parametrize("staged", [set(), {0}])
@pytest.mark.parametrize("sizes", [[2], [4], [2, 1]])
def test_processes_reach_each_others_memory(sizes: list[int], staged: set[int]) -> None:
    with rank_processes(PROCESS, sum(sizes), args=[repr(sizes), repr(staged)]) as ranks:
        codes = ranks.wait(60)
        logs = [ranks.log(rank) for rank in range(sum(sizes))]
    assert codes == [0] * sum(sizes), "\n".join(logs)
    assert all("reach" in log and "done" in log for log in logs)


@pytest.fixture(scope="module")
def pair() -> Any:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:
        yield contexts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
def test_empty_gives_torch_tensors(pair: list[Context], dtype: torch.dtype) -> None:
    for size in ((0,), (5,), (3, 4), (2, 0, 3)):
        tensor = pair[0].empty(*size, dtype=dtype)
        assert (tuple(tensor.shape), tensor.dtype) == (size, dtype)
        assert pair[0].empty(size, dtype=dtype).shape == tensor.shape
        tensor.fill_(3)
        assert (tensor == 3).all()


def test_empty_follows_the_dtype(pair: list[Context], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(pair[0].empty(3, dtype=np.float64), np.ndarray)
    assert isinstance(pair[0].empty(3, dtype=np.dtype("int32")), np.ndarray)
    assert pair[0].empty(3).dtype == torch.float32
    assert pair[0].empty(3, dtype="bfloat16").dtype == torch.bfloat16
    monkeypatch.delitem(sys.modules, "torch")
    array = pair[0].empty(3)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert array.flags.writeable


def test_empty_refuses(pair: list[Context]) -> None:
    with pytest.raises(UnsupportedError, match="size"):
        pair[0].empty(-1)
    with pytest.raises(UnsupportedError, match="size"):
        pair[0].empty(2.5)
    with pytest.raises(DataTypeError, match="nonsense"):
        pair[0].empty(2, dtype="nonsense")
    with pytest.raises(SharedMemoryError, match="available"):
        pair[0].empty(1 << 48, dtype=np.float32)


def test_memory_returns_when_the_last_view_dies(pair: list[Context]) -> None:
    engine = pair[0]._engine
    gc.collect()
    before = engine.shared_nbytes(), len(os.listdir("/proc/self/fd"))
    tensors = [pair[0].empty(1 << 20, dtype=torch.float32) for _ in range(4)]
    assert engine.shared_nbytes() == before[0] + (16 << 20)
    view = tensors[2][5:]
    del tensors
    gc.collect()
    assert engine.shared_nbytes() == before[0] + (4 << 20)
    again = pair[0].empty(1 << 20, dtype=torch.float32)
    assert (again == 0).all()  # given back, and used again: not the old bytes
    del view, again
    gc.collect()
    assert (engine.shared_nbytes(), len(os.listdir("/proc/self/fd"))) == before


def test_a_tensor_dropped_in_flight_stays_until_the_end(pair: list[Context]) -> None:
    def body(rank: int) -> None:
        for call in range(20):
            work = pair[rank].allreduce(
                pair[rank].empty(200_000, dtype=torch.float32).fill_(call), async_op=True
            )
            gc.collect()
            assert work is not None
            work.wait()
            assert (work.get_future().wait()[0] == 2 * call).all()

    assert each_rank(body, 2) == [None, None]


def test_tensors_outlive_their_context() -> None:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:
        tensor = contexts[0].empty(1000, dtype=torch.float32).fill_(7)
    del contexts
    gc.collect()
    assert (tensor == 7).all()


def test_alone_on_a_node_it_is_ordinary_memory() -> None:
    with engine_contexts(Topology.virtual(2, 1)) as contexts:
        assert contexts[0].empty(4, dtype=np.float32).shape == (4,)
        assert contexts[0]._engine.shared_nbytes() == 0
        assert contexts[0].reach() == {}


def test_repr_says_how_memory_is_reached(pair: list[Context]) -> None:
    assert repr(pair[0]).endswith("in_node=same_process)")


def test_some_ranks_of_a_node_work_alone() -> None:
    """Steps inside a node may run over a part of it: ranks 1 and 3 here, in memory of all three kinds."""
    topology, numel = Topology.virtual(1, 4), 50_000
    steps = tuple(
        Step(
            id=place,
            op=op,
            bucket=0,
            shard=0,
            chunk=0,
            region=Region(0, numel),
            group=(1, 3),
            root=root,
            divisor=1,
            after=tuple(range(place)),
        )
        for place, (op, root) in enumerate([("reduce", 3), ("gather", 3), ("reduce_all", -1)])
    )
    plan = Plan(
        collective="allreduce",
        numel=numel,
        dtype="float32",
        op="sum",
        compressor="none",
        topology=topology,
        chunk_elems=numel,
        steps=steps,
    )
    for staged in (set(), {1}, {1, 3}):
        contexts = connect(topology, staged, chunk_nbytes=1 << 20)

        def body(rank: int, contexts: list[Any] = contexts) -> Any:
            array = np.full(numel, rank + 1, np.float32)
            contexts[rank]._engine.run(lower(plan, rank, None), array.ctypes.data)
            return set(array)

        try:
            assert each_rank(body, 4) == [{1.0}, {12.0}, {3.0}, {12.0}]
        finally:
            close_all(contexts)


def test_module_function_uses_the_default_context(pair: list[Context]) -> None:
    assert hybridcomm.empty(2, 3, dtype=torch.float32, group=pair[1]).shape == (2, 3)
