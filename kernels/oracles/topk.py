"""Steps 4 and 6 of 7, the oracle of block-wise top-k.

Phases of ``encode``, between compensating and sealing (``reference.encode``)
    1  select    per block the k largest |acc|, ties to the lowest index, kept in index order
    2  scale     2^(s - 127), s = max(exponent of the block's largest + 2 - value_bits, 1): one byte
    3  quantise  q = clamp(round_half_even(acc / scale), -qmax, qmax)
       signs     2^(s - 127) <= 4/3 of the mean of what is kept and not zero; q = sign of acc above half of it
    4  residual  acc - q * scale where kept, acc elsewhere; both exact, so acc = decoded + residual
    5  pack      scales, records

Magnitudes are compared as integers (bits without the sign), so nothing here depends on a flush-to-zero mode.
"""

from __future__ import annotations

import numpy as np

from hybridcomm.kernels.oracles.bits import Bytes, Floats, Ints, keys, power, quantised
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.topk import TopKSpec

__all__ = ["add", "check", "encode", "quantise", "quantise_signs", "select", "unpack"]


def select(acc: Floats, k: int) -> Ints:
    """Phase 1 on whole blocks: ``acc`` is (nblocks, block), the result (nblocks, k) ascending indices."""
    order = np.argsort(-keys(acc).astype(np.int64), axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1).astype(np.int64)


def quantise(spec: TopKSpec, kept: Floats) -> tuple[Ints, Ints, Floats]:
    """Phases 2 and 3 on kept values (nblocks, k): scale bytes (nblocks,), codes and values (nblocks, k)."""
    return quantised(kept, spec.layout[2])


def quantise_signs(kept: Floats) -> tuple[Ints, Ints, Floats]:
    """Phases 2 and 3 of signs, in integers: the mean is taken over mantissas aligned to the largest's."""
    key = keys(kept).astype(np.int64)
    exponent = np.maximum(key >> 23, 1)
    mantissa = (key & 0x7FFFFF) | ((key >= 1 << 23).astype(np.int64) << 23)
    largest = exponent.max(axis=1)
    total = ((mantissa << 16) >> np.minimum(largest[:, None] - exponent, 63)).sum(axis=1)
    count = np.maximum((key > 0).sum(axis=1), 1)
    scales = largest.copy()
    for _ in range(16):  # twelve octaves below the largest are the most that 4096 elements can need
        too_large = (3 * count << np.maximum(39 - (largest - scales), 0)) > 4 * total
        scales -= too_large & (scales > 1)
    half = np.where(scales > 1, (scales - 1) << 23, 1 << 22)
    codes = np.where(key > half[:, None], np.where(kept < 0, -1, 1), 0)
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
    scales, codes, decoded = quantise_signs(kept) if spec.sign else quantise(spec, kept)
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
    """Scales and signs that an encoder writes, and indices of the last block inside the region."""
    scales, index, codes = unpack(spec, payload, numel)
    tail = numel % spec.block
    outside = bool(tail) and bool((index[-1] >= tail).any())
    if spec.sign and bool((codes < -1).any()):
        return False
    return not outside and not bool(((scales < 1) | (scales > spec.max_scale)).any())


def add(spec: TopKSpec, payload: Bytes, out: Floats, weight: np.float32) -> None:
    """Each record is ``out[i] = out[i] + (float(q) * scale) * weight``, every operation rounded to fp32."""
    scales, index, codes = unpack(spec, payload, out.size)
    values = codes.astype(np.float32) * power(scales)[:, None] * weight
    index += (np.arange(len(scales)) * spec.block)[:, None]
    np.add.at(out, index.reshape(-1), values.reshape(-1))
