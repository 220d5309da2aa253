"""What the threads of each shipped kernel execute per element, as the executor of PTX counts it, and what they move.

``python -m tests.kernels.executed`` writes it to kernels/cubins/executed.json, which the roofline page takes instead of
machine code where kernels have loops; the tests of budgets hold every launch to that record, and to the budgets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels.cubins import executed, find_ptx, roof
from hybridcomm.kernels.cubins.launcher import Launcher
from hybridcomm.kernels.cubins.manifest import Build, Entry, Manifest
from hybridcomm.kernels.cuda import gtopk, powersgd, topk
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.device_tensors import GRADIENTS
from hybridcomm.kernels.triton import bucket, launch_bucket, launch_records
from tests.kernels import cases, ptx_powersgd, ptx_triton
from tests.kernels.cases import Case
from tests.kernels.ptx_run import PtxRun
from tests.kernels.ptx_sparse import Device, inputs
from tests.ptx import Counters
from tests.ptx.conformance import Figures

__all__ = ["Measured", "complaints", "of_bucket", "of_powersgd", "of_sparse", "of_triton"]

TYPES = (
    ("fp32", "fp32"),
    ("bf16", "fp32"),
    ("fp16", "bf16"),
    ("fp32", "bf16"),
    ("bf16", "bf16"),
    ("fp16", "fp32"),
)
"""Of gradient and residual, as CUDA C++ has them."""
TRITON_TYPES = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"))
ARCHS = (80, 90, 100)
FAR = 0.01
"""Of the record: beyond this share a count is another one."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One launch. ``cold``: of values, or in a region, that a kernel starts from a worse guess for."""

    kernel: DeviceKernel
    arch: int
    figures: Figures
    cold: bool = False


def of_triton(codec: ptx_triton.Codec, arch: int) -> Iterator[Measured]:
    """Every kernel of a codec, on a grid whose share of header and checksum is that of a bucket, and in a region of 48
    elements: in a block zeros tie then, a bad guess to start from."""
    run = PtxRun(arch=arch)
    functions, numel = codec.on(run), 64 * min(codec.kernels[0].elements, 2048)
    for size in (numel, 48):
        for types in TRITON_TYPES:
            ptx_triton.encoded(codec, functions, *ptx_triton.inputs(codec, "normal", size, types))
        payloads = ptx_triton.payloads_of(codec, ("normal", "heavy"), size)
        for rest in ("fp32", "bf16"):
            e_in = ptx_triton.inputs(codec, "normal", size, ("fp32", rest))[1]
            ptx_triton.reencoded(codec, functions, payloads, e_in)
        for clear in ({}, {"clear": True}) if codec.host is launch_records else ({},):
            out = torch.zeros(size)
            codec.host.decode_add(functions, codec.spec, payloads, out, 1.0, cases.DIGEST, **clear)
    for kernel, elements, counters in run.launches:
        if (
            not kernel.codec and codec.text != "int8"
        ):  # the pass behind all encoders reads more or fewer words
            continue
        cold = elements == kernel.elements and not kernel.tail
        yield Measured(kernel=kernel, arch=arch, figures=Figures.of(elements, counters), cold=cold)


def _case(kind: str, numel: int, spec: Any) -> Case:
    return Case(spec=spec, kind=kind, numel=numel, seed=7)


def _encode(device: Device, spec: Any, kind: str, numel: int) -> None:
    payload, e_out = np.zeros(spec.nbytes(numel), np.uint8), np.zeros(numel, np.float32)
    device.encode(spec, *inputs(_case(kind, numel, spec)), e_out, payload)


def of_sparse(arch: int, kinds: Sequence[str]) -> Iterator[Measured]:
    """topk and gtopk; of ``kinds`` of values cold, where a kernel has a guess to start from."""
    device, numel = Device(arch=arch), 4 * 4096

    def measured(size: int, cold: bool = False) -> Iterator[Measured]:
        launches: dict[str, list[Counters]] = device.launches
        for name, counters in launches.items():
            for one in counters:  # every launch of a kernel that has several has the budget for itself
                yield Measured(kernel=_sparse()[name], arch=arch, figures=Figures.of(size, one), cold=cold)

    for spec in (topk.SPEC, gtopk.SPEC):
        for device.grad, device.rest in TYPES:
            _encode(device, spec, "normal", numel)
            yield from measured(numel)
    for kind in kinds:
        # Largest elements in few lanes are what a threshold is found worst for.
        for device.grad, device.rest in TYPES if kind.startswith("few lanes") else TYPES[:1]:
            _encode(device, topk.SPEC, kind, 4096)
            yield from measured(4096, cold=True)
    device.grad, device.rest = TYPES[0]
    for spec in (topk.SPEC, gtopk.SPEC):
        size = numel if spec == topk.SPEC else 8 * numel  # one program of gtopk's stands for millions
        payload = cases.encoded(Case(spec=spec, kind="normal", numel=size, seed=0))[1]
        for clear in (False, True) if spec == topk.SPEC else (False,):
            device.decode_add(spec, [payload], cases.values("normal", size, 99)[0], clear=clear)
            yield from measured(size)
    payload = cases.encoded(Case(spec=topk.SPEC, kind="normal", numel=numel, seed=0))[1]
    for device.rest in ("fp32", "bf16"):
        left, made = np.zeros(numel, np.float32), np.zeros(payload.size, np.uint8)
        device.reencode([payload], cases.values("normal", numel, 99)[0], left, made)
        yield from measured(numel)


@cache
def _sparse() -> Mapping[str, DeviceKernel]:
    return {kernel.name: kernel for kernel in topk.KERNELS + gtopk.KERNELS}


class _Without(PtxRun):
    """A device that leaves out passes which have been counted."""

    def __call__(self, kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
        if all(kernel is not counted for counted, _, _ in self.launches):
            super().__call__(kernel, programs, arguments)


def of_powersgd(spec: Any, arch: int) -> Iterator[Measured]:
    """Every kernel of a rank, in a region of 128 rows."""
    numel, run = 128 * 512, PtxRun(arch=arch)
    grad, e_in = cases.values("normal", numel, 5)
    for types in (("fp32", "fp32"), ("fp32", "bf16")):
        ptx_powersgd.encoded(run, spec, grad, e_in, types)
    run = _Without(arch=arch, launches=run.launches)
    for types in TYPES:
        ptx_powersgd.encoded(run, spec, grad, e_in, types)
    payload = ptx_powersgd.payload_of(spec, grad)
    for rest in ("fp32", "bf16"):
        ptx_powersgd.reencoded(run, spec, [payload], e_in, numel, rest, 0.9)
    for clear in (False, True):
        ptx_powersgd.added(run, spec, [payload], grad, 0.5, clear=clear)
    for kernel, _, counters in run.launches:
        yield Measured(kernel=kernel, arch=arch, figures=Figures.of(numel, counters))


def of_bucket(dtype: torch.dtype, arch: int) -> Iterator[Measured]:
    """Into a bucket of ``dtype`` and out of it, a tensor of fp32: one case of the six that a program may run."""
    numel = 8 * bucket.CHUNK
    run = PtxRun(arch=arch, beside=[torch.ones(numel)])
    where, got = launch_bucket.layout(run.beside, [0]), torch.zeros(numel, dtype=dtype)
    kernel = Launcher(function=bucket.FUNCTION, kernels=bucket.KERNELS, run=run, otherwise=False)
    launch_bucket.pack(where, got, kernel=kernel)
    launch_bucket.unpack(where, got, kernel=kernel)
    for chosen, elements, counters in run.launches:
        yield Measured(kernel=chosen, arch=arch, figures=Figures.of(elements, counters))


@cache
def _entries() -> Mapping[str, Entry]:
    return {entry.kernel.name: entry for entry in Manifest.read().entries}


def _build(measured: Measured) -> Build:
    builds = _entries()[measured.kernel.name].builds
    return next(build for build in builds if build.arch == measured.arch)


def complaints(launches: Iterable[Measured]) -> list[str]:
    """What is over its budget, or no longer as it was recorded, a line each."""
    found, most = [], _most(launches := list(launches))
    for each in launches:
        kernel, count = each.kernel, each.figures.instructions
        budget = kernel.budget
        print(f"{kernel.name}, sm_{each.arch}{', cold' * each.cold}: {each.figures}; {budget}")
        allowed = budget.cold if each.cold and budget.cold is not None else budget.instructions
        # Of straight code the gate has counted, in machine code.
        many = not roof.straight(kernel, _build(each)) and count > allowed
        if each.figures.moved > budget.nbytes or many:
            found.append(f"{kernel.name}, sm_{each.arch}: {each.figures}; {budget}")
    for (name, arch), count in most.items():
        recorded = executed.instructions(name, arch)
        if abs(recorded - count) > FAR * recorded:
            found.append(
                f"{name}, sm_{arch}: {count:.2f} instructions per element, {recorded} are recorded:"
                " python -m tests.kernels.executed"
            )
    return found


GROUPS: Mapping[str, Callable[[int], Iterator[Measured]]] = MappingProxyType(
    {
        "sparse": lambda arch: of_sparse(arch, ()),
        "powersgd": lambda arch: chain.from_iterable(of_powersgd(spec, arch) for spec in powersgd.SPECS),
        "bucket": lambda arch: chain.from_iterable(of_bucket(dtype, arch) for dtype in GRADIENTS),
        **{
            codec.text: lambda arch, codec=codec: of_triton(codec, arch)  # type: ignore[misc]
            for codec in ptx_triton.CODECS
        },
    }
)


def _text(name: str, arch: int) -> str:
    """A kernel's PTX, without the lines that say for whom it is."""
    lines = find_ptx(name, arch).data.decode().splitlines()
    return "\n".join(line for line in lines if not line.startswith((".target", ".version")))


def main() -> int:
    """Counts groups of kernels, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.executed", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS))
    groups = parser.parse_args().only
    rows = {name: dict(row) for name, row in executed.read().items()} if executed.FILE.exists() else {}
    for group in groups:
        counted: dict[str, dict[str, float]] = {}  # kernel -> its text -> instructions
        for arch in ARCHS:
            if not counted or any(_text(name, arch) not in counted[name] for name in counted):
                for (name, _), count in _most(GROUPS[group](arch)).items():
                    counted.setdefault(name, {})[_text(name, arch)] = float(f"{count:.4g}")
            rows |= {name: {**rows.get(name, {}), arch: counted[name][_text(name, arch)]} for name in counted}
        print(group, flush=True)
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(set(rows) & set(_entries()))]
    executed.FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(lines)} kernels: wrote {executed.FILE.name}")
    return 0


def _most(launches: Iterable[Measured]) -> dict[tuple[str, int], float]:
    """Instructions of each kernel, warm; of several launches the most."""
    found: dict[tuple[str, int], float] = {}
    for each in launches:
        if not each.cold:
            key = each.kernel.name, each.arch
            found[key] = max(found.get(key, 0.0), each.figures.instructions)
    return found


if __name__ == "__main__":
    sys.exit(main())
