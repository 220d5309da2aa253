"""The memory of a call: pieces cover what was placed, scratch takes what must not be written, packed tensors return."""

from __future__ import annotations

import ctypes

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.arrays import view
from hybridcomm.memory import Memory, ScratchPool


def write_through(memory: Memory, numel: int, begin: int, end: int, number: float) -> None:
    """What an operation of the engine does: finds the last piece that begins before, and writes from there."""
    address, pieces = memory.table()
    for at in range(begin, end):
        start, base = max((p for p in pieces or [(0, address)] if p[0] <= at), default=(0, address))
        ctypes.c_float.from_address(base + 4 * (at - start)).value = number


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    edges=st.lists(st.integers(0, 200), max_size=6),
    writable=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(max_examples=150)
def test_shielded_inputs_stay_and_scratch_has_their_contents(
    sizes: list[int], edges: list[int], writable: list[bool]
) -> None:
    numel = sum(sizes)
    arrays = [np.arange(size, dtype=np.float32) + 1000 * i for i, size in enumerate(sizes)]
    kept = [array.copy() for array in arrays]
    memory, at = Memory(dtype="float32", pool=ScratchPool()), 0
    for array, may in zip(arrays, writable, strict=False):
        memory.place(at, array.size, array.ctypes.data, writable=may)
        at += array.size
    cuts = sorted({min(edge, numel) for edge in edges})
    regions = [(b, e) for b, e in zip(cuts[::2], cuts[1::2], strict=False) if b < e]
    memory.shield(regions)
    address, pieces = memory.table()
    want = np.concatenate(kept)
    for i in range(numel):
        start, base = max((p for p in pieces or [(0, address)] if p[0] <= i), default=(0, address))
        assert ctypes.c_float.from_address(base + 4 * (i - start)).value == want[i]
    for begin, end in regions:
        write_through(memory, numel, begin, end, -1.0)
    at = 0
    for array, before, may in zip(arrays, kept, writable, strict=False):
        inside = np.array([any(b <= at + i < e for b, e in regions) for i in range(array.size)], bool)
        assert (array == np.where(inside & may, -1.0, before)).all()
        at += array.size


def test_packed_tensors_are_copied_in_and_back() -> None:
    tensors = [np.full(n, n, np.float32) for n in (3, 0, 5)]
    memory = Memory(dtype="float32", pool=ScratchPool())
    memory.pack(0, [view(t) for t in tensors])
    address, pieces = memory.table()
    assert not pieces
    packed = np.ctypeslib.as_array((ctypes.c_float * 8).from_address(address))
    assert packed.tolist() == [3.0] * 3 + [5.0] * 5
    packed += 1
    assert tensors[0].tolist() == [3.0] * 3
    memory.finish()
    assert [t.tolist() for t in tensors] == [[4.0] * 3, [], [6.0] * 5]


def test_neighbours_merge_and_one_piece_needs_no_table() -> None:
    array = np.zeros(10, np.float32)
    memory = Memory(dtype="float32", pool=ScratchPool())
    memory.place(4, 6, array.ctypes.data + 16)
    memory.place(0, 4, array.ctypes.data)
    assert memory.table() == (array.ctypes.data, [])
    apart = Memory(dtype="float32", pool=ScratchPool())
    apart.place(2, 4, array.ctypes.data)
    assert apart.table() == (0, [(2, array.ctypes.data)])
    assert Memory(dtype="float32", pool=ScratchPool()).table() == (0, [])


def test_scratch_is_used_again_and_little_of_it_is_kept() -> None:
    pool = ScratchPool()
    first = pool.take(1000)
    pool.give([first])
    assert pool.take(500) is first
    pool.give([np.empty(n, np.uint8) for n in (10, 30, 20, 40)])
    assert sorted(pool.take(1).nbytes for _ in range(3)) == [1, 30, 40]
