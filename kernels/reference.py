"""Steps 4 and 6 of 7, the oracle: what compress and decompress must compute, bit for bit, in plain numpy.

Phases of ``encode``
    1  compensate   acc = grad + decay * e_in       (fp32, each operation rounded; acc = grad when memoryless)
    2  look         a NaN or an infinity anywhere: nothing is sent, the flag says so
    3  body         the codec's own part, in ``oracles/``: fills its sections, leaves what is not sent
    4  seal         header, checksum

Everything here holds for all codecs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from hybridcomm.kernels.oracles import quant, topk
from hybridcomm.kernels.oracles.bits import INF_KEY, QUIET_NAN, Bytes, Floats, Oracle, keys
from hybridcomm.kernels.payload import (
    FLAG_NONFINITE,
    HEADER_DTYPE,
    HEADER_NBYTES,
    MAGIC,
    VERSION,
    Codec,
    PayloadFormatError,
    Spec,
    Status,
)

__all__ = ["check", "checksum", "compensate", "decode_add", "encode", "header"]

ORACLES: Mapping[Codec, Oracle] = MappingProxyType(
    {
        Codec.TOPK: topk,
        Codec.FP16: quant,
        Codec.BF16: quant,
        Codec.FP8: quant,
        Codec.INT8: quant,
        Codec.INT4: quant,
        Codec.SIGN1: quant,
    }
)


def checksum(payload: Bytes) -> int:
    """Sum of word[i] * (2 i + 1) modulo 2^64 over the payload's u32 words, its own field counted as zero.

    The factor is taken modulo 2^32. Being odd it finds every change inside one word; being a sum it can be
    formed in any order, by any number of threads. It is no defence against an adversary.
    """
    words = payload.view("<u4").astype(np.uint64)
    words[12:14] = 0
    factors = (np.arange(words.size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)) & np.uint64(0xFFFFFFFF)
    return int((words * factors).sum(dtype=np.uint64))


def header(spec: Spec, numel: int, *, digest: int, flags: int, seed: int = 0) -> Bytes:
    """The 64 header bytes, checksum left zero."""
    head = np.zeros(1, HEADER_DTYPE)
    head["magic"], head["version"] = MAGIC, VERSION
    for name, value in zip(("codec", "value_bits", "variant", "block", "k"), spec.params, strict=True):
        head[name] = value
    head["numel"], head["nbytes"], head["digest"], head["flags"] = numel, spec.nbytes(numel), digest, flags
    head["seed"] = seed if spec.seeded else 0
    return head.view(np.uint8)


def compensate(grad: Floats, e_in: Floats | None, decay: float = 1.0) -> Floats:
    """Phase 1."""
    with np.errstate(all="ignore"):
        if e_in is None:
            return grad.copy()
        return grad + (e_in if decay == 1.0 else np.float32(decay) * e_in)


def encode(
    spec: Spec,
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
    acc = compensate(grad, e_in, decay)
    flags = FLAG_NONFINITE if bool((keys(acc) >= INF_KEY).any()) else 0
    payload[:] = 0
    payload[:HEADER_NBYTES] = header(spec, grad.size, digest=digest, flags=flags, seed=seed)
    if flags:
        rest = np.zeros_like(acc) if e_in is None else e_in.copy()
    else:
        with np.errstate(all="ignore"):
            rest = ORACLES[spec.codec].encode(spec, acc, payload, seed)
    payload[:HEADER_NBYTES].view(HEADER_DTYPE)["checksum"] = checksum(payload)
    if e_out is not None:
        e_out[:] = rest
    return flags


def check(spec: Spec, payload: Bytes, numel: int, digest: int) -> Status:
    """Whether ``payload`` is one that an encoder with this spec, size and plan digest could have written."""
    if payload.size != spec.nbytes(numel):
        return Status.BAD_NBYTES
    head = payload[:HEADER_NBYTES].view(HEADER_DTYPE)[0]
    flags, seed = int(head["flags"]), int(head["seed"])
    want = header(spec, numel, digest=digest, flags=flags, seed=seed).view(HEADER_DTYPE)[0]

    def differs(*names: str) -> bool:
        return any(head[name] != want[name] for name in names)

    if differs("magic", "version", "codec", "seed") or head["reserved"].any() or flags > FLAG_NONFINITE:
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
    if not flags and not ORACLES[spec.codec].check(spec, payload, numel):
        return Status.BAD_RECORD
    return Status.OK


def decode_add(
    spec: Spec, payloads: Sequence[Bytes], out: Floats, weight: float = 1.0, digest: int = 0
) -> int:
    """Add ``weight`` times each payload into ``out`` (numel,) fp32, in list order; returns all flags or-ed.

    Each value is added as ``out[i] = out[i] + value * weight``, every operation rounded to fp32. If any payload
    is flagged non-finite, all of ``out`` becomes the quiet NaN 0x7fc00000.

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
        with np.errstate(all="ignore"):
            ORACLES[spec.codec].add(spec, payload, out, np.float32(weight))
    return flags
