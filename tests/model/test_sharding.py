"""Splits: balanced sizes, and whole -> parts -> whole, for any sizes and sections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.errors import UnsupportedError
from model.sharding import Sharding, balanced


@given(total=st.integers(0, 70_000), parts=st.integers(1, 17))
def test_balanced_sizes_differ_by_one_at_most(total: int, parts: int) -> None:
    sizes = balanced(total, parts)
    assert sum(sizes) == total
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    sections=st.integers(1, 3),
    dim=st.integers(0, 1),
)
def test_parts_join_to_the_whole(sizes: list[int], sections: int, dim: int) -> None:
    sharding = Sharding(dim=dim, sizes=tuple(sizes), sections=sections)
    shape = [3, 3]
    shape[dim] = sharding.whole
    whole = torch.arange(shape[0] * shape[1]).reshape(shape)
    parts = [sharding.take(whole, rank) for rank in range(len(sizes))]
    assert torch.equal(sharding.join(parts), whole)
    assert sum(part.numel() for part in parts) == whole.numel()


def test_each_section_is_split() -> None:
    """Query, key and value of 3 heads over 2 ranks: the second has the last head of each."""
    sharding = Sharding(dim=0, sizes=(2, 1), sections=3)
    assert sharding.take(torch.arange(9), 1).tolist() == [2, 5, 8]
    assert sharding.bounds(1) == (2, 3)


def test_other_shapes_are_refused() -> None:
    sharding = Sharding(dim=0, sizes=(2, 1), sections=2)
    with pytest.raises(UnsupportedError, match="dimension 0 must be 6 long"):
        sharding.take(torch.zeros(5), 0)
    with pytest.raises(UnsupportedError, match="are not those of"):
        sharding.join([torch.zeros(3), torch.zeros(3)])
