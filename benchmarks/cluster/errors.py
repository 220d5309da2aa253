"""What can go wrong with a virtual cluster."""

from __future__ import annotations

__all__ = ["ClusterError", "RankFailure", "RateError"]


class ClusterError(RuntimeError):
    """The cluster could not be built: the message names the missing tool or right, or what failed."""


class RateError(ClusterError):
    """A real transfer over a link did not run at the rate the link was shaped to."""


class RankFailure(ClusterError):  # noqa: N818  (it is a rank that failed, not the cluster)
    """A command failed or timed out on a rank; ``rank`` says which (-1: several, or a timeout)."""

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank
