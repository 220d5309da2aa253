from __future__ import annotations

import pytest

from hybridcomm.compress import Compressor, check_compressible, resolve
from hybridcomm.errors import CompressorError, DataTypeError, UnsupportedError


def get(text: str) -> Compressor:
    compressor = resolve(text)
    assert compressor is not None
    return compressor


def test_what_compress_means() -> None:
    assert resolve(None) is None
    assert resolve("none") is None
    assert str(get("topk")) == str(get("topk:0.01"))
    assert get("topk:0.05").spec.layout[1] == round(0.05 * 1024)
    for text in ("topk", "topk:0.1", "topk:0.25/b64", "topk:1.0"):
        assert resolve(str(get(text))) == get(text)
        assert resolve(get(text)) == get(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tpok", "did you mean 'topk'"),
        ("TopK:0.1", "did you mean 'topk'"),
        ("top-k", "did you mean 'topk'"),
        ("xyz", "known: topk"),
        ("int", "did you mean 'int"),
        ("sign", "did you mean 'sign1'"),
        ("fp8:e3m4", "fp8:e5m2"),
        ("int8/g100", "power of two"),
        ("topk:", "write topk"),
        ("topk:x", "topk:0.01"),
        ("topk:0", "ratio"),
        ("topk:-0.1", "ratio"),
        ("topk:1.5", "ratio"),
        ("topk:nan", "ratio"),
        ("topk:0.1/b100", "power of two"),
        ("", "known: topk"),
        (0.01, "expected None or a text"),
    ],
)
def test_bad_settings_are_named(text: str, match: str) -> None:
    with pytest.raises(CompressorError, match=match):
        resolve(text)


def test_facts_are_those_of_the_payload() -> None:
    codec = get("topk:0.25/b64")
    assert 0 < codec.contraction <= 0.25  # exact values would reach k / block
    assert codec.nbytes(6400) == codec.spec.nbytes(6400)
    assert codec.ratio(6400) == 4 * 6400 / codec.nbytes(6400)
    assert codec.ratio(0) == 1.0
    assert not codec.unbiased
    assert not codec.summable


@pytest.mark.parametrize(
    ("text", "canonical", "ratio"),
    [
        ("fp16", "fp16", 2.0),
        ("bf16", "bf16", 2.0),
        ("fp8", "fp8:e4m3/g128", 32 / (8 + 8 / 128)),
        ("int8", "int8/g128", 32 / (8 + 8 / 128)),
        ("int4", "int4/g32", 32 / (4 + 8 / 32)),
        ("sign1", "sign1/g256", 32 / (1 + 16 / 256)),
    ],
)
def test_quantisers_state_size_and_text(text: str, canonical: str, ratio: float) -> None:
    codec = get(text)
    assert str(codec) == canonical
    numel = 1 << 20
    assert codec.nbytes(numel) == 64 + 4 * numel / ratio
    assert (codec.contraction is None) == (text == "fp16")
    assert not codec.unbiased


def test_only_float32_sums_and_means_can_be_compressed() -> None:
    check_compressible(get("topk"), dtype="float32", op="mean")
    with pytest.raises(DataTypeError, match="bfloat16"):
        check_compressible(get("topk"), dtype="bfloat16", op="sum")
    with pytest.raises(UnsupportedError, match="'max'"):
        check_compressible(get("topk"), dtype="float32", op="max")
