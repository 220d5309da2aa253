"""Steps 4 and 6 of 7 on a GPU: which kernels encode and decode a plan's payloads, in which memory.

In: regions of a tensor on the device, and the residual's two buffers. Out: launches, as they were recorded from the
host side of the kernels; scratch for the payloads of every chunk, this rank's and those that it receives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from hybridcomm.device_decay import Decay
from hybridcomm.device_draws import Draws
from hybridcomm.device_plan import Buffer
from hybridcomm.device_record import Recorded, Recorder
from hybridcomm.errors import UnsupportedError
from hybridcomm.kernels.device_codec import DeviceCodec, device_codec
from hybridcomm.kernels.device_tensors import Header, make_header
from hybridcomm.kernels.payload import HEADER_NBYTES, Codec
from hybridcomm.kernels.specs.quant import QuantSpec
from hybridcomm.plan import RESIDUALS

if TYPE_CHECKING:
    import torch

    from hybridcomm.compress import Compressor
    from hybridcomm.kernels.cubins.load import Image
    from hybridcomm.plan import Plan, Region, Step

__all__ = ["DeviceMemory", "DevicePayloads"]

_ALIGN = 256  # bytes, as cuMemAlloc


class DeviceMemory(Protocol):
    """Where scratch comes from: `hybridcomm.stream_provider`."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 on the device, on 256 bytes."""
        ...

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        """A copy on the device, there when this returns."""
        ...


class DevicePayloads:
    """A rank's payloads of one plan: where they lie, and how they are made and read.

    ``tensor``: (plan.numel,) fp32 on the device. ``residual``: (e_in, e_out), fp32, of `Plan.residuals` one behind the
    other, or None; ``decay``: what e_in is multiplied with first. Raises `UnsupportedError` for a codec, or a region,
    for which no kernel is shipped.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        compressor: Compressor,
        tensor: torch.Tensor,
        residual: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        memory: DeviceMemory,
        find: Callable[[str], Image],
        decay: float = 1.0,
    ) -> None:
        self.spec, self._plan, self._rank = compressor.spec, plan, rank
        self._recorder = Recorder(find)
        self._codec = _kernels_of(compressor, self._recorder)
        self._memory, self._tensor = memory, tensor
        self._decay = Decay(1.0 if residual is None else decay, memory=memory, find=find)
        self._headers: dict[int, Header] = {}
        self._slots, nbytes = self._lay_out()
        self._scratch = memory.empty(max(nbytes, 1))
        self._workspace = self._make_workspace()
        self._drawn, self.draws = self._make_draws()
        self._residual = residual
        self._offsets = _offsets(plan, rank)
        if residual is None:  # kernels are shipped with feedback alone: what nobody keeps goes here
            total = sum(region.numel for op in RESIDUALS for region in plan.residual_regions(rank, op))
            self._zeros, self._unused = (memory.empty(4 * max(total, 1)).view(_float32()) for _ in range(2))

    # -- memory --------------------------------------------------------------------------------------------

    def _lay_out(self) -> tuple[dict[Region, tuple[int, int, int]], int]:
        """Region -> (offset in scratch, bytes of a payload, how many); and the bytes of all."""
        slots: dict[Region, tuple[int, int, int]] = {}
        end = 0
        for step in self._plan.for_rank(self._rank):
            if step.op == "compress":
                nbytes = self.spec.nbytes(step.region.numel)
                count = len(self._plan.topology.nodes)
                slots[step.region] = end, nbytes, count
                end += -(-nbytes * (count + 1) // _ALIGN) * _ALIGN  # and one of the sum
        return slots, end

    def _make_workspace(self) -> Mapping[str, torch.Tensor]:
        """What exact top-k over a region needs beside; one for all regions, as kernels run one after another. The
        passes of powersgd need none: what they share lies in the payload, and in e_out, which is fp32."""
        if self.spec.codec is not Codec.GTOPK:
            return {}
        from hybridcomm.kernels.cuda.gtopk import workspace

        most = max((region.numel for region in self._slots), default=0)
        return {"workspace": self._memory.empty(max(workspace(most, "fp32")[0], 1))}

    def _make_draws(self) -> tuple[Mapping[str, torch.Tensor], Draws | None]:
        """Headers that every call has of its own, as a seed is in them."""
        steps = [step for step in self._plan.for_rank(self._rank) if step.op in ("compress", "recompress")]
        if not self.spec.seeded or not steps:
            return {}, None
        headers = self._memory.empty(HEADER_NBYTES * len(steps))
        encoded = tuple((step.id, step.region.numel) for step in steps)
        draws = Draws.made(self.spec, self._plan.digest, encoded, headers)
        return {"headers": headers}, draws

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All device memory of the payloads and residuals."""
        named = {"payloads": self._scratch, **self._workspace, **self._drawn}
        pair = (self._zeros, self._unused) if self._residual is None else self._residual
        named |= dict(zip(("e_in", "e_out"), pair, strict=True))
        named |= {f"header{numel}": header.template for numel, header in self._headers.items()}
        named |= {f"decay{i}": tensor for i, tensor in enumerate(self._decay.kept)}
        return tuple(
            Buffer(name, tensor.data_ptr(), tensor.numel() * tensor.element_size())
            for name, tensor in named.items()
        )

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        """Own memory whose addresses the launches hold; the caller's tensors are not the program's to keep."""
        return (
            self._scratch,
            *self._workspace.values(),
            *self._drawn.values(),
            *(() if self._residual is not None else (self._zeros, self._unused)),
            *(header.template for header in self._headers.values()),
            *self._decay.kept,
        )

    def place(self, step: Step, rank: int) -> Buffer:
        """Where the payload of ``rank``, one of the step's owners, lies."""
        offset, nbytes, _ = self._slots[step.region]
        node = self._plan.topology.node_of(rank)
        return Buffer(f"payload of {rank}", self._scratch.data_ptr() + offset + node * nbytes, nbytes)

    def second(self, step: Step) -> Buffer:
        """Where the payload of the sum lies."""
        offset, nbytes, count = self._slots[step.region]
        return Buffer("payload of the sum", self._scratch.data_ptr() + offset + count * nbytes, nbytes)

    def _payload(self, region: Region, place: int) -> torch.Tensor:
        offset, nbytes, _ = self._slots[region]
        return self._scratch[offset + place * nbytes : offset + (place + 1) * nbytes]

    def _all_payloads(self, region: Region) -> torch.Tensor:
        offset, nbytes, count = self._slots[region]
        return self._scratch[offset : offset + count * nbytes].view(count, nbytes)

    def _header(self, step: Step) -> Header:
        import torch

        numel = step.region.numel
        if self.draws is not None:
            at = HEADER_NBYTES * self.draws.encoded.index((step.id, numel))
            return Header(template=self._drawn["headers"][at : at + HEADER_NBYTES], withdrawn=0)
        if numel not in self._headers:
            made = make_header(self.spec, numel, self._plan.digest, torch.device("cpu"))
            self._headers[numel] = dataclasses.replace(made, template=self._memory.upload(made.template))
        return self._headers[numel]

    def _feedback(self, op: str, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self._offsets[op][region]
        pair = (self._zeros, self._unused) if self._residual is None else self._residual
        e_in, e_out = (each[begin : begin + region.numel] for each in pair)
        return e_in, e_out

    # -- launches ------------------------------------------------------------------------------------------

    def encode(self, step: Step) -> tuple[Recorded, ...]:
        """Own region and residual -> own payload, new residual."""
        region, node = step.region, self._plan.topology.node_of(self._rank)
        e_in, e_out = self._feedback("compress", region)
        header = self._header(step)

        def call(rest: torch.Tensor, decay: float) -> None:
            if self._residual is None:
                rest.zero_()
            self._codec.encode(
                self._tensor[region.begin : region.end],
                rest,
                e_out,
                self._payload(region, node),
                self._plan.digest,
                decay=decay,
                header=header,
                **self._workspace,
            )

        return self._encoded(call, e_in)

    def reencode(self, step: Step) -> tuple[Recorded, ...]:
        """All payloads of the slice and the second residual -> the sum's payload, new second residual."""
        region = step.region
        if self._codec.reencode is None:
            raise UnsupportedError(f"{self.spec}: no kernel encodes a sum anew; use exchange='gather'")
        reencode = self._codec.reencode
        e_in, e_out = self._feedback("recompress", region)
        header = self._header(step)

        def call(rest: torch.Tensor, decay: float) -> None:
            if self._residual is None:
                rest.zero_()
            reencode(
                self._all_payloads(region),
                region.numel,
                rest,
                e_out,
                self._payload(region, self._slots[region][2]),
                self._plan.digest,
                decay=decay,
                header=header,
                check=False,
            )

        return self._encoded(call, e_in)

    def _encoded(
        self, call: Callable[[torch.Tensor, float], None], e_in: torch.Tensor
    ) -> tuple[Recorded, ...]:
        def record(rest: torch.Tensor, decay: float) -> tuple[Recorded, ...]:
            return self._recorder.record(lambda: call(rest, decay), str(self.spec), numel=e_in.numel())

        return self._decay.record(record, e_in)

    def decode(self, step: Step, divisor: int) -> tuple[Recorded, ...]:
        """The payloads that this rank has -> their sum or mean in the region."""
        region = step.region
        two_stage = self._plan.exchange == "two_stage"
        payloads = (
            self._payload(region, self._slots[region][2]).view(1, -1)
            if two_stage
            else self._all_payloads(region)
        )
        out = self._tensor[region.begin : region.end]

        def call() -> None:
            clear: Mapping[str, Any] = {"clear": True, **self._workspace}
            if isinstance(self.spec, QuantSpec):  # whose kernels add to what is there
                out.zero_()
                clear = {}
            self._codec.decode_add(payloads, out, 1.0 / divisor, self._plan.digest, check=False, **clear)

        return self._recorder.record(call, str(self.spec), numel=region.numel)


def _float32() -> Any:
    import torch

    return torch.float32


def _kernels_of(compressor: Compressor, recorder: Recorder) -> DeviceCodec:
    try:
        return device_codec(compressor.spec, recorder.run, jit=False)
    except NotImplementedError as error:
        raise UnsupportedError(f"compress={compressor}: has no kernels for GPUs") from error


def _offsets(plan: Plan, rank: int) -> dict[str, dict[Region, int]]:
    """Where each region's residual begins, in elements: ops in their order, regions ascending."""
    offsets: dict[str, dict[Region, int]] = {}
    total = 0
    for op in RESIDUALS:
        offsets[op] = {}
        for region in plan.residual_regions(rank, op):
            offsets[op][region] = total
            total += region.numel
    return offsets
