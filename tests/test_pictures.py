"""tools/pictures: the pictures of docs/PICTURES.md are those the tool draws, and the page shows each."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stagecut.tools.pictures import FOLDER, PICTURES, main

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def _texts(path: Path) -> list[str]:
    return sorted("".join(t.itertext()) for t in ElementTree.parse(path).iter(f"{SVG}text"))


def test_the_page_shows_every_picture() -> None:
    page = (ROOT / "docs" / "PICTURES.md").read_text(encoding="utf-8")
    assert {*re.findall(r"\(pictures/([\w-]+)\.svg\)", page)} == {*PICTURES} == {p.stem for p in (ROOT / FOLDER).glob("*.svg")}


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "llama"])
def test_committed_pictures_are_what_is_drawn(name: str, tmp_path: Path) -> None:
    """By their texts: where things lie depends on the version of Graphviz."""
    assert main([str(tmp_path), name]) == 0
    assert _texts(tmp_path / f"{name}.svg") == _texts(ROOT / FOLDER / f"{name}.svg")


def test_an_unknown_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "nothing"]) == 2
    assert "known: stages, modules" in capsys.readouterr().err
