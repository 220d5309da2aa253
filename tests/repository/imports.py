"""Import directions, kernels <- hybridcomm <- model <- train: `python -m tests.repository.imports LAYOUT`.

import-linter holds the contracts of pyproject.toml between the packages; that kernels is a leaf inside
hybridcomm is checked on the same graph here, because a contract cannot name "the rest of the parent package".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["kernel_leaks", "lint_imports"]

_LINT = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
_LEAKS = """
import grimp, json
graph = grimp.build_graph("hybridcomm", include_external_packages=True, cache_dir=None)
kernels = {"hybridcomm.kernels"} | graph.find_descendants("hybridcomm.kernels")
own = {"hybridcomm", "model", "train", "benchmarks", "tests", "kernels"}
print(json.dumps(sorted(
    f"{module} imports {imported}"
    for module in kernels
    for imported in graph.find_modules_directly_imported_by(module) - kernels
    if imported.partition(".")[0] in own
)))
"""


def lint_imports(layout: Path) -> tuple[int, str]:
    """Runs import-linter on a layout; exit code and output."""
    result = _python(layout, _LINT)
    return result.returncode, result.stdout + result.stderr


def kernel_leaks(layout: Path) -> list[str]:
    """Imports by which a module of ``hybridcomm.kernels`` reaches anything of ours outside it."""
    result = _python(layout, _LEAKS)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    leaks: list[str] = json.loads(result.stdout)
    return leaks


def _python(layout: Path, code: str) -> subprocess.CompletedProcess[str]:
    # -S: without it an editable install's finder would lead from the layout back to the sources.
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(layout), *libraries])}
    return subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=layout, env=env, capture_output=True, text=True, check=False
    )


def main(layout: Path) -> int:
    code, text = lint_imports(layout)
    print(text.strip())
    leaks = kernel_leaks(layout)
    for leak in leaks:
        print(f"kernels must stay a leaf: {leak}")
    return 1 if leaks else code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
