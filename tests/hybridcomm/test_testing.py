"""The conformance harness passes good compressors and finds each planted breach, with the check that is made for it."""

from __future__ import annotations

import pytest

from hybridcomm.custom import CustomCompressor
from hybridcomm.testing import ConformanceError, check_compressor
from tests.hybridcomm.compressors import BROKEN, GOOD


@pytest.mark.parametrize("good", GOOD)
@pytest.mark.parametrize("seed", [0, 1])
def test_good_compressors_conform(good: type[CustomCompressor], seed: int) -> None:
    check_compressor(good(), seed=seed)


@pytest.mark.parametrize(("broken", "check"), BROKEN.items())
def test_planted_breaches_are_found(broken: type[CustomCompressor], check: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_compressor(broken())
    assert any(line.startswith(check + ":") for line in caught.value.findings), caught.value
