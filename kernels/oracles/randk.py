"""Steps 4 and 6 of 7, the oracle of randk.

Phases of ``encode``, between compensating and sealing (``reference.encode``)
    1  draw      of each stratum one element, by a hash of (seed, number of the stratum in the region)
    2  quantise  8 bits, a power-of-two scale per block from what was drawn; at random when unbiased
    3  residual  acc - value where sent, acc elsewhere
    4  pack      scales, codes

Strata that reach beyond the region may draw padding: such a code is zero, and decoders pass over it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels.oracles.bits import Bytes, Floats, Ints, keys, power, quantised
from hybridcomm.kernels.payload import HEADER_DTYPE, HEADER_NBYTES
from hybridcomm.kernels.specs.randk import VALUE_BITS, RandKSpec

__all__ = ["add", "check", "draw", "encode"]

Words = npt.NDArray[np.uint32]

UNBIASED_MAX_SCALE = 239


def mix(x: Words) -> Words:
    """A bijection of 32 bits: C. Wellons' lowbias32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def draw(seed: int, count: int) -> Words:
    """Hashes of strata 0..count - 1."""
    number = np.arange(count, dtype=np.uint64)
    low = mix((number & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ np.uint32(seed & 0xFFFFFFFF))
    high = np.uint32(seed >> 32) ^ (number >> np.uint64(32)).astype(np.uint32) * np.uint32(0x9E3779B9)
    return mix(low + high)


def places(spec: RandKSpec, hashes: Words) -> Ints:
    """The elements of the region that hashes mean, (nblocks, k)."""
    within = ((hashes.astype(np.uint64) * np.uint64(spec.rows)) >> np.uint64(32)).astype(np.int64)
    place: Ints = (np.arange(hashes.size) * spec.rows + within).reshape(-1, spec.k)
    return place


def rounded_at_random(kept: Floats, hashes: Words) -> tuple[Ints, Ints]:
    """Phase 2 when unbiased: scale bytes and codes; the mean of a code is acc / scale, to 16 binary places."""
    largest = keys(kept).max(axis=1).astype(np.int64)
    scales = np.clip((largest >> 23) + 2 - (VALUE_BITS - 1), 1, UNBIASED_MAX_SCALE)
    x = np.clip(kept * power(254 - scales)[:, None], np.float32(-127), np.float32(127))
    fixed = (x * np.float32(65536)).astype(np.int64)
    return scales, (fixed + (mix(hashes) >> np.uint32(16)).astype(np.int64).reshape(kept.shape)) >> 16


def decoded(spec: RandKSpec, scales: Ints, codes: Ints) -> Floats:
    """What codes (nblocks, k) mean; exact in fp32."""
    times = np.float32(spec.rows if spec.unbiased else 1)
    return codes.astype(np.float32) * times * power(scales)[:, None]


def encode(spec: RandKSpec, acc: Floats, payload: Bytes, seed: int = 0) -> Floats:
    """The phases above."""
    nblocks, start = spec.nblocks(acc.size), spec.codes_offset(acc.size)
    if not nblocks:
        return acc
    padded = np.zeros(nblocks * spec.block, np.float32)
    padded[: acc.size] = acc
    hashes = draw(seed, nblocks * spec.k)
    place = places(spec, hashes)
    kept = padded[place]
    if spec.unbiased:
        scales, codes = rounded_at_random(kept, hashes)
    else:
        scales, codes, _ = quantised(kept, VALUE_BITS)
    padded[place] = kept - decoded(spec, scales, codes)
    payload[HEADER_NBYTES : HEADER_NBYTES + nblocks] = scales.astype(np.uint8)
    payload[start : start + codes.size] = codes.astype(np.int8).reshape(-1).view(np.uint8)
    return padded[: acc.size]


def unpack(spec: RandKSpec, payload: Bytes, numel: int) -> tuple[Ints, Ints, Ints]:
    """Scale bytes (nblocks,), places in the region and codes (nblocks, k)."""
    nblocks, start = spec.nblocks(numel), spec.codes_offset(numel)
    seed = int(payload[:HEADER_NBYTES].view(HEADER_DTYPE)["seed"][0])
    codes = payload[start : start + spec.k * nblocks].view(np.int8).astype(np.int64).reshape(nblocks, spec.k)
    scales = payload[HEADER_NBYTES : HEADER_NBYTES + nblocks].astype(np.int64)
    return scales, places(spec, draw(seed, nblocks * spec.k)), codes


def check(spec: RandKSpec, payload: Bytes, numel: int) -> bool:
    """Scales and codes that an encoder writes; zero for padding."""
    scales, place, codes = unpack(spec, payload, numel)
    most = UNBIASED_MAX_SCALE if spec.unbiased else 256 - VALUE_BITS
    bad = (codes == -128) | ((place >= numel) & (codes != 0))
    return not bool(bad.any()) and not bool(((scales < 1) | (scales > most)).any())


def add(spec: RandKSpec, payload: Bytes, out: Floats, weight: np.float32) -> None:
    """Each code is ``out[i] = out[i] + value * weight``, every operation rounded to fp32."""
    scales, place, codes = unpack(spec, payload, out.size)
    inside = place < out.size
    out[place[inside]] += (decoded(spec, scales, codes) * weight)[inside]
