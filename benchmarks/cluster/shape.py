"""The rate of a link: text such as ``1gbit`` to numbers, and numbers to a token bucket filter (tbf)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.cluster.errors import ClusterError

__all__ = [
    "CONGESTION_CONTROL",
    "ETHERNET_OVERHEAD",
    "MTU",
    "PACKET_HEADERS",
    "SEGMENT",
    "Shape",
    "parse_rate",
]

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}

CONGESTION_CONTROL = "cubic"
"""Of every node's TCP, whatever this machine uses: Linux's own default, so that figures compare from host to host."""

MTU = 1500
"""Bytes of an IP packet on every link."""

PACKET_HEADERS = 14 + 20 + 32
"""Bytes of Ethernet, IP and TCP headers in each packet, and all there is of an acknowledgement."""

SEGMENT = 70_000
"""Bytes of a segment offload unit: 64 KiB, with the headers of its 46 packets. With a smaller burst tbf cuts units
up, and processors are busy with packets as behind no network card.
"""

ETHERNET_OVERHEAD = (MTU + 14) / (MTU - 20 - 32)
"""Wire bytes per TCP payload byte: 14 of Ethernet, 20 of IP, 32 of TCP with time stamps (1.0456)."""


def parse_rate(text: str) -> int:
    """Bits per second of a rate as tc writes it: ``"1gbit"``, ``"200mbit"``, ``"1.5Gbit"``.

    Raises ClusterError for anything else (a bare number is ambiguous between bits and bytes).
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?bit)(?:/s|ps)?\s*", text.lower())
    if match is None:
        raise ClusterError(
            f"rate {text!r}: write a number with a unit of bit, kbit, mbit or gbit, such as 1gbit"
        )
    rate = round(float(match[1]) * _UNITS[match[2]])
    if rate < 10**6:
        raise ClusterError(
            f"rate {text!r}: below 1mbit a single packet takes longer than the shaper's queue allows"
        )
    return rate


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How each direction of each link is shaped.

    ``rate`` in bits per second; ``burst`` in bytes, what a link that was idle may send at once; ``latency``
    in seconds, how long a packet may wait in the shaper's queue before it is dropped.
    """

    rate: int
    burst: int
    latency: float = 0.05

    @classmethod
    def at(cls, rate: str | int, burst: int | None = None) -> Shape:
        """Shape for a rate; the burst is 1 ms of the rate, but at least one segment offload unit (`SEGMENT`)."""
        bits = parse_rate(rate) if isinstance(rate, str) else rate
        return cls(rate=bits, burst=burst if burst is not None else max(SEGMENT, bits // 8_000))

    @property
    def bytes_per_second(self) -> float:
        """Wire bytes per second, headers included."""
        return self.rate / 8

    @property
    def goodput(self) -> float:
        """TCP payload bytes per second at most: the rate without packet headers."""
        return self.bytes_per_second / ETHERNET_OVERHEAD

    def tc(self, device: str) -> str:
        """The line for ``tc -batch`` that shapes what ``device`` sends."""
        return (
            f"qdisc add dev {device} root tbf rate {self.rate}bit burst {self.burst}b "
            f"latency {self.latency * 1e3:g}ms"
        )

    def __str__(self) -> str:
        return (
            f"tbf {self.rate / 1e6:g} Mbit/s each way, burst {self.burst / 1024:.0f} KiB "
            f"({self.burst / self.bytes_per_second * 1e3:.2f} ms), queue {self.latency * 1e3:g} ms, MTU {MTU}, "
            f"TCP {CONGESTION_CONTROL}"
        )
