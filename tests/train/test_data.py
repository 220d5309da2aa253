"""The loader against a plain oracle; every malformed file is refused by name and line; no split leaks."""

from __future__ import annotations

import gzip
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.train.builders import dataset, write_tables
from train.batch import train_batch
from train.data import Dataset, Split, load_directory, split_leave_one_out
from train.errors import DataError

GOOD = "user_id\titem_id\tposition\nu1\ta\t0\nu2\tb\t0\nu1\tc\t2\nu2\ta\t1\nu1\tb\t1\n"


def oracle(text: str, order: str) -> list[list[str]]:
    """Item ids per user in order of first appearance, by plain Python."""
    header, *lines = text.strip().split("\n")
    rows: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for number, line in enumerate(lines):
        fields = dict(zip(header.split("\t"), line.split("\t"), strict=True))
        rows[fields["user_id"]].append((int(fields[order]), number, fields["item_id"]))
    return [[item for _, _, item in sorted(sequence)] for sequence in rows.values()]


def as_ids(data: Dataset) -> list[list[int]]:
    return [data.sequence(user).tolist() for user in range(data.num_users)]


def numbered(sequences: list[list[str]]) -> list[list[int]]:
    codes: dict[str, int] = {}
    return [[codes.setdefault(item, len(codes)) for item in sequence] for sequence in sequences]


def test_rows_in_any_order_give_each_user_its_own_sequence(tmp_path: Path) -> None:
    data = load_directory(write_tables(tmp_path, GOOD))
    assert as_ids(data) == numbered(oracle(GOOD, "position")) == [[0, 1, 2], [1, 0]]
    assert data.texts is None


def test_shuffled_file_and_timestamps_against_the_oracle(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [f"u{random.integers(9)}\ti{random.integers(40)}\t5\t{random.integers(50)}" for _ in range(300)]
    text = "\n".join(["user_id\titem_id\trating\ttimestamp", *rows]) + "\n"
    data = load_directory(write_tables(tmp_path, text))
    assert as_ids(data) == numbered(oracle(text, "timestamp"))


def test_texts_follow_the_item_codes(tmp_path: Path) -> None:
    items = "item_id\ttitle\tgenre\nz\tunused\tx\nc\tthird\tg3\na\tfirst\tg1\n"
    data = load_directory(write_tables(tmp_path, GOOD, items))
    assert data.texts == ("first g1", "", "third g3")  # a, b (no row), c: as the sequences number them


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: empty file"),
        ("user_id\titem_id\tposition\n", "line 2: no rows"),
        ("user\titem_id\tposition\nu\ta\t0\n", "line 1: column 'user_id'"),
        ("user_id\titem_id\trating\nu\ta\t0\n", "line 1: needs a column 'position' or 'timestamp'"),
        (GOOD.replace("u2\tb\t0", "u2\tb"), "line 3: 2 fields, the header has 3"),
        (GOOD.replace("u1\tc\t2", "u1\tc\t2\tx"), "line 4: 4 fields, the header has 3"),
        (GOOD.replace("u1\tc\t2", "u1\tc\ttwo"), "line 4: position 'two' is not an integer"),
        (GOOD.replace("u2\ta\t1", "u2\t\t1"), "line 5: item_id is empty"),
        (GOOD.replace("u1\tb\t1", "\tb\t1"), "line 6: user_id is empty"),
        (GOOD.replace("u1\tb\t1", "u1\tb\t0"), "line 6: user 'u1' has position 0 twice"),
        (GOOD.replace("u1\tc\t2\n", "\n"), "line 4: 1 fields"),
    ],
)
def test_malformed_interactions_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_directory(write_tables(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'interactions.tsv.gz'}: {message}")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("item_id\ttext\na\tx\na\ty\n", "line 3: item 'a' appears twice"),
        ("item_id\na\n", "line 1: no text column"),
        ("id\ttext\na\tx\n", "line 1: column 'item_id'"),
    ],
)
def test_malformed_items_name_file_and_line(tmp_path: Path, items: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_directory(write_tables(tmp_path, GOOD, items))
    assert str(caught.value).startswith(f"{tmp_path / 'items.tsv.gz'}: {message}")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data directory"):
        load_directory(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"interactions\.tsv\.gz: file not found"):
        load_directory(tmp_path)
    path = tmp_path / "interactions.tsv.gz"
    path.write_bytes(GOOD.encode())
    with pytest.raises(DataError, match="cannot be read as gzip"):
        load_directory(tmp_path)
    path.write_bytes(gzip.compress(GOOD.encode())[:-9])
    with pytest.raises(DataError, match="cannot be read as gzip"):
        load_directory(tmp_path)
    path.write_bytes(gzip.compress(GOOD.encode().replace(b"u1\tc", b"u1\t\xff")))
    with pytest.raises(DataError, match="line 4: not valid UTF-8"):
        load_directory(tmp_path)


def trained_pairs(data: Dataset, split: Split) -> set[tuple[int, int]]:
    """(user, item) of everything the training sees, as input or as target."""
    pairs = set()
    for user in range(data.num_users):
        batch = train_batch(data, split, np.array([user]), 50)
        seen = batch.items[batch.segments >= 0].tolist() + batch.targets.tolist()
        pairs |= {(user, item) for item in seen}
    return pairs


def held_out_pairs(data: Dataset) -> set[tuple[int, int]]:
    return {
        (u, int(i))
        for u in range(data.num_users)
        if len(data.sequence(u)) >= 3
        for i in data.sequence(u)[-2:]
    }


def test_held_out_items_are_never_trained_on() -> None:
    data = dataset([[0, 1, 2, 3, 4], [5, 6, 7], [8, 9], [2]])
    split = split_leave_one_out(data)
    assert split.train_ends.tolist() == [3, 1, 2, 1]
    assert split.users.tolist() == [0, 1]
    assert not trained_pairs(data, split) & held_out_pairs(data)


def test_control_a_leaking_split_is_noticed() -> None:
    data = dataset([[0, 1, 2, 3, 4], [5, 6, 7], [8, 9], [2]])
    split = split_leave_one_out(data)
    leaking = Split(train_ends=split.train_ends + (split.train_ends == 3), users=split.users)
    assert trained_pairs(data, leaking) & held_out_pairs(data)


@pytest.mark.data
@pytest.mark.skipif("HYBRIDCOMM_DATA" not in os.environ, reason="HYBRIDCOMM_DATA names no data folder")
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "text"),
    [
        ("amazon-scientific-2018", 8442, 4385, 59384, True),
        ("amazon-electronics-2014-dense", 9699, 7679, 204934, False),
        ("ml-100k", 943, 1682, 100000, True),
    ],
)
def test_published_counts(name: str, users: int, items: int, interactions: int, text: bool) -> None:
    data = load_directory(Path(os.environ["HYBRIDCOMM_DATA"]) / name)
    assert (data.num_users, data.num_items, len(data.items)) == (users, items, interactions)
    assert (data.texts is not None) is text
    assert text is False or all(data.texts or ())
