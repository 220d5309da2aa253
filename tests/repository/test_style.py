"""House rules that no linter knows: tests assert, files and functions stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.repository.layout import ROOT

PACKAGES = ("hybridcomm", "kernels", "model", "train", "benchmarks", "tests")
MAX_FILE = 400
MAX_FUNCTION = 60
VENDORS = ROOT / "tests" / "gpu" / "nccl"
"""Headers that are NVIDIA's."""


def sources(*suffixes: str) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts and VENDORS not in path.parents:
                yield path


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def too_long(text: str) -> list[str]:
    """Functions of a Python source that are over the limit, docstring included."""
    return [
        f"{f.name}: {f.end_lineno - f.lineno + 1} lines"
        for f in functions(ast.parse(text))
        if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > MAX_FUNCTION
    ]


def checks(node: ast.AST) -> bool:
    """Whether a statement can fail a test: assert, raise, pytest.raises, assert_*/check_* calls, check=True.

    ``guarded*``: memory between guard pages, where touching one byte too many ends the process.
    """
    if isinstance(node, (ast.Assert, ast.Raise)):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return (
        name in ("raises", "fail", "warns")
        or name.lstrip("_").lower().startswith(("assert", "check", "expect", "guarded"))
        or any(k.arg == "check" and getattr(k.value, "value", None) is True for k in node.keywords)
    )


def vacuous_tests(text: str) -> list[str]:
    """Tests of a source that assert nothing, neither themselves nor in a function of that file they use."""
    tree = ast.parse(text)
    asserting: set[str] = set()
    bodies = {f.name: list(ast.walk(f)) for f in functions(tree)}
    grown = True
    while grown:
        grown = False
        for name, nodes in bodies.items():
            if name in asserting:
                continue
            called = {
                getattr(n.func, "id", getattr(n.func, "attr", "")) for n in nodes if isinstance(n, ast.Call)
            }
            passed = {n.id for n in nodes if isinstance(n, ast.Name)}  # run_ranks(body, ...)
            if any(map(checks, nodes)) or (called | passed) & asserting:
                asserting.add(name)
                grown = True
    return [name for name in bodies if name.startswith("test") and name not in asserting]


def test_every_test_asserts() -> None:
    found = {
        str(path.relative_to(ROOT)): vacuous
        for path in sources(".py")
        if path.name.startswith("test_") and (vacuous := vacuous_tests(path.read_text()))
    }
    assert not found, f"tests that cannot fail: {found}"


def test_files_are_short() -> None:
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources(".py", ".cpp", ".h")
    }
    assert len(lengths) > 50
    assert {name: n for name, n in lengths.items() if n > MAX_FILE} == {}


def test_functions_are_short() -> None:
    found = {str(p.relative_to(ROOT)): long for p in sources(".py") if (long := too_long(p.read_text()))}
    assert found == {}


def test_the_checks_see_what_they_are_for() -> None:
    assert vacuous_tests("def test_a():\n    f()\n") == ["test_a"]
    assert vacuous_tests("def g():\n    assert 1\ndef test_a():\n    run(g)\n") == []
    assert vacuous_tests("def test_a():\n    with pytest.raises(E):\n        f()\n") == []
    assert too_long("def f():\n" + "    x = 1\n" * MAX_FUNCTION) == [f"f: {MAX_FUNCTION + 1} lines"]
    assert too_long("def f():\n" + "    x = 1\n" * (MAX_FUNCTION - 1)) == []
