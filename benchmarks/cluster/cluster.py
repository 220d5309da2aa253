"""The virtual cluster: nodes on a bridge, shaped links, a checked rate, and commands run on every rank."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.cluster.errors import ClusterError, RateError
from benchmarks.cluster.namespace import Namespace, skip_reason
from benchmarks.cluster.ranks import Job, RankCommand, Result
from benchmarks.cluster.shape import CONGESTION_CONTROL, ETHERNET_OVERHEAD, Shape

__all__ = ["Cluster", "RateCheck"]

_SUBNET = "10.231.0"  # exists only inside the namespaces
_PROBE_SECONDS = 0.4
_PROBE_PORT = 29400
_ATTEMPTS = 4
_RATE_BAND = (0.90, 1.03)
"""Measured TCP goodput over the shaped one: below is a starved link, above an unshaped one."""


@dataclass(frozen=True, kw_only=True)
class RateCheck:
    """One measured transfer: TCP payload bytes per second from node ``source`` to node ``target``."""

    source: int
    target: int
    goodput: float

    @property
    def rate(self) -> float:
        """Bits per second on the wire that the goodput stands for (headers added)."""
        return self.goodput * ETHERNET_OVERHEAD * 8


class Cluster:
    """``nodes`` virtual nodes with ``per_node`` ranks each (an int, or one number per node).

    ``rate`` such as ``"1gbit"`` shapes each link both ways; None leaves links unshaped. ``pin`` gives each
    node its own share of the machine's cores (as far as they go). Use as a context manager: building takes
    about 0.1 s per node, plus 0.6 s per link for the check of the rate. Raises ClusterError (with the
    missing right or tool) or RateError. Everything is gone after the ``with``, or when this process dies in
    whatever way.
    """

    def __init__(
        self,
        nodes: int = 2,
        per_node: int | Sequence[int] = 2,
        rate: str | None = "1gbit",
        *,
        burst: int | None = None,
        verify: bool = True,
        pin: bool = False,
        shm_size: str = "4g",
    ) -> None:
        counts = [per_node] * nodes if isinstance(per_node, int) else list(per_node)
        if len(counts) != nodes or not 1 <= nodes <= 250 or min(counts) < 1:
            raise ClusterError(
                f"{nodes} nodes with {per_node} ranks: want 1 to 250 nodes, each with 1 rank or more"
            )
        self.ranks_of = counts
        self.shape = Shape.at(rate, burst) if rate is not None else None
        self.checks: list[RateCheck] = []
        self._verify = verify
        self._pin = pin
        self._shm_size = shm_size
        self._nodes: list[Namespace] = []
        self._stack = contextlib.ExitStack()
        self._runs = 0

    @property
    def world_size(self) -> int:
        """Ranks of the cluster."""
        return sum(self.ranks_of)

    def address(self, node: int) -> str:
        """IPv4 address of a node on the bridge."""
        return f"{_SUBNET}.{node + 1}"

    def __enter__(self) -> Cluster:
        reason = skip_reason()
        if reason is not None:
            raise ClusterError(reason)
        try:
            self._build()
            if self._verify and self.shape is not None and len(self._nodes) > 1:
                self.verify_rate(self.shape)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._nodes.clear()

    def _hold(self, hostname: str, hosts: str) -> Namespace:
        space = Namespace(hostname, hosts=hosts, shm_size=self._shm_size)
        self._stack.callback(space.close)
        return space

    def _build(self) -> None:
        count = len(self.ranks_of)
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{form}{self.address(n)} node{n}\n" for n in range(count) for form in ("", "::ffff:")
        )
        bridge = self._hold("bridge", hosts)
        bridge.batch("ip", ["link add br0 type bridge stp_state 0 forward_delay 0", "link set br0 up"])
        for node in range(count):
            space = self._hold(f"node{node}", hosts)
            self._nodes.append(space)
            port = f"port{node}"
            bridge.batch(
                "ip",
                [
                    f"link add {port} type veth peer name eth0 netns {space.pid}",
                    f"link set {port} master br0 up",
                ],
            )
            # A route's congestion control needs no leave of the host, as a namespace's default does.
            own, via = self.address(node), f"src {self.address(node)} congctl {CONGESTION_CONTROL}"
            space.batch(
                "ip",
                [
                    f"address add {own}/24 dev eth0 noprefixroute",
                    "link set eth0 up",
                    f"route add {_SUBNET}.0/24 dev eth0 {via}",
                    f"route replace local {own} dev eth0 table local proto kernel scope host {via}",
                ],
            )
            if self.shape is not None:
                space.batch("tc", [self.shape.tc("eth0")])
                bridge.batch("tc", [self.shape.tc(port)])

    def verify_rate(self, shape: Shape) -> list[RateCheck]:
        """Send real TCP traffic from each node to the next; RateError when one is not at the shaped rate.

        A transfer that a loss has slowed down is made again: no shaper makes one too fast.
        """
        for source in range(len(self._nodes)):
            for _ in range(_ATTEMPTS):
                check = self._transfer(source, (source + 1) % len(self._nodes), shape)
                if check.goodput >= _RATE_BAND[0] * shape.goodput:
                    break
            self.checks.append(check)
            share = check.goodput / shape.goodput
            if not _RATE_BAND[0] <= share <= _RATE_BAND[1]:
                raise RateError(
                    f"node{check.source} to node{check.target}: {check.rate / 1e6:.0f} Mbit/s on the wire, "
                    f"{share:.2f} of the {shape.rate / 1e6:g} asked for (want {_RATE_BAND[0]} to "
                    f"{_RATE_BAND[1]}); is the machine too busy, or the link not shaped?"
                )
        return self.checks

    def _transfer(self, source: int, target: int, shape: Shape) -> RateCheck:
        skip = 2 * shape.burst + int(0.1 * shape.goodput)
        total = skip + int(_PROBE_SECONDS * shape.goodput)
        python = [sys.executable, "-I", "-S", str(Path(__file__).with_name("probe.py"))]
        receiver = subprocess.Popen(
            self._nodes[target].enter([*python, "recv", str(_PROBE_PORT), str(skip)]),
            stdout=subprocess.PIPE,
            text=True,
        )
        with receiver:
            assert receiver.stdout is not None
            receiver.stdout.readline()
            send = [*python, "send", self.address(target), str(_PROBE_PORT), str(total)]
            subprocess.run(self._nodes[source].enter(send), check=True, timeout=60)
            line = json.loads(receiver.stdout.readline())
        return RateCheck(source=source, target=target, goodput=line["bytes"] / max(line["seconds"], 1e-9))

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 600.0,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        live: str = "none",
    ) -> Result:
        """Run ``argv`` on every rank in the present directory, with the environment torchrun would set.

        ``timeout`` in seconds for the whole run; ``env`` adds variables; ``live`` prints output as it comes
        (``"all"``, or ``"first"`` for rank 0). Raises RankFailure when a rank fails or the timeout passes, or
        with ``check=False`` leaves that to ``Result.ok``.
        """
        self._runs += 1
        commands = self._commands(argv, env or {})
        before = [space.counters("eth0") for space in self._nodes]
        begin = time.monotonic()
        job = Job(commands, self._kill_inside, live=live)
        try:
            codes = job.wait(timeout)
        finally:
            job.kill()
        seconds = time.monotonic() - begin
        after = [space.counters("eth0") for space in self._nodes]
        stdout, stderr = job.output()
        result = Result(
            exit_codes=codes,
            stdout=stdout,
            stderr=stderr,
            seconds=seconds,
            tx_bytes=[new.tx_bytes - old.tx_bytes for old, new in zip(before, after, strict=True)],
            rx_bytes=[new.rx_bytes - old.rx_bytes for old, new in zip(before, after, strict=True)],
            tx_packets=[new.tx_packets - old.tx_packets for old, new in zip(before, after, strict=True)],
            failed=job.failed,
            timed_out=job.timed_out,
        )
        return result.check() if check else result

    def _kill_inside(self) -> None:
        for space in self._nodes:
            space.kill_all()

    def _commands(self, argv: Sequence[str], extra: Mapping[str, str]) -> list[RankCommand]:
        commands = []
        cores = sorted(os.sched_getaffinity(0))
        for node, space in enumerate(self._nodes):
            prefix = []
            if self._pin:
                share = cores[node % len(cores) :: len(self._nodes)]
                prefix = ["taskset", "-c", ",".join(map(str, share))]
            for local_rank in range(self.ranks_of[node]):
                env = {**os.environ, "OMP_NUM_THREADS": "1", **self._rank_env(node, local_rank), **extra}
                commands.append(RankCommand(argv=space.enter([*prefix, *argv], cwd=os.getcwd()), env=env))
        return commands

    def _rank_env(self, node: int, local_rank: int) -> dict[str, str]:
        return {
            "RANK": str(sum(self.ranks_of[:node]) + local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_of[node]),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(29500 + self._runs),
            "TORCHELASTIC_RUN_ID": f"cluster-{os.getpid()}-{self._runs}",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
