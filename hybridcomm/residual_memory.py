"""Where a residual's buffers lie: on the host as NumPy arrays, or on a device as its tensors."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["HOST", "DeviceResiduals", "ResidualMemory"]

_FloatArray = npt.NDArray[np.float32]


class ResidualMemory(Protocol):
    """What a `Residual` does with buffers: 1-D, fp32; slices of them are views."""

    def zeros(self, numel: int) -> Any: ...

    def from_host(self, values: _FloatArray) -> Any:
        """A copy."""
        ...

    def to_host(self, buffer: Any) -> _FloatArray:
        """A copy, complete."""
        ...

    def add(self, target: Any, source: Any, factor: float) -> None:
        """``target += factor * source``."""
        ...

    def clear(self, buffer: Any) -> None: ...


class _Host:
    def zeros(self, numel: int) -> _FloatArray:
        return np.zeros(numel, np.float32)

    def from_host(self, values: _FloatArray) -> _FloatArray:
        return values.copy()

    def to_host(self, buffer: _FloatArray) -> _FloatArray:
        return buffer.copy()

    def add(self, target: _FloatArray, source: _FloatArray, factor: float) -> None:
        target += source if factor == 1.0 else np.float32(factor) * source

    def clear(self, buffer: _FloatArray) -> None:
        buffer.fill(0)


HOST = _Host()


class DeviceResiduals:
    """On the device of a `hybridcomm.stream_provider.StreamProvider`, in the order of its current stream."""

    def __init__(self, provider: Any) -> None:
        self.provider = provider

    def zeros(self, numel: int) -> Any:
        import torch

        buffer = self.provider.empty(max(4 * numel, 1))[: 4 * numel].view(torch.float32)
        self.provider.zero(buffer)
        return buffer

    def from_host(self, values: _FloatArray) -> Any:
        import torch

        return self.provider.upload(torch.from_numpy(values.copy()))

    def to_host(self, buffer: Any) -> _FloatArray:
        values: _FloatArray = self.provider.download(buffer).numpy().copy()
        return values

    def add(self, target: Any, source: Any, factor: float) -> None:
        self.provider.add(target, source, factor)

    def clear(self, buffer: Any) -> None:
        self.provider.zero(buffer)
