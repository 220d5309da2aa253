"""Where ranks tell each other how a case went: through the job's store, since a failed case ends the contexts."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from hybridcomm.errors import StallError

if TYPE_CHECKING:
    from hybridcomm.bootstrap import World

__all__ = ["Board"]


class Board:
    """One rank's access; all ranks call `exchange` in one order.

    ``patience``: s that ranks may come later than the first one. ``gone``: those that did not come, for whom nobody
    waits again.
    """

    def __init__(self, world: World, *, patience: float) -> None:
        self._world, self._patience, self._round = world, patience, 0
        self.gone: set[int] = set()
        number = 0 if world.store is None else world.store.count(f"selftest/{world.rank}")
        self._prefix = f"selftest{number}"

    @property
    def rank(self) -> int:
        return self._world.rank

    @property
    def world_size(self) -> int:
        return self._world.world_size

    def exchange(self, said: Any) -> list[Any]:
        """What each rank said (as JSON has it), None for one that did not come in time; the same on all ranks.

        Raises `StallError` where rank 0, which collects, does not answer, or has given this rank up.
        """
        self._round += 1
        store, key = self._world.store, f"{self._prefix}/{self._round}"
        if store is None:
            return [json.loads(json.dumps(said))]
        store.set(f"{key}/{self.rank}", json.dumps(said).encode())
        if self.rank == 0:
            every = self._collected(key)
            store.set(f"{key}/all", json.dumps(every).encode())
            return self._seen(every)
        try:
            # Rank 0 may have come last, and then have waited for one that is gone.
            found: list[Any] = json.loads(store.get(f"{key}/all", 2 * self._patience + 5))
        except TimeoutError as error:
            raise StallError(
                f"self-test, rank {self.rank}: rank 0 has not said in {2 * self._patience + 5:g} s how all ranks did: "
                "it has ended, or hangs",
                missing=(0,),
            ) from error
        return self._seen(found)

    def _collected(self, key: str) -> list[Any]:
        store, until, found = self._world.store, time.monotonic() + self._patience, list[Any]()
        for rank in range(self.world_size):
            if rank in self.gone:
                found.append(None)
                continue
            try:
                assert store is not None  # noqa: S101 (a world of one does not collect)
                found.append(json.loads(store.get(f"{key}/{rank}", max(until - time.monotonic(), 0.05))))
            except TimeoutError:
                found.append(None)
        return found

    def _seen(self, every: list[Any]) -> list[Any]:
        self.gone |= {rank for rank, said in enumerate(every) if said is None}
        if self.rank in self.gone:
            raise StallError(
                f"self-test, rank {self.rank}: it came too late, and the others went on without it"
            )
        return every
