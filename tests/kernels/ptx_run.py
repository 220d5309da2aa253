"""A device of its own for launchers: kernels are executed from their shipped PTX, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.payload import HEADER_NBYTES
from tests.ptx import Counters, Memory
from tests.ptx.conformance import Executable, executable
from tests.ptx.types import Bools

__all__ = ["PtxRun"]

Load = Callable[[DeviceKernel, int], Executable]


@dataclass(kw_only=True)
class PtxRun:
    """Runs launches for one architecture; ``launches`` keeps what was run: kernel, elements, counters.

    ``load``: where executables come from, so that a test can plant bugs in them. ``beside``: tensors that a kernel
    finds by the addresses in its table.
    """

    arch: int
    load: Load = executable
    beside: Sequence[torch.Tensor] = ()
    launches: list[tuple[DeviceKernel, int, Counters]] = field(default_factory=list)
    _held: dict[int, tuple[torch.Tensor, Bools]] = field(default_factory=dict)

    def __call__(self, kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
        memory, places, values = Memory(), dict[int, int](), {}
        moved = {tensor.data_ptr(): self._place(memory, places, "beside", tensor) for tensor in self.beside}
        for name, value in arguments.items():
            given = _moved(value, moved) if name == "table" else value
            if isinstance(given, torch.Tensor):
                given = self._place(memory, places, name, given)
            values[name] = 0 if given is None else given
        elements = programs * kernel.elements
        counters = self.load(kernel, self.arch).launch(memory, elements, **values)
        self.launches.append((kernel, elements, counters))
        for start, address in places.items():
            data, initialised = self._held[start]
            data.numpy()[:] = memory.read(address)
            initialised[:] = memory.written(address)

    def hold(self, tensor: torch.Tensor, initialised: Bools) -> None:
        """Says which bytes of a tensor, the only one in its storage, may be read before a kernel has written them."""
        storage = tensor.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        self._held[storage.data_ptr()] = data, initialised.copy()

    def written(self, tensor: torch.Tensor) -> bool:
        """Whether kernels have written, or were given, all of a tensor."""
        return bool(self._held[tensor.untyped_storage().data_ptr()][1].all())

    def _place(self, memory: Memory, places: dict[int, int], name: str, tensor: torch.Tensor) -> int:
        """A storage stands in memory once, however many of its parts are passed. What a kernel is to write it must not
        read before; of a payload the host has written the header."""
        start = tensor.untyped_storage().data_ptr()
        if start not in self._held:
            initialised = np.full(tensor.untyped_storage().nbytes(), name not in ("e_out", "payload", "sums"))
            if name == "payload":
                initialised[:HEADER_NBYTES] = True
            self.hold(tensor, initialised)
        if start not in places:
            data, known = self._held[start]
            places[start] = memory.place(data.numpy(), name=name, initialised=known)
        return places[start] + tensor.data_ptr() - start


def _moved(table: torch.Tensor, moved: Mapping[int, int]) -> torch.Tensor:
    """A bucket's table with the addresses that tensors have in the executor's memory."""
    table = table.clone()
    for row in table:
        start = max(address for address in moved if address <= int(row[0]))
        row[0] += moved[start] - start
    return table
