"""Planted bugs: oracles that are wrong in one place, to show that a comparison would notice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hybridcomm.kernels import HEADER_NBYTES, TopKSpec, reference
from hybridcomm.kernels.oracles import topk
from hybridcomm.kernels.oracles.bits import keys, power

_select, _quantise = topk.select, topk.quantise
_compensate, _header = reference.compensate, reference.header


def _ties_to_the_highest_index(acc: Any, k: int) -> Any:
    return acc.shape[1] - 1 - _select(np.ascontiguousarray(acc[:, ::-1]), k)[:, ::-1]


def _largest_first(acc: Any, k: int) -> Any:
    return np.argsort(-keys(acc).astype(np.int64), axis=1, kind="stable")[:, :k]


def _last_block_off_by_one(acc: Any, k: int) -> Any:
    index = _select(acc, k)
    index[-1:] = (index[-1:] + 1) % acc.shape[1]
    return np.sort(index, axis=1)


def _compares_signed_values(acc: Any, k: int) -> Any:
    return np.sort(np.argsort(-acc, axis=1, kind="stable")[:, :k], axis=1)


def _rounds_half_away(spec: TopKSpec, kept: Any) -> Any:
    scales, _, _ = _quantise(spec, kept)
    scale = power(scales)[:, None]
    codes = np.floor(np.abs(kept.astype(np.float64)) / scale + 0.5) * np.sign(kept)
    codes = np.clip(codes, -spec.qmax, spec.qmax).astype(np.int64)
    return scales, codes, codes.astype(np.float32) * scale


def _does_not_clamp(spec: TopKSpec, kept: Any) -> Any:
    scales, _, _ = _quantise(spec, kept)
    scale = power(scales)[:, None]
    codes = np.rint(kept.astype(np.float64) / scale).astype(np.int64)
    return scales, codes, codes.astype(np.float32) * scale


def _scale_one_octave_up(spec: TopKSpec, kept: Any) -> Any:
    scales, codes, decoded = _quantise(spec, kept)
    return scales + 1, codes, decoded


def _no_floor_under_the_scale(spec: TopKSpec, kept: Any) -> Any:
    largest = keys(kept).max(axis=1).astype(np.int64)
    scales, codes, decoded = _quantise(spec, kept)
    return (
        np.maximum((largest >> 23) + 2 - spec.layout[2], 0),
        codes,
        np.where(scales[:, None] == 1, 0, decoded),
    )


def _forgets_the_residual(grad: Any, e_in: Any, decay: float) -> Any:
    del e_in, decay
    return grad.copy()


def _flushes_denormals(grad: Any, e_in: Any, decay: float) -> Any:
    acc = _compensate(grad, e_in, decay)
    return np.where(np.abs(acc) < np.float32(2.0**-126), np.float32(0), acc)


def _drops_the_last_element(grad: Any, e_in: Any, decay: float) -> Any:
    acc = _compensate(grad, e_in, decay)
    acc[-1:] = 0
    return acc


def _header_of_one_element_less(spec: TopKSpec, numel: int, **fields: int) -> Any:
    return _header(spec, max(numel - 1, 0), **fields)


def _keeps_padding_records(spec: TopKSpec, kept: Any) -> Any:
    scales, codes, decoded = _quantise(spec, kept)
    return scales, np.where(kept == 0, 1, codes), decoded


def _records_right_after_the_scales(spec: TopKSpec, numel: int) -> int:
    return HEADER_NBYTES + spec.nblocks(numel)


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ties to the highest index": ("select", _ties_to_the_highest_index),
    "records by size": ("select", _largest_first),
    "last block off by one": ("select", _last_block_off_by_one),
    "signed comparison": ("select", _compares_signed_values),
    "half away from zero": ("quantise", _rounds_half_away),
    "no clamp": ("quantise", _does_not_clamp),
    "scale one octave up": ("quantise", _scale_one_octave_up),
    "no floor under the scale": ("quantise", _no_floor_under_the_scale),
    "zeros sent as one": ("quantise", _keeps_padding_records),
    "residual forgotten": ("compensate", _forgets_the_residual),
    "denormals flushed": ("compensate", _flushes_denormals),
    "last element dropped": ("compensate", _drops_the_last_element),
    "numel off by one": ("header", _header_of_one_element_less),
    "sections not padded": ("records_offset", _records_right_after_the_scales),
}


def _nbytes_of(right: Callable[[TopKSpec, int], int]) -> Callable[[TopKSpec, int], int]:
    """The true size, whatever is done to the offset of the records."""
    return lambda spec, numel: right(spec, numel) + -(-2 * spec.layout[1] * spec.nblocks(numel) // 16) * 16


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The oracle with one bug in it."""
    attribute, wrong = MUTANTS[name]
    with pytest.MonkeyPatch.context() as patch:
        if attribute == "records_offset":
            patch.setattr(TopKSpec, "nbytes", _nbytes_of(TopKSpec.records_offset))
            patch.setattr(TopKSpec, attribute, wrong)
        else:
            patch.setattr(topk if hasattr(topk, attribute) else reference, attribute, wrong)
        yield
