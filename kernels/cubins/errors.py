"""What can be wrong with device kernels built ahead of time."""

from __future__ import annotations

__all__ = [
    "AlignmentError",
    "ArchitectureError",
    "ArtefactError",
    "BuildError",
    "DriverError",
    "KernelError",
]


class KernelError(LookupError):
    """No shipped kernel has this name."""


class AlignmentError(ValueError):
    """An address or a length is no multiple of 16, which a shipped kernel was compiled for."""


class ArchitectureError(LookupError):
    """No cubin of a kernel runs on this compute capability; its PTX or Triton's JIT does."""


class ArtefactError(RuntimeError):
    """An artefact is missing, damaged or of another format."""


class BuildError(RuntimeError):
    """A kernel cannot be built ahead of time."""


class DriverError(RuntimeError):
    """The CUDA driver is missing, or refuses a call."""
