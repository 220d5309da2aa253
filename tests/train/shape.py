"""What stands for a group where only its size is asked for."""

from __future__ import annotations


class FakeGroup:
    """Rank 0 of so many; it cannot communicate."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.world_size = size
