"""The documentation speaks of what is there: links, variables, messages, codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repository.layout import ROOT
from tests.repository.test_style import sources

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_GENERATED = {"docs/verify-report.md"}


def everything() -> str:
    """All sources, with string literals that follow each other joined as the compilers join them."""
    texts = [path.read_text() for path in sources(".py", ".cpp", ".h") if "tests" not in path.parts]
    texts.append((ROOT / "Makefile").read_text())
    return re.sub(r'"\s*f?"', "", "\n".join(texts))


def local_links(page: Path) -> Iterator[tuple[str, Path]]:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            yield target, (page.parent / target).resolve()


def headings_with_messages(text: str) -> list[str]:
    return re.findall(r"^### `(.+)`$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [
        target
        for target, path in local_links(page)
        if not path.exists() and str(path.relative_to(ROOT)) not in _GENERATED
    ]
    assert broken == []


def test_variables_are_documented_and_real() -> None:
    used: set[str] = set()
    for path in [*sources(".py", ".cpp", ".h"), ROOT / "CMakeLists.txt"]:
        if path.name != Path(__file__).name:
            used |= set(re.findall(r"HYBRIDCOMM_[A-Z_]+", path.read_text()))
    told = set(re.findall(r"HYBRIDCOMM_[A-Z_]+", (ROOT / "docs" / "environment.md").read_text()))
    assert used == told


def test_messages_of_the_troubleshooting_page_exist() -> None:
    messages = headings_with_messages((ROOT / "docs" / "troubleshooting.md").read_text())
    code = everything()
    assert len(messages) > 20
    assert [message for message in messages if message not in code] == []


def test_a_message_that_is_gone_would_be_found() -> None:
    assert "this text stands nowhere in " + "the sources" not in everything()
    assert headings_with_messages("### `a b`\n## `no`\n### plain\n") == ["a b"]


def test_codes_of_the_wire_format_page_are_those_of_the_engine() -> None:
    page = (ROOT / "docs" / "wire-format.md").read_text()
    source = (ROOT / "hybridcomm" / "csrc" / "tag.cpp").read_text()
    for field, array in (
        ("collective", "kCollectives"),
        ("dtype", "kDtypes"),
        ("op", "kOps"),
        ("codec", "kCodecs"),
    ):
        listed = re.search(rf"{array}\[\] = {{([^}}]*)}}", source)
        row = re.search(rf"\| {field} \| (.*) \|", page)
        assert listed is not None
        assert row is not None
        names = re.findall(r'"(\w+)"', listed[1])
        assert row[1] == ", ".join(f"{code} {name}" for code, name in enumerate(names))


def test_the_readme_has_its_two_commands_up_front() -> None:
    top = (ROOT / "README.md").read_text().splitlines()[:12]
    assert any(line.startswith("make run") for line in top)
    assert any(line.startswith("make test") for line in top)
