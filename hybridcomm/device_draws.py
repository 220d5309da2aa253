"""Codecs that draw (randk, powersgd) on a GPU: what of a recorded program belongs to one call, and that call's program.

In: a lowered plan, whose payloads begin with headers that were made for no call. Out: the same plan with seeds of one
call, those of the host. Two things change: where headers are copied from, and the checksum that a launch gives to a
payload whose body was withdrawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybridcomm.device_plan import Buffer, Touch
from hybridcomm.kernels.payload import HEADER_NBYTES

if TYPE_CHECKING:
    import torch

    from hybridcomm.device_plan import DevicePlan, Operation
    from hybridcomm.stream_provider import StreamProvider

__all__ = ["Draws", "of_call", "seed_of"]

_U64 = (1 << 64) - 1
_CHECKSUM = "checksum"  # parameter of the launches that may withdraw a payload


def seed_of(digest: int, call: int, step: int) -> int:
    """As the host's executor has it (csrc/executor_codec.cpp): another for every call and every step of a plan."""
    return _mixed((_mixed((digest + call) & _U64) + step) & _U64)


def of_call(
    plan: DevicePlan, call: int, provider: StreamProvider, producer: int
) -> tuple[DevicePlan, torch.Tensor]:
    """What call number ``call`` runs, and the headers that it copies, there when stream ``producer`` is this far."""
    if plan.draws is None:
        raise ValueError(f"{plan.name}: draws nothing")
    templates, withdrawn = plan.draws.headers_of(call)
    headers = provider.send(templates) if producer == provider.stream() else provider.upload(templates)
    return plan.draws.plan_of(plan, headers.data_ptr(), withdrawn), headers


def _mixed(x: int) -> int:
    """splitmix64's."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _U64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _U64
    return x ^ (x >> 31)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """``encoded``: step and elements of whatever is encoded, in the order of their headers in ``headers``, where the
    plan as it was recorded copies them from."""

    spec: Any
    digest: int
    encoded: tuple[tuple[int, int], ...]
    headers: Buffer

    def headers_of(self, call: int) -> tuple[torch.Tensor, dict[int, int]]:
        """Of one call: headers for the device, one behind another; by step, the checksum of a withdrawn payload."""
        import torch

        from hybridcomm.kernels.device_tensors import make_header

        made = {
            step: make_header(
                self.spec,
                numel,
                self.digest,
                torch.device("cpu"),
                seed=seed_of(self.digest, call, step),
            )
            for step, numel in self.encoded
        }
        templates = torch.cat([header.template for header in made.values()])
        return templates, {step: header.withdrawn for step, header in made.items()}

    def plan_of(self, plan: DevicePlan, headers: int, withdrawn: Mapping[int, int]) -> DevicePlan:
        """``plan`` with a call's headers, which lie at address ``headers``."""
        moved = Buffer(self.headers.name, headers, self.headers.nbytes)
        return replace(
            plan,
            operations=tuple(self._drawn(op, headers, withdrawn) for op in plan.operations),
            buffers=tuple(moved if each == self.headers else each for each in plan.buffers),
            draws=None,
        )

    def _drawn(self, op: Operation, headers: int, withdrawn: Mapping[int, int]) -> Operation:
        by = headers - self.headers.address
        if op.kind == "copy" and self._holds(op.source):
            touches = tuple(
                Touch(each.begin + by, each.end + by, each.write) if self._holds(each.begin) else each
                for each in op.touches
            )
            return replace(op, source=op.source + by, touches=touches)
        if op.image is None or op.step not in withdrawn:
            return op
        at = next((each.offset for each in op.image.parameters if each.name == _CHECKSUM), None)
        if at is None:
            return op
        value = withdrawn[op.step].to_bytes(8, "little", signed=True)
        return replace(op, arguments=op.arguments[:at] + value + op.arguments[at + 8 :])

    def _holds(self, address: int) -> bool:
        return self.headers.address <= address < self.headers.end

    @classmethod
    def made(
        cls, spec: Any, digest: int, encoded: tuple[tuple[int, int], ...], headers: torch.Tensor
    ) -> Draws:
        """``headers``: (64 * len(encoded),) uint8 on the device, whose bytes nobody reads."""
        buffer = Buffer("headers", headers.data_ptr(), HEADER_NBYTES * len(encoded))
        return cls(spec=spec, digest=digest, encoded=encoded, headers=buffer)
