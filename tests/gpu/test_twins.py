"""Host twins of device kernels behind the kernels' own host code: the oracle's bytes, the executor's in all memory.

And what `device_access.ranges` says of each shipped kernel, against what its PTX touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.kernels import parse
from hybridcomm.kernels.cubins import find
from hybridcomm.kernels.cubins.launcher import Launcher
from hybridcomm.kernels.cubins.load import names
from hybridcomm.kernels.cubins.manifest import Manifest
from hybridcomm.kernels.cuda import gtopk, powersgd, topk
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.device_access import Range, ranges
from hybridcomm.kernels.triton import bucket
from tests.gpu.calls import Call, arguments, host_memory
from tests.gpu.codec_cases import SPECS, decoded, encoded, reencoded, sizes, types_of
from tests.gpu.twins import Twin, twin_of
from tests.gpu.watched import Watch
from tests.kernels import cases
from tests.kernels.interpreted_bucket import TYPES as BUCKETS
from tests.kernels.interpreted_bucket import check_pack_and_unpack, tensors
from tests.kernels.ptx_run import PtxRun

ARCH = 90
SUMS = (("normal", "heavy", "tied"), ("negative zero", "spike"), ("normal", "nan"), ("denormal", "huge"))
over_specs = pytest.mark.parametrize("spec", [parse(text) for text in SPECS], ids=str)


@dataclass(kw_only=True)
class Twins:
    """Launches twins on the memory of tensors, through the argument buffers that the driver gets."""

    twin: Any = twin_of
    launched: set[str] = field(default_factory=set)

    def __call__(self, kernel: DeviceKernel, programs: int, given: Mapping[str, Any]) -> None:
        image = find(kernel.name, ARCH)
        addresses = {name: _address(value) for name, value in given.items()}
        values = arguments(image.parameters, image.pack(**addresses))
        self.twin(kernel)(Call(kernel=kernel, programs=programs, values=values, view=host_memory))
        self.launched.add(kernel.name)


def _address(value: Any) -> Any:
    return 0 if value is None else value.data_ptr() if isinstance(value, torch.Tensor) else value


def clears(spec: Any) -> tuple[bool, ...]:
    """Whether decoding has a form that clears first."""
    return (False, True) if hasattr(spec, "layout") or spec in powersgd.SPECS else (False,)


def check_codec(run: Any, spec: Any, kinds: tuple[str, ...] = cases.KINDS) -> None:
    for i, kind in enumerate(kinds):
        types = types_of(spec)[(i + i // 3) % len(types_of(spec))]
        got, want = encoded(run, spec, kind, sizes(spec)[i % 3], types)
        assert got == want, (kind, types)
    for of, weight, numel in zip(SUMS, (1.0, 0.25, 0.5, -1.0), (*sizes(spec), 16), strict=True):
        for clear in clears(spec):
            sums = decoded(run, spec, of, numel, weight, clear=clear)
            assert next(sums) == next(sums), (of, weight, clear)
        for rest in ("fp32", "bf16") if spec != gtopk.SPEC else ():
            got, want = reencoded(run, spec, of, numel, rest)
            assert got == want, (of, rest)


def every_type(run: Any, spec: Any) -> None:
    """All kernels of a spec, on finite values, so that nothing is left to be taken back, and on some that are not."""
    for numel in sizes(spec)[1:]:
        for types in types_of(spec):
            for kind in ("normal", "nan"):
                list(encoded(run, spec, kind, numel, types))
        for clear in clears(spec):
            list(decoded(run, spec, ("normal", "tied"), numel, 0.25, clear=clear))
        for rest in ("fp32", "bf16") if spec != gtopk.SPEC else ():
            list(reencoded(run, spec, ("normal", "tied"), numel, rest))


@over_specs
def test_twins_equal_the_oracle(spec: Any) -> None:
    check_codec(Twins(), spec)


def shipped(run: Any) -> Launcher:
    return Launcher(function=bucket.FUNCTION, kernels=bucket.KERNELS, run=run, otherwise=False)


@pytest.mark.parametrize("dtype", BUCKETS, ids=str)
def test_the_buckets_twin_equals_torch(dtype: torch.dtype) -> None:
    check_pack_and_unpack(tensors(), dtype, 3, float(np.float32(1 / 3)), shipped(Twins()))


def test_every_shipped_kernel_has_a_twin_that_runs() -> None:
    run = Twins()
    for text in SPECS:
        every_type(run, parse(text))
        list(decoded(run, parse(text), ("normal", "nan"), 48, 1.0))
    for dtype in BUCKETS:
        check_pack_and_unpack(tensors(), dtype, 0, 1.0, shipped(run))
    assert run.launched == set(names())


@dataclass(kw_only=True)
class Held:
    """Executes PTX, on memory that counts as initialised: what kernels read too early, other tests look for."""

    watch: Watch

    def __call__(self, kernel: DeviceKernel, programs: int, given: Mapping[str, Any]) -> None:
        run = PtxRun(arch=ARCH, load=self.watch.load)
        for value in given.values():
            if isinstance(value, torch.Tensor):
                nbytes = value.untyped_storage().nbytes()
                run.hold(value, np.ones(nbytes, np.bool_))
        run(kernel, programs, given)


@over_specs
def test_twins_leave_all_memory_as_the_executor_does(spec: Any) -> None:
    """And every kernel touches what is declared: nothing else, and all that is declared as written."""
    watch, numel = Watch(arch=ARCH), sizes(spec)[1]
    for types in types_of(spec):
        list(encoded(Held(watch=watch), spec, "normal", numel, types))
    for clear in clears(spec):
        for kinds in (("normal", "tied"), ("normal", "nan")):
            list(decoded(Held(watch=watch), spec, kinds, numel, 0.25, clear=clear))
    for rest in ("fp32", "bf16") if spec != gtopk.SPEC else ():
        list(reencoded(Held(watch=watch), spec, ("normal", "tied"), numel, rest))
    watch.compare = False  # what encoders leave of values that are not finite is taken back
    for types in types_of(spec):
        if types[0] == "bf16" or spec == gtopk.SPEC:
            list(encoded(Held(watch=watch), spec, "nan", 48, types))
    assert watch.wrong == []
    assert watch.unwritten() == []
    assert {name for name in watch.kernels if not name.startswith("withdraw_")} == of_spec(spec)


def of_spec(spec: Any) -> set[str]:
    """Shipped kernels; those of powersgd's first pass are for all ranks."""
    shared = "powersgd_" if spec in powersgd.SPECS else str(spec)
    entries = [each.kernel for each in Manifest.read().entries]
    return {each.name for each in entries if each.codec == str(spec) or each.name.startswith(shared)}


@pytest.mark.parametrize("dtype", BUCKETS, ids=str)
def test_a_buckets_kernel_touches_what_its_table_says(dtype: torch.dtype) -> None:
    watch, made = Watch(arch=ARCH), tensors()[:3]
    run = PtxRun(arch=ARCH, load=watch.load, beside=made)
    check_pack_and_unpack(made, dtype, 3, float(np.float32(1 / 3)), shipped(run))
    assert len(watch.kernels) == 2
    assert watch.wrong == []
    assert watch.unwritten() == []


def flawed(flaw: str) -> Any:
    """Twins with one bug."""

    def made(kernel: DeviceKernel) -> Twin:
        right = twin_of(kernel)

        def wrong(call: Call) -> None:
            values, before = dict(call.values), None
            if flaw == "ignores first" and "first" in values:
                values["first"] = 0
            if flaw == "forgets the checksum" and "payload" in values:
                before = call.bytes("payload", 48, 8).copy()
            if flaw == "adds half" and "weight" in values:
                values["weight"] = values["weight"] / 2
            if flaw == "never withdraws" and "withdraw" in kernel.name:
                return
            programs = call.programs - (flaw == "a program short" and call.programs > 1)
            right(Call(kernel=kernel, programs=programs, values=values, view=call.view))
            if before is not None:
                call.bytes("payload", 48, 8)[:] = before
            if flaw == "loses a residual" and call.values.get("e_out"):
                call.array("e_out", 0, 1).view(np.uint8)[:] ^= 1

        return wrong

    return made


FLAWS = {
    "ignores first": "int8",
    "forgets the checksum": "topk:0.01",
    "adds half": "gtopk:0.01",
    "never withdraws": "bf16",
    "a program short": "randk:0.01",
    "loses a residual": "sign1",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_planted_bug_in_a_twin_is_caught(flaw: str) -> None:
    spec = parse(FLAWS[flaw])
    check_codec(Twins(), spec, ("normal", "nan", "tied"))
    with pytest.raises(AssertionError):
        check_codec(Twins(twin=flawed(flaw)), spec, ("normal", "nan", "tied"))


@pytest.mark.parametrize("flaw", ["forgets the checksum", "loses a residual"])
def test_the_executors_memory_tells_too(flaw: str) -> None:
    watch = Watch(arch=ARCH, twin=flawed(flaw))
    list(encoded(Held(watch=watch), parse("int8"), "normal", 48, ("fp32", "fp32")))
    assert any("its twin" in line for line in watch.wrong)


def declared_wrongly(how: str) -> Any:
    def made(kernel: DeviceKernel, *given: Any, **options: Any) -> tuple[Range, ...]:
        found = []
        for each in ranges(kernel, *given, **options):
            nbytes, write = each.nbytes, each.write
            if how == "short":
                nbytes -= 1
            if how == "read only":
                write = False
            if how == "all written":
                write = True
            found.append(Range(begin=each.begin, nbytes=nbytes, write=write))
        return tuple(found)

    return made


@pytest.mark.parametrize("how", ["short", "read only", "all written"])
def test_ranges_that_are_wrong_are_told(how: str) -> None:
    watch = Watch(arch=ARCH, declare=declared_wrongly(how))
    list(encoded(Held(watch=watch), parse("int4"), "normal", 48, ("fp32", "fp32")))
    found = watch.unwritten() if how == "all written" else watch.wrong
    assert any("int4_encode_fp32_fp32_tail" in line for line in found)


BY_NAME = {kernel.name: kernel for kernel in (*topk.KERNELS, *gtopk.KERNELS, *bucket.KERNELS)}


def test_null_pointers_have_no_range() -> None:
    kernel = BY_NAME["topk_withdraw_fp32"]
    values = {"e_in": 0, "e_out": 4096, "payload": 8192, "numel": 48, "records_at": 80, "checksum": 1}
    with_residual = ranges(kernel, {**values, "e_in": 16})
    assert [each for each in with_residual if each.begin != 16] == list(ranges(kernel, values))
    assert Range(begin=16, nbytes=192, write=False) in with_residual


def test_what_device_memory_says_is_read_there() -> None:
    """Or, where the region's size is all that is needed, given."""
    pack = BY_NAME["gtopk_pack"]
    values = {"values": 16, "indices": 32, "rest": 4096, "payload": 1 << 20}
    values |= {"kept": 2, "records_at": 80, "counts_at": 96}
    with pytest.raises(ValueError, match="pass read"):
        ranges(pack, values)
    known = {32: 3, 36: 1030}
    found = ranges(pack, values, read=lambda at, nbytes: known[at].to_bytes(nbytes, "little"))
    assert Range(begin=4096 + 12, nbytes=4 * 1028, write=True) in found
    assert Range(begin=4096, nbytes=4 * 2048, write=True) in ranges(pack, {**values, "numel": 2048})
    table = {"table": 64, "bucket": 4096, "scale": 1.0}
    with pytest.raises(ValueError, match="programs wanted"):
        ranges(BY_NAME["bucket_pack_bf16"], table)
    row = np.array([1 << 20, 8, 5, 3], np.int64).tobytes()
    found = ranges(BY_NAME["bucket_pack_bf16"], table, programs=1, read=lambda at, nbytes: row)
    assert found == (
        Range(begin=64, nbytes=32, write=False),
        Range(begin=1 << 20, nbytes=20, write=False),
        Range(begin=4096 + 16, nbytes=10, write=True),
    )
