"""Runs cases on this rank, together with the others, and goes on with new contexts where one failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridcomm.context import Context
from hybridcomm.device_context import DeviceContext
from hybridcomm.errors import AbortedError, HybridCommError, PeerLostError, StallError
from hybridcomm.selftest.rank import Rank

if TYPE_CHECKING:
    from hybridcomm.bootstrap import World
    from hybridcomm.selftest.board import Board
    from hybridcomm.selftest.cases import Case
    from hybridcomm.selftest.gpu import Gpu
    from hybridcomm.topology import Topology

__all__ = ["FAILED", "LEFT_OUT", "NOT_RUN", "PASSED", "Result", "Runner"]

PASSED, FAILED, LEFT_OUT, NOT_RUN = "passed", "FAILED", "left out", "NOT RUN"
_CONSEQUENCES = (AbortedError, PeerLostError, StallError)
_RECONNECTS = 5
_LINES = 8


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one case went on all ranks. ``layout``: nodes, as `Topology` prints them; ``seconds``: on rank 0."""

    layout: str
    case: str
    against: str
    status: str
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        return self.status in (FAILED, NOT_RUN)


class Runner:
    """One rank's part. All ranks make one, and call the same methods in one order; ``results`` are the same on all.

    ``timeout``: s, of the contexts. ``say``: progress, called on rank 0. A case that raises on any rank ends its
    contexts on all of them; the next one has new ones, unless ranks have gone, or it happened too often.
    """

    def __init__(
        self,
        world: World,
        gpu: Gpu,
        board: Board,
        *,
        timeout: float,
        watch: float,
        say: Callable[[str], None],
    ) -> None:
        self._world, self._gpu, self._board, self._say = world, gpu, board, say
        self._timeout, self._watch = timeout, watch
        self._topology: Topology | None = None
        self._reconnects = 0
        self.rank: Rank | None = None
        self.results: list[Result] = []

    def connect(self, topology: Topology | None) -> bool:
        """New contexts along ``topology`` (None: as detected); False, and a result that says why, where that failed."""
        self._topology, begin = topology, time.monotonic()
        gone = [f"ranks {sorted(self._board.gone)} have gone"] if self._board.gone else []
        reasons = gone or self._together(self._connected)[0]
        if reasons:
            self._record(str(topology or "detected"), "connect", "", FAILED, begin, reasons)
            self.disconnect(abort=True)
        return not reasons

    def _connected(self) -> list[str]:
        host = Context.connect(
            self._topology,
            store=self._world.store,
            rank=self._world.rank,
            world_size=self._world.world_size,
            timeout=self._timeout,
        )
        try:
            device = DeviceContext.connect(host, self._gpu, watch=self._watch)
        except BaseException:
            host.abort()  # the others may be waiting for this rank
            host.close()
            raise
        self._topology = host.topology
        self.rank = Rank(host=host, device=device, torch=self._gpu)
        return []

    def disconnect(self, *, abort: bool = False) -> None:
        """Closes the contexts; ``abort``: without waiting for what is under way."""
        rank, self.rank = self.rank, None
        if rank is None:
            return
        host: Any = rank.host
        for call in (rank.device.abort, host.abort) if abort else ():
            with suppress(HybridCommError):
                call()
        for call in (rank.device.close, host.close):
            with suppress(HybridCommError):
                call()

    def run(self, cases: Sequence[Case]) -> None:
        """Each case, or why not, as a result; leaves this layout's contexts connected if it can."""
        topology = self._topology
        assert topology is not None  # noqa: S101 (connected)
        layout, lost = str(topology), ""
        for case in cases:
            begin = time.monotonic()
            why = case.why_not(topology.world_size, len(topology.nodes))
            if why or lost:
                status = LEFT_OUT if why else NOT_RUN
                self._record(layout, case.name, case.against, status, begin, [why or lost])
                continue
            body = case.body
            reasons, broken = self._together(lambda body=body: body(self._here()))  # type: ignore[misc]
            self._record(layout, case.name, case.against, FAILED if reasons else PASSED, begin, reasons)
            if broken:
                lost = self._again(f"contexts were lost in {case.name!r}")

    def measure(self, body: Callable[[Rank], Any]) -> Any:
        """What ``body`` returns on this rank; None, and a result that says why, where it raised on any."""
        begin, made = time.monotonic(), list[Any]()
        if self.rank is None:
            self._record(str(self._topology), "timings", "", NOT_RUN, begin, ["contexts were lost before"])
            return None

        def call() -> list[str]:
            made.append(body(self._here()))
            return []

        reasons, broken = self._together(call)
        if broken:
            self._record(str(self._topology), "timings", "", FAILED, begin, reasons)
            self.disconnect(abort=True)
            return None
        return made[0]

    def last(self, case: Case) -> None:
        """A case that is to end its contexts."""
        begin, body = time.monotonic(), case.body
        reasons, _ = self._together(lambda: body(self._here()), ends=True)
        self._record(
            str(self._topology), case.name, case.against, FAILED if reasons else PASSED, begin, reasons
        )
        self.disconnect(abort=True)

    def _here(self) -> Rank:
        if self.rank is None:
            raise HybridCommError("there are no contexts")
        return self.rank

    def _again(self, why: str) -> str:
        """New contexts; "", or why there are none."""
        self.disconnect(abort=True)
        if self._board.gone:
            return f"{why}; ranks {sorted(self._board.gone)} have gone"
        if self._reconnects == _RECONNECTS:
            return f"{why}, as {_RECONNECTS} times before"
        self._reconnects += 1
        return "" if self.connect(self._topology) else f"{why}, and could not be made anew"

    def _together(self, body: Callable[[], list[str]], *, ends: bool = False) -> tuple[list[str], bool]:
        """Calls it, and asks how the others did: (what is wrong on any rank, whether contexts are lost)."""
        error, wrong = "", list[str]()
        follows = False
        try:
            wrong = body()
        except Exception as raised:
            error, follows = f"{type(raised).__name__}: {raised}", isinstance(raised, _CONSEQUENCES)
            if self.rank is not None and not ends:
                self.rank.device.abort()  # the others are not to wait for this rank
        every = self._board.exchange({"wrong": wrong[:_LINES], "error": error, "follows": follows})
        causes: list[str] = []
        consequences: list[str] = []
        for rank, said in enumerate(every):
            if said is None:
                causes.append(f"rank {rank}: has not come back from it: it has ended, or hangs")
                continue
            causes += [f"rank {rank}: {line}" for line in said["wrong"]]
            if said["error"]:
                (consequences if said["follows"] else causes).append(f"rank {rank}: {said['error']}")
        broken = bool(consequences) or any(said is None or said["error"] for said in every)
        return [*causes, *consequences], broken

    def _record(
        self, layout: str, case: str, against: str, status: str, begin: float, reasons: Sequence[str]
    ) -> None:
        seconds = time.monotonic() - begin
        self.results.append(
            Result(
                layout=layout,
                case=case,
                against=against,
                status=status,
                seconds=seconds,
                reasons=tuple(reasons),
            )
        )
        if self._world.rank == 0:
            told = "".join(f"\n    {line}" for line in reasons[:_LINES])
            self._say(f"{status:8s} {layout}  {case}  {seconds:.2f} s{told}")
