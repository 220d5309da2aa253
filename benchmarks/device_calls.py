"""What `bench_device_kernels` times: each device kernel as its users call it, and what they would write without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.codec_peers import PEERS
from hybridcomm.kernels import parse
from hybridcomm.kernels.cubins.launcher import Launcher, Run
from hybridcomm.kernels.cuda.launch import make_workspace
from hybridcomm.kernels.device_codec import device_codec
from hybridcomm.kernels.device_tensors import make_header
from hybridcomm.kernels.payload import Codec
from hybridcomm.kernels.triton import bucket, launch_bucket

__all__ = ["CODECS", "PAYLOADS", "STEPS", "Calls"]

CODECS = tuple(PEERS)
"""All have device kernels."""
STEPS = ("encode", "decode", "reencode")
PAYLOADS = 2
_TENSORS = 64  # in a bucket
_DENSITY = 100  # one element in so many, by `topk:0.01`

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Calls on tensors of ``numel`` fp32 elements on a device.

    ``run`` launches what is shipped; ``cupy``: the module, or None where it is not installed.
    """

    device: torch.device
    numel: int
    run: Run
    cupy: Any = None

    def _random(self) -> torch.Tensor:
        return torch.randn(self.numel, device=self.device)

    def copy(self) -> tuple[Call, int]:
        """The limit: a copy, and the bytes that it moves."""
        source, target = self._random(), self._random()
        return lambda: target.copy_(source), 8 * self.numel

    def moved(self, step: str, codec: str) -> int:
        """Bytes that a step has to move: gradient or sum, residuals, payloads."""
        payload = parse(codec).nbytes(self.numel)
        floats = {"encode": 12, "decode": 8, "reencode": 8}[step]
        return (
            floats * self.numel + payload * {"encode": 1, "decode": PAYLOADS, "reencode": PAYLOADS + 1}[step]
        )

    def ours(self, step: str, codec: str) -> Call | None:
        """The shipped kernel as the engine would call it: header and workspace made before. None: it has none."""
        spec = parse(codec)
        made, header = (
            device_codec(spec, self.run, jit=False),
            make_header(spec, self.numel, 0, self.device),
        )
        grad, e_in, e_out = self._random(), self._random(), self._random()
        payload = torch.empty(spec.nbytes(self.numel), dtype=torch.uint8, device=self.device)
        workspace = (
            {"workspace": make_workspace(self.numel, self.device)} if spec.codec == Codec.GTOPK else {}
        )
        made.encode(grad, e_in, e_out, payload, header=header, **workspace)
        payloads, out = torch.stack([payload] * PAYLOADS), torch.zeros_like(grad)
        if step == "encode":
            return lambda: made.encode(grad, e_in, e_out, payload, header=header, **workspace)
        if step == "decode":
            return lambda: made.decode_add(payloads, out, 0.5, check=False, **workspace)
        again = made.reencode
        if again is None:
            return None
        return lambda: again(
            payloads, self.numel, e_in, e_out, payload, weight=0.5, header=header, check=False
        )

    def torch(self, step: str, codec: str) -> Call:
        """The same by steps in torch, as `benchmarks.codec_peers` has it."""
        peer = PEERS[codec]
        grad, e_in, e_out = self._random(), self._random(), self._random()
        code, out = peer.encode(grad, e_in, e_out), torch.zeros_like(grad)

        def decode() -> None:
            for _ in range(PAYLOADS):
                peer.decode_add(code, out)

        def reencode() -> None:
            out.zero_()
            decode()
            peer.encode(out, e_in, e_out)

        return {"encode": lambda: peer.encode(grad, e_in, e_out), "decode": decode, "reencode": reencode}[
            step
        ]

    def select_by_cupy(self) -> Call:
        """Top-k with error feedback by ``cupy.argpartition``, on torch's memory."""
        cupy, k = self.cupy, self.numel // _DENSITY
        grad, e_in, e_out = (cupy.from_dlpack(self._random()) for _ in range(3))

        def encode() -> None:
            cupy.add(grad, e_in, out=e_out)
            index = cupy.argpartition(cupy.abs(e_out), -k)[-k:]
            sent = e_out[index]  # noqa: F841 (the payload)
            e_out[index] = 0

        return encode

    def bucket(self, step: str, who: str) -> Call:
        """``pack`` or ``unpack`` of a bucket of many tensors, ours or torch's loop over them."""
        sizes = [self.numel // _TENSORS // 16 * 16] * _TENSORS
        tensors = [torch.randn(size, device=self.device) for size in sizes]
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        whole = torch.zeros(sum(sizes), device=self.device)
        parts = [whole[begin : begin + size] for begin, size in zip(offsets, sizes, strict=True)]
        if who == "torch":
            target, source = (parts, tensors) if step == "pack" else (tensors, parts)
            return lambda: torch._foreach_copy_(target, source)
        where = launch_bucket.layout(tensors, offsets)
        move = launch_bucket.pack if step == "pack" else launch_bucket.unpack
        kernel = Launcher(function=bucket.FUNCTION, kernels=bucket.KERNELS, run=self.run, otherwise=False)
        return lambda: move(where, whole, kernel=kernel)
