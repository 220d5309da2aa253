"""The collectives that copy and combine nothing: broadcast, all_gather, gather, scatter, all_to_all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hybridcomm import collective_plans
from hybridcomm.arrays import Array, View, view
from hybridcomm.collectives_base import CollectivesBase, check_dtypes
from hybridcomm.errors import PlanMismatchError, UnsupportedError
from hybridcomm.lower import DTYPES
from hybridcomm.parted import Parted, place_gathered, sizes_of

if TYPE_CHECKING:
    from hybridcomm import _C
    from hybridcomm.memory import Memory
    from hybridcomm.plan import Plan
    from hybridcomm.work import Work

__all__ = ["Copies", "rows_by_rank"]


class Copies(CollectivesBase):
    """broadcast, all_gather, gather, scatter, all_to_all."""

    def broadcast(self, t: Array, src: int = 0, *, async_op: bool = False) -> Work | None:
        """Copies rank ``src``'s ``t`` into every rank's ``t``."""
        target = view(t, written=self.rank != src)
        _, program = self._program(
            ("broadcast", target.numel, target.dtype, src),
            lambda: collective_plans.broadcast(
                self.topology, target.numel, root=src, dtype=target.dtype, chunk_nbytes=self.chunk_nbytes
            ),
        )
        memory = self._memory(target.dtype)
        memory.place(0, target.numel, target.address)
        (memory.keep if self.rank == src else memory.write_to)(target)
        return self._launch(program, memory, async_op)

    # -- all_gather ----------------------------------------------------------------------------------------

    def all_gather(self, out: Sequence[Array] | Array, t: Array, *, async_op: bool = False) -> Work | None:
        """Copies every rank's ``t`` into ``out[rank]`` of all ranks; see `hybridcomm.all_gather`."""
        if not isinstance(out, (list, tuple)):
            return self.all_gather_into_tensor(out, t, async_op=async_op)
        own = view(t, "t", written=False)
        parts = self._views(out, "out", like=own, written=True)
        if parts[self.rank].numel != own.numel:
            raise UnsupportedError(
                f"out[{self.rank}] has {parts[self.rank].numel} elements, this rank's t {own.numel}"
            )
        return self._all_gather([Parted(own=own, parts=tuple(parts))], async_op)

    def all_gather_into_tensor(self, out: Array, t: Array, *, async_op: bool = False) -> Work | None:
        """Gathers every rank's ``t`` into ``out`` (world_size x t.numel() elements, by rank) on all ranks."""
        whole, own = view(out, "out"), view(t, "t", written=False)
        parts = self._equal_parts(whole, own, ("out", "t"))
        return self._all_gather([Parted(own=own, parts=tuple(parts))], async_op)

    def _all_gather(
        self, entries: Sequence[Parted], async_op: bool, *, packed: Sequence[Parted] = (), name: int = 0
    ) -> Work | None:
        """Of ``packed`` tensors in one message, and of the others."""
        if self._batch is not None:
            self._batch.all_gather(entries, async_op=async_op)
            return None
        dtype, sizes = (*entries, *packed)[0].own.dtype, sizes_of(packed, entries)
        _, program = self._program(
            ("all_gather", sizes, dtype),
            lambda: collective_plans.all_gather(
                self.topology,
                sum(map(sum, sizes)),
                dtype=dtype,
                segments=sizes,
                chunk_nbytes=self.chunk_nbytes,
            ),
        )
        memory = self._memory(dtype)
        place_gathered(memory, packed, entries, self.rank)
        return self._launch(program, memory, async_op, name=name)

    # -- one rank and all others ---------------------------------------------------------------------------

    def gather(
        self, t: Array, gather_list: Sequence[Array] | None = None, dst: int = 0, *, async_op: bool = False
    ) -> Work | None:
        """Copies every rank's ``t`` into rank ``dst``'s ``gather_list[rank]``; elsewhere the list is None."""
        own = view(t, written=False)
        parts = self._list_of_one_rank(gather_list, "gather_list", own, at=dst, written=True)
        program, memory = self._one_and_all(collective_plans.gather, own, parts, dst)
        memory.keep(own)
        if self.rank == dst:
            memory.copy(parts[dst].address, own.address, own.numel)
            memory.write_to(*parts)
        return self._launch(program, memory, async_op)

    def scatter(
        self, t: Array, scatter_list: Sequence[Array] | None = None, src: int = 0, *, async_op: bool = False
    ) -> Work | None:
        """Copies rank ``src``'s ``scatter_list[rank]`` into every rank's ``t``; elsewhere the list is None."""
        own = view(t)
        parts = self._list_of_one_rank(scatter_list, "scatter_list", own, at=src, written=False)
        program, memory = self._one_and_all(collective_plans.scatter, own, parts, src)
        memory.write_to(own)
        if self.rank == src:
            memory.copy(own.address, parts[src].address, own.numel)
            memory.keep(*parts)
        return self._launch(program, memory, async_op)

    def _one_and_all(
        self, build: Callable[..., Plan], own: View, parts: Sequence[View], root: int
    ) -> tuple[_C.Program, Memory]:
        """The program between ``root`` and all ranks, and where the parts lie: at the root all, elsewhere its own."""
        _, program = self._program(
            (build.__name__, own.numel, own.dtype, root),
            lambda: build(
                self.topology,
                own.numel * self.world_size,
                root=root,
                dtype=own.dtype,
                chunk_nbytes=self.chunk_nbytes,
            ),
        )
        memory = self._memory(own.dtype)
        for rank, part in enumerate(parts) if self.rank == root else [(self.rank, own)]:
            memory.place(rank * own.numel, own.numel, part.address)
        return program, memory

    def _list_of_one_rank(
        self, arrays: Sequence[Array] | None, name: str, own: View, *, at: int, written: bool
    ) -> list[View]:
        """The list that rank ``at`` alone passes: equally long views, and none elsewhere."""
        self.topology.node_of(at)  # raises for a rank that is not there
        if self.rank != at:
            if arrays:
                raise UnsupportedError(f"{name}: only rank {at} passes one, this is rank {self.rank}")
            return []
        parts = self._views(arrays, name, like=own, written=written)
        for rank, part in enumerate(parts):
            if part.numel != own.numel:
                raise UnsupportedError(f"{name}[{rank}] has {part.numel} elements, t {own.numel}")
        return parts

    # -- all_to_all ----------------------------------------------------------------------------------------

    def all_to_all(
        self, out_list: Sequence[Array], in_list: Sequence[Array], *, async_op: bool = False
    ) -> Work | None:
        """Copies ``in_list[r]`` to rank r, which gets it in its ``out_list`` at this rank's place.

        Sizes may differ, and be 0. The ranks exchange them first, which waits for the calls before this one.
        """
        first = next(iter(in_list), None) if isinstance(in_list, (list, tuple)) else None
        if first is None:
            raise UnsupportedError("in_list: expected a list of one array per rank")
        like = view(first, "in_list[0]", written=False)
        given = self._views(in_list, "in_list", like=like, written=False)
        wanted = self._views(out_list, "out_list", like=like, written=True)
        return self._all_to_all(wanted, given, self._exchanged_sizes(wanted, given), async_op)

    def all_to_all_single(
        self,
        out: Array,
        t: Array,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Work | None:
        """Rank r gets part r of ``t``; parts lie in ``out`` by sender; see `hybridcomm.all_to_all_single`."""
        target, source = view(out, "out"), view(t, "t", written=False)
        check_dtypes(("out", target), ("t", source))
        wanted = self._split(target, output_split_sizes, "output_split_sizes", "out")
        given = self._split(source, input_split_sizes, "input_split_sizes", "t")
        if output_split_sizes is not None or input_split_sizes is not None:
            sizes = self._exchanged_sizes(wanted, given)
        elif target.numel != source.numel:
            raise UnsupportedError(
                f"out has {target.numel} elements, t {source.numel}: without split sizes they must be equal"
            )
        else:
            sizes = [[part.numel for part in given]] * self.world_size
        return self._all_to_all(wanted, given, sizes, async_op)

    def _split(self, whole: View, sizes: Sequence[int] | None, name: str, what: str) -> list[View]:
        """One view per rank; sizes count along the first dimension, as torch's do."""
        sizes = rows_by_rank(tuple(whole.owner.shape), sizes, self.world_size, name, what)
        rows = sum(sizes)
        row = whole.numel // rows if rows else 0
        return whole.split([size * row for size in sizes])

    def _exchanged_sizes(self, wanted: Sequence[View], given: Sequence[View]) -> list[list[int]]:
        """How much goes from whom to whom: every rank learns all, so that all see a disagreement alike."""
        world, dtype = self.world_size, given[0].dtype
        own = np.array([DTYPES.index(dtype), *(v.numel for v in given), *(v.numel for v in wanted)], np.int64)
        every = np.zeros((world, own.size), np.int64)
        memory, part = self._memory("int64"), own.size
        _, program = self._program(
            ("all_to_all", "sizes"),
            lambda: replace(
                collective_plans.all_gather(self.topology, world * part, dtype="int64"),
                collective="all_to_all",
            ),
        )
        every[self.rank] = own
        memory.place(0, every.size, every.ctypes.data)
        self._launch(program, memory, False)
        sent, expected = every[:, 1 : 1 + world], every[:, 1 + world :].T
        for rank in range(world):
            if every[rank, 0] != every[0, 0]:
                raise PlanMismatchError(
                    f"all_to_all: rank {rank} passes {DTYPES[every[rank, 0]]}, rank 0 {DTYPES[every[0, 0]]}"
                )
        if (sent != expected).any():
            i, j = (int(index) for index in np.argwhere(sent != expected)[0])
            raise PlanMismatchError(
                f"all_to_all: rank {i} sends {sent[i, j]} elements to rank {j}, which expects {expected[i, j]}"
            )
        return [[int(size) for size in row] for row in sent]

    def _all_to_all(
        self, wanted: Sequence[View], given: Sequence[View], sizes: Sequence[Sequence[int]], async_op: bool
    ) -> Work | None:
        dtype = given[0].dtype
        plan, program = self._program(
            ("all_to_all", tuple(map(tuple, sizes)), dtype),
            lambda: collective_plans.all_to_all(
                self.topology, sizes, dtype=dtype, chunk_nbytes=self.chunk_nbytes
            ),
        )
        memory = self._memory(dtype)
        memory.keep(*given)
        memory.write_to(*wanted)
        memory.copy(wanted[self.rank].address, given[self.rank].address, given[self.rank].numel)
        for part in plan.parts:
            if part.source == self.rank:
                memory.place(part.begin, part.end - part.begin, given[part.target].address)
            elif part.target == self.rank:
                memory.place(part.begin, part.end - part.begin, wanted[part.source].address)
        return self._launch(program, memory, async_op)


def rows_by_rank(
    shape: tuple[int, ...], sizes: Sequence[int] | None, world: int, name: str, what: str
) -> list[int]:
    """How many rows of ``what`` each of ``world`` ranks gets: ``sizes``, or equal parts where there are none."""
    if not shape:
        raise UnsupportedError(f"{what}: a tensor without dimensions cannot be split; pass it as t.view(1)")
    rows = shape[0]
    if sizes is None:
        if rows % world:
            raise UnsupportedError(f"{what} has {rows} rows: give {name}, or a multiple of {world} rows")
        return [rows // world] * world
    sizes = [int(size) for size in sizes]
    if len(sizes) != world or min(sizes) < 0 or sum(sizes) != rows:
        raise UnsupportedError(
            f"{name}={sizes}: needs {world} sizes >= 0, one per rank, that sum to the {rows} rows of {what}"
        )
    return sizes
