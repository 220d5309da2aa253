"""Small data sets for tests."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from train.data import Dataset


def dataset(sequences: list[list[int]], num_items: int | None = None) -> Dataset:
    """A data set of the given item sequences."""
    items = np.array([item for sequence in sequences for item in sequence], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])]).astype(np.int64)
    return Dataset(name="test", items=items, starts=starts, num_items=num_items or int(items.max()) + 1)


def random_dataset(users: int, num_items: int, seed: int = 0) -> Dataset:
    """Users with 1 to 14 items each, none twice."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 15, users)
    return dataset([random.permutation(num_items)[:length].tolist() for length in lengths], num_items)


def write_tables(folder: Path, interactions: str, items: str | None = None) -> Path:
    """A data directory with the given file contents."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "interactions.tsv.gz").write_bytes(gzip.compress(interactions.encode()))
    if items is not None:
        (folder / "items.tsv.gz").write_bytes(gzip.compress(items.encode()))
    return folder
