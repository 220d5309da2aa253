"""``Residual(decay=)`` on GPUs: the residual's product with the factor, rounded to fp32 as hosts round it.

Kernels in CUDA take the factor when they are launched. Triton's are shipped without it, so a launch of the buckets'
kernel multiplies before them, into scratch that they read in the residual's place. Only what restores the residual of a
region that is not finite reads the residual itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hybridcomm.device_plan import Touch
from hybridcomm.device_record import Recorded
from hybridcomm.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from hybridcomm.device_codec import DeviceMemory
    from hybridcomm.kernels.cubins.load import Image

__all__ = ["Decay"]

_MULTIPLIES, _RESTORES = "bucket_pack_fp32", "withdraw"


class Decay:
    """Of one program. ``kept``: scratch, and tables for the kernel that multiplies, whose addresses launches have."""

    def __init__(self, factor: float, *, memory: DeviceMemory, find: Callable[[str], Image]) -> None:
        self._factor, self._memory, self._find = factor, memory, find
        self.kept: list[torch.Tensor] = []

    def record(
        self, record: Callable[[torch.Tensor, float], tuple[Recorded, ...]], e_in: torch.Tensor
    ) -> tuple[Recorded, ...]:
        """The launches of an encoding, which ``record`` writes down for a residual and a decay of the kernels' own.

        Raises `UnsupportedError` where they cannot do it either way.
        """
        if self._factor == 1.0 or not e_in.numel():
            return record(e_in, 1.0)
        try:
            return record(e_in, self._factor)
        except UnsupportedError:
            scaled = self._memory.empty(4 * e_in.numel()).view(e_in.dtype)
            self.kept.append(scaled)
            pairs = zip(record(scaled, 1.0), record(e_in, 1.0), strict=True)
            return (self._multiply(e_in, scaled), *(own if _restores(own) else other for other, own in pairs))

    def _multiply(self, source: torch.Tensor, target: torch.Tensor) -> Recorded:
        from hybridcomm.kernels.triton.launch_bucket import layout

        table, image = self._memory.upload(layout([source], [0]).table), self._find(_MULTIPLIES)
        self.kept.append(table)
        touches = [
            Touch(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t is target)
            for t in (source, target, table)
        ]
        arguments = image.pack(table=table.data_ptr(), bucket=target.data_ptr(), scale=self._factor)
        return Recorded(
            kind="launch", touches=tuple(touches), image=image, blocks=table.shape[0], arguments=arguments
        )


def _restores(launch: Recorded) -> bool:
    return launch.image is not None and launch.image.name.startswith(_RESTORES)
