"""What the host side of a codec's device kernels asks for, written down instead of done.

The host code in `hybridcomm.kernels` launches by a callable and moves a few bytes by torch. Run once, when a plan is
lowered, it yields the launches with their argument buffers, and copies and fills; the engine repeats them without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridcomm.device_plan import Touch
from hybridcomm.errors import UnsupportedError
from hybridcomm.kernels.cubins.errors import KernelError
from hybridcomm.kernels.device_access import ranges

if TYPE_CHECKING:
    from hybridcomm.kernels.cubins.load import Image
    from hybridcomm.kernels.device import DeviceKernel

__all__ = ["Recorded", "Recorder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A launch (``image``, ``blocks``, ``arguments``), a copy within the device, or a fill with zeros (``kind``)."""

    kind: str
    touches: tuple[Touch, ...]
    source: int = 0
    target: int = 0
    nbytes: int = 0
    image: Image | None = None
    blocks: int = 0
    arguments: bytes = b""


class Recorder:
    """Collects what is asked for while `record` runs.

    ``find``: the image of a kernel's name for the device. Addresses are written down, and no tensor is kept: whoever
    has them recorded sees to that.
    """

    def __init__(self, find: Callable[[str], Image]) -> None:
        self._find = find
        self._recorded: list[Recorded] = []
        self._numel = 0

    def run(self, kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
        """A `hybridcomm.kernels.cubins.launcher.Run`."""
        values = {name: _value(value) for name, value in arguments.items()}
        image = self._find(kernel.name)
        touched = ranges(kernel, {"numel": self._numel, **values}, programs=programs)
        self._recorded.append(
            Recorded(
                kind="launch",
                touches=tuple(Touch(each.begin, each.begin + each.nbytes, each.write) for each in touched),
                image=image,
                blocks=programs,
                arguments=image.pack(**values),
            )
        )

    def record(self, call: Callable[[], None], what: str, *, numel: int) -> tuple[Recorded, ...]:
        """What ``call``, about a region of ``numel`` elements, asks for, in its order.

        Raises `UnsupportedError` naming ``what`` where no kernel is shipped.
        """
        self._recorded, self._numel = [], numel
        try:
            with _Mode(self):
                call()
        except KernelError as error:
            raise UnsupportedError(
                f"{what}: {error}; the engine launches kernels that are built ahead of time: "
                "`python -m hybridcomm.kernels.cubins` lists them"
            ) from error
        except ValueError as error:
            raise UnsupportedError(f"{what}: {error}") from error
        return tuple(self._recorded)

    def moved(self, kind: str, target: torch.Tensor, source: torch.Tensor | None) -> None:
        nbytes = target.numel() * target.element_size()
        if nbytes == 0:
            return
        at = target.data_ptr()
        touches = [Touch(at, at + nbytes, True)]
        if source is not None:
            touches.append(Touch(source.data_ptr(), source.data_ptr() + nbytes, False))
        self._recorded.append(
            Recorded(
                kind=kind,
                touches=tuple(touches),
                source=0 if source is None else source.data_ptr(),
                target=at,
                nbytes=nbytes,
            )
        )


_HARMLESS = ("view", "slice", "select", "alias", "detach", "as_strided", "unsqueeze")
"""Calls that neither read nor write elements, nor make memory, which nobody would keep."""


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands between the host code and torch: notes what moves bytes, lets views pass, refuses the rest."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "copy_":
            target, source = args[:2]
            if target.dtype != source.dtype or not (target.is_contiguous() and source.is_contiguous()):
                raise UnsupportedError(
                    "a copy between tensors of other types or with gaps cannot be recorded"
                )
            self._recorder.moved("copy", target, source)
            return target
        if name == "zero_":
            self._recorder.moved("fill", args[0], None)
            return args[0]
        if name not in _HARMLESS:
            raise UnsupportedError(f"torch's {name} cannot be recorded for the device")
        return func(*args, **(kwargs or {}))


def _value(value: Any) -> int | float:
    if value is None:
        return 0
    address: int | float = value.data_ptr() if isinstance(value, torch.Tensor) else value
    return address
