"""Steps 4 and 6 of 7, the oracle of block-wise top-k.

Phases of ``encode``, between compensating and sealing (``reference.encode``)
    1  select    per block the k largest |acc|, ties to the lowest index, kept in index order
    2  scale     2^(s - 127), s = max(exponent of the block's largest + 2 - value_bits, 1): one byte
    3  quantise  q = clamp(round_half_even(acc / scale), -qmax, qmax)
    4  residual  acc - q * scale where kept, acc elsewhere; both exact, so acc = decoded + residual
    5  pack      scales, records

Magnitudes are compared as integers (bits without the sign), so nothing here depends on a flush-to-zero mode.
"""

from __future__ import annotations

import numpy as np

from hybridcomm.kernels.oracles.bits import Bytes, Floats, Ints, keys, power
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.topk import TopKSpec

__all__ = ["add", "check", "encode", "quantise", "select", "unpack"]


def select(acc: Floats, k: int) -> Ints:
    """Phase 1 on whole blocks: ``acc`` is (nblocks, block), the result (nblocks, k) ascending indices."""
    order = np.argsort(-keys(acc).astype(np.int64), axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1).astype(np.int64)


def quantise(spec: TopKSpec, kept: Floats) -> tuple[Ints, Ints, Floats]:
    """Phases 2 and 3 on kept values (nblocks, k): scale bytes (nblocks,), codes and values (nblocks, k)."""
    largest = keys(kept).max(axis=1).astype(np.int64)
    scales = np.maximum((largest >> 23) + 2 - spec.layout[2], 1)
    with np.errstate(under="ignore"):
        codes = np.rint(kept * power(254 - scales)[:, None]).astype(np.int64)
    codes = np.clip(codes, -spec.qmax, spec.qmax)
    return scales, codes, codes.astype(np.float32) * power(scales)[:, None]


def encode(spec: TopKSpec, acc: Floats, payload: Bytes, seed: int = 0) -> Floats:
    """The phases above."""
    del seed
    numel, (block, k, value_bits) = acc.size, spec.layout
    nblocks, start = spec.nblocks(numel), spec.records_offset(numel)
    if not nblocks:
        return acc
    padded = np.zeros((nblocks, block), np.float32)
    padded.reshape(-1)[:numel] = acc
    index = select(padded, k)
    kept = np.take_along_axis(padded, index, axis=1)
    scales, codes, decoded = quantise(spec, kept)
    np.put_along_axis(padded, index, kept - decoded, axis=1)
    records = ((codes << (16 - value_bits)) & 0xFFFF) | index
    if numel % block:  # padding that was chosen: a record that adds zero to element 0
        records[-1][index[-1] >= numel % block] = 0
    payload[HEADER_NBYTES : HEADER_NBYTES + nblocks] = scales.astype(np.uint8)
    payload[start : start + 2 * records.size] = records.astype("<u2").reshape(-1).view(np.uint8)
    return padded.reshape(-1)[:numel]


def unpack(spec: TopKSpec, payload: Bytes, numel: int) -> tuple[Ints, Ints, Ints]:
    """Scale bytes (nblocks,), indices and codes (nblocks, k) of a payload whose header has been checked."""
    _, k, value_bits = spec.layout
    nblocks, start = spec.nblocks(numel), spec.records_offset(numel)
    raw = payload[start : start + 2 * k * nblocks].view("<u2").reshape(nblocks, k)
    codes = raw.view("<i2").astype(np.int64) >> (16 - value_bits)
    scales = payload[HEADER_NBYTES : HEADER_NBYTES + nblocks].astype(np.int64)
    return scales, (raw & np.uint16(spec.block - 1)).astype(np.int64), codes


def check(spec: TopKSpec, payload: Bytes, numel: int) -> bool:
    """Scales that an encoder writes, and indices of the last block inside the region."""
    scales, index, _ = unpack(spec, payload, numel)
    tail = numel % spec.block
    outside = bool(tail) and bool((index[-1] >= tail).any())
    return not outside and not bool(((scales < 1) | (scales > spec.max_scale)).any())


def add(spec: TopKSpec, payload: Bytes, out: Floats, weight: np.float32) -> None:
    """Each record is ``out[i] = out[i] + (float(q) * scale) * weight``, every operation rounded to fp32."""
    scales, index, codes = unpack(spec, payload, out.size)
    values = codes.astype(np.float32) * power(scales)[:, None] * weight
    index += (np.arange(len(scales)) * spec.block)[:, None]
    np.add.at(out, index.reshape(-1), values.reshape(-1))
