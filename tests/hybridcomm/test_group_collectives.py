"""The verbs on groups: roots and parts count the group's ranks in their order, and handles of one group agree."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcomm.context import Context
from tests.engine_ranks import engine_contexts
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", ["1x4", "2x2", "3+2"])
@pytest.mark.parametrize("ranks", [(0, 3), (3, 1, 0)])
def test_every_verb_in_ranks_of_the_group(name: str, ranks: tuple[int, ...]) -> None:
    n = 5000

    def value(rank: int, call: int = 0) -> np.ndarray:
        return np.arange(n, dtype=np.float32) % 89 + 100 * rank + call

    def body(ctx: Context) -> None:
        if ctx.rank not in ranks:
            ctx.barrier()
            return
        size, last = len(ranks), len(ranks) - 1
        for _ in range(2):  # handles are made anew, and are the same group
            group = ctx.group(ranks)
            me, total = group.rank, sum(value(r) for r in range(size))
            array = value(me)
            group.reduce(array, last)
            assert (array == (total if me == last else value(me))).all()
            out = [np.zeros(n, np.float32) for _ in ranks]
            group.gather(value(me), out if me == last else None, last)
            assert me != last or all((got == value(r)).all() for r, got in enumerate(out))
            got = np.zeros(n, np.float32)
            group.scatter(got, [value(7, r) for r in range(size)] if me == 0 else None, 0)
            assert (got == value(7, me)).all()
            group.all_to_all(out, [value(me, r) for r in range(size)])
            assert all((each == value(r, me)).all() for r, each in enumerate(out))
            with group.coalescing():
                group.allreduce(array[:3])
                group.allreduce(got[:5])
            assert (got[:5] == sum(value(7, r)[:5] for r in range(size))).all()
            group.monitored_barrier()
        ctx.barrier()

    with engine_contexts(NAMED[name]) as contexts:
        run_ranks(body, contexts)
