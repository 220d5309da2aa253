"""Steps 4 and 6 of 7, the oracle of the quantising codecs.

Phases of ``encode``, between compensating and sealing (``reference.encode``)
    1  scale     per group: a power of two from the largest magnitude (int8, int4, fp8), or the mean magnitude (sign1)
    2  code      round half to even in units of the scale, never beyond the largest code
    3  residual  acc - value, one fp32 subtraction: exact for int8, int4, fp8 and bf16, and for fp16 below 2^29
    4  pack      scales, codes

A code's value does not depend on its neighbours but through the scale, and the mean is formed of integers: nothing
here depends on the order of elements or on the width of a vector.
"""

from __future__ import annotations

import numpy as np

from hybridcomm.kernels.oracles.bits import Bytes, Floats, Ints, keys, power
from hybridcomm.kernels.payload import HEADER_NBYTES, Codec
from hybridcomm.kernels.specs.quant import CastSpec, Fp8Spec, QuantSpec, ScaledSpec, SignSpec

__all__ = ["add", "check", "encode"]

FIXED = 22  # bits of a magnitude below the largest one's power of two that the mean of sign1 takes in


def grouped(spec: QuantSpec, values: Floats) -> Floats:
    """(nblocks, block), the last group padded with zeros."""
    padded = np.zeros(spec.nblocks(values.size) * spec.block, np.float32)
    padded[: values.size] = values
    return padded.reshape(-1, spec.block)


def form_of(spec: QuantSpec) -> tuple[int, int, int]:
    """Mantissa bits, exponent of the smallest normal value and largest code of a floating point format."""
    if isinstance(spec, Fp8Spec):
        return spec.mantissa, spec.emin, 0x77
    return (10, -14, 0x7BFF) if spec.codec is Codec.FP16 else (7, -126, 0x7F7F)


def to_float_codes(spec: QuantSpec, values: Floats) -> Ints:
    """Sign, exponent and mantissa of ``values`` in the spec's format."""
    mantissa, emin, largest = form_of(spec)
    exponent = np.maximum((keys(values) >> 23).astype(np.int64) - 127, emin)
    steps = np.rint(np.abs(values.astype(np.float64)) * np.exp2((mantissa - exponent).astype(np.float64)))
    codes: Ints = np.minimum(((exponent - emin) << mantissa) + steps.astype(np.int64), largest)
    codes |= np.signbit(values).astype(np.int64) << (spec.value_bits - 1)
    return codes


def from_float_codes(spec: QuantSpec, codes: Ints) -> Floats:
    """The values of codes, exact in fp32."""
    mantissa, emin, _ = form_of(spec)
    size = codes & ((1 << (spec.value_bits - 1)) - 1)
    digits, exponent = size & ((1 << mantissa) - 1), size >> mantissa
    digits = np.where(exponent > 0, digits + (1 << mantissa), digits)
    values = digits * np.exp2((np.maximum(exponent, 1) - 1 + emin - mantissa).astype(np.float64))
    signed: Floats = np.where(codes >> (spec.value_bits - 1), -values, values).astype(np.float32)
    return signed


def scale_of(spec: ScaledSpec, groups: Floats) -> Ints:
    """Phase 1 of int8, int4 and fp8: biased exponents (nblocks,), so that the largest is 2^top scales or more."""
    exponents: Ints = np.maximum((keys(groups).max(axis=1).astype(np.int64) >> 23) - spec.top, 1)
    return exponents


def mean_of(groups: Floats, valid: Ints) -> Floats:
    """Phase 1 of sign1: mean magnitudes of the first ``valid`` elements of each group as bf16, towards zero.

    Magnitudes are counted in units of 2^(e - 148), e the biased exponent of the group's largest and at least
    22, each cut to an integer below 2^22; the sum is exact, the mean is cut to an integer and to 8 digits.
    """
    exponent = np.maximum(keys(groups).max(axis=1).astype(np.int64) >> 23, FIXED)
    units = np.exp2((253 + FIXED - 127 - exponent).astype(np.float64))
    sums = np.floor(np.abs(groups.astype(np.float64)) * units[:, None]).astype(np.int64).sum(axis=1)
    whole = (sums // valid).astype(np.float32)
    digits: Floats = (whole.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return digits * power(exponent + 1 - FIXED)


def to_codes(spec: QuantSpec, scaled: Floats) -> Ints:
    """Phase 2 of int8, int4 and fp8."""
    if isinstance(spec, Fp8Spec):
        return to_float_codes(spec, scaled)
    qmax = (1 << (spec.value_bits - 1)) - 1
    return np.clip(np.rint(scaled).astype(np.int64), -qmax, qmax)


def values_of(spec: QuantSpec, codes: Ints) -> Floats:
    """What codes are worth, in units of the scale."""
    if isinstance(spec, (CastSpec, Fp8Spec)):
        return from_float_codes(spec, codes)
    if isinstance(spec, SignSpec):
        return np.where(codes, np.float32(-1), np.float32(1))
    return codes.astype(np.float32)


def quantise(spec: QuantSpec, acc: Floats) -> tuple[Floats, Bytes, Ints]:
    """Phases 1 and 2: scales (nblocks, 1), their bytes, and codes (numel,)."""
    groups = grouped(spec, acc)
    if isinstance(spec, CastSpec):
        return np.ones((len(groups), 1), np.float32), np.zeros(0, np.uint8), to_float_codes(spec, acc)
    if isinstance(spec, SignSpec):
        valid = np.minimum(acc.size - spec.block * np.arange(len(groups)), spec.block)
        scales = mean_of(groups, valid)
        halves = (scales.view(np.uint32) >> 16).astype("<u2")
        return scales[:, None], halves.view(np.uint8), np.signbit(acc).astype(np.int64)
    if not isinstance(spec, ScaledSpec):
        raise TypeError(f"{spec}: no quantiser")
    exponent = scale_of(spec, groups)
    codes = to_codes(spec, groups * power(254 - exponent)[:, None])
    return power(exponent)[:, None], exponent.astype(np.uint8), codes.reshape(-1)[: acc.size]


def pack(spec: QuantSpec, codes: Ints) -> Bytes:
    """Codes as bytes: two nibbles or eight bits to one, the first in the lowest bits."""
    if spec.value_bits == 1:
        return np.packbits(codes.astype(np.uint8), bitorder="little")
    if spec.value_bits == 4:
        nibbles = np.zeros(-(-codes.size // 2) * 2, np.uint8)
        nibbles[: codes.size] = codes & 15
        return nibbles[::2] | nibbles[1::2] << np.uint8(4)
    return codes.astype("<u2" if spec.value_bits == 16 else np.uint8).view(np.uint8)


def unpack(spec: QuantSpec, packed: Bytes, numel: int) -> Ints:
    """The codes that ``pack`` packed, integers with their sign."""
    if spec.value_bits == 1:
        return np.unpackbits(packed, bitorder="little")[:numel].astype(np.int64)
    if spec.value_bits == 4:
        nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:numel].astype(np.int64)
        return (nibbles ^ 8) - 8
    if spec.value_bits == 16:
        return packed.view("<u2").astype(np.int64)
    return packed.view(np.int8 if spec.codec is Codec.INT8 else np.uint8).astype(np.int64)


def sections(spec: QuantSpec, payload: Bytes, numel: int) -> tuple[Bytes, Bytes]:
    """Views of the scales' and the codes' bytes."""
    start = spec.codes_offset(numel)
    scales = payload[HEADER_NBYTES : HEADER_NBYTES + spec.scale_nbytes * spec.nblocks(numel)]
    return scales, payload[start : start + spec.codes_nbytes(numel)]


def scales_of(spec: QuantSpec, stored: Bytes) -> Floats:
    """(nblocks,) of a payload that has been checked."""
    if isinstance(spec, SignSpec):
        return (stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return power(stored.astype(np.int64))


def spread(spec: QuantSpec, scales: Floats, codes: Ints) -> Floats:
    """Values of codes, each with its group's scale."""
    values = values_of(spec, codes)
    if isinstance(spec, CastSpec):
        return values
    return values * np.repeat(scales.reshape(-1), spec.block)[: values.size]


def encode(spec: QuantSpec, acc: Floats, payload: Bytes, seed: int = 0) -> Floats:
    """The phases above."""
    del seed
    if not acc.size:
        return acc
    scales, stored, codes = quantise(spec, acc)
    scale_bytes, code_bytes = sections(spec, payload, acc.size)
    scale_bytes[:] = stored
    code_bytes[:] = pack(spec, codes)
    return acc - spread(spec, scales, codes)


def check(spec: QuantSpec, payload: Bytes, numel: int) -> bool:
    """Scales and codes that an encoder writes, and zeros after the last code in its byte."""
    stored, packed = sections(spec, payload, numel)
    codes = unpack(spec, packed, numel)
    if bytes(pack(spec, codes)) != bytes(packed):
        return False
    if isinstance(spec, SignSpec):
        halves = stored.view("<u2")
        return not bool(((halves != 0) & ((halves < 0x0080) | (halves > 0x7F7F))).any())
    if isinstance(spec, ScaledSpec) and bool(((stored < 1) | (stored > spec.max_scale)).any()):
        return False
    if isinstance(spec, (CastSpec, Fp8Spec)):
        return not bool(((codes & ((1 << (spec.value_bits - 1)) - 1)) > form_of(spec)[2]).any())
    return not bool((codes == -(1 << (spec.value_bits - 1))).any())


def add(spec: QuantSpec, payload: Bytes, out: Floats, weight: np.float32) -> None:
    """``out[i] = out[i] + (code * scale) * weight``, every operation rounded to fp32."""
    stored, packed = sections(spec, payload, out.size)
    out += spread(spec, scales_of(spec, stored), unpack(spec, packed, out.size)) * weight
