"""Steps 4 and 6 of 7, the oracle of gtop1.

Phases of ``encode``, between compensating and sealing (``reference.encode``)
    1  select    a block is rows x k elements; of each column the largest |acc|, ties to the lowest row
    2  quantise  as block-wise top-k: a power-of-two scale per block, round half to even
    3  residual  acc - value where sent, acc elsewhere; both exact
    4  pack      scales, a record per column

Columns of the last block that begin beyond the region have a record of zero, which decoders pass over.
"""

from __future__ import annotations

import numpy as np

from hybridcomm.kernels.oracles.bits import Bytes, Floats, Ints, keys, power, quantised
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.gtop1 import GTop1Spec

__all__ = ["add", "check", "encode", "select", "unpack"]


def select(acc: Floats) -> Ints:
    """Phase 1: ``acc`` is (nblocks, rows, k), the result (nblocks, k) rows."""
    row: Ints = np.argmax(keys(acc), axis=1).astype(np.int64)
    return row


def encode(spec: GTop1Spec, acc: Floats, payload: Bytes, seed: int = 0) -> Floats:
    """The phases above."""
    del seed
    rows, k, value_bits = spec.layout
    nblocks, start = spec.nblocks(acc.size), spec.records_offset(acc.size)
    if not nblocks:
        return acc
    padded = np.zeros((nblocks, rows, k), np.float32)
    padded.reshape(-1)[: acc.size] = acc
    row = select(padded)[:, None, :]
    kept = np.take_along_axis(padded, row, axis=1)
    scales, codes, decoded = quantised(kept[:, 0], value_bits)
    np.put_along_axis(padded, row, kept - decoded[:, None], axis=1)
    records = ((codes << (16 - value_bits)) & 0xFFFF) | row[:, 0]
    payload[HEADER_NBYTES : HEADER_NBYTES + nblocks] = scales.astype(np.uint8)
    payload[start : start + 2 * records.size] = records.astype("<u2").reshape(-1).view(np.uint8)
    return padded.reshape(-1)[: acc.size]


def unpack(spec: GTop1Spec, payload: Bytes, numel: int) -> tuple[Ints, Ints, Ints]:
    """Scale bytes (nblocks,), what stands below the code, and codes (nblocks, k)."""
    _, k, value_bits = spec.layout
    nblocks, start = spec.nblocks(numel), spec.records_offset(numel)
    raw = payload[start : start + 2 * k * nblocks].view("<u2").reshape(nblocks, k)
    low = np.uint16((1 << (16 - value_bits)) - 1)
    codes = raw.view("<i2").astype(np.int64) >> (16 - value_bits)
    scales = payload[HEADER_NBYTES : HEADER_NBYTES + nblocks].astype(np.int64)
    return scales, (raw & low).astype(np.int64), codes


def places(spec: GTop1Spec, row: Ints) -> Ints:
    """Elements of the region that records (nblocks, k) stand for."""
    nblocks, k = row.shape
    place: Ints = row * k + np.arange(k) + (np.arange(nblocks) * spec.block)[:, None]
    return place


def check(spec: GTop1Spec, payload: Bytes, numel: int) -> bool:
    """Scales, rows and codes that an encoder writes; zero for columns beyond the region."""
    scales, row, codes = unpack(spec, payload, numel)
    _, _, value_bits = spec.layout
    inside = (row < spec.rows) & (places(spec, row) < numel)
    beyond = places(spec, np.zeros_like(row)) >= numel
    good = np.where(inside, codes != -(1 << (value_bits - 1)), beyond & (row == 0) & (codes == 0))
    return bool(good.all()) and not bool(((scales < 1) | (scales > 256 - value_bits)).any())


def add(spec: GTop1Spec, payload: Bytes, out: Floats, weight: np.float32) -> None:
    """Each record is ``out[i] = out[i] + (float(q) * scale) * weight``, every operation rounded to fp32."""
    scales, row, codes = unpack(spec, payload, out.size)
    values = (codes.astype(np.float32) * power(scales)[:, None] * weight).reshape(-1)
    where = places(spec, row).reshape(-1)
    out[where[where < out.size]] += values[where < out.size]
