"""Tensors of one part per rank (all_gather, reduce_scatter): one or several of them as one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridcomm.arrays import View
from hybridcomm.memory import Memory
from hybridcomm.policy import itemsize

__all__ = ["Parted", "place_gathered", "place_scattered", "sizes_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parted:
    """``parts[r]`` belongs to rank r; ``own`` is what this rank gives to a gather, or gets from a scatter."""

    own: View
    parts: tuple[View, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(part.numel for part in self.parts)


def sizes_of(packed: Sequence[Parted], apart: Sequence[Parted]) -> tuple[tuple[int, ...], ...]:
    """The segments of a plan: what is packed makes up the first, then come the others in their order."""
    first = tuple(sum(sizes) for sizes in zip(*(each.sizes for each in packed), strict=True))
    return (*([first] if packed else []), *(each.sizes for each in apart))


def place_gathered(memory: Memory, packed: Sequence[Parted], apart: Sequence[Parted], rank: int) -> None:
    """For an all_gather: own parts go where they are gathered, results are written in place or unpacked."""
    for place, each, r in _pack(memory, packed):
        if r == rank:
            memory.copy(place, each.own.address, each.own.numel)
        memory.copy_later(each.parts[r].address, place, each.parts[r].numel)
    at = sum(sum(each.sizes) for each in packed)
    for each in apart:
        memory.copy(each.parts[rank].address, each.own.address, each.own.numel)
        for part in each.parts:
            memory.place(at, part.numel, part.address)
            at += part.numel
    for each in (*packed, *apart):
        memory.write_to(*each.parts)


def place_scattered(memory: Memory, packed: Sequence[Parted], apart: Sequence[Parted], rank: int) -> None:
    """For a reduce_scatter: own parts are reduced in ``own``; inputs are only to be read (`Memory.shield`)."""
    for place, each, r in _pack(memory, packed):
        memory.copy(place, each.parts[r].address, each.parts[r].numel)
        if r == rank:
            memory.copy_later(each.own.address, place, each.own.numel)
    at = sum(sum(each.sizes) for each in packed)
    for each in apart:
        memory.copy(each.own.address, each.parts[rank].address, each.own.numel)
        for r, part in enumerate(each.parts):
            mine = r == rank
            memory.place(at, part.numel, each.own.address if mine else part.address, writable=mine)
            at += part.numel
    for each in (*packed, *apart):
        memory.write_to(each.own)
        memory.keep(*each.parts)


def _pack(memory: Memory, packed: Sequence[Parted]) -> list[tuple[int, Parted, int]]:
    """Places all of ``packed`` in one piece of scratch, by rank: where each tensor's part of each rank lies."""
    numel = sum(sum(each.sizes) for each in packed)
    if not packed:
        return []
    address = memory.scratch(numel)
    memory.place(0, numel, address)
    places = []
    for rank in range(len(packed[0].parts)):
        for each in packed:
            places.append((address, each, rank))
            address += each.sizes[rank] * itemsize(memory.dtype)
    return places
