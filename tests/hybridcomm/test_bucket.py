from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.bucket import Bucket, BucketState, ParameterSize, plan_buckets
from hybridcomm.errors import HybridCommError, UnsupportedError

PADDING = {"none": 16, "topk:0.1/b64": 64, "topk:0.01": 1024}
SIZES = st.lists(
    st.tuples(st.integers(0, 500), st.sampled_from(["float32", "bfloat16"]), st.sampled_from(list(PADDING))),
    max_size=20,
)


def named(sizes: Sequence[tuple[Any, ...]]) -> list[ParameterSize]:
    return [
        ParameterSize(f"p{i}", *fields, *(PADDING[name] for name in fields[2:]))
        for i, fields in enumerate(sizes)
    ]


@given(sizes=SIZES, cap=st.integers(1, 3000))
def test_every_parameter_once_back_to_front_padded_once(sizes: list[tuple[int, str, str]], cap: int) -> None:
    parameters = named(sizes)
    layouts = plan_buckets(parameters, cap_nbytes=cap)
    names = [name for layout in layouts for name in layout.names]
    assert sorted(names) == sorted(parameter.name for parameter in parameters)
    by_name = {parameter.name: parameter for parameter in parameters}
    for index, layout in enumerate(layouts):
        assert layout.index == index
        pad = PADDING[layout.compress]
        assert layout.numel % pad == 0
        assert 0 <= layout.numel - layout.used < pad
        begin = 0
        for span in layout.spans:
            assert (span.begin, span.numel) == (begin, by_name[span.name].numel)
            assert by_name[span.name].dtype == layout.dtype
            assert by_name[span.name].compress == layout.compress
            begin = span.end
        order = [int(name[1:]) for name in layout.names]
        assert order == sorted(order, reverse=True)
        size = 4 if layout.dtype == "float32" else 2
        assert layout.used * size <= cap or sum(span.numel > 0 for span in layout.spans) == 1
    fills = [int(layout.names[-1][1:]) for layout in layouts]
    assert fills == sorted(fills, reverse=True), "numbered by when backward fills them"


def test_layout_digests_differ() -> None:
    base = [(100, "float32"), (50, "float32"), (7, "float32")]
    plans = [
        plan_buckets(named(base), cap_nbytes=1 << 20),
        plan_buckets(named(base[::-1]), cap_nbytes=1 << 20),
        plan_buckets([p._replace(align=1024) for p in named(base)], cap_nbytes=1 << 20),
        plan_buckets([p._replace(compress="topk:0.01") for p in named(base)], cap_nbytes=1 << 20),
        plan_buckets(named([(n, "bfloat16") for n, _ in base]), cap_nbytes=1 << 20),
        plan_buckets([ParameterSize("q" + p.name, *p[1:]) for p in named(base)], cap_nbytes=1 << 20),
    ]
    assert len({layouts[0].digest() for layouts in plans}) == len(plans)
    assert all(0 <= layouts[0].digest() < 2**63 for layouts in plans)


def test_states_go_round_in_one_direction() -> None:
    (layout,) = plan_buckets(named([(3, "float32"), (4, "float32")]), cap_nbytes=1 << 20)
    bucket = Bucket(layout)
    with pytest.raises(HybridCommError, match="from filling to in_flight"):
        bucket.advance(BucketState.IN_FLIGHT)
    bucket.mark_ready("p1")
    assert bucket.missing == ("p0",)
    with pytest.raises(HybridCommError, match="'p1' got a second gradient"):
        bucket.mark_ready("p1")
    bucket.mark_ready("p0")
    assert bucket.state is BucketState.READY
    for state in (BucketState.IN_FLIGHT, BucketState.DONE, BucketState.FILLING):
        bucket.advance(state)
    bucket.reset()
    assert bucket.missing == ("p1", "p0")


def test_bad_settings_are_named() -> None:
    with pytest.raises(UnsupportedError, match="capacity of 0 bytes"):
        plan_buckets(named([(3, "float32")]), cap_nbytes=0)
    with pytest.raises(UnsupportedError, match="'p0' is listed twice"):
        plan_buckets(named([(3, "float32")]) * 2, cap_nbytes=100)
    assert plan_buckets([], cap_nbytes=100) == ()
