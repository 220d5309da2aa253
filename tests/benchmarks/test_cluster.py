"""The virtual cluster: real rates, real isolation, whole-run failure, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from benchmarks.cluster import (
    Cluster,
    ClusterError,
    RankFailure,
    RateError,
    Shape,
    namespace,
    parse_rate,
    skip_reason,
)
from benchmarks.cluster.shape import ETHERNET_OVERHEAD

_REASON = skip_reason()
needs_cluster = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
root = pytest.mark.root


def test_rates_are_read_as_tc_writes_them() -> None:
    assert parse_rate("1gbit") == 10**9
    assert parse_rate("1.5Gbit/s") == 1_500_000_000
    assert parse_rate(" 200 mbit ") == 200_000_000


@pytest.mark.parametrize("text", ["1000", "1gbyte", "-1gbit", "gbit", "10kbit", ""])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ClusterError, match="rate"):
        parse_rate(text)


def test_shape_says_what_it_is() -> None:
    said = "tbf 1000 Mbit/s each way, burst 122 KiB (1.00 ms), queue 50 ms, MTU 1500, TCP cubic"
    assert str(Shape.at("1gbit")) == said


@pytest.mark.parametrize("layout", [(0, 1), (2, 0), (2, (1, 1, 1)), (251, 1)])
def test_layouts_that_cannot_be_are_refused(layout: tuple[int, int]) -> None:
    with pytest.raises(ClusterError, match="nodes"):
        Cluster(*layout)


def test_without_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in (skip_reason() or "")
    with pytest.raises(ClusterError, match="needs root"), Cluster():
        pass


def test_without_iproute2_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "iproute2" in (skip_reason() or "")


def test_a_congestion_control_that_is_not_allowed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = tmp_path / "allowed"
    monkeypatch.setattr(namespace, "_ALLOWED", allowed)
    monkeypatch.setattr(namespace, "_TOOLS", {})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        namespace.subprocess, "run", lambda *a, **_: subprocess.CompletedProcess(a, 0, "", "")
    )
    assert skip_reason() is None  # a kernel that does not say
    allowed.write_text("reno cubic\n")
    assert skip_reason() is None
    allowed.write_text("reno bbr\n")
    assert "tcp_allowed_congestion_control='reno bbr cubic'" in (skip_reason() or "")


@root
@needs_cluster
def test_ranks_see_their_place_and_nodes_are_apart() -> None:
    script = (
        "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $(hostname) $MASTER_ADDR $(ls /dev/shm | wc -l)"
    )
    script += " $(cat /proc/sys/net/ipv4/tcp_congestion_control)"
    script += "; touch /dev/shm/mark$RANK; readlink /proc/self/ns/ipc >&2"
    with Cluster(3, (2, 1, 1), None) as cluster:
        result = cluster.run(["sh", "-c", script])
        again = cluster.run(["sh", "-c", "ls /dev/shm"])
    fields = [line.split() for line in result.stdout]
    assert [f[:5] for f in fields] == [
        ["0", "4", "0", "2", "node0"],
        ["1", "4", "1", "2", "node0"],
        ["2", "4", "0", "1", "node1"],
        ["3", "4", "0", "1", "node2"],
    ]
    assert {f[5] for f in fields} == {"10.231.0.1"}
    assert {f[7] for f in fields} == {"cubic"}
    assert [text.split() for text in again.stdout] == [["mark0", "mark1"]] * 2 + [["mark2"], ["mark3"]]
    assert not list(Path("/dev/shm").glob("mark*"))
    ipc = [text.strip() for text in result.stderr]
    assert ipc[0] == ipc[1]
    assert len({*ipc, os.readlink("/proc/self/ns/ipc")}) == 4


@root
@needs_cluster
def test_shaped_link_runs_at_its_rate_and_an_unshaped_one_fails_the_check() -> None:
    with Cluster(2, 1, "100mbit") as cluster:
        assert len(cluster.checks) == 2  # both directions; a wrong rate would have raised
    with Cluster(2, 1, None) as cluster, pytest.raises(RateError, match="Mbit/s on the wire"):
        cluster.verify_rate(Shape.at("100mbit"))  # the negative control
    with Cluster(2, 1, "50mbit", verify=False) as cluster, pytest.raises(RateError):
        cluster.verify_rate(Shape.at("100mbit"))  # too slow is as wrong as too fast


_TRANSFER = """
import os, socket
rank, count = int(os.environ["RANK"]), 4_000_000
if rank == 0:
    with socket.create_server(("0.0.0.0", 29000)) as server:
        peers = [server.accept()[0] for _ in range(2)]
        for peer in peers:
            peer.sendall(b"go")
        for peer in peers:
            while peer.recv(1 << 16):
                pass
else:
    while True:
        try:
            peer = socket.create_connection(("10.231.0.1", 29000))
            break
        except ConnectionRefusedError:
            pass
    peer.recv(2)
    peer.sendall(bytes(count))
"""


@root
@needs_cluster
def test_interface_counters_count_a_transfer_and_two_senders_share_the_receivers_link() -> None:
    with Cluster(3, 1, "100mbit") as cluster:
        begin = time.monotonic()
        result = cluster.run([sys.executable, "-I", "-S", "-c", _TRANSFER])
        seconds = time.monotonic() - begin
    for node in (1, 2):
        assert 4_000_000 <= result.tx_bytes[node] <= 4_000_000 * ETHERNET_OVERHEAD * 1.02
    assert 8_000_000 <= result.rx_bytes[0] <= 8_000_000 * ETHERNET_OVERHEAD * 1.02
    assert result.tx_bytes[0] < 400_000  # acknowledgements only
    # Both senders at once: node0's link, shaped on the bridge's side, takes 8 MB at 12.5 MB/s.
    assert seconds > 8_000_000 / 12.5e6 - 0.05


@root
@needs_cluster
def test_a_failed_rank_ends_the_run_and_is_named() -> None:
    script = 'test $RANK != 2 || { echo "rank two is ill" >&2; exit 3; }; sleep 100'
    with Cluster(2, 2, None) as cluster:
        begin = time.monotonic()
        with pytest.raises(RankFailure, match=r"rank 2 ended with 3.*\nrank two is ill") as caught:
            cluster.run(["sh", "-c", script])
        assert time.monotonic() - begin < 20
        assert caught.value.rank == 2
        result = cluster.run(["sh", "-c", "exit $RANK"], check=False)  # the cluster is still of use
    assert (result.exit_codes, result.failed, result.ok) == ([0, 1, 2, 3], 1, False)


@root
@needs_cluster
def test_a_timeout_ends_the_run_with_all_it_started() -> None:
    mark = f"hc{uuid.uuid4().hex}"
    with Cluster(2, 1, None) as cluster:
        with pytest.raises(RankFailure, match="had not ended"):
            cluster.run(["sh", "-c", "setsid sleep 100 & sleep 100"], timeout=0.5, env={"MARK": mark})
        assert not _alive(mark)


def _alive(mark: str) -> list[str]:
    """Processes whose environment holds the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@root
@needs_cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_driver_dies(number: signal.Signals) -> None:
    mark = f"hc{uuid.uuid4().hex}"
    argv = [
        sys.executable,
        "-m",
        "benchmarks.cluster",
        "--rate",
        "none",
        "--",
        "sh",
        "-c",
        "echo up; sleep 100",
    ]
    driver = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MARK": mark},
        cwd=Path(__file__).parents[2],
    )
    assert driver.stdout is not None
    with driver:
        driver.stdout.readline()
        assert len(_alive(mark)) > 4  # the control: the search does find ranks and holders
        driver.send_signal(number)
        driver.wait(timeout=20)
        end = time.monotonic() + 10
        while _alive(mark) and time.monotonic() < end:
            time.sleep(0.05)
        assert not _alive(mark)
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert "port0" not in links
