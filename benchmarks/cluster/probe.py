"""One timed TCP transfer inside the nodes: ``probe.py recv PORT SKIP``, ``probe.py send ADDRESS PORT COUNT``.

Uses the standard library only, so that it starts fast (``python -I -S``). The receiver prints one JSON line:
bytes and seconds after the warm-up (in which the shaper's burst is spent).
"""

from __future__ import annotations

import json
import socket
import sys
import time


def receive(port: int, skip: int) -> None:
    """Accept one connection, drop ``skip`` bytes of warm-up, then time the rest until the peer closes."""
    with socket.create_server(("0.0.0.0", port)) as server:
        server.settimeout(20)
        print("listening", flush=True)
        connection, _ = server.accept()
        connection.settimeout(20)
        buffer = bytearray(1 << 20)
        seen = counted = 0
        begin = end = 0.0
        while count := connection.recv_into(buffer):
            end = time.perf_counter()
            if begin:
                counted += count
            else:
                seen += count
                begin = end if seen >= skip else 0.0
        connection.close()
    print(json.dumps({"bytes": counted, "seconds": end - begin}), flush=True)


def send(address: str, port: int, count: int) -> None:
    """Connect and send ``count`` bytes."""
    with socket.create_connection((address, port), timeout=20) as connection:
        block = memoryview(bytes(1 << 16))
        while count > 0:
            count -= connection.send(block[:count])


if __name__ == "__main__":
    if sys.argv[1] == "recv":
        receive(int(sys.argv[2]), int(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
