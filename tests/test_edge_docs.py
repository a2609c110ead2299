"""docs/EDGE_CASES.md lists the edge cases, all of them and no others."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "EDGE_CASES.md"
FAMILIES = ("values", "state", "mutation", "random", "modes", "regions", "interface")


def listed() -> dict[str, list[str]]:
    """Family -> the names in the first column of its tables."""
    found: dict[str, list[str]] = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        found[part.partition("\n")[0].lower()] = re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)
    return found


def test_the_page_has_a_section_for_each_family() -> None:
    """In the order of the files."""
    assert tuple(listed()) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_on_the_page_and_the_other_way_round(family: str) -> None:
    """A case that is added, renamed or removed must be so on the page."""
    module = importlib.import_module(f"test_edge_{family}")
    names = [*module.case.cases, *getattr(module, "MISFITS", ())]
    assert listed()[family] == names


@pytest.mark.parametrize("family", FAMILIES)
def test_open_bugs_are_marked(family: str) -> None:
    """What is a strict xfail in the tests is open on the page, and nothing else is."""
    module = importlib.import_module(f"test_edge_{family}")
    page = PAGE.read_text(encoding="utf-8").split(f"\n## {family.capitalize()}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*?) \|", page, re.MULTILINE))
    for name, one in module.case.cases.items():
        assert ("**open**" in rows[name]) == bool(one.bug), name
