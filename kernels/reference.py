"""Steps 4 and 6 of 7, the oracle: what compress and decompress must compute, bit for bit, in plain numpy.

Phases of ``encode``
    1  compensate   acc = grad + decay * e_in       (fp32, each operation rounded; acc = grad when memoryless)
    2  select       per block the k largest |acc|, ties to the lowest index, kept in index order
    3  scale        2^(s - 127), s = max(exponent of the block's largest + 2 - value_bits, 1): one byte
    4  quantise     q = clamp(round_half_even(acc / scale), -qmax, qmax)
    5  residual     e_out = acc - q * scale where kept, acc elsewhere; both exact, so acc = decoded + e_out
    6  pack         header, scales, records, checksum

Magnitudes are compared as integers (bits without the sign), so nothing here depends on a flush-to-zero mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels.spec import (
    FLAG_NONFINITE,
    HEADER_DTYPE,
    HEADER_NBYTES,
    MAGIC,
    VERSION,
    PayloadFormatError,
    Status,
    TopKSpec,
)

__all__ = ["check", "checksum", "compensate", "decode_add", "encode", "header", "quantise", "select"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

INF_KEY = 0x7F800000
QUIET_NAN = np.uint32(0x7FC00000).view(np.float32)


def keys(values: Floats) -> npt.NDArray[np.int32]:
    """Magnitudes as integers: they order like |values|, NaN above infinity."""
    return values.view(np.int32) & np.int32(0x7FFFFFFF)


def power(exponent: npt.NDArray[np.int64]) -> Floats:
    """2^(exponent - 127) for biased exponents in [1, 254]."""
    return (exponent.astype(np.int32) << 23).view(np.float32)


def checksum(payload: Bytes) -> int:
    """Sum of word[i] * (2 i + 1) modulo 2^64 over the payload's u32 words, its own field counted as zero.

    The factor is taken modulo 2^32. Being odd it finds every change inside one word; being a sum it can be
    formed in any order, by any number of threads. It is no defence against an adversary.
    """
    words = payload.view("<u4").astype(np.uint64)
    words[12:14] = 0
    factors = (np.arange(words.size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)) & np.uint64(0xFFFFFFFF)
    return int((words * factors).sum(dtype=np.uint64))


def header(spec: TopKSpec, numel: int, *, digest: int, flags: int) -> Bytes:
    """The 64 header bytes, checksum left zero."""
    block, k, value_bits = spec.layout
    head = np.zeros(1, HEADER_DTYPE)
    head["magic"], head["version"], head["codec"] = MAGIC, VERSION, spec.codec
    head["block"], head["k"], head["value_bits"] = block, k, value_bits
    head["numel"], head["nbytes"], head["digest"], head["flags"] = numel, spec.nbytes(numel), digest, flags
    return head.view(np.uint8)


def compensate(grad: Floats, e_in: Floats | None, decay: float = 1.0) -> Floats:
    """Phase 1."""
    with np.errstate(all="ignore"):
        if e_in is None:
            return grad.copy()
        return grad + (e_in if decay == 1.0 else np.float32(decay) * e_in)


def select(acc: Floats, k: int) -> Ints:
    """Phase 2 on whole blocks: ``acc`` is (nblocks, block), the result (nblocks, k) ascending indices."""
    order = np.argsort(-keys(acc).astype(np.int64), axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1).astype(np.int64)


def quantise(spec: TopKSpec, kept: Floats) -> tuple[Ints, Ints, Floats]:
    """Phases 3 and 4 on kept values (nblocks, k): scale bytes (nblocks,), codes and values (nblocks, k)."""
    largest = keys(kept).max(axis=1).astype(np.int64)
    scales = np.maximum((largest >> 23) + 2 - spec.layout[2], 1)
    with np.errstate(under="ignore"):
        codes = np.rint(kept * power(254 - scales)[:, None]).astype(np.int64)
    codes = np.clip(codes, -spec.qmax, spec.qmax)
    return scales, codes, codes.astype(np.float32) * power(scales)[:, None]


def encode(
    spec: TopKSpec,
    grad: Floats,
    e_in: Floats | None,
    e_out: Floats | None,
    payload: Bytes,
    digest: int = 0,
    *,
    decay: float = 1.0,
    seed: int = 0,
) -> int:
    """Compress ``grad + e_in`` into ``payload`` and leave in ``e_out`` what was not sent.

    Shapes: grad, e_in, e_out (numel,) fp32, contiguous; payload (spec.nbytes(numel),) u8. ``e_in=None`` is
    memoryless, ``e_out=None`` drops the rest; e_out may be e_in itself. Returns the flags. With
    ``FLAG_NONFINITE`` nothing is sent: the body is zero and e_out is e_in (zero when memoryless), so that a
    skipped step loses nothing.
    Source: error feedback, Seide et al. 2014 and Karimireddy et al., arXiv 1901.09847.
    """
    numel, (block, k, value_bits) = grad.size, spec.layout
    nblocks = spec.nblocks(numel)
    acc = compensate(grad, e_in, decay)
    flags = FLAG_NONFINITE if bool((keys(acc) >= INF_KEY).any()) else 0
    payload[:] = 0
    payload[:HEADER_NBYTES] = header(spec, numel, digest=digest, flags=flags)
    if flags:
        rest = np.zeros_like(acc) if e_in is None else e_in.copy()
    else:
        padded = np.zeros((nblocks, block), np.float32)
        padded.reshape(-1)[:numel] = acc
        index = select(padded, k)
        kept = np.take_along_axis(padded, index, axis=1)
        scales, codes, decoded = quantise(spec, kept) if nblocks else (index[:, 0], index, kept)
        np.put_along_axis(padded, index, kept - decoded, axis=1)
        rest = padded.reshape(-1)[:numel]
        records = ((codes << (16 - value_bits)) & 0xFFFF) | index
        if numel % block:
            records[-1][index[-1] >= numel % block] = (
                0  # padding was chosen: a record that adds zero to element 0
            )
        start = spec.records_offset(numel)
        payload[HEADER_NBYTES : HEADER_NBYTES + nblocks] = scales.astype(np.uint8)
        payload[start : start + 2 * records.size] = records.astype("<u2").reshape(-1).view(np.uint8)
    payload[:HEADER_NBYTES].view(HEADER_DTYPE)["checksum"] = checksum(payload)
    if e_out is not None:
        e_out[:] = rest
    return flags


def unpack(spec: TopKSpec, payload: Bytes, numel: int) -> tuple[Ints, Ints, Ints]:
    """Scale bytes (nblocks,), indices and codes (nblocks, k) of a payload whose header has been checked."""
    _, k, value_bits = spec.layout
    nblocks, start = spec.nblocks(numel), spec.records_offset(numel)
    raw = payload[start : start + 2 * k * nblocks].view("<u2").reshape(nblocks, k)
    codes = raw.view("<i2").astype(np.int64) >> (16 - value_bits)
    scales = payload[HEADER_NBYTES : HEADER_NBYTES + nblocks].astype(np.int64)
    return scales, (raw & np.uint16(spec.block - 1)).astype(np.int64), codes


def check(spec: TopKSpec, payload: Bytes, numel: int, digest: int) -> Status:
    """Whether ``payload`` is one that an encoder with this spec, size and plan digest could have written."""
    if payload.size != spec.nbytes(numel):
        return Status.BAD_NBYTES
    head = payload[:HEADER_NBYTES].view(HEADER_DTYPE)[0]
    want = header(spec, numel, digest=digest, flags=int(head["flags"])).view(HEADER_DTYPE)[0]

    def differs(*names: str) -> bool:
        return any(head[name] != want[name] for name in names)

    if (
        differs("magic", "version", "codec", "seed")
        or head["reserved"].any()
        or head["flags"] > FLAG_NONFINITE
    ):
        return Status.BAD_HEADER
    for names, status in (
        (("digest",), Status.BAD_DIGEST),
        (("block", "k", "value_bits", "variant"), Status.BAD_LAYOUT),
        (("numel",), Status.BAD_NUMEL),
        (("nbytes",), Status.BAD_NBYTES),
    ):
        if differs(*names):
            return status
    if checksum(payload) != head["checksum"]:
        return Status.BAD_CHECKSUM
    if not head["flags"]:
        scales, index, _ = unpack(spec, payload, numel)
        tail = numel % spec.block
        if ((scales < 1) | (scales > spec.max_scale)).any() or (tail and (index[-1] >= tail).any()):
            return Status.BAD_RECORD
    return Status.OK


def decode_add(
    spec: TopKSpec, payloads: Sequence[Bytes], out: Floats, weight: float = 1.0, digest: int = 0
) -> int:
    """Add ``weight`` times each payload into ``out`` (numel,) fp32, in list order; returns all flags or-ed.

    Each record is ``out[i] = out[i] + (float(q) * scale) * weight`` with every operation rounded to fp32. If
    any payload is flagged non-finite, all of ``out`` becomes the quiet NaN 0x7fc00000.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say; ``out`` is then untouched.
    """
    flags = 0
    for position, payload in enumerate(payloads):
        status = check(spec, payload, out.size, digest)
        if status is not Status.OK:
            raise PayloadFormatError(status, position)
        flags |= int(payload[:HEADER_NBYTES].view(HEADER_DTYPE)["flags"][0])
    if flags & FLAG_NONFINITE:
        out[:] = QUIET_NAN
        return flags
    for payload in payloads:
        scales, index, codes = unpack(spec, payload, out.size)
        with np.errstate(all="ignore"):
            values = codes.astype(np.float32) * power(scales)[:, None] * np.float32(weight)
            index += (np.arange(len(scales)) * spec.block)[:, None]
            np.add.at(out, index.reshape(-1), values.reshape(-1))
    return flags
