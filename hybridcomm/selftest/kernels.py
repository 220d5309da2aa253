"""The shipped device kernels on a GPU: the vectors of the tests, byte for byte against the oracle, then timings."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridcomm.kernels import HEADER_NBYTES, parse, reference
from hybridcomm.kernels.vectors import KINDS, values

if TYPE_CHECKING:
    import torch

    from hybridcomm.kernels.device_codec import DeviceCodec

__all__ = ["DIGEST", "SPECS", "Vector", "check", "differences", "oracle", "report", "run", "vectors"]

SPECS = (
    "topk:0.01",
    "topk:0.01+sign",
    "topk:0.01+int8",
    "gtopk:0.01",
    "gtop1:0.01",
    "randk:0.01",
    "powersgd:1",
    "powersgd:2",
    "powersgd:4",
    "sign1",
    "int8",
    "int4",
    "fp8",
    "fp16",
    "bf16",
)
CUDA_ALONE = ("gtopk", "powersgd")
"""Codecs for which Triton's compiler has nothing."""
DIGEST = 0xFEDCBA9876543210
SIZES = (3 * 4096, 2048 + 1040, 48)
"""Whole programs, some and a tail, a tail alone: multiples of 16, as what is shipped takes."""
ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class Vector:
    """One input: kind of values, elements, types of gradient and residual."""

    kind: str
    numel: int
    grad: str
    rest: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.numel} elements, {self.grad} and {self.rest}"


def vectors(spec: Any) -> Iterator[Vector]:
    """Each kind with every size and type in turn."""
    types = [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", "bfloat16"),
    ]
    for i, kind in enumerate(KINDS):
        grad, rest = types[(i + i // 3) % len(types)]
        yield Vector(kind=kind, numel=SIZES[i % 3], grad=grad, rest=rest)


def oracle(spec: Any, grad: torch.Tensor, e_in: torch.Tensor, *, seed: int = 0) -> tuple[bytes, bytes]:
    """Payload and residual by ``reference``, of widened inputs; the residual as its type has it, widened."""
    import torch

    payload, e_out = np.zeros(spec.nbytes(grad.numel()), np.uint8), np.zeros(grad.numel(), np.float32)
    reference.encode(spec, grad.float().numpy(), e_in.float().numpy(), e_out, payload, DIGEST, seed=seed)
    rest = torch.from_numpy(e_out)
    if e_in.dtype == torch.bfloat16:  # half to even, but nothing finite becomes infinite
        largest = torch.finfo(torch.bfloat16).max
        rest = torch.where(rest.isfinite(), rest.bfloat16().clamp(-largest, largest), rest.bfloat16())
    return payload.tobytes(), rest.float().numpy().tobytes()


def differences(codec: DeviceCodec, vector: Vector, device: torch.device) -> list[str]:
    """What a codec makes otherwise of a vector than the oracle does: of encode, decode_add and reencode."""
    import torch

    spec = codec.spec
    made = (torch.from_numpy(each) for each in values(vector.kind, vector.numel, 7))
    grad, e_in = (
        each.to(getattr(torch, kind)) for each, kind in zip(made, (vector.grad, vector.rest), strict=True)
    )
    payload = torch.empty(spec.nbytes(vector.numel), dtype=torch.uint8, device=device)
    e_out = torch.empty(vector.numel, dtype=e_in.dtype, device=device)
    codec.encode(grad.to(device), e_in.to(device), e_out, payload, DIGEST)
    want = oracle(spec, grad, e_in)
    found = _compared("encode", want, payload, e_out)

    one, total = np.frombuffer(want[0], np.uint8), np.zeros(vector.numel, np.float32)
    payloads = np.stack([one, one])
    reference.decode_add(spec, list(payloads), total, 0.5, DIGEST)
    out, given = torch.zeros(vector.numel, device=device), torch.from_numpy(payloads).to(device)
    codec.decode_add(given, out, 0.5, DIGEST)
    if out.cpu().numpy().tobytes() != total.tobytes():
        found.append("decode_add: another sum")
    if codec.reencode is not None:
        codec.reencode(given, vector.numel, e_in.to(device), e_out, payload, DIGEST, weight=0.5)
        found += _compared("reencode", oracle(spec, torch.from_numpy(total), e_in), payload, e_out)
    return found


def _compared(what: str, want: tuple[bytes, bytes], payload: torch.Tensor, e_out: torch.Tensor) -> list[str]:
    got = payload.cpu().numpy().tobytes(), e_out.cpu().float().numpy().tobytes()
    names = ("header", want[0][:HEADER_NBYTES], got[0][:HEADER_NBYTES]), ("payload", want[0], got[0])
    found = [f"{what}: another {name}" for name, right, seen in names if right != seen]
    return found + [f"{what}: another residual"] * (want[1] != got[1])


def check(codec: DeviceCodec, device: torch.device) -> list[str]:
    """What is wrong with a codec, a line each; empty if all is as the oracle has it."""
    found = []
    for vector in vectors(codec.spec):
        found += [f"{codec.spec}: {vector}: {what}" for what in differences(codec, vector, device)]
    return found


def _milliseconds(call: Callable[[], object]) -> float:
    """Median on the device, by events, after two calls that are not counted."""
    import torch

    times: list[float] = []
    for i in range(ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _timed(codec: DeviceCodec, numel: int, device: torch.device, copy: float) -> list[str]:
    """A line of the table. ``copy``: bytes/s that a copy reaches."""
    import torch

    from hybridcomm.kernels.device_tensors import make_header

    spec = codec.spec
    grad, e_in = (torch.randn(numel, device=device) for _ in range(2))
    e_out, out = torch.empty_like(grad), torch.zeros_like(grad)
    payload = torch.empty(spec.nbytes(numel), dtype=torch.uint8, device=device)
    header = make_header(spec, numel, DIGEST, device)
    encode = _milliseconds(lambda: codec.encode(grad, e_in, e_out, payload, header=header))
    payloads = torch.stack([payload, payload])
    decode = _milliseconds(lambda: codec.decode_add(payloads, out, 0.5, check=False))
    moved = 12 * numel + spec.nbytes(numel)
    return [
        str(spec),
        f"{encode:.3f}",
        f"{moved / encode / 1e6:.0f}",
        f"{moved / encode * 1e3 / copy:.2f}",
        f"{decode:.3f}",
    ]


def _peers(numel: int, device: torch.device) -> Iterator[list[str]]:
    """What users have without us: a top-k of torch's with error feedback, and torch's own quantisation by steps."""
    import torch

    grad, e_in = (torch.randn(numel, device=device) for _ in range(2))

    def topk() -> None:
        acc = grad + e_in
        indices = acc.abs().topk(numel // 100, sorted=False).indices
        kept = acc[indices]
        acc[indices] -= kept

    def int8() -> None:
        acc = (grad + e_in).view(-1, 128)
        scale = acc.abs().amax(1, keepdim=True) / 127
        codes = (acc / scale).round().to(torch.int8)
        acc -= codes * scale

    for name, call in (("torch.topk 1 %", topk), ("torch int8, by steps", int8)):
        yield [name, f"{_milliseconds(call):.3f}", "", "", ""]


def run(texts: Sequence[str], *, device: int, numel: int, jit: bool) -> int:
    """Checks and times codecs, and prints both; the exit code of `__main__`."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: nothing was checked; pip install torch")
        return 2
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked. docs/architecture.md says what was checked without one")
        return 2
    from hybridcomm import default, device_kernels
    from hybridcomm.kernels.cubins.driver import Driver
    from hybridcomm.kernels.cubins.launcher import on_cuda

    place = torch.device("cuda", device)
    torch.cuda.set_device(place)
    torch.zeros(1, device=place)  # makes the context that the driver launches in
    major, minor = torch.cuda.get_device_capability(place)
    launch = on_cuda(Driver(), 10 * major + minor, lambda: torch.cuda.current_stream(place).cuda_stream)
    group = default.init() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    route, codecs = device_kernels.prepare(
        group,
        [parse(text) for text in texts if not (jit and text.startswith(CUDA_ALONE))],
        run=launch,
        arch=10 * major + minor,
        device=place,
        wanted="jit" if jit else "auto",
        grad=torch.float32,
        rest=torch.float32,
    )
    print(
        f"{torch.cuda.get_device_name(place)}, sm_{major}{minor}, torch {torch.__version__}, kernels {route.reason}"
    )
    return report(codecs, place, numel)


def report(codecs: Sequence[DeviceCodec], place: torch.device, numel: int) -> int:
    """Prints what is right and how fast it is; 1 if something is wrong."""
    import torch

    wrong = 0
    for codec in codecs:
        found = check(codec, place)
        wrong += bool(found)
        print(f"{codec.spec}: {'WRONG' if found else 'as the oracle, byte for byte'}", *found[:5], sep="\n  ")
    source, target = torch.randn(numel, device=place), torch.empty(numel, device=place)
    copy = 8 * numel / _milliseconds(lambda: target.copy_(source)) * 1e3
    print(f"{numel} elements, fp32; a copy moves {copy / 1e9:.0f} GB/s")
    print("codec | encode, ms | GB/s | of a copy's | decode of two, ms")
    for row in [*(_timed(codec, numel, place, copy) for codec in codecs), *_peers(numel, place)]:
        print(" | ".join(row))
    print("FAILED" if wrong else "all codecs are right")
    return 1 if wrong else 0
