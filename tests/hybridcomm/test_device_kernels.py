"""All ranks run the same device kernels, each once before step 0; a PTX executor stands in for the GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridcomm import device_kernels
from hybridcomm.device_kernels import Offer, Route, agree, choose, codec, node_cache, prepare
from hybridcomm.errors import UnsupportedError
from hybridcomm.kernels import parse
from hybridcomm.kernels.cubins.manifest import Manifest
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts

OFFER = Offer(arch=90, shipped="1234", triton="3.9.0")
CPU = torch.device("cpu")


def test_what_all_ship_alike_is_run() -> None:
    route = choose([OFFER, replace(OFFER, arch=80)])
    assert (route.shipped, route.compiler) == (True, True)
    without = choose([OFFER, replace(OFFER, triton="3.8.0")])
    assert (without.shipped, without.compiler) == (True, False), (
        "what is not shipped cannot be compiled alike"
    )


@pytest.mark.parametrize("shipped", ["5678", ""], ids=["another build", "no image"])
def test_where_one_rank_differs_all_compile(shipped: str) -> None:
    route = choose([OFFER, OFFER, replace(OFFER, shipped=shipped)])
    assert (route.shipped, route.compiler) == (False, True)
    assert f"rank 2 {shipped or 'none'}" in route.reason


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shipped": "5678", "triton": ""}, "rank 1 5678.*Triton.*rank 1 none"),
        ({"wanted": "jit"}, "rank 0 wants auto, rank 1 jit"),
    ],
)
def test_ranks_that_cannot_agree_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        choose([OFFER, replace(OFFER, **changes)])


@pytest.mark.parametrize(("wanted", "missing"), [("shipped", {"shipped": ""}), ("jit", {"triton": ""})])
def test_what_is_asked_for_is_not_replaced(wanted: str, missing: dict[str, str]) -> None:
    asked = replace(OFFER, wanted=wanted)
    route = choose([asked, asked])
    assert route.shipped == (wanted == "shipped")
    with pytest.raises(UnsupportedError, match=f"kernels={wanted}.*rank 0 has none"):
        choose([replace(asked, **missing)] * 2)


def test_a_word_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, shipped, jit"):
        Offer.here(90, "fast")


def test_an_older_device_than_any_image_is_offered_nothing() -> None:
    assert Offer.here(90).shipped == Offer.here(120).shipped != ""
    assert not Offer.here(75).shipped


@pytest.mark.parametrize("changes", [{}, {"shipped": "5678"}, {"shipped": "", "triton": "3.8.0" * 40}])
def test_all_ranks_come_to_the_same_answer(changes: dict[str, str]) -> None:
    offers = [OFFER, OFFER, replace(OFFER, **changes)]
    with engine_contexts(Topology.from_sizes([2, 1])) as contexts:
        answers = each_rank(lambda rank: agree(contexts[rank], offers[rank]), 3)
    if "triton" in changes:
        assert all(isinstance(answer, UnsupportedError) for answer in answers), answers
        assert len(set(map(str, answers))) == 1
    else:
        assert answers == [choose(offers)] * 3


def nothing(kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
    raise AssertionError("nothing is to be run")


def test_a_setting_that_is_not_shipped_needs_a_compiler() -> None:
    alone = Route(shipped=True, compiler=False, reason="")
    assert codec(parse("topk:0.01"), alone, nothing).spec == parse("topk:0.01")
    with pytest.raises(UnsupportedError, match=r"topk:0\.02.*pip install triton"):
        codec(parse("topk:0.02"), alone, nothing)


def test_what_only_cuda_has_is_refused_without_it() -> None:
    pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile with")
    compiled = Route(shipped=False, compiler=True, reason="by Triton")
    assert codec(parse("topk:0.02"), compiled, nothing).spec == parse("topk:0.02")
    with pytest.raises(UnsupportedError, match=r"gtopk.*by Triton"):
        codec(parse("gtopk:0.01"), compiled, nothing)


def test_the_cache_is_on_this_node_and_this_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ: dict[str, str] = {}
    path = node_cache(environ)
    assert tmp_path in path.parents
    assert environ == {"TRITON_CACHE_DIR": str(path)}
    assert path.stat().st_mode & 0o077 == 0
    assert node_cache({}) == path, "a second process of this user's"
    assert node_cache({"TRITON_CACHE_DIR": "/elsewhere"}) == Path("/elsewhere")
    path.chmod(0o777)
    with pytest.raises(UnsupportedError, match="not this user's alone"):
        node_cache({})
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(UnsupportedError, match="not this user's alone"):
        node_cache({})


def test_triton_takes_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed: it keeps no cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    environ: dict[str, str] = {}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(node_cache(environ)))
    assert triton.knobs.cache.dir == environ["TRITON_CACHE_DIR"]


def test_every_kernel_runs_before_step_0_first_on_one_rank_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels.ptx_run import PtxRun

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ran: list[tuple[int, str]] = []
    lock = threading.Lock()

    class Logged(PtxRun):
        def __call__(self, kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
            super().__call__(kernel, programs, arguments)
            with lock:
                ran.append((group_rank[threading.get_ident()], kernel.name))

    group_rank: dict[int, int] = {}

    def rank_prepares(rank: int) -> Route:
        group_rank[threading.get_ident()] = rank
        route, _ = prepare(
            contexts[rank], [parse("int8"), parse("topk:0.01")], run=Logged(arch=90), arch=90, device=CPU,
            grad=torch.float32, rest=torch.float32,
        )  # fmt: skip
        return route

    with engine_contexts(Topology.from_sizes([2, 1])) as contexts:
        routes = each_rank(rank_prepares, 3)
    assert all(isinstance(route, Route) and route.shipped for route in routes), routes
    ranks = [rank for rank, _ in ran]
    assert max(i for i, rank in enumerate(ranks) if rank in (0, 2)) < ranks.index(1), "leaders first"
    fp32 = {
        entry.kernel.name
        for entry in Manifest.read().entries
        if entry.kernel.codec in (str(parse("int8")), str(parse("topk:0.01")))
        and not any(argument.type in ("*bf16", "*fp16") for argument in entry.kernel.arguments)
    }
    for rank in range(3):
        got = {name for who, name in ran if who == rank}
        assert got - {"withdraw_fp32"} == fp32, rank


def test_a_rank_that_cannot_warm_up_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait in a barrier, which has the context's timeout and names who is missing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def warm(*_: object, **__: object) -> None:
        if threading.current_thread() is failing[0]:
            raise RuntimeError("no memory")

    failing: list[threading.Thread] = []
    monkeypatch.setattr(device_kernels, "warm_up", warm)

    def body(rank: int) -> None:
        if rank == 0:
            failing.append(threading.current_thread())
        context = contexts[rank]
        try:
            prepare(
                context, [parse("topk:0.01")], run=nothing, arch=90, device=CPU, grad=torch.float32, rest=torch.float32
            )  # fmt: skip
        finally:
            context.close()

    with engine_contexts(Topology.from_sizes([2])) as contexts:
        failed = each_rank(body, 2)
    assert str(failed[0]) == "no memory"
    assert "rank 0" in str(failed[1])
