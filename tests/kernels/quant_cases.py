"""Specs of the quantising codecs, and planted bugs: oracles that are wrong in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from hybridcomm.kernels import Codec, Spec, parse, reference
from hybridcomm.kernels.oracles import quant
from hybridcomm.kernels.oracles.bits import keys
from tests.kernels.mutants import MUTANTS as OF_ALL

SPECS = tuple(
    parse(text)
    for text in (
        "fp16",
        "bf16",
        "fp8/g16",
        "fp8",
        "fp8:e5m2/g64",
        "int8/g16",
        "int8",
        "int4/g16",
        "int4",
        "sign1/g16",
        "sign1",
        "sign1/g4096",
    )
)
FEW = tuple(
    parse(text) for text in ("fp16", "bf16", "fp8/g16", "fp8:e5m2/g16", "int8/g16", "int4/g16", "sign1/g16")
)


def specs() -> st.SearchStrategy[Spec]:
    names = ("fp8", "fp8:e5m2", "int8", "int4", "sign1")
    grouped = st.builds(
        lambda name, bits: parse(f"{name}/g{1 << bits}"), st.sampled_from(names), st.integers(4, 12)
    )
    return st.sampled_from(SPECS) | grouped


_scale_of, _mean_of, _to_codes = quant.scale_of, quant.mean_of, quant.to_codes
_to_float_codes, _pack, _form_of = quant.to_float_codes, quant.pack, quant.form_of


def _scale_one_octave_up(spec: Any, groups: Any) -> Any:
    return np.minimum(_scale_of(spec, groups) + 1, spec.max_scale)


def _no_floor_under_the_scale(spec: Any, groups: Any) -> Any:
    largest = (keys(groups).max(axis=1).astype(np.int64) >> 23) - spec.top
    return np.where(largest < 1, 2, largest)


def _scale_of_the_group_before(spec: Any, groups: Any) -> Any:
    return np.roll(_scale_of(spec, groups), 1)


def _mean_over_padding(groups: Any, valid: Any) -> Any:
    return _mean_of(groups, np.full_like(valid, groups.shape[1]))


def _mean_in_floats(groups: Any, valid: Any) -> Any:
    mean = (np.abs(groups).sum(axis=1, dtype=np.float32) / valid.astype(np.float32)).astype(np.float32)
    return (mean.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _mean_rounded_up(groups: Any, valid: Any) -> Any:
    bits = _mean_of(groups, valid).view(np.uint32)
    return np.where(bits > 0, bits + np.uint32(0x10000), bits).astype(np.uint32).view(np.float32)


def _mean_of_the_signed(groups: Any, valid: Any) -> Any:
    return _mean_of(np.maximum(groups, np.float32(0)), valid)


def _half_away_from_zero(spec: Any, scaled: Any) -> Any:
    if spec.codec is Codec.FP8:
        return _to_codes(spec, scaled)
    qmax = (1 << (spec.value_bits - 1)) - 1
    return np.clip(np.floor(np.abs(scaled) + 0.5) * np.sign(scaled), -qmax, qmax).astype(np.int64)


def _does_not_clamp(spec: Any, scaled: Any) -> Any:
    return _to_codes(spec, scaled) if spec.codec is Codec.FP8 else np.rint(scaled).astype(np.int64)


def _uses_the_reserved_code(spec: Any, scaled: Any) -> Any:
    codes, lowest = _to_codes(spec, scaled), 1 << (spec.value_bits - 1)
    return codes if spec.codec is Codec.FP8 else np.where(codes == 1 - lowest, -lowest, codes)


def _cuts_digits_off(spec: Any, values: Any) -> Any:
    mantissa, _, _ = _form_of(spec)
    mask = np.uint32(0xFFFFFFFF << (23 - mantissa) & 0xFFFFFFFF)
    return _to_float_codes(spec, (values.view(np.uint32) & mask).view(np.float32))


def _flushes_small_codes(spec: Any, values: Any) -> Any:
    _, emin, _ = _form_of(spec)
    small = np.abs(values.astype(np.float64)) < 2.0**emin
    return _to_float_codes(
        spec, np.where(small, np.copysign(np.float32(0), values), values).astype(np.float32)
    )


def _loses_the_sign_of_zero(spec: Any, values: Any) -> Any:
    return _to_float_codes(spec, values + np.float32(0))


def _one_code_too_many(spec: Any) -> Any:
    mantissa, emin, largest = _form_of(spec)
    return mantissa, emin, largest + 1


def _first_code_in_the_high_bits(spec: Any, codes: Any) -> Any:
    packed = _pack(spec, codes)
    if spec.value_bits == 4:
        return packed >> np.uint8(4) | packed << np.uint8(4)
    return np.packbits(codes.astype(np.uint8)) if spec.value_bits == 1 else packed


def _most_significant_byte_first(spec: Any, codes: Any) -> Any:
    packed = _pack(spec, codes)
    return packed.reshape(-1, 2)[:, ::-1].reshape(-1) if spec.value_bits == 16 else packed


_SHARED = ("residual forgotten", "denormals flushed", "last element dropped", "numel off by one")
MUTANTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "scale one octave up": (quant, "scale_of", _scale_one_octave_up),
    "no floor under the scale": (quant, "scale_of", _no_floor_under_the_scale),
    "scale of the group before": (quant, "scale_of", _scale_of_the_group_before),
    "mean over padding": (quant, "mean_of", _mean_over_padding),
    "mean in floats": (quant, "mean_of", _mean_in_floats),
    "mean rounded up": (quant, "mean_of", _mean_rounded_up),
    "mean of the signed": (quant, "mean_of", _mean_of_the_signed),
    "half away from zero": (quant, "to_codes", _half_away_from_zero),
    "no clamp": (quant, "to_codes", _does_not_clamp),
    "reserved code": (quant, "to_codes", _uses_the_reserved_code),
    "digits cut off": (quant, "to_float_codes", _cuts_digits_off),
    "small codes flushed": (quant, "to_float_codes", _flushes_small_codes),
    "sign of zero lost": (quant, "to_float_codes", _loses_the_sign_of_zero),
    "one code too many": (quant, "form_of", _one_code_too_many),
    "first code in the high bits": (quant, "pack", _first_code_in_the_high_bits),
    "most significant byte first": (quant, "pack", _most_significant_byte_first),
    **{name: (reference, *OF_ALL[name]) for name in _SHARED},
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The oracle with one bug in it."""
    module, attribute, wrong = MUTANTS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, attribute, wrong)
        yield
