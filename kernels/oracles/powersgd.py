"""Steps 4 and 6 of 7, the oracle of powersgd.

Phases of ``encode``, between compensating and sealing (``reference.encode``)
    1  scale        M = acc / 2^(s - 127), s the largest magnitude's exponent, as rows of ``block`` elements
    2  start        Q of signs, by a hash of (seed, place)
    3  left         P = M Q
    4  orthonormal  each column of P against those before it, twice; a column that vanishes becomes zero
    5  right        Q = M^T P
    6  residual     acc - P Q^T 2^(s - 127), rounded once

The order of every sum is part of the format: ``dot`` over columns and rows, row after row in phase 5, column after
column in phase 6. Nothing is fused.
"""

from __future__ import annotations

import numpy as np

from hybridcomm.kernels.oracles.bits import Bytes, Floats, keys, power
from hybridcomm.kernels.oracles.randk import draw
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.powersgd import PowerSGDSpec

__all__ = ["add", "check", "encode"]

MAX_SCALE = 226
"""Regions with a magnitude of 2^100 and more are not sent: products of two factors could leave fp32's range."""

LANES = 16
VANISHED = np.float32(2.0**-16)
"""A column of whose energy not more than this is left is a rounding error."""


def dot(a: Floats, b: Floats) -> Floats:
    """Sum over the last axis: 16 partial sums, lane l of elements l, l + 16, ..., then halves onto halves."""
    products = a * b
    room = np.zeros((*products.shape[:-1], -(-products.shape[-1] // LANES) * LANES), np.float32)
    room[..., : products.shape[-1]] = products
    partial = np.zeros((*products.shape[:-1], LANES), np.float32)
    for begin in range(0, room.shape[-1], LANES):
        partial = partial + room[..., begin : begin + LANES]
    while partial.shape[-1] > 1:
        half = partial.shape[-1] // 2
        partial = partial[..., :half] + partial[..., half:]
    return partial[..., 0]


def start(spec: PowerSGDSpec, seed: int) -> Floats:
    """Phase 2: (rank, block)."""
    signs = draw(seed, spec.rank * spec.block) >> np.uint32(31)
    return (np.float32(1) - np.float32(2) * signs.astype(np.float32)).reshape(spec.rank, spec.block)


def orthonormal(left: Floats) -> Floats:
    """Phase 4, in place on (rank, rows)."""
    for c in range(len(left)):
        before = dot(left[c], left[c])
        for earlier in [*left[:c], *left[:c]]:
            left[c] -= dot(earlier, left[c]) * earlier
        after = dot(left[c], left[c])
        left[c] *= np.float32(1) / np.sqrt(after) if after > before * VANISHED else np.float32(0)
    return left


def product(left: Floats, right: Floats) -> Floats:
    """P Q^T, (rows, block): rank after rank."""
    total: Floats = left[0][:, None] * right[0]
    for p, q in zip(left[1:], right[1:], strict=True):
        total = total + p[:, None] * q
    return total


def encode(spec: PowerSGDSpec, acc: Floats, payload: Bytes, seed: int = 0) -> Floats:
    """The phases above."""
    if not acc.size:
        return acc
    scale = max(int(keys(acc).max()) >> 23, 1)
    if scale > MAX_SCALE:
        return acc
    padded = np.zeros((spec.rows(acc.size), spec.block), np.float32)
    padded.reshape(-1)[: acc.size] = acc
    matrix = padded * power(np.array(254 - scale))
    left = np.stack([dot(matrix, column) for column in start(spec, seed)])
    left = orthonormal(left)
    right = np.zeros((spec.rank, spec.block), np.float32)
    for i, row in enumerate(matrix):
        right = right + row * left[:, i : i + 1]
    left_at, right_at, _ = spec.offsets(acc.size)
    payload[HEADER_NBYTES] = scale
    payload[left_at : left_at + left.nbytes] = left.reshape(-1).view(np.uint8)
    payload[right_at : right_at + right.nbytes] = right.reshape(-1).view(np.uint8)
    rest: Floats = (padded - product(left, right) * power(np.array(scale))).reshape(-1)[: acc.size]
    return rest


def unpack(spec: PowerSGDSpec, payload: Bytes, numel: int) -> tuple[int, Floats, Floats]:
    """Scale byte, P (rank, rows) and Q (rank, block)."""
    left_at, right_at, _ = spec.offsets(numel)
    left = payload[left_at : left_at + 4 * spec.rank * spec.rows(numel)].view("<f4").reshape(spec.rank, -1)
    right = payload[right_at : right_at + 4 * spec.rank * spec.block].view("<f4").reshape(spec.rank, -1)
    return int(payload[HEADER_NBYTES]), left, right


def check(spec: PowerSGDSpec, payload: Bytes, numel: int) -> bool:
    """Factors whose product stays finite; zero throughout where nothing was sent."""
    if not numel:
        return True
    scale, left, right = unpack(spec, payload, numel)
    if scale == 0:
        return not left.view(np.uint32).any() and not right.view(np.uint32).any()
    largest = np.float32(2), np.float32(2.0**20)
    within = all(
        bool((keys(f) <= keys(np.array(m))).all()) for f, m in zip((left, right), largest, strict=True)
    )
    return scale <= MAX_SCALE and within


def add(spec: PowerSGDSpec, payload: Bytes, out: Floats, weight: np.float32) -> None:
    """``out[i] = out[i] + ((P Q^T)[i] * scale) * weight``, every operation rounded to fp32."""
    if not out.size:
        return
    scale, left, right = unpack(spec, payload, out.size)
    if scale:
        values = product(left, right) * power(np.array(scale))
        out += values.reshape(-1)[: out.size] * weight
