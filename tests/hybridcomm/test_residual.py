from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.bucket import Span
from hybridcomm.errors import ResidualError
from hybridcomm.residual import Residual

REGIONS = ((0, 4), (4, 8), (12, 14))
SPANS = (Span("a", 0, 6), Span("b", 6, 13), Span("c", 13, 16))


def stage(residual: Residual, name: str = "x") -> tuple[np.ndarray, np.ndarray]:
    return residual.stage(name, numel=16, regions=REGIONS, spans=SPANS)


def test_first_stage_reads_what_was_committed_and_later_ones_go_on_in_place() -> None:
    residual = Residual()
    e_in, e_out = stage(residual)
    assert e_in is not e_out
    assert e_in.dtype == e_out.dtype == np.float32
    assert e_in.shape == e_out.shape == (10,)
    assert not e_in.any()
    e_out[:] = 1
    again_in, again_out = stage(residual)
    assert again_in is again_out is e_out
    residual.commit()
    assert not residual.pending
    e_in, e_out = stage(residual)
    assert (e_in == 1).all()
    e_out[:] = 2
    residual.rollback()
    e_in, _ = stage(residual)
    assert (e_in == 1).all()
    assert residual.nbytes == 2 * 10 * 4


def test_commit_and_rollback_act_on_all_entries_and_only_on_staged_ones() -> None:
    residual = Residual()
    stage(residual, "x")[1][:] = 1
    stage(residual, "y")[1][:] = 2
    residual.commit()
    stage(residual, "x")[1][:] = 3  # y takes no part in this step
    assert residual.pending
    residual.commit()
    assert (stage(residual, "x")[0] == 3).all()
    assert (stage(residual, "y")[0] == 2).all()
    residual.rollback()
    assert (stage(residual, "x")[0] == 3).all()


def test_another_layout_is_refused_but_another_chunk_size_is_not() -> None:
    residual = Residual()
    stage(residual)
    residual.stage("x", numel=16, regions=[(0, 2), (2, 8), (12, 13), (13, 14)], spans=SPANS)
    for fields in (
        {"numel": 17, "regions": REGIONS, "spans": SPANS},
        {"numel": 16, "regions": REGIONS[:2], "spans": SPANS},
        {"numel": 16, "regions": REGIONS, "spans": SPANS[:2]},
    ):
        with pytest.raises(ResidualError, match="keep one Residual per tensor"):
            residual.stage("x", **fields)  # type: ignore[arg-type]
    with pytest.raises(ResidualError, match="ascend"):
        residual.stage("z", numel=16, regions=[(4, 8), (0, 4)])


def filled() -> Residual:
    residual = Residual()
    stage(residual)[1][:] = np.arange(10)
    residual.commit()
    return residual


def test_state_is_keyed_by_parameter_span_and_holds_only_what_was_committed() -> None:
    residual = filled()
    stage(residual)[1][:] = 99
    state = residual.state_dict()
    assert {key: values.tolist() for key, values in state.items()} == {
        "a[0:6]": [0, 1, 2, 3, 4, 5],
        "b[0:2]": [6, 7],
        "b[6:7]": [8],
        "c[0:1]": [9],
    }


@pytest.mark.parametrize("staged_before", [False, True])
def test_load_restores_and_resumed_equals_never_stopped(staged_before: bool) -> None:
    state, other = filled().state_dict(), Residual()
    if staged_before:
        stage(other)[1][:] = 5
    other.load_state_dict(state)
    assert not other.pending
    assert (stage(other)[0] == np.arange(10)).all()
    assert other.unclaimed == ()
    other.rollback()
    assert {k: v.tolist() for k, v in other.state_dict().items()} == {k: v.tolist() for k, v in state.items()}


def test_load_outlives_other_bucket_names_and_boundaries() -> None:
    """The same elements in two buckets instead of one: keyed by index they would be lost or swapped."""
    other = Residual()
    other.load_state_dict(filled().state_dict())
    assert set(other.unclaimed) == {"a", "b", "c"}
    second, _ = other.stage(
        "q", numel=10, regions=[(0, 2), (6, 8)], spans=[Span("b", 0, 7), Span("c", 7, 10)]
    )
    assert second.tolist() == [6, 7, 8, 9]
    assert other.unclaimed == ("a",)
    assert "a[0:6]" in other.state_dict()
    first, _ = other.stage("p", numel=6, regions=[(0, 6)], spans=[Span("a", 0, 6)])
    assert first.tolist() == [0, 1, 2, 3, 4, 5]


def test_rekey_keeps_values_for_other_buckets() -> None:
    residual = filled()
    stage(residual)[1][:] = 77
    residual.rekey()
    assert not residual.pending
    e_in, _ = residual.stage("other", numel=16, regions=REGIONS, spans=SPANS)
    assert e_in.tolist() == list(range(10))


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_lost() -> None:
    state = filled().state_dict()
    for name, broken in (
        ("missing", {k: v for k, v in state.items() if not k.startswith("b[6")}),
        ("too much", {**state, "c[1:2]": np.ones(1, np.float32)}),
    ):
        other = Residual()
        stage(other)[1][:] = 5
        other.commit()
        with pytest.raises(ResidualError, match="another topology"):
            other.load_state_dict(broken)
        assert (stage(other)[0] == 5).all(), name
    for broken in (
        {"a": np.ones(1, np.float32)},
        {"a[0:2]": np.ones(1, np.float32)},
        {"a[0:1]": np.ones(1, np.float64)},
        {"a[0:1]": np.ones((1, 1), np.float32)},
    ):
        with pytest.raises(ResidualError, match="state entry"):
            Residual().load_state_dict(broken)


@given(
    numel=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    edges=st.lists(st.integers(0, 60), max_size=6),
)
def test_state_round_trips_for_any_layout(numel: int, cuts: list[int], edges: list[int]) -> None:
    marks = sorted({0, numel, *(cut % (numel + 1) for cut in cuts)})
    spans = [Span(f"p{i}[0]", b, e) for i, (b, e) in enumerate(pairwise(marks))]
    bounds = sorted({edge % (numel + 1) for edge in edges})
    regions = list(zip(bounds[::2], bounds[1::2], strict=False))
    first, second = Residual(), Residual()
    _, e_out = first.stage("x", numel=numel, regions=regions, spans=spans)
    e_out[:] = np.arange(len(e_out)) + 1
    first.commit()
    second.load_state_dict(first.state_dict())
    e_in, _ = second.stage("y", numel=numel, regions=regions, spans=spans)
    assert e_in.tolist() == e_out.tolist()
