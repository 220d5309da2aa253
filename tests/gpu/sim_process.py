"""One rank of several processes, each with simulated devices of its own: what the tests of that start.

    python -m tests.gpu.sim_process RANK RANKS ID CASE SEED

Prints JSON: what was reported, and whether values were right.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.gpu.sim_device import Device, in_threads
from tests.gpu.sim_nccl import FLOAT32, REMOTE_ERROR, SUCCESS, SUM, Communicator, UniqueId, until
from tests.gpu.simulated import Fault, Simulation, sim_library

Floats = npt.NDArray[np.float32]


class Rank:
    """Its communicator, a stream, and what it has lent to the device."""

    def __init__(
        self, sim: Simulation, number: int, ranks: int, identity: UniqueId, ordinal: int = 0
    ) -> None:
        self.sim, self.number, self.ranks = sim, number, ranks
        self.device, self.library = Device(ordinal), sim_library()
        self.stream, self.other = self.device.stream(), self.device.stream()
        self.lent: list[Floats] = []
        self.comm = Communicator.join(identity, ranks, number)

    def lend(self, values: Any) -> Floats:
        made = np.array(values, np.float32)
        self.sim.adopt(made, self.device.ordinal)
        self.lent.append(made)
        return made

    def call(self, name: str, *given: Any, stream: Any = None, comm: Communicator | None = None) -> int:
        """Arrays as their addresses; counts have to be c_size_t."""
        handle = (comm or self.comm).handle
        plain = [ctypes.c_void_p(g.ctypes.data) if isinstance(g, np.ndarray) else g for g in given]
        return int(getattr(self.library, name)(*plain, handle, stream or self.stream))

    def wait(self) -> int:
        return int(self.device.cuda.cuStreamSynchronize(self.stream))

    def close(self) -> None:
        for each in (self.stream, self.other):
            self.device.wait(each)
        self.comm.destroy()
        for values in self.lent:
            self.sim.drop(values)
        self.device.end(self.stream, self.other)


def size(count: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(count)


def everything(own: Rank) -> bool:
    """Each collective, a ring of messages, and halves of the world that reduce for themselves."""
    n, r = own.ranks, own.number
    whole, piece = own.lend(np.arange(2 * n) + r), own.lend(np.zeros(2))
    gathered, swapped = own.lend(np.zeros(2 * n)), own.lend(np.zeros(2 * n))
    start = own.lend(np.arange(2 * n) + r)
    first, last = own.lend([r]), own.lend([-1.0])
    own.call("ncclAllReduce", whole, whole, size(2 * n), FLOAT32, SUM)
    own.call("ncclReduceScatter", start, piece, size(2), FLOAT32, SUM)
    own.call("ncclAllGather", piece, gathered, size(2), FLOAT32)
    own.call("ncclAlltoAll", start, swapped, size(2), FLOAT32)
    own.library.ncclGroupStart()
    own.call("ncclSend", first, size(1), FLOAT32, (r + 1) % n)
    own.call("ncclRecv", last, size(1), FLOAT32, (r - 1) % n)
    own.library.ncclGroupEnd()
    own.call("ncclBroadcast", first, first, size(1), FLOAT32, n - 1)
    half, part = own.comm.split(r % 2, r), own.lend([1.0 + r])
    own.call("ncclAllReduce", part, part, size(1), FLOAT32, SUM, comm=half)
    own.wait()
    total = n * np.arange(2 * n) + n * (n - 1) / 2
    right = (whole == total).all() and (gathered == total).all() and (piece == total[2 * r : 2 * r + 2]).all()
    expected = np.concatenate([np.arange(2 * r, 2 * r + 2) + other for other in range(n)])
    right &= (swapped == expected).all() and last[0] == (r - 1) % n and first[0] == n - 1
    half.destroy()
    return bool(right and part[0] == sum(1.0 + other for other in range(r % 2, n, 2)))


def known_through_others(own: Rank, told: bool) -> bool:
    """What one stream wrote, another may write over when a message has been to another process and back."""
    value, back, answer = own.lend([1.0]), own.lend([0.0]), own.lend([0.0])
    if own.number == 0:
        own.device.call(
            "cuMemsetD8Async", ctypes.c_uint64(back.ctypes.data), ctypes.c_ubyte(1), size(4), own.stream
        )
        own.call("ncclSend", value, size(1), FLOAT32, 1)
        if told:
            own.call("ncclRecv", answer, size(1), FLOAT32, 1, stream=own.other)
        own.device.call(
            "cuMemsetD8Async", ctypes.c_uint64(back.ctypes.data), ctypes.c_ubyte(2), size(4), own.other
        )
    elif own.number == 1:
        own.call("ncclRecv", back, size(1), FLOAT32, 0)
        if told:
            own.call("ncclSend", back, size(1), FLOAT32, 0)
    return own.wait() == 0


def one_that_never_comes(own: Rank) -> bool:
    """The others give up, and say whom they miss."""
    own.sim.patience(1500)
    values = own.lend([1.0])
    if own.number != own.ranks - 1:
        own.call("ncclAllReduce", values, values, size(1), FLOAT32, SUM)
        code = own.wait()
        own.comm.abort()
        own.wait()
        return code == 719
    own.comm.abort()
    return True


def another_count(own: Rank) -> bool:
    values = own.lend(np.ones(4))
    own.call("ncclAllReduce", values, values, size(4 - (own.number == 1)), FLOAT32, SUM)
    return own.wait() == 0 and bool((values == 1.0).all())


def one_that_is_lost(own: Rank) -> bool:
    """By an error of its own. The others hear of it, or not, and abort."""
    if own.number == 1:
        own.sim.inject(Fault.SYSTEM_ERROR, device=0, communicator=0, operation=0)
    values = own.lend([1.0])
    own.call("ncclAllReduce", values, values, size(1), FLOAT32, SUM)
    until(lambda: own.comm.state() != SUCCESS, 500)
    said = own.comm.state()
    own.comm.abort()
    return own.wait() == 0 and said in ((Fault.SYSTEM_ERROR,) if own.number == 1 else (SUCCESS, REMOTE_ERROR))


def joins(identity: UniqueId) -> bool:
    """Whether there is a world of two."""
    device = Device(0)
    try:
        Communicator.join(identity, 2, 0)
    except AssertionError:
        return False
    return device.ordinal == 0


def two_threads(sim: Simulation, number: int, ranks: int, identity: UniqueId) -> bool:
    """Two ranks in each process."""
    right = []

    def thread(ordinal: int) -> None:
        own = Rank(sim, 2 * number + ordinal, 2 * ranks, identity, ordinal)
        right.append(everything(own))
        own.close()

    in_threads(2, thread)
    return right == [True, True]


def run(own: Rank, case: str) -> bool:
    if case == "everything":
        return everything(own)
    if case in ("told", "not told"):
        return known_through_others(own, case == "told")
    acts = {"missing": one_that_never_comes, "another count": another_count, "lost": one_that_is_lost}
    return acts[case](own)


def main(number: int, ranks: int, identity: str, case: str, seed: int) -> None:
    with Simulation() as sim:
        sim.nccl_version(22902)
        sim.patience(30_000)
        sim.reset(seed, (0, 60, 97)[seed % 3], 2 if case == "two threads" else 0)
        unique = UniqueId.from_buffer_copy(bytes.fromhex(identity))
        if case in ("alone", "two threads"):
            if case == "alone":
                sim.patience(500)
            right = two_threads(sim, number, ranks, unique) if case == "two threads" else not joins(unique)
            print(json.dumps({"right": right, "lines": sim.finish()}))
            return
        own = Rank(sim, number, ranks, unique)
        right = run(own, case)
        if case in ("missing", "lost"):
            own.device.end(own.stream, own.other)
            for values in own.lent:
                sim.drop(values)
        else:
            own.close()
        print(json.dumps({"right": right, "lines": sim.finish()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
