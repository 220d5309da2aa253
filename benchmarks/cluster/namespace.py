"""One set of namespaces (network, host name, IPC, mounts, processes) held by one small shell.

Nothing of it has a name on the host, so nothing can be left over: the shell waits on a pipe whose other end
the driver holds, and it is process 1 of its own pid namespace. When the driver closes the pipe, or dies in
whatever way (Ctrl-C, SIGTERM, kill -9), the shell ends, the kernel kills every process inside, and with the
last of them the network devices, the shapers, the host name and the private /dev/shm are gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cluster.errors import ClusterError
from benchmarks.cluster.shape import CONGESTION_CONTROL

__all__ = ["Counters", "Namespace", "skip_reason"]

_TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
}

# $1 host name, $2 /etc/hosts, $3 size of /dev/shm, $4 congestion control. IPv6 is off: its neighbours would count.
_HOLDER = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount -t tmpfs -o size="$3",mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=1m tmpfs /run
printf '%s' "$2" > /run/hosts
mount --bind /run/hosts /etc/hosts
for scope in all default; do
    if [ -e /proc/sys/net/ipv6/conf/$scope/disable_ipv6 ]; then
        echo 1 > /proc/sys/net/ipv6/conf/$scope/disable_ipv6
    fi
done
echo "$4" > /proc/sys/net/ipv4/tcp_congestion_control
ip link set lo up
echo ready
read -r _ || true
"""

_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


def skip_reason() -> str | None:
    """Why no cluster can be built here, or None when one can: root, tools and namespaces are looked for."""
    if os.geteuid() != 0:
        return "the virtual cluster needs root (network namespaces, traffic shaping); run it with sudo"
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return (
            f"the virtual cluster needs the packages {', '.join(missing)} (ip, tc, unshare, nsenter, mount)"
        )
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"the virtual cluster needs the right to make namespaces: {done.stderr.strip()}"
    allowed = _ALLOWED.read_text().split() if _ALLOWED.exists() else [CONGESTION_CONTROL]
    if CONGESTION_CONTROL not in allowed:
        return (
            f"the virtual cluster needs TCP {CONGESTION_CONTROL}, which namespaces may not use here: "
            f"sysctl -w net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, CONGESTION_CONTROL])}'"
        )
    return None


class Counters(NamedTuple):
    """Of one device since it exists; a packet here may be a segment offload unit of up to 64 KiB."""

    rx_bytes: int
    tx_bytes: int
    tx_packets: int


class Namespace:
    """Holds one set of namespaces from construction to ``close()``.

    Raises ClusterError with the tool's own message when they cannot be made.
    """

    def __init__(self, hostname: str, *, hosts: str = "", shm_size: str = "4g") -> None:
        self.hostname = hostname
        flags = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        argv = ["unshare", *flags, "sh", "-c", _HOLDER, "sh", hostname, hosts, shm_size, CONGESTION_CONTROL]
        self._holder = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline().strip() != b"ready":
            error = self._holder.stderr.read().decode(errors="replace").strip()
            self.close()
            raise ClusterError(f"namespaces of {hostname} could not be made: {error}")

    @property
    def pid(self) -> int:
        """A process in all of the namespaces but the pid namespace, which only its children are in."""
        return self._holder.pid

    def enter(self, argv: Sequence[str], *, cwd: str = "/") -> list[str]:
        """The command line that runs ``argv`` inside every namespace, in directory ``cwd``."""
        inside = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", cwd, *argv]
        spaces = ["--net", "--uts", "--ipc", "--mount", f"--pid=/proc/{self.pid}/ns/pid_for_children"]
        return ["nsenter", "-t", str(self.pid), *spaces, "--", *inside]

    def batch(self, tool: str, lines: Sequence[str]) -> None:
        """Run lines of ``ip -batch`` or ``tc -batch`` in the network namespace, or raise ClusterError."""
        argv = ["nsenter", "-t", str(self.pid), "--net", "--", tool, "-batch", "-"]
        done = subprocess.run(
            argv, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ClusterError(
                f"{tool} failed in {self.hostname}: {done.stderr.strip()} (input: {'; '.join(lines)})"
            )

    def counters(self, device: str) -> Counters:
        """What the device has received and sent, by the kernel's interface counters."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.strip() == device:
                fields = rest.split()
                return Counters(int(fields[0]), int(fields[8]), int(fields[9]))
        raise ClusterError(f"{self.hostname} has no device {device}")

    def kill_all(self) -> None:
        """Kill every process inside but the holder."""
        subprocess.run(self.enter(["sh", "-c", "kill -9 -1"]), capture_output=True, check=False)

    def close(self) -> None:
        """End the namespaces and every process inside. Idempotent; returns when they are gone."""
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._holder.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._holder.kill()  # --kill-child takes process 1 of the pid namespace along
            self._holder.wait()
