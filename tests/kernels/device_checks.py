"""What decides whether a shipped device kernel is right: values that take every path, sums of payloads, the oracle.

A check runs with executables of the caller's choice, so that bugs can be planted in them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels import reference
from hybridcomm.kernels.cuda import gtopk, powersgd, topk
from hybridcomm.kernels.device import DeviceKernel
from tests.kernels import cases, ptx_powersgd, ptx_triton
from tests.kernels.cases import DIGEST, Case
from tests.kernels.ptx_run import PtxRun
from tests.kernels.ptx_sparse import Device, inputs
from tests.ptx import Kernel, Memory
from tests.ptx.conformance import Executable, executable
from tests.ptx.mutate import Mutant, judge
from tests.ptx.parse import Entry

__all__ = ["ARCH", "TARGETS", "Target"]

ARCH = 90
LIMIT = 50_000  # instructions in a row: mutants' loops need not be waited for long

Load = Callable[[DeviceKernel, int], Executable]


def spiked(numel: int, group: int, seed: int) -> Any:
    """Small numbers, and in every group of them a large one of either sign and one of two sizes, anywhere: what finds
    the largest of a group has to look everywhere, and groups have scales of their own."""
    dice = np.random.default_rng(seed)
    values = dice.standard_normal(numel).astype(np.float32)
    for first in range(0, numel, group):
        values[dice.integers(first, min(first + group, numel))] = dice.choice([-40.0, 40.0, -1e6, 1e6])
    return values


def edges() -> Any:
    """Every sign, exponent and leading digits, each on and next to what lies between two codes, in no order; finite."""
    high = np.arange(1 << 12, dtype=np.uint32) << np.uint32(20)
    low = np.array(
        [0x0, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x27FFF, 0x7FFFF, 0x80000, 0xF8000], np.uint32
    )
    values = (high[:, None] | low).reshape(-1).view(np.float32)
    return np.random.default_rng(0).permutation(values[np.isfinite(values)])


def triton_check(codec: ptx_triton.Codec) -> Callable[[Load], bool]:
    """Encoding, decoding and encoding anew, whole programs and a tail, of values that take every path."""
    size = codec.kernels[0].elements
    many = 32 * min(size, 2048) + 48

    def spikes(seed: int, numel: int = many) -> torch.Tensor:
        return torch.from_numpy(spiked(numel, min(codec.spec.block, 256), seed))

    def payloads(*grads: torch.Tensor) -> torch.Tensor:
        made = [ptx_triton.wanted(codec, grad, torch.zeros_like(grad))[0] for grad in grads]
        return torch.from_numpy(np.stack([np.frombuffer(each, np.uint8) for each in made]))

    @functools.cache
    def right() -> Any:
        given = [(spikes(seed), spikes(seed + 1) / 64) for seed in (1, 11, 21)]
        given += [(torch.from_numpy(edges()), torch.zeros(edges().size))]
        largest = torch.full((2 * size,), torch.finfo(torch.float32).max)
        ties = np.random.default_rng(2).integers(-31, 32, 2 * size) * 2.0**-127  # beside the smallest scale
        least = torch.from_numpy(ties.astype(np.float32))
        given += [(each, torch.zeros(2 * size)) for each in (largest, -largest, least)]
        for i, kind in enumerate(cases.KINDS):
            numel = (2 * size, size + 48, 48)[i % 3]
            given.append(ptx_triton.inputs(codec, kind, numel, ("fp32", "fp32")))
        encodes = [(*each, ptx_triton.wanted(codec, *each)) for each in given]
        totals = []
        for summed, numel, rest in (
            (payloads(spikes(3), spikes(4), spikes(6)), many, spikes(5)),
            (ptx_triton.payloads_of(codec, ("tied", "nan"), size + 16), size + 16, spikes(5, size + 16)),
            (ptx_triton.payloads_of(codec, ("zero",), 2 * size), 2 * size, torch.zeros(2 * size)),  # all tie
        ):
            total = np.zeros(numel, np.float32)
            reference.decode_add(codec.spec, list(summed.numpy()), total, 0.25, DIGEST)
            totals.append((summed, total, rest, ptx_triton.wanted(codec, torch.from_numpy(total), rest)))
        return encodes, totals

    def check(load: Load) -> bool:
        functions, (encodes, totals) = codec.on(PtxRun(arch=ARCH, load=load)), right()
        for summed, total, rest, want in totals:
            got = torch.zeros(total.size)
            codec.host.decode_add(functions, codec.spec, summed, got, 0.25, DIGEST)
            if got.numpy().tobytes() != total.tobytes():
                return False
            if ptx_triton.reencoded(codec, functions, summed, rest) != want:
                return False
        return all(ptx_triton.encoded(codec, functions, *given) == want for *given, want in encodes)

    return check


def before(numel: int) -> Any:
    """What a region holds that payloads are added to: also zeros with a sign, which adding nothing must leave alone."""
    values = np.random.default_rng(9).standard_normal(numel).astype(np.float32)
    values[::2] = values[1::1024] = -0.0
    return values


def cuda_check(spec: Any) -> Callable[[Load], bool]:
    """Likewise of the kernels in CUDA C++."""
    tiles = 3 * 4096 if spec == topk.SPEC else 3 * 8192
    numel = tiles + 1024 + 48  # the last block is not a program's first
    kinds = (
        "normal",
        "tied",
        "nan",
        "few lanes",
        "denormal",
        "spike",
        "negative zero",
        "few lanes tied",
        "heavy",
    )

    @functools.cache
    def right() -> Any:
        given = [inputs(Case(spec=spec, kind=kind, numel=numel, seed=7)) for kind in kinds]
        given.append((spiked(numel, 128, 1), spiked(numel, 128, 2) / 64))
        given.append((np.resize(edges(), numel), np.zeros(numel, np.float32)))
        made = []
        for grad, e_in in given:
            payload, e_out = np.zeros(spec.nbytes(numel), np.uint8), np.zeros(numel, np.float32)
            reference.encode(spec, grad, e_in, e_out, payload, DIGEST)
            made.append((grad, e_in, payload, e_out))
        # Records that add nothing, and records for the same elements at other places; 15, as loops over payloads are
        # unrolled by four and what is left has to see both too.
        payloads = [made[kinds.index(kind)][2] for kind in ("normal", "tied")]
        for seed in range(12):
            grad, dice = made[0][0].copy(), np.random.default_rng(seed)
            grad[dice.integers(0, numel, 6)] *= 50
            payload = np.zeros(spec.nbytes(numel), np.uint8)
            reference.encode(spec, grad, None, np.zeros(numel, np.float32), payload, DIGEST)
            payloads.append(payload)
        payloads.append(made[kinds.index("negative zero")][2])
        total, flagged = before(numel), before(numel)
        reference.decode_add(spec, payloads, total, 0.25, DIGEST)
        reference.decode_add(spec, [made[0][2], made[2][2]], flagged, 0.25, DIGEST)
        return made, payloads, total, flagged

    def check(load: Load) -> bool:
        device = Device(arch=ARCH, load=load)
        made, payloads, total, flagged = right()
        for given, want in ((payloads, total), ([payloads[0], made[2][2]], flagged)):
            got = before(numel)
            device.decode_add(spec, given, got, 0.25)
            if got.tobytes() != want.tobytes():
                return False
        for grad, e_in, want, want_rest in made:
            payload, e_out = np.zeros(want.size, np.uint8), np.zeros(numel, np.float32)
            device.encode(spec, grad, e_in, e_out, payload)
            if payload.tobytes() != want.tobytes() or e_out.tobytes() != want_rest.tobytes():
                return False
        return _reencodes(device, payloads, made[0][1]) if spec == topk.SPEC else _scans(load)

    return check


def _scans(load: Load) -> bool:
    """More counts than a program has threads, as regions of millions have."""
    kernel = next(kernel for kernel in gtopk.KERNELS if kernel.name == "gtopk_scan")
    counts = np.random.default_rng(1).integers(0, 1000, 700).astype(np.uint64)
    memory = Memory()
    at = memory.place(counts, name="counts")
    load(kernel, ARCH).launch(memory, 1, counts=at, tiles=counts.size)
    return bool((memory.read(at, np.uint64) == np.cumsum(counts) - counts).all())


def _reencodes(device: Device, payloads: list[Any], e_in: Any) -> bool:
    total = np.zeros_like(e_in)
    reference.decode_add(topk.SPEC, payloads, total, 0.25, DIGEST)
    want, got = (np.zeros(topk.SPEC.nbytes(e_in.size), np.uint8) for _ in range(2))
    want_rest, got_rest = np.zeros_like(e_in), np.zeros_like(e_in)
    reference.encode(topk.SPEC, total, e_in, want_rest, want, DIGEST)
    device.reencode(payloads, e_in, got_rest, got)
    return bool(got.tobytes() == want.tobytes() and got_rest.tobytes() == want_rest.tobytes())


def powersgd_check(spec: Any) -> Callable[[Load], bool]:
    """Likewise of powersgd's: more rows than are brought at a time, a region that ends inside one, what is not sent."""
    rows = 129 * 512 + 16
    small = 9 * 512 + 48

    @functools.cache
    def right() -> Any:
        given = [(spiked(rows, 128, 1), spiked(rows, 128, 2) / 64)]
        given += [cases.values(kind, small, 7) for kind in ("heavy", "denormal", "negative zero", "nan")]
        given += [(make(9 * 512), None) for make in (ptx_powersgd.huge, ptx_powersgd.dependent)]
        given += [(spiked(16, 16, 3), None), (cases.values("nan", small, 7)[0], None)]
        for last in (70, 100):  # all but sixteen columns are zero, and have to be found so
            few = np.zeros(last * 512 + 16, np.float32)
            few[np.arange(few.size) % 512 < 16] = np.float32(1e-38)
            given.append((few, None))
        encodes = [(*each, ptx_powersgd.wanted(spec, *each)) for each in given]
        sums = []
        for kinds in (("normal", "tied", "heavy"), ("normal", "nan"), ("zero",)):
            grads = [
                *(cases.values(kind, small, i)[0] for i, kind in enumerate(kinds)),
                ptx_powersgd.huge(small),
            ]
            payloads = [ptx_powersgd.payload_of(spec, grad, i) for i, grad in enumerate(grads)]
            added = [np.zeros(small, np.float32), before(small)]
            for total in added:
                reference.decode_add(spec, payloads, total, 0.25, DIGEST)
            e_in = spiked(small, 128, 4)
            again = ptx_powersgd.wanted(spec, added[0], e_in, decay=0.9)
            sums.append((payloads, *(total.tobytes() for total in added), e_in, again))
        return encodes, sums

    def adds(run: PtxRun, payloads: Any, cleared: bytes, added: bytes, e_in: Any, again: Any) -> bool:
        made = [
            ptx_powersgd.added(run, spec, payloads, before(small), 0.25, clear=clear)
            for clear in (True, False)
        ]
        return (
            made == [cleared, added]
            and ptx_powersgd.reencoded(run, spec, payloads, e_in, small, "fp32", 0.9) == again
        )

    def check(load: Load) -> bool:
        """What finds most comes first: a mutant takes no longer than it must."""
        run, (encodes, sums) = PtxRun(arch=ARCH, load=load), right()
        return (
            adds(run, *sums[0])
            and all(ptx_powersgd.encoded(run, spec, *given) == want for *given, want in encodes)
            and ptx_powersgd.columns_right(spec, load, ARCH)
            and ptx_powersgd.largest_right(spec, load, ARCH)
            and all(adds(run, *each) for each in sums[1:])
        )

    return check


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kernel that is run by ``check``."""

    kernel: DeviceKernel
    check: Callable[[Load], bool]

    def __str__(self) -> str:
        return self.kernel.name

    def judge(self, mutant: Mutant) -> str:
        """What came of a mutant."""

        def right(entry: Entry) -> bool:
            def load(kernel: DeviceKernel, arch: int) -> Executable:
                found = executable(kernel, arch)
                if kernel != self.kernel:
                    return found
                return replace(found, program=Kernel(entry), limit=LIMIT)

            return self.check(load)

        return judge(mutant, right).outcome


def targets() -> Iterator[Target]:
    """Every kernel for gradients and residuals of fp32."""
    for codec in ptx_triton.CODECS:
        check = triton_check(codec)
        for kernel in codec.kernels:
            narrow = any(argument.type in ("*bf16", "*fp16") for argument in kernel.arguments)
            if kernel.codec == str(codec.spec) and not narrow and "clear" not in kernel.name:
                yield Target(kernel=kernel, check=check)
    for spec, kernels in ((topk.SPEC, topk.KERNELS), (gtopk.SPEC, gtopk.KERNELS)):
        check = cuda_check(spec)
        for kernel in kernels:
            narrow = any(argument.type in ("*bf16", "*fp16") for argument in kernel.arguments)
            if not narrow and kernel.name != "topk_decode":
                yield Target(kernel=kernel, check=check)
    for spec in powersgd.SPECS:
        check = powersgd_check(spec)
        for kernel in powersgd.KERNELS:
            narrow = any(argument.type in ("*bf16", "*fp16") for argument in kernel.arguments)
            shared = not kernel.codec and spec == powersgd.SPECS[0]
            if not narrow and (shared or kernel.codec == str(spec)):
                yield Target(kernel=kernel, check=check)


TARGETS = tuple(targets())
