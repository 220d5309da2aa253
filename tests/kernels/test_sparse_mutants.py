"""Planted bugs: oracles that are wrong in one place; the comparison with C++ must notice each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybridcomm.kernels.oracles import gtop1, gtopk, powersgd, randk, topk
from tests.kernels import cases, sparse_cases
from tests.kernels.sparse_cases import SPECS, case, encoder

_signs = topk.quantise_signs
_of_region, _product = gtopk.select, powersgd.product
_draw, _at_random = randk.draw, randk.rounded_at_random


def _mean_over_zeros_too(kept: Any) -> Any:
    """Divides by all that is kept: zeros pull the scale down."""
    padded = np.where(kept == 0, np.float32(1e-45), kept)
    return _signs(padded)


def _scale_of_the_largest(kept: Any) -> Any:
    scales = np.maximum(topk.keys(kept).max(axis=1).astype(np.int64) >> 23, 1)
    codes = np.sign(kept).astype(np.int64)
    return scales, codes, codes.astype(np.float32) * topk.power(scales)[:, None]


def _sends_what_is_below_half(kept: Any) -> Any:
    scales, _, _ = _signs(kept)
    codes = np.sign(kept).astype(np.int64)
    return scales, codes, codes.astype(np.float32) * topk.power(scales)[:, None]


def _ties_to_the_last_row(acc: Any) -> Any:
    rows = acc.shape[1]
    return rows - 1 - np.argmax(gtop1.keys(acc[:, ::-1]), axis=1)


def _compares_signed_values(acc: Any) -> Any:
    return np.argmax(acc, axis=1)


def _groups_side_by_side(acc: Any) -> Any:
    """Group j as elements j * rows ... instead of column j."""
    rows = acc.shape[1]
    flat = acc.reshape(len(acc), acc.shape[2], rows)
    return np.argmax(gtop1.keys(flat), axis=2)


def _scale_one_octave_up(kept: Any, value_bits: int) -> Any:
    scales, codes, decoded = topk.quantised(kept, value_bits)
    return scales + 1, codes, decoded


def _low_half_of_the_seed_alone(seed: int, count: int) -> Any:
    return _draw(seed & 0xFFFFFFFF, count)


def _first_stratum_again(seed: int, count: int) -> Any:
    return np.repeat(_draw(seed, 1), count)


def _rounds_half_even_when_unbiased(kept: Any, hashes: Any) -> Any:
    scales, _ = _at_random(kept, hashes)
    return scales, np.rint(kept.astype(np.float64) / topk.power(scales)[:, None]).astype(np.int64)


def _never_scales(spec: Any, scales: Any, codes: Any) -> Any:
    del spec
    return codes.astype(np.float32) * topk.power(scales)[:, None]


def _region_ties_to_the_highest_index(acc: Any, kept: int) -> Any:
    return np.sort(acc.size - 1 - _of_region(np.ascontiguousarray(acc[::-1]), kept))


def _region_by_blocks(acc: Any, kept: int) -> Any:
    """As many from the front half as from the back: not the largest of all."""
    half = acc.size // 2
    front = min(kept // 2, half)
    return np.concatenate([_of_region(acc[:half], front), half + _of_region(acc[half:], kept - front)])


def _unary_without_ends(counts: Any) -> Any:
    return np.concatenate([np.ones(counts.sum(), np.uint8), np.zeros(counts.size, np.uint8)])


def _one_sum_after_the_other(a: Any, b: Any) -> Any:
    products = a * b
    total = np.zeros(products.shape[:-1], np.float32)
    for j in range(products.shape[-1]):
        total = total + products[..., j]
    return total


def _in_double(a: Any, b: Any) -> Any:
    return (a.astype(np.float64) * b).sum(axis=-1).astype(np.float32)


def _once(left: Any) -> Any:
    for c in range(len(left)):
        for earlier in left[:c]:
            left[c] -= powersgd.dot(earlier, left[c]) * earlier
        left[c] *= np.float32(1) / np.sqrt(powersgd.dot(left[c], left[c]))
    return left


def _last_rank_first(left: Any, right: Any) -> Any:
    return _product(left[::-1], right[::-1])


MUTANTS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "zeros count in the mean": ("topk:0.1+sign/b64", topk, "quantise_signs", _mean_over_zeros_too),
    "scale of the largest": ("topk:0.1+sign/b64", topk, "quantise_signs", _scale_of_the_largest),
    "sends what is below half a scale": (
        "topk:0.1+sign/b64",
        topk,
        "quantise_signs",
        _sends_what_is_below_half,
    ),
    "gtop1: ties to the last row": ("gtop1:0.5/k16", gtop1, "select", _ties_to_the_last_row),
    "gtop1: signed comparison": ("gtop1:0.07/k48", gtop1, "select", _compares_signed_values),
    "gtop1: groups side by side": ("gtop1:0.07/k48", gtop1, "select", _groups_side_by_side),
    "gtopk: ties to the highest index": (
        "gtopk:0.3/b64",
        gtopk,
        "select",
        _region_ties_to_the_highest_index,
    ),
    "gtopk: selects in halves": ("gtopk:0.3/b64", gtopk, "select", _region_by_blocks),
    "gtopk: counts run together": ("gtopk:0.3/b64", gtopk, "unary", _unary_without_ends),
    "powersgd: sums in sequence": ("powersgd:1/b16", powersgd, "dot", _one_sum_after_the_other),
    "powersgd: sums in double": ("powersgd:3/b32", powersgd, "dot", _in_double),
    "powersgd: orthonormal once": ("powersgd:3/b32", powersgd, "orthonormal", _once),
    "powersgd: last rank first": ("powersgd:3/b32", powersgd, "product", _last_rank_first),
    "randk: half of the seed": ("randk:0.5", randk, "draw", _low_half_of_the_seed_alone),
    "randk: one draw for all": ("randk:0.5", randk, "draw", _first_stratum_again),
    "randk: rounds to nearest": (
        "randk:0.1+unbiased",
        randk,
        "rounded_at_random",
        _rounds_half_even_when_unbiased,
    ),
    "randk: never scales": ("randk:0.1+unbiased", randk, "decoded", _never_scales),
    "gtop1: scale one octave up": ("gtop1:0.5/k16", gtop1, "quantised", _scale_one_octave_up),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, module, attribute, wrong = MUTANTS[name]
    spec = SPECS[text]
    monkeypatch.setattr(module, attribute, wrong)
    caught = [
        (kind, numel)
        for kind in cases.KINDS
        for numel in sparse_cases.sizes(spec)
        if cases.run(case(spec, kind, numel), encoder())
        != cases.run(case(spec, kind, numel), encoder("scalar"))
    ]
    assert caught, "the comparison let a wrong oracle pass"
