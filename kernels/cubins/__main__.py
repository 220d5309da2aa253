"""``python -m hybridcomm.kernels.cubins build | check | gate``; see ``--help``."""

from __future__ import annotations

import argparse
import sys
import time

from hybridcomm.kernels.cubins import gate, lock, registry, roof
from hybridcomm.kernels.cubins.errors import ArtefactError, BuildError
from hybridcomm.kernels.cubins.manifest import ARTEFACTS, Manifest
from hybridcomm.kernels.cubins.ptx import OLDEST_CUDA


def _build(arguments: argparse.Namespace) -> int:
    from hybridcomm.kernels.cubins.build import build

    begin = time.monotonic()
    manifest = build(force=arguments.force, jobs=arguments.jobs)
    size = sum(path.stat().st_size for path in ARTEFACTS.iterdir())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.toolchain.items()))
    seconds = time.monotonic() - begin
    print(f"{len(manifest.entries)} kernels, {size / 1024:.0f} KiB, {seconds:.0f} s; {versions}")
    print(f"PTX for sm_80 and later, for drivers of CUDA {OLDEST_CUDA} and later")
    return 0


def _check(_: argparse.Namespace) -> int:
    problems = [*lock.check(), *lock.check_kernels(registry.gather())]
    print(
        "\n".join(problems)
        or f"{len(Manifest.read().entries)} kernels: the artefacts are those of the sources"
    )
    return 1 if problems else 0


def _gate(arguments: argparse.Namespace) -> int:
    broken = 0
    for entry in Manifest.read().entries:
        for build in entry.builds if arguments.only in entry.kernel.name else ():
            violations = gate.judge(entry.kernel, build)
            broken += len(violations)
            print(
                f"{entry.kernel.name} sm_{build.arch}: {build.registers} registers,"
                f" {build.static_shared + build.dynamic_shared} bytes shared,"
                f" {roof.resident(entry.kernel, build).blocks} blocks per SM,"
                f" {build.figures.instructions:.1f} instructions per element, {build.figures.loops} loops"
            )
            for violation in violations:
                print(f"  {violation.rule}: {violation.detail}")
    print(f"{broken} violations")
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hybridcomm.kernels.cubins", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="build what is missing or stale (needs triton and torch)")
    command.add_argument("--force", action="store_true", help="build everything")
    command.add_argument("--jobs", type=int, help="processes (default: one per core)")
    command.set_defaults(run=_build)
    command = commands.add_parser("check", help="whether the artefacts are those of the sources")
    command.set_defaults(run=_check)
    command = commands.add_parser("gate", help="figures of the machine code, and which rules it breaks")
    command.add_argument("--only", default="", help="kernels whose name holds this")
    command.set_defaults(run=_gate)
    arguments = parser.parse_args()
    try:
        return int(arguments.run(arguments))
    except (ArtefactError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
