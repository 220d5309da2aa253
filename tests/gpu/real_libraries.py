"""Real libraries without a device, ``python -m tests.gpu.real_libraries``: NCCL and cupy of wheels, Debian's libcuda.

1. One after the other is fetched into a temporary folder and unpacked there; nothing is installed, nothing stays.
2. `loader.cpp` loads it as the engine does, and starts it: without a device that has to end with the library's word.
3. What it says of itself has to be what its package says, and its symbols those that our tables have for that version.
4. Of cupy, whose arrays need a device, it is the streams that have to be taken as it makes them.

What cannot be had from the registries in reach is skipped, counted and said. Exit code 0: nothing was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import table
from tests.gpu.loading import Ran, build_loader, run_loader
from tests.gpu.test_abi import code, nccl_calls

__all__ = ["CUPY", "WHEELS", "Finding", "UnavailableError", "check_cupy", "check_driver", "check_nccl"]

WHEELS = {
    "nvidia-nccl-cu12": ("2.18.1", "2.19.3", "2.23.4", "2.27.3", "2.28.3", "2.29.2", ""),
    "nvidia-nccl-cu13": ("2.27.7", ""),
}
"""The oldest, those with which newer calls came, and the newest, which has no number here."""
CUPY = ("cupy-cuda12x", "cupy-cuda13x")
DRIVER = "libcuda1"
NO_DEVICE = "CUDA_ERROR_NO_DEVICE (100)"
FAILED = 1  # ncclUnhandledCudaError: what beginning a communicator comes to without a device
GPU_DRIVER = Path("/proc/driver/nvidia")
DEVICES = Path("/dev")
_SECONDS = 900  # for one package of some 300 MB
_STREAM = 0x7F00  # an address: nothing is asked of it
_CUPYS_STREAM = f"""
import cupy
from hybridcomm.device_work import handle_of
print(cupy.__version__, handle_of(cupy.cuda.ExternalStream({_STREAM})), hasattr(cupy.ndarray, "__dlpack__"))
"""


class UnavailableError(Exception):
    """A package cannot be had here; says why."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``problems``: what is not as it should be; ``says``: what it answered when it was started."""

    library: str
    version: str = ""
    symbols: str = ""
    says: str = ""
    problems: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def outcome(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        return "; ".join(self.problems) or "as it should be"


def version_of(text: str) -> int:
    """As the library says it: 22703 of "2.27.3", also of "2.27.3.post1"."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return code([int(part) for part in found.groups()]) if found else 0


@contextlib.contextmanager
def no_new_devices() -> Iterator[None]:
    """As root, NVIDIA's driver makes /dev/nvidiactl before it finds that there is no device: such nodes go again."""
    before = set(DEVICES.glob("nvidia*"))
    try:
        yield
    finally:
        for node in set(DEVICES.glob("nvidia*")) - before:
            node.unlink()


def ended(loader: Path, *arguments: str | Path, **environment: str | Path) -> Ran:
    """What the loader said; a crash, and no end, are an error that it says."""
    try:
        with no_new_devices():
            return run_loader(loader, *arguments, **environment)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Ran(code=1, said={"error": " ".join(str(error).split())})


def exported(library: Path) -> frozenset[str]:
    done = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True, timeout=60
    )
    return frozenset(line.split()[-1].partition("@")[0] for line in done.stdout.splitlines())


def check_nccl(loader: Path, library: Path, package: str, version: str, driver: Path | None) -> Finding:
    """``driver``: the folder of a libcuda.so.1 to start it beside; without, there is none in its sight."""
    beside = {"LD_LIBRARY_PATH": "" if driver is None else driver, "NCCL_SOCKET_IFNAME": "lo"}
    ran = ended(loader, "nccl", "--file", library, "--start", "1", **beside)
    number, names = version_of(version), exported(library)
    base = [call.symbol for call in nccl_calls() if not call.since]
    newer = [call for call in nccl_calls() if call.since]
    wanted = [call.symbol for call in newer if call.since <= number]
    missing = [symbol for symbol in (*base, *wanted) if symbol not in names]
    early = [call.symbol for call in newer if call.since > number and call.symbol in names]
    problems = [
        *([f"fails: {ran.said.get('error')}"] if ran.code else []),
        *([f"says {ran.said.get('version')}"] if ran.said.get("version") != str(number) else []),
        *([f"has no {', '.join(missing)}"] if missing else []),
        *([f"has {', '.join(early)} before the version of our table"] if early else []),
        *(["the loader has other newer calls"] if ran.said.get("newer", "").split() != wanted else []),
        *no_device(ran),
    ]
    return Finding(
        library=package,
        version=version,
        symbols=f"{len(base)} + {len(wanted)} of {len(newer)}",
        says=ran.said.get("started", ""),
        problems=tuple(problems),
    )


def no_device(ran: Ran) -> list[str]:
    said = ran.said.get("started", "")
    return [] if re.fullmatch(rf"{FAILED} .+: Cuda failure .+", said) else [f"started, it says {said!r}"]


def check_driver(loader: Path, library: Path, package: str, version: int) -> Finding:
    """``version``: of CUDA, as the package says it; 12020 for 12.2. The loader refuses one that lacks a symbol."""
    ran = ended(loader, "cuda", "--file", library)
    said = ran.said.get("cuInit:", "")
    problems = [
        *([f"fails: {ran.said.get('error')}"] if ran.code else []),
        *([f"says {ran.said.get('version')}"] if ran.said.get("version") != str(version) else []),
        *([f"cuInit says {said!r}"] if not said.startswith(NO_DEVICE) else []),
        *(["counts devices"] if ran.said.get("devices") != "0" else []),
    ]
    return Finding(
        library=package,
        version=f"CUDA {version // 1000}.{version % 1000 // 10}",
        symbols="all" if not ran.code else "",
        says=f"cuInit: {said}",
        problems=tuple(problems),
    )


def check_cupy(package: str, folder: Path) -> Finding:
    """``folder``: what the package was installed into."""
    done = subprocess.run(
        [sys.executable, "-c", _CUPYS_STREAM],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    version, handle, dlpack = done.stdout.split() if len(done.stdout.split()) == 3 else ("", "", "")
    problems = [
        *([f"fails: {done.stderr.strip().splitlines()[-1:]}"] if done.returncode else []),
        *([f"a stream at {_STREAM} is taken for {handle!r}"] if handle != str(_STREAM) else []),
        *(["its arrays have no __dlpack__"] if dlpack != "True" else []),
    ]
    return Finding(library=package, version=version, says=f"a stream at {handle}", problems=tuple(problems))


def command(*arguments: str | Path, what: str, folder: Path) -> str:
    try:
        done = subprocess.run(
            list(map(str, arguments)),
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{what} ({type(error).__name__})") from error
    if done.returncode:
        raise UnavailableError(what)
    return done.stdout


def fetch_nccl(package: str, version: str, folder: Path) -> tuple[Path, str]:
    """The library of a wheel, and the wheel's version."""
    wanted = f"{package}=={version}" if version else package
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder)
    command(*pip, wanted, what="pip cannot fetch it", folder=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("/libnccl.so.2"))
        library = Path(archive.extract(member, folder))
    wheel.unlink()
    return library, wheel.name.split("-")[1]


def non_free(folder: Path) -> tuple[str, ...]:
    """Options that make apt-get look into the non-free part of the system's own mirror, in lists of its own."""
    release = Path("/etc/os-release")
    facts = dict(re.findall(r'^(\w+)="?([^"\n]*)', release.read_text() if release.exists() else "", re.M))
    if facts.get("ID") != "debian":
        raise UnavailableError("not a Debian")
    form = "--format=$(REPO_URI) $(RELEASE) $(COMPONENT)"
    known = command("apt-get", "indextargets", "--no-release-info", form, what="no apt-get", folder=folder)
    suite = facts.get("VERSION_CODENAME", "")
    mirrors = sorted({line.split()[0] for line in known.splitlines() if line.endswith(f" {suite} main")})
    if not mirrors:
        raise UnavailableError("apt-get knows no mirror of Debian")
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    sources = folder / "non-free.list"
    sources.write_text("".join(f"deb {mirror} {suite} non-free\n" for mirror in mirrors))
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    return tuple(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))


def fetch_driver(folder: Path) -> tuple[Path, str, int]:
    """The driver's library, its package's version, and the version of CUDA that the package provides."""
    options = non_free(folder)
    what = "apt-get cannot fetch it"
    command("apt-get", *options, "-q", "update", what=what, folder=folder)
    command("apt-get", *options, "-q", "download", DRIVER, what=what, folder=folder)
    (package,) = folder.glob("*.deb")
    fields = command("dpkg-deb", "-f", package, "Version", "Provides", what="no dpkg-deb", folder=folder)
    command("dpkg-deb", "-x", package, folder / "unpacked", what="no dpkg-deb", folder=folder)
    provided = [(int(a), int(b)) for a, b in re.findall(r"libcuda-(\d+)\.(\d+)-1", fields)]
    major, minor = max(provided, default=(0, 0))
    version = re.search(r"^Version: (\S+)", fields, re.MULTILINE)
    (library,) = (folder / "unpacked").rglob("libcuda.so.1")
    return library, version[1] if version else "", 1000 * major + 10 * minor


def findings(folder: Path) -> Iterator[Finding]:
    loader, driver = build_loader(folder), None
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        library, version, cuda = fetch_driver(place)
        driver = library.parent
        yield check_driver(loader, library, f"{DRIVER} {version}", cuda)
    except UnavailableError as error:
        yield Finding(library=DRIVER, skipped=str(error))
    for package, versions in WHEELS.items():
        for wanted in versions:
            with tempfile.TemporaryDirectory(dir=folder) as gone:
                try:
                    library, version = fetch_nccl(package, wanted, Path(gone))
                except UnavailableError as error:
                    yield Finding(library=package, version=wanted or "newest", skipped=str(error))
                    continue
                for beside in [None, *([driver] if driver else [])]:
                    yield check_nccl(
                        loader, library, package + (f" beside {DRIVER}" if beside else ""), version, beside
                    )
    for package in CUPY:
        with tempfile.TemporaryDirectory(dir=folder) as gone:
            pip = (sys.executable, "-m", "pip", "install", "-q", "--only-binary", ":all:", "--target", gone)
            try:
                command(*pip, package, what="pip cannot fetch it", folder=Path(gone))
                yield check_cupy(package, Path(gone))
            except UnavailableError as error:
                yield Finding(library=package, version="newest", skipped=str(error))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.real_libraries", description=__doc__)
    parser.add_argument("--markdown", type=Path, help="write a table of what was found to this file")
    options = parser.parse_args()
    found = []
    if GPU_DRIVER.exists():
        found.append(Finding(library="all", skipped="this machine has a GPU: there is no 'no device' here"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for finding in findings(Path(folder)):
                print(
                    finding.library,
                    finding.version,
                    finding.says,
                    "->",
                    finding.outcome,
                    sep=" | ",
                    flush=True,
                )
                found.append(finding)
    if options.markdown:
        header = ["library", "version", "symbols", "without a device", "outcome"]
        rows = [[f.library, f.version, f.symbols, f.says, f.outcome] for f in found]
        options.markdown.write_text(table(header, rows) + "\n", encoding="utf-8")
    failed, skipped = sum(bool(f.problems) for f in found), sum(bool(f.skipped) for f in found)
    print(f"{len(found) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
