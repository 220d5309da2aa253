"""Sizes: how large a chunk and a bucket are. Pure functions of values that are identical on all ranks.

A policy that answers differently on two ranks would hang them, so nothing here reads clocks, environment or
devices.
"""

from __future__ import annotations

from hybridcomm.errors import DataTypeError

__all__ = [
    "DENSE_ALIGN",
    "DENSE_CHUNK_NBYTES",
    "EXCHANGES",
    "EXCHANGE_GAIN",
    "GATHERING_NODES",
    "ITEMSIZE",
    "MAX_CHUNK_NBYTES",
    "MIN_CHUNK_NBYTES",
    "NODE_CHUNK_NBYTES",
    "ONE_SHOT_READ_NBYTES",
    "bucket_nbytes",
    "chunk_elems",
    "exchange",
    "exchange_at_once",
    "is_relayed",
    "itemsize",
    "one_shot_nbytes",
]

ITEMSIZE = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "float64": 8,
    "int32": 4,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
    "complex128": 16,
}

DENSE_ALIGN = 16
"""Elements: boundaries of dense shards and slices fall on multiples of this (a cache line of fp32)."""

MAX_CHUNK_NBYTES = 1024 * 1024
"""The longest chunk, and the size of a slot of the shared-memory lanes."""

DENSE_CHUNK_NBYTES = 512 * 1024
"""The longest dense chunk: a share of the L2 cache, and short enough to overlap in-node and inter-node work."""

NODE_CHUNK_NBYTES = 256 * 1024
"""The longest dense chunk where nothing leaves the node: what the slots of four ranks hold fits a shared L3 cache."""

MIN_CHUNK_NBYTES = 64 * 1024
"""Below this the cost of a hand-off (about 33 us across cores) exceeds what more overlap gains."""

ONE_SHOT_READ_NBYTES = 32 * 1024
"""What a rank may read from the others of its node so that it sums all itself."""

EXCHANGES = ("auto", "gather", "two_stage")
"""How payloads may be asked to be exchanged."""

EXCHANGE_GAIN = 0.5
"""A two-stage exchange has to take less than this part of a gather's time: it loses information twice."""

GATHERING_NODES = 4
"""Up to so many nodes two stages send half of a gather's bytes or more: 2 (M - 1) / M against M - 1 payloads."""

_ASSUMED_ALPHA, _ASSUMED_BETA = 100e-6, 8e-9  # s, s/byte: Ethernet of 1 Gbit/s
_ASSUMED_KERNELS = 1e-9  # s per element of a shard: two passes of a codec over it

_CHUNKS_WANTED = 4  # enough that the in-node and the inter-node stage overlap


def itemsize(dtype: str) -> int:
    """Bytes per element of a dtype name; raises :class:`DataTypeError` for a dtype no plan can carry."""
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise DataTypeError(f"dtype {dtype!r}: plans carry {', '.join(ITEMSIZE)}") from None


def chunk_elems(
    *,
    numel: int,
    dtype: str,
    shards: int,
    align: int = DENSE_ALIGN,
    compressed: bool = False,
    overlap: bool = True,
) -> int:
    """Elements per chunk: a quarter of a shard, within 64..512 KiB, and a multiple of ``align``.

    Without stages to ``overlap`` (an all-reduce inside one node keeps every rank busy) 256 KiB. Compressed
    chunks are as long as a slot: their payloads are a hundredth of that, and short messages cost more in
    headers than pipelining them gains.
    """
    size = itemsize(dtype)
    shard_nbytes = -(-numel // max(shards, 1)) * size
    wanted = shard_nbytes // _CHUNKS_WANTED if overlap else NODE_CHUNK_NBYTES
    dense = min(max(wanted, MIN_CHUNK_NBYTES), DENSE_CHUNK_NBYTES)
    nbytes = MAX_CHUNK_NBYTES if compressed else dense
    return max(nbytes // size // align, 1) * align


def one_shot_nbytes(ranks: int) -> int:
    """Up to how many bytes the ranks of one node each sum everything themselves: one hand-off instead of two.

    Every rank reads all others' inputs, so the more there are the sooner that costs more than it saves.
    """
    return ONE_SHOT_READ_NBYTES // max(ranks - 1, 1)


def exchange_at_once(
    nodes: int, nbytes: int, *, alpha: float | None = None, beta: float | None = None
) -> bool:
    """Whether the owners of a shard each get all others' sums and add them, instead of a slice each and then its total.

    It saves a hop. Of two nodes it sends just as much, ``2 (M - 1) / M * nbytes`` a node; of more ``(M - 1) * nbytes``,
    which pays while the difference takes less time than the hop. ``alpha`` and ``beta`` as for `exchange`.
    """
    if alpha is None or beta is None:
        alpha, beta = _ASSUMED_ALPHA, _ASSUMED_BETA
    return (nodes - 1) * (nodes - 2) / nodes * nbytes * beta <= alpha


def is_relayed(nbytes: int) -> bool:
    """Whether a broadcast to several nodes is worth a hop more: one chunk is not."""
    return nbytes > MIN_CHUNK_NBYTES


def exchange(
    *,
    nodes: int,
    payload_nbytes: int,
    shard_numel: int,
    alpha: float | None = None,
    beta: float | None = None,
) -> str:
    """ "gather" or "two_stage": how ``nodes`` nodes exchange payloads of ``payload_nbytes`` per node.

    With M nodes a gather takes ``alpha + (M - 1) * payload * beta`` on a node's link, two stages take
    ``2 * alpha + 2 * (M - 1) / M * payload * beta``; either beside the kernels' time for ``shard_numel`` elements.
    ``alpha`` (s) and ``beta`` (s/byte) are those of the links between nodes; where they were not measured, those of
    Ethernet of 1 Gbit/s.
    """
    if alpha is None or beta is None:
        alpha, beta = _ASSUMED_ALPHA, _ASSUMED_BETA
    kernels, wire = shard_numel * _ASSUMED_KERNELS, payload_nbytes * beta
    gather = kernels + alpha + (nodes - 1) * wire
    two_stage = kernels + 2 * alpha + 2 * (nodes - 1) / nodes * wire
    return "two_stage" if two_stage < EXCHANGE_GAIN * gather else "gather"


def bucket_nbytes(total_nbytes: int) -> int:
    """Bucket capacity: an eighth of all gradients, within 1..25 MiB, so that backward hides most of them."""
    mib = 1 << 20
    return min(max(total_nbytes // 8, mib), 25 * mib)
