"""Steps 4 and 6 of 7, the oracle of gtopk.

Phases of ``encode``, between compensating and sealing (``reference.encode``)
    1  select    the largest |acc| of the region, ties to the lowest index, kept in index order
    2  quantise  as block-wise top-k, a power-of-two scale for each 16 records
    3  residual  acc - value where sent, acc elsewhere; both exact
    4  pack      scales, records, counts: for each block as many ones as it has records, then a zero
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels.oracles.bits import Bytes, Floats, Ints, keys, power, quantised
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.gtopk import GROUP, GTopKSpec

__all__ = ["add", "check", "encode", "select"]


def select(acc: Floats, kept: int) -> Ints:
    """Phase 1: indices, ascending."""
    order = np.argsort(-keys(acc).astype(np.int64), kind="stable")
    return np.sort(order[:kept]).astype(np.int64)


def unary(counts: Ints) -> npt.NDArray[np.uint8]:
    """Bits, one a byte: each count as ones, and a zero behind it."""
    bits = np.ones(int(counts.sum()) + counts.size, np.uint8)
    bits[np.cumsum(counts + 1) - 1] = 0
    return bits


def encode(spec: GTopKSpec, acc: Floats, payload: Bytes, seed: int = 0) -> Floats:
    """The phases above."""
    del seed
    block, _, value_bits = spec.topk.layout
    kept, (records_at, counts_at, _) = spec.kept(acc.size), spec.offsets(acc.size)
    if not kept:
        return acc
    index = select(acc, kept)
    padded = np.zeros(-(-kept // GROUP) * GROUP, np.float32)
    padded[:kept] = acc[index]
    scales, codes, decoded = quantised(padded.reshape(-1, GROUP), value_bits)
    rest = acc.copy()
    rest[index] = acc[index] - decoded.reshape(-1)[:kept]
    records = ((codes.reshape(-1)[:kept] << (16 - value_bits)) & 0xFFFF) | (index % block)
    counts = np.bincount(index // block, minlength=spec.topk.nblocks(acc.size)).astype(np.int64)
    bits = np.packbits(unary(counts), bitorder="little")
    payload[HEADER_NBYTES : HEADER_NBYTES + scales.size] = scales.astype(np.uint8)
    payload[records_at : records_at + 2 * kept] = records.astype("<u2").view(np.uint8)
    payload[counts_at : counts_at + bits.size] = bits
    return rest


def check(spec: GTopKSpec, payload: Bytes, numel: int) -> bool:
    """Counts that add up, ascending indices in the region, and scales and codes that an encoder writes."""
    block, _, value_bits = spec.topk.layout
    kept, nblocks = spec.kept(numel), spec.topk.nblocks(numel)
    if not kept:
        return True
    records_at, counts_at, _ = spec.offsets(numel)
    bits = np.unpackbits(payload[counts_at : counts_at - (-(kept + nblocks) // 8)], bitorder="little")
    used = bits[: kept + nblocks]
    if bits[kept + nblocks :].any() or int(used.sum()) != kept or used[-1]:
        return False
    raw = payload[records_at : records_at + 2 * kept].view("<u2")
    low = (raw & np.uint16((1 << (16 - value_bits)) - 1)).astype(np.int64)
    codes = raw.view("<i2").astype(np.int64) >> (16 - value_bits)
    index = low + _blocks(used) * block
    scales = payload[HEADER_NBYTES : HEADER_NBYTES - (-kept // GROUP)]
    return not (
        bool((low >= block).any())
        or bool((codes == -(1 << (value_bits - 1))).any())
        or bool((np.diff(index) <= 0).any())
        or bool(index[-1] >= numel)
        or bool(((scales < 1) | (scales > 256 - value_bits)).any())
    )


def _blocks(bits: npt.NDArray[np.uint8]) -> Ints:
    """The block of each record: the zeros before its one."""
    zeros: Ints = np.cumsum(bits == 0)[bits == 1]
    return zeros


def add(spec: GTopKSpec, payload: Bytes, out: Floats, weight: np.float32) -> None:
    """Each record is ``out[i] = out[i] + (float(q) * scale) * weight``, every operation rounded to fp32."""
    block, _, value_bits = spec.topk.layout
    kept, nblocks = spec.kept(out.size), spec.topk.nblocks(out.size)
    records_at, counts_at, end = spec.offsets(out.size)
    raw = payload[records_at : records_at + 2 * kept].view("<u2")
    bits = np.unpackbits(payload[counts_at:end], bitorder="little")[: kept + nblocks]
    index = (raw & np.uint16(block - 1)).astype(np.int64) + _blocks(bits) * block
    scales = payload[HEADER_NBYTES : HEADER_NBYTES - (-kept // GROUP)].astype(np.int64).repeat(GROUP)[:kept]
    codes = raw.view("<i2").astype(np.int64) >> (16 - value_bits)
    out[index] += codes.astype(np.float32) * power(scales) * weight
