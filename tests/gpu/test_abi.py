"""Our declarations of CUDA's driver and of NCCL are the vendor's: proven by the compiler, for many versions of both.

NCCL's headers are in the test tree (`nccl/`, with their licences). CUDA's may not be copied: its wheels are fetched,
and where that is impossible, the tests that need them are skipped and counted.
"""

from __future__ import annotations

import functools
import random
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GPU = ROOT / "hybridcomm" / "csrc"
FETCHED = ROOT / "build" / "cuda-headers"
VERSIONS = sorted(
    (path.stem for path in (HERE / "nccl").glob("*.h")), key=lambda v: tuple(map(int, v.split(".")))
)
CUDA_WHEELS = {
    "12.1": ("nvidia-cuda-runtime-cu12==12.1.105", "nvidia/cuda_runtime/include"),
    "12.9": ("nvidia-cuda-runtime-cu12==12.9.79", "nvidia/cuda_runtime/include"),
    "13": ("nvidia-cuda-runtime>=13", "nvidia/cu13/include"),
}
CONFIG = (
    "size",
    "magic",
    "version",
    "blocking",
    "cgaClusterSize",
    "minCTAs",
    "maxCTAs",
    "netName",
    "splitShare",
)
CONFIG_SINCE = {
    "trafficClass": "2.26.2",
    "commName": "2.27.3",
    "collnetEnable": "2.27.3",
    "CTAPolicy": "2.27.3",
    "shrinkShare": "2.27.3",
    "nvlsCTAs": "2.27.3",
}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A row of a table: ``since`` the version that brought it, 0 where it was always there."""

    symbol: str
    result: str
    arguments: tuple[str, ...]
    since: int = 0

    def check(self) -> str:
        """The assertion that the vendor's function is called so."""
        return f"ABI_CALLED({self.symbol}, {self.result}, ({', '.join(self.arguments)}))"


def calls(header: str, table: str) -> list[Call]:
    """The rows of a table, as the compiler sees them."""
    source = f'#include "{header}"\n#define X(s, r, a, ...) @s|r|a|__VA_ARGS__@\n{table}(X)\n'
    done = subprocess.run(
        ["c++", "-std=c++17", "-E", "-P", "-x", "c++", "-", f"-I{GPU}"],
        input=source,
        capture_output=True,
        text=True,
        check=True,
    )
    found = []
    for symbol, result, arguments, since in re.findall(r"@(\w+)\|([^|]+)\|\((.*?)\)\|(.*?)@", done.stdout):
        numbers = [int(number) for number in re.findall(r"\d+", since)]
        found.append(
            Call(
                symbol=symbol,
                result=result.strip(),
                arguments=tuple(part.strip() for part in arguments.split(",") if part.strip()),
                since=code(numbers),
            )
        )
    return found


def code(version: list[int]) -> int:
    return version[0] * 10000 + version[1] * 100 + version[2] if version else 0


def number(version: str) -> int:
    return code([int(part) for part in version.split(".")])


@functools.cache
def nccl_calls() -> tuple[Call, ...]:
    return (*calls("gpu_nccl_abi.h", "NCCL_CALLS"), *calls("gpu_nccl_abi.h", "NCCL_NEWER_CALLS"))


@functools.cache
def cuda_calls() -> tuple[Call, ...]:
    return tuple(calls("gpu_cuda_abi.h", "CUDA_CALLS"))


def constants(header: str) -> list[str]:
    """Names of the enums' members that the vendor has too."""
    text = re.sub(r"//.*", "", (GPU / header).read_text(encoding="utf-8"))
    bodies = re.findall(r"enum : \w+ \{(.*?)\}", text, flags=re.DOTALL)
    return [name for body in bodies for name in re.findall(r"(\w+) = \d+", body)]


def compiles(source: str, *folders: Path) -> tuple[bool, str]:
    done = subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", "-Werror", "-x", "c++", "-", *(f"-I{f}" for f in folders)],
        input=source,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode == 0, done.stderr


def nccl_proof(version: str, checked: tuple[Call, ...]) -> str:
    there = [call.check() for call in checked if call.since <= number(version)]
    newer = [field for field, since in CONFIG_SINCE.items() if number(since) <= number(version)]
    fields = (*CONFIG, *newer)
    names = [name for name in constants("gpu_nccl_abi.h") if name.startswith("nccl")]
    return "\n".join(
        [
            f'#include "{version}.h"',
            '#include "gpu_nccl_abi.h"',
            '#include "abi.h"',
            "namespace hybridcomm::gpu {",
            *there,
            *(f"ABI_EQUAL({name})" for name in names),
            *(f"ABI_AT(ncclConfig_t, {field})" for field in fields),
            "constexpr ::ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;",
            "static_assert(theirs.magic == kNcclMagic && theirs.blocking == kNcclUndefined);",
            "#ifdef NCCL_CTA_POLICY_ZERO",
            "static_assert(NCCL_CTA_POLICY_ZERO == kNcclCtaPolicyZero);",
            "static_assert(NCCL_VERSION_CODE >= kNcclCtaPolicyZeroSince);",
            "#else",
            "static_assert(NCCL_VERSION_CODE < kNcclCtaPolicyZeroSince);",
            "#endif",
            "#ifdef NCCL_WIN_COLL_SYMMETRIC",
            "static_assert(NCCL_WIN_COLL_SYMMETRIC == kNcclWindowSymmetric);",
            "#endif",
            f"static_assert(NCCL_VERSION_CODE == {number(version)});",
            f"static_assert(nccl_version({version.replace('.', ', ')}) == NCCL_VERSION_CODE);",
            "}",
        ]
    )


def check_nccl(version: str, checked: tuple[Call, ...]) -> tuple[bool, str]:
    return compiles(nccl_proof(version, checked), HERE / "nccl", HERE / "stubs", GPU, HERE)


@pytest.mark.parametrize("version", VERSIONS)
def test_nccl_is_declared_as_the_vendor_does(version: str) -> None:
    passed, said = check_nccl(version, nccl_calls())
    assert passed, said


def test_versions_reach_from_the_oldest_on() -> None:
    assert len(VERSIONS) >= 8
    assert VERSIONS[0] == "2.18.1"
    oldest = re.search(r"kOldestNccl = nccl_version\((.*?)\)", (GPU / "gpu_nccl_abi.h").read_text())
    assert oldest is not None
    assert oldest[1].replace(", ", ".") == VERSIONS[0]


@pytest.mark.parametrize("call", [call for call in nccl_calls() if call.since], ids=lambda call: call.symbol)
def test_what_is_newer_came_when_the_table_says(call: Call) -> None:
    """The last version before it lacks it, the first from then on has it."""
    has = {v: re.search(rf"\b{call.symbol}\(", (HERE / "nccl" / f"{v}.h").read_text()) for v in VERSIONS}
    before = [v for v in VERSIONS if number(v) < call.since]
    assert before
    assert not has[before[-1]]
    assert has[VERSIONS[len(before)]]


@pytest.mark.parametrize("field", CONFIG_SINCE)
def test_the_configuration_grows_when_the_header_says(field: str) -> None:
    comment = re.search(rf"\b{field} = .*?// (\d+\.\d+)", (GPU / "gpu_nccl_abi.h").read_text())
    assert comment is not None
    assert CONFIG_SINCE[field].startswith(comment[1])
    has = {v: re.search(rf"[ *]{field};", (HERE / "nccl" / f"{v}.h").read_text()) for v in VERSIONS}
    assert [v for v in VERSIONS if has[v]] == [
        v for v in VERSIONS if number(v) >= number(CONFIG_SINCE[field])
    ]


def mutated(call: Call, dice: random.Random) -> Call:
    """Another way to call it, that a compiler can tell from the right one."""
    arguments = list(call.arguments)
    kind = dice.choice(["more", "fewer", "wider", "result"] if arguments else ["more", "result"])
    if kind == "more":
        arguments.append("int")
    elif kind == "fewer":
        arguments.pop(dice.randrange(len(arguments)))
    elif kind == "wider":
        i = dice.randrange(len(arguments))
        arguments[i] = "double" if "*" in arguments[i] or arguments[i] != "size_t" else "int"
    else:
        return Call(symbol=call.symbol, result="short", arguments=call.arguments, since=call.since)
    return Call(symbol=call.symbol, result=call.result, arguments=tuple(arguments), since=call.since)


@pytest.mark.parametrize("seed", range(12))
def test_control_a_changed_signature_fails(seed: int) -> None:
    dice = random.Random(seed)
    every = list(nccl_calls())
    at = dice.randrange(len(every))
    wrong = mutated(every[at], dice)
    passed, said = check_nccl(VERSIONS[-1], (*every[:at], wrong, *every[at + 1 :]))
    assert not passed
    assert f"{wrong.symbol} is called otherwise" in said


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("ncclBfloat16 = 9", "ncclBfloat16 = 10", "ncclBfloat16 differs"),
        ("int minCTAs = kNcclUndefined;", "int64_t minCTAs = kNcclUndefined;", "minCTAs"),
        ("char internal[128]", "char internal[64]", "ncclCommInitRankConfig is called otherwise"),
    ],
)
def test_control_a_changed_declaration_fails(tmp_path: Path, old: str, new: str, named: str) -> None:
    for name in ("gpu_cuda_abi.h", "gpu_nccl_abi.h"):
        text = (GPU / name).read_text()
        (tmp_path / name).write_text(text.replace(old, new))
    assert old in (GPU / "gpu_nccl_abi.h").read_text()
    proof = nccl_proof(VERSIONS[-1], nccl_calls())
    passed, said = compiles(proof, HERE / "nccl", HERE / "stubs", tmp_path, HERE)
    assert not passed
    assert named in said


@functools.cache
def cuda_headers(version: str) -> Path:
    """The include folder of a wheel, fetched once and kept below build/."""
    wanted, inside = CUDA_WHEELS[version]
    folder = FETCHED / version
    if not (folder / inside / "cuda.h").exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            pytest.skip(f"CUDA {version}: its headers could not be fetched")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(inside)])
    return folder / inside


@pytest.mark.timeout(400)
@pytest.mark.xdist_group("cuda-headers")
@pytest.mark.parametrize("version", CUDA_WHEELS)
def test_the_driver_is_declared_as_the_vendor_does(version: str) -> None:
    def proof(checked: list[Call]) -> str:
        return "\n".join(
            [
                "#include <cuda.h>",
                '#include "gpu_cuda_abi.h"',
                '#include "abi.h"',
                "namespace hybridcomm::gpu {",
                *(call.check() for call in checked),
                *(f"ABI_EQUAL({name})" for name in constants("gpu_cuda_abi.h")),
                "}",
            ]
        )

    folder, every = cuda_headers(version), list(cuda_calls())
    passed, said = compiles(proof(every), folder, GPU, HERE)
    assert passed, said
    for seed in range(4):  # the control
        dice = random.Random(seed)
        at = dice.randrange(len(every))
        wrong = mutated(every[at], dice)
        passed, said = compiles(proof([*every[:at], wrong, *every[at + 1 :]]), folder, GPU, HERE)
        assert not passed
        assert f"{wrong.symbol} is called otherwise" in said
