"""Whose streams and memory the GPU engine works with: torch's, or those of a simulated device.

The engine needs little of the framework above it: the stream that the caller is on, memory, and a few copies on that
stream. Everything else is CUDA's and NCCL's. So what only a GPU can run is small, and the code above it is the same
under a simulated driver, whose device memory lies behind CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hybridcomm.errors import DataTypeError, DeviceError, UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["HOST_TENSORS", "HostTensors", "StreamProvider", "TensorMover", "TorchCuda", "view_of"]


_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class TensorMover(Protocol):
    """What gradients go into buckets with, and come out of them: all in the order of the tensors' own work."""

    def copy(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], scale: float = 1.0
    ) -> None:
        """Each source times ``scale``, formed in the wider of both types, to its target."""
        ...

    def zero(self, tensor: torch.Tensor) -> None: ...

    def finite(self, tensor: torch.Tensor, limit: float) -> bool:
        """Whether all elements are finite and of at most that magnitude; the host waits for the answer."""
        ...


class StreamProvider(TensorMover, Protocol):
    """What the engine asks of the framework whose tensors it reduces; every call is about one device."""

    @property
    def ordinal(self) -> int:
        """Of the device, as CUDA counts them."""
        ...

    @property
    def device(self) -> torch.device:
        """That its tensors have."""
        ...

    def owns(self, tensor: Any) -> bool:
        """Whether a tensor lies on the device."""
        ...

    def stream(self) -> int:
        """The calling thread's current stream (a CUstream's address, 0: the legacy one)."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 on the device, on 256 bytes, not cleared; used on the engine's streams."""
        ...

    def wrap(self, address: int, nbytes: int, owner: Any) -> torch.Tensor:
        """(nbytes,) uint8: device memory that ``owner`` keeps while the tensor lives."""
        ...

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor on the device, complete when this returns."""
        ...

    def send(self, data: torch.Tensor) -> torch.Tensor:
        """As `upload`, but the host does not wait: the current stream has it."""
        ...

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, complete when this returns, of what the current stream has done so far."""
        ...

    def add(self, target: torch.Tensor, source: torch.Tensor, factor: float) -> None:
        """``target += factor * source`` on the current stream."""
        ...

    def timed(self, call: Callable[[], object]) -> float:
        """s that the device takes for what ``call`` puts on the current stream; the host waits for it."""
        ...

    def place(self, module: torch.nn.Module) -> None:
        """Moves a module's parameters and buffers to the device; parameters stay the same objects."""
        ...


class HostTensors:
    """CPU tensors, whose work is done when a call returns."""

    def copy(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], scale: float = 1.0
    ) -> None:
        import torch

        with torch.no_grad():
            if scale == 1.0:
                torch._foreach_copy_(list(targets), list(sources))
                return
            for target, source in zip(targets, sources, strict=True):
                if target.element_size() >= source.element_size():
                    target.copy_(source).mul_(scale)
                else:
                    target.copy_(source * scale)

    def zero(self, tensor: torch.Tensor) -> None:
        tensor.detach().zero_()

    def finite(self, tensor: torch.Tensor, limit: float) -> bool:
        import torch

        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            return False
        return limit >= torch.finfo(tensor.dtype).max or bool((tensor.abs() <= limit).all())


HOST_TENSORS = HostTensors()


class TorchCuda(HostTensors):
    """torch's CUDA streams and memory.

    Raises `UnsupportedError` where torch is built without CUDA or there is no such device.
    """

    def __init__(self, device: Any = None) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError(
                "torch sees no GPU: install a build of torch for CUDA, and look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        wanted = torch.device("cuda" if device is None else device)
        if wanted.type != "cuda":
            raise UnsupportedError(f"device={device!r}: a CUDA device is wanted")
        self.ordinal = torch.cuda.current_device() if wanted.index is None else wanted.index
        self.device = torch.device("cuda", self.ordinal)

    def owns(self, tensor: Any) -> bool:
        return getattr(tensor, "device", None) == self.device

    def stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        """From torch's caching allocator; the engine's works keep it until they are over.

        Raises `DeviceError` where there is not so much.
        """
        import torch

        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(
                f"{nbytes:,} bytes of scratch on {self.device}: {error}; make buckets or batches smaller",
                call="torch.empty",
                name="CUDA_ERROR_OUT_OF_MEMORY",
                code=_OUT_OF_MEMORY,
                device=self.ordinal,
            ) from error

    def wrap(self, address: int, nbytes: int, owner: Any) -> torch.Tensor:
        import torch

        tensor: torch.Tensor = torch.as_tensor(_Interface(address, nbytes, owner), device=self.device)
        return tensor

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        import torch

        moved = data.to(self.device)
        torch.cuda.current_stream(self.device).synchronize()
        return moved

    def send(self, data: torch.Tensor) -> torch.Tensor:
        return data.pin_memory().to(self.device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def add(self, target: torch.Tensor, source: torch.Tensor, factor: float) -> None:
        target.add_(source, alpha=factor)

    def timed(self, call: Callable[[], object]) -> float:
        import torch

        stream = torch.cuda.current_stream(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def place(self, module: torch.nn.Module) -> None:
        module.to(self.device)


class _Interface:
    """Memory as ``__cuda_array_interface__`` (version 3) shows it; its array keeps this, and so the owner."""

    def __init__(self, address: int, nbytes: int, owner: Any) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def view_of(tensor: Any, provider: StreamProvider, name: str = "t") -> torch.Tensor:
    """A flat view of a caller's array on the device: torch's, or through DLPack cupy's and others'.

    The exchange by DLPack orders the producer's stream before the current one. Raises `DataTypeError` for one with
    gaps, on another device, or that is read-only.
    """
    import torch
    import torch.utils.dlpack

    if not isinstance(tensor, torch.Tensor):
        if not hasattr(tensor, "__dlpack__"):
            raise DataTypeError(
                f"{name}: expected a tensor or an array with __dlpack__, got {type(tensor).__name__}"
            )
        try:
            tensor = torch.utils.dlpack.from_dlpack(tensor)
        except (BufferError, RuntimeError) as error:
            raise DataTypeError(f"{name}: its array cannot be taken: {error}") from error
    if not provider.owns(tensor):
        raise DataTypeError(f"{name}: lies on {tensor.device}, this rank's device is {provider.device}")
    if not tensor.is_contiguous():
        raise DataTypeError(f"{name}: has gaps; pass {name}.contiguous(), and copy the result back")
    flat: torch.Tensor = tensor.detach().view(-1)
    return flat
