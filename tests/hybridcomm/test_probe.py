"""The probe: its fit on known figures, and that all ranks of real contexts get the same ones."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from hybridcomm import probe as probing
from hybridcomm.errors import UnsupportedError
from hybridcomm.probe import Figures, fit_link, probe
from hybridcomm.topology import Link, Topology
from tests.engine_ranks import each_rank, engine_contexts

_SIZES = (64, 1 << 14, 1 << 15, 1 << 16, 3 << 15, 1 << 17)


@pytest.mark.parametrize("build", [probing._between_nodes, probing._inside_nodes])
@pytest.mark.parametrize("sizes", [[2, 2], [3, 3, 2]])
def test_the_fit_finds_the_figures_that_the_model_was_given(build: Any, sizes: list[int]) -> None:
    topology, link = Topology.from_sizes(sizes), Link(alpha=30e-6, beta=2e-9)
    plans = [build(topology, numel, 1 << 20) for numel in _SIZES]
    known = replace(topology, intra_node=link, inter_node=link)
    found = fit_link(plans, [plan.cost(known) for plan in plans])
    assert found.alpha == pytest.approx(link.alpha, rel=0.05)
    assert found.beta == pytest.approx(link.beta, rel=0.2)  # alpha hides in the pipeline of the larger ones


@pytest.mark.parametrize("disturbed", range(1, 6))
def test_one_disturbed_sample_does_not_move_beta(disturbed: int) -> None:
    topology, link = Topology.virtual(2, 1), Link(alpha=0.0, beta=8e-9)
    plans = [probing._between_nodes(topology, numel, 1 << 20) for numel in _SIZES]
    rng = random.Random(disturbed)
    seconds = [plan.cost(replace(topology, inter_node=link)) * rng.uniform(0.98, 1.02) for plan in plans]
    seconds[disturbed] *= 5
    assert fit_link(plans, seconds).beta == pytest.approx(link.beta, rel=0.15)


def test_plans_of_one_link_class_touch_only_that() -> None:
    topology = Topology.from_sizes([2, 3, 1])
    near, far = (
        build(topology, 99_999, 1 << 20) for build in (probing._inside_nodes, probing._between_nodes)
    )
    assert {step.op for step in near.steps} == {"reduce", "gather"}
    assert {step.group for step in near.steps} == {(0, 1), (2, 3, 4)}
    assert {step.op for step in far.steps} == {"exchange_reduce", "exchange_gather"}
    assert {step.group for step in far.steps} == {topology.owners(0)}


@pytest.mark.parametrize(("sizes", "links"), [([2, 1], 2), ([2], 1), ([1, 1], 1)])
def test_all_ranks_get_the_same_measured_figures(sizes: list[int], links: int) -> None:
    topology = Topology.from_sizes(sizes)
    with engine_contexts(topology) as contexts:
        found = each_rank(
            lambda rank: probe(contexts[rank], codecs=["topk:0.01"], budget=0.05), topology.world_size
        )
    figures = found[0]
    assert isinstance(figures, Figures), figures
    assert all(other == figures for other in found)
    measured = [link for link in (figures.topology.intra_node, figures.topology.inter_node) if link != Link()]
    assert len(measured) == links
    assert all(link.alpha is not None and 0 <= link.alpha < 1 for link in measured)
    assert all(link.beta is not None and 0 <= link.beta < 1e-6 for link in measured)
    (kernel,) = figures.kernels.values()
    assert 1e-12 < kernel.encode < 1e-6
    assert 1e-12 < kernel.sum_of(2) < 1e-6
    assert "ns/element" in str(figures)


def test_a_budget_must_be_positive() -> None:
    with (
        engine_contexts(Topology.virtual(1, 1)) as (context,),
        pytest.raises(UnsupportedError, match="budget"),
    ):
        probe(context, budget=0)
