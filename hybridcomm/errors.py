"""Typed errors: each names the rank, the step or the peers, and what to do.

The C++ engine raises the same types (``csrc/bind_errors.cpp`` maps its error codes onto the classes below).
"""

from __future__ import annotations

__all__ = [
    "AbortedError",
    "BootstrapError",
    "CompressorError",
    "DataTypeError",
    "DeviceError",
    "GroupError",
    "HybridCommError",
    "PayloadError",
    "PeerLostError",
    "PlanError",
    "PlanMismatchError",
    "ResidualError",
    "SharedMemoryError",
    "StallError",
    "TopologyError",
    "UnsupportedError",
]


class HybridCommError(RuntimeError):
    """Base of every error this package raises on purpose."""


class BootstrapError(HybridCommError):
    """The ranks could not find or connect to each other: a port in use, a peer that never came."""


class SharedMemoryError(HybridCommError):
    """A shared segment could not be created or filled (memory limit, descriptor limit)."""


class TopologyError(HybridCommError, ValueError):
    """Ranks cannot be laid out on nodes as asked."""


class DataTypeError(HybridCommError, TypeError):
    """A tensor's dtype, device or layout cannot be taken by the operation."""


class GroupError(HybridCommError, ValueError):
    """A collective of a group that this rank is not in, or ranks that no group can have."""


class UnsupportedError(HybridCommError, ValueError):
    """A combination of options that cannot act; the message names the one to change."""


class CompressorError(HybridCommError, ValueError):
    """An unknown compressor, or a setting of it that is out of range."""


class ResidualError(HybridCommError, ValueError):
    """A residual used with another tensor layout, or left without commit or rollback."""


class PlanError(HybridCommError, ValueError):
    """A plan that is not a correct schedule of its collective, or a text that is not a plan."""


class PlanMismatchError(HybridCommError):
    """Ranks called different collectives, or the same one with different shapes, dtypes or codecs."""


class PayloadError(HybridCommError):
    """A payload's header or length is not what the plan says."""


class PeerLostError(HybridCommError):
    """A rank died or left; ``rank`` says which."""

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class StallError(HybridCommError, TimeoutError):
    """A wait ran into its timeout; ``missing`` lists the ranks that were waited for."""

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class DeviceError(HybridCommError):
    """A GPU failed, or CUDA refused a call.

    ``call``: whose; ``name`` and ``code``: CUDA's ("CUDA_ERROR_OUT_OF_MEMORY", 2), or of NCCL's where CUDA failed it;
    ``device``: its number, -1 of none yet; ``lost``: nothing works there any more, on any rank of the context.
    """

    def __init__(
        self,
        message: str,
        *,
        call: str = "",
        name: str = "",
        code: int = 0,
        device: int = -1,
        lost: bool = False,
    ) -> None:
        super().__init__(message)
        self.call, self.name, self.code, self.device, self.lost = call, name, code, device, lost


class AbortedError(HybridCommError):
    """The context was aborted here or by a peer; every later call raises this until a new ``init()``."""
