"""The page of predicted steps: what the generator prints, laws that any such figures obey, and arithmetic by hand."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks import predicted_steps
from benchmarks.predicted_model import (
    DECODE_LAUNCHES,
    ENCODE_LAUNCHES,
    Cluster,
    Stages,
    flat,
    kernel_cost,
    line_rate,
)
from benchmarks.predicted_steps import BUCKETS, CODECS, FASTER, NUMEL, RATES, Prediction
from hybridcomm import collective_plans
from hybridcomm import compress as compressors
from hybridcomm.auto import Policy
from hybridcomm.compress import Compressor
from hybridcomm.kernels.cubins import roof
from hybridcomm.kernels.cubins.gpu import GPUS
from hybridcomm.kernels.cubins.manifest import Manifest

# All share what was simulated once; a simulation of 64 ranks takes up to a second.
pytestmark = [pytest.mark.xdist_group("predicted-steps"), pytest.mark.timeout(600)]
ROUNDINGS = 32 * sys.float_info.epsilon  # no more than so many operations on each side
NBYTES = 4 * NUMEL


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    return Prediction(manifest=Manifest.read())


def codec(text: str) -> Compressor:
    found = compressors.resolve(text)
    assert found is not None
    return found


def every(prediction: Prediction, gbit: float) -> dict[str, tuple[Stages, float]]:
    """Stages and simulated s, by codec; "none": dense."""
    decision = prediction.decide(gbit)
    found = {}
    for text, seconds in decision.seconds.items():
        one = next((each for each in prediction.codecs if str(each) == text), None)
        found[text] = prediction.stages(gbit, one, decision.exchanges.get(text, "auto"), 1), seconds
    return found


def unmarked(page: str) -> list[str]:
    """Headers of tables, but that of the assumptions, that do not say *prediction*."""
    headers = re.findall(r"^(\|.*)\n\| ?:?-", page, re.MULTILINE)
    return [header for header in headers if "*prediction*" not in header and "assumption" not in header]


def test_the_page_in_the_repository_is_the_generators(prediction: Prediction) -> None:
    page = predicted_steps.PAGE.read_text(encoding="utf-8")
    assert page == predicted_steps.page(prediction), "run `python -m benchmarks.predicted_steps`"


def test_every_table_says_prediction() -> None:
    page = predicted_steps.PAGE.read_text(encoding="utf-8")
    assert len(re.findall(r"^\| ?:?-", page, re.MULTILINE)) == 3 + len(BUCKETS)
    assert unmarked(page) == []
    assert unmarked(page.replace("*prediction*, ps", "ps")) != []  # the control


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Cluster)])
def test_every_assumption_is_printed(prediction: Prediction, name: str) -> None:
    """None can change without the table of assumptions changing."""
    other = replace(prediction.cluster, **{name: getattr(prediction.cluster, name) * 2})
    changed = replace(prediction, cluster=other)
    assert predicted_steps.assumptions(changed) != predicted_steps.assumptions(prediction)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("exchange", ["gather", "two_stage"])
def test_a_faster_link_is_never_slower(prediction: Prediction, text: str, exchange: str) -> None:
    """With one kind of exchange: policy may go back from two stages to a gather, which takes longer and loses less."""
    one, rates = codec(text), sorted((*RATES, *FASTER))
    simulated = [
        prediction.policy(rate, (text,)).decide(NUMEL, exchange=exchange).seconds[str(one)] for rate in rates
    ]
    totals = [prediction.stages(rate, one, exchange, 1).total for rate in rates]
    assert all(fast < slow for slow, fast in pairwise(totals))
    # In the simulation the link has no part in the makespan once the node's own work hides it.
    assert all(fast <= slow * (1 + ROUNDINGS) for slow, fast in pairwise(simulated))


def test_a_faster_link_is_never_slower_for_dense_ones(prediction: Prediction) -> None:
    rates = sorted((*RATES, *FASTER))
    for times in (
        [flat(prediction.cluster, rate, NBYTES).seconds for rate in rates],
        [prediction.stages(rate, None, "auto", 1).total for rate in rates],
        [prediction.decide(rate).seconds["none"] for rate in rates],
    ):
        assert all(fast < slow for slow, fast in pairwise(times))


@pytest.mark.parametrize("gbit", RATES)
def test_nothing_is_faster_than_its_bytes_on_the_wire(prediction: Prediction, gbit: float) -> None:
    for text, (stages, simulated) in every(prediction, gbit).items():
        limit = stages.wire / line_rate(gbit)
        assert min(stages.exchange, stages.total, simulated) > limit, text
    nccl = flat(prediction.cluster, gbit, NBYTES)
    assert nccl.seconds > nccl.wire / line_rate(gbit)


def test_bytes_are_the_payloads(prediction: Prediction) -> None:
    nodes, shards = 8, 8
    chunks = NUMEL // shards // prediction.chunk
    for one in prediction.codecs:
        each = one.nbytes(prediction.chunk)
        gathered = prediction.stages(10, one, "gather", 1)
        assert gathered.wire == shards * chunks * (nodes - 1) * each
        assert chunks == nodes  # so a slice of a shard is a chunk
        assert prediction.stages(10, one, "two_stage", 1).wire == shards * 2 * (nodes - 1) * each
        assert prediction.stages(10, one, "gather", 16).wire == 16 * gathered.wire
    assert prediction.stages(10, None, "auto", 1).wire == 2 * (nodes - 1) / nodes * NBYTES


def test_a_plan_of_the_larger_bucket_sends_as_many_bytes_as_its_multiple(prediction: Prediction) -> None:
    one, topology = codec("sign1"), prediction.cluster.topology(10)
    for numel, scale in ((NUMEL, 1), (2 * NUMEL, 2)):
        plan = collective_plans.allreduce(topology, numel, compressor=one, exchange="gather")
        assert plan.chunk_elems == prediction.chunk
        assert plan.wire_nbytes(one.nbytes) == 8 * prediction.stages(10, one, "gather", scale).wire


def test_compression_wins_on_slow_links_and_not_on_the_fastest(prediction: Prediction) -> None:
    found, nccl = every(prediction, 10), flat(prediction.cluster, 10, NBYTES)
    dense = found.pop("none")
    assert len(found) == len(CODECS)
    for text, (stages, simulated) in found.items():
        assert stages.total < min(dense[0].total, nccl.seconds), text
        assert simulated < dense[1], text
    assert prediction.decide(10).active == str(codec("topk:0.01"))
    assert prediction.decide(10_000).active == "none"
    for text in CODECS:
        last, beyond = prediction.crossover(text)
        assert last < beyond < 1.2 * last
        assert prediction.decide(last, (text,)).active != "none"
        assert prediction.decide(beyond, (text,)).active == "none"


def test_what_is_remembered_is_what_policy_says(prediction: Prediction) -> None:
    one = codec("sign1")
    remembering = prediction.policy(200, ("sign1",))
    bare = Policy(figures=remembering.figures, requested=remembering.requested, candidates=(one,))
    assert bare.decide(16 * NUMEL) == prediction.decide(200, ("sign1",), scale=16)


def test_flat_by_hand() -> None:
    cluster = Cluster()
    ring = flat(cluster, 10, NBYTES)
    assert ring.how == "ring"
    hops = 8.4e-6 + 112 * 3.4e-6 + 14 * 14e-6
    assert ring.seconds == pytest.approx(hops + 126 / 64 * NBYTES / (1.25e9 * 0.96), rel=ROUNDINGS)
    short = flat(cluster, 10, 4096)
    assert short.how == "tree"
    hops = 8.4e-6 + 2 * (7 * 4e-6 + 3 * 14e-6)
    assert short.seconds == pytest.approx(hops + 2 * 4096 / (1.25e9 * 0.96 * 0.92), rel=ROUNDINGS)
    inside = flat(replace(cluster, nvlink=1e9), 1600, NBYTES)  # a link in the node may be the slowest
    assert inside.seconds > 126 / 64 * NBYTES / 1e9


def test_kernels_by_hand() -> None:
    manifest, cluster, chunk = Manifest.read(), Cluster(), 1 << 18
    launch, memory = cluster.launch / chunk, GPUS[80].bandwidth * roof.DRAM
    topk = kernel_cost(manifest, codec("topk:0.01"), cluster, chunk)
    each = codec("topk:0.01").nbytes(1 << 20) / (1 << 20)
    encode = roof.OVERHEAD * (12 + each) / memory
    assert topk.encode == pytest.approx(encode + ENCODE_LAUNCHES * launch, rel=ROUNDINGS)
    assert topk.sum_of(1) == pytest.approx(
        roof.OVERHEAD * (4 + each) / memory + DECODE_LAUNCHES * launch, rel=ROUNDINGS
    )
    int8 = kernel_cost(manifest, codec("int8"), cluster, chunk)
    entry = next(entry for entry in manifest.entries if entry.kernel.name == "int8_decode")
    (build,) = (build for build in entry.builds if build.arch == 80)
    two = 1 / roof.predict(entry.kernel, build).rate + 4 / memory + DECODE_LAUNCHES * launch
    one = two - roof.OVERHEAD * codec("int8").nbytes(1 << 24) / (1 << 24) / memory
    assert int8.sum_of(1) == pytest.approx(one, rel=1e-6)  # the header's share differs by size
    assert int8.sum_of(8) > int8.sum_of(1)
    free = kernel_cost(manifest, codec("int8"), replace(cluster, launch=0.0), chunk)
    assert int8.encode - free.encode == pytest.approx(ENCODE_LAUNCHES * launch, rel=1e-9)


def test_a_kernel_that_is_not_there_is_named() -> None:
    with pytest.raises(LookupError, match="no kernel powersgd_"):
        kernel_cost(Manifest.read(), codec("powersgd:2"), Cluster(), 1 << 18)
