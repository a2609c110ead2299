"""docs/EDGE_CASES.md lists the edge cases, all of them and no others."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "EDGE_CASES.md"
FAMILIES = ("values", "state", "mutation", "random", "modes", "regions", "interface")


def rows(part: str) -> list[tuple[str, str]]:
    """Each case of a section and what happens there. Its rows are rules with their cases; then come calls that do not fit."""
    found: list[tuple[str, str]] = []
    for happens, names in re.findall(r"^\| .* \| ([^`|]+) \| (`[^|]+`) \|$", part, re.MULTILINE):
        found += [(name, happens) for name in re.findall(r"`([^`]+)`", names)]
    return found + re.findall(r"^\| `([^`]+)` \| ([^|`]*?) \| the message names ", part, re.MULTILINE)


def sections() -> dict[str, str]:
    """Family -> its section of the page."""
    parts = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.partition("\n")[0].lower(): part for part in parts}


def test_the_page_has_a_section_for_each_family() -> None:
    """In the order of the files."""
    assert tuple(sections()) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_on_the_page_and_the_other_way_round(family: str) -> None:
    """A case that is added, renamed or removed must be so on the page."""
    module = importlib.import_module(f"test_edge_{family}")
    names = [*module.case.cases, *getattr(module, "MISFITS", ())]
    assert sorted(name for name, _ in rows(sections()[family])) == sorted(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_bugs_are_marked(family: str) -> None:
    """What is a strict xfail in the tests is open on the page, and nothing else is."""
    module = importlib.import_module(f"test_edge_{family}")
    opened = {name for name, happens in rows(sections()[family]) if "**open**" in happens}
    assert opened == {name for name, one in module.case.cases.items() if one.bug}
