"""Interaction data: the directory format, and the leave-one-out split.

A directory holds ``interactions.tsv.gz`` (``user_id``, ``item_id``, and ``position`` or ``timestamp``;
more columns are ignored) and optionally ``items.tsv.gz`` (``item_id`` and any text columns). Both are
gzip, UTF-8, tab-separated, with one header line. Anything that is not so raises DataError naming the file
and the line.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from train.errors import DataError

__all__ = ["Dataset", "Split", "load_directory", "read_table", "split_leave_one_out"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Users' item sequences, oldest first, as one flat array.

    ``items`` is int64 [interactions] with values in [0, num_items); user u owns
    ``items[starts[u]:starts[u + 1]]``. ``texts`` holds one string per item, or None when the data has no
    text. ``best_ndcg`` is the best reachable test NDCG@10 when the generator of the data is known.
    """

    name: str
    items: np.ndarray
    starts: np.ndarray
    num_items: int
    texts: tuple[str, ...] | None = None
    best_ndcg: float | None = None

    @property
    def num_users(self) -> int:
        return len(self.starts) - 1

    def sequence(self, user: int) -> np.ndarray:
        """The user's items, int64 [length]."""
        return self.items[self.starts[user] : self.starts[user + 1]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which part of a user's sequence may be seen: ``train_ends`` [users] is the length of the training
    prefix.

    ``users`` are those with a validation and a test target: the item at ``train_ends`` and the one after it.
    """

    train_ends: np.ndarray
    users: np.ndarray


def split_leave_one_out(data: Dataset) -> Split:
    """Last item test, the one before it validation; users with fewer than three items only train."""
    lengths = np.diff(data.starts)
    evaluated = lengths >= 3
    return Split(train_ends=np.where(evaluated, lengths - 2, lengths), users=np.flatnonzero(evaluated))


def load_directory(directory: str | Path) -> Dataset:
    """Reads a data directory; raises DataError that names file and line."""
    folder = Path(directory)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data directory; expected a folder with interactions.tsv.gz")
    path = folder / "interactions.tsv.gz"
    table = _ordered_interactions(path, read_table(path, ("user_id", "item_id")))
    item_ids = table.get_column("item_id").unique(maintain_order=True)
    codes = pl.DataFrame({"item_id": item_ids, "code": np.arange(len(item_ids), dtype=np.int64)})
    items = table.join(codes, on="item_id", how="left", maintain_order="left").get_column("code").to_numpy()
    lengths = table.group_by("user_id", maintain_order=True).len().get_column("len").to_numpy()
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    text_path = folder / "items.tsv.gz"
    texts = _item_texts(text_path, item_ids) if text_path.exists() else None
    return Dataset(
        name=folder.resolve().name,
        items=np.ascontiguousarray(items),
        starts=starts,
        num_items=len(item_ids),
        texts=texts,
    )


def read_table(path: Path, required: tuple[str, ...]) -> pl.DataFrame:
    """All columns of a tsv.gz file as strings, with a column ``line`` (1-based line in the file)."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: file not found") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as gzip ({error})") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line}: not valid UTF-8") from None
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path}: line 1: empty file, expected a header with {', '.join(required)}")
    header = lines[0].rstrip("\r").split("\t")
    for column in required:
        if header.count(column) != 1:
            raise DataError(
                f"{path}: line 1: column {column!r} must appear once in the header, found {header}"
            )
    if len(lines) == 1:
        raise DataError(f"{path}: line 2: no rows after the header")
    rows = pl.DataFrame({"row": lines[1:]}).with_columns(pl.col("row").str.strip_suffix("\r"))
    fields = rows.select(pl.col("row").str.count_matches("\t", literal=True) + 1).to_series()
    _refuse(path, fields != len(header), lambda i: f"{fields[i]} fields, the header has {len(header)}")
    table = rows.select(pl.col("row").str.split("\t").list.to_struct(fields=header)).unnest("row")
    for column in required:
        _refuse(path, table.get_column(column) == "", lambda _, column=column: f"{column} is empty")
    return table.with_columns(pl.int_range(2, pl.len() + 2).alias("line"))


def _refuse(path: Path, bad: pl.Series, describe: object) -> None:
    """Raises DataError for the first true row of ``bad``, if there is one."""
    index = bad.arg_max() if bad.any() else None
    if index is not None:
        raise DataError(f"{path}: line {index + 2}: {describe(index)}")  # type: ignore[operator]


def _ordered_interactions(path: Path, table: pl.DataFrame) -> pl.DataFrame:
    """Rows sorted by user (first appearance) and order within the user."""
    order = next((name for name in ("position", "timestamp") if name in table.columns), None)
    if order is None:
        raise DataError(
            f"{path}: line 1: needs a column 'position' or 'timestamp', found {table.columns[:-1]}"
        )
    parsed = table.get_column(order).cast(pl.Int64, strict=False)
    _refuse(path, parsed.is_null(), lambda i: f"{order} {table.get_column(order)[i]!r} is not an integer")
    table = table.with_columns(parsed.alias(order))
    if order == "position":
        seen = table.select(pl.struct("user_id", order).is_first_distinct()).to_series()
        _refuse(path, ~seen, lambda i: f"user {table['user_id'][i]!r} has position {table[order][i]} twice")
    return table.with_columns(pl.col("line").min().over("user_id").alias("first")).sort(
        "first", order, "line"
    )


def _item_texts(path: Path, item_ids: pl.Series) -> tuple[str, ...]:
    """One text per item of the interactions: all columns but the id, joined by blanks; empty when there
    is no row."""
    table = read_table(path, ("item_id",))
    seen = table.select(pl.col("item_id").is_first_distinct()).to_series()
    _refuse(path, ~seen, lambda i: f"item {table['item_id'][i]!r} appears twice")
    columns = [name for name in table.columns if name not in ("item_id", "line")]
    if not columns:
        raise DataError(f"{path}: line 1: no text column beside item_id")
    joined = table.select("item_id", pl.concat_str(columns, separator=" ").alias("text"))
    texts = item_ids.to_frame("item_id").join(joined, on="item_id", how="left", maintain_order="left")
    return tuple(texts.get_column("text").fill_null("").to_list())
