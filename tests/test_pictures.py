"""tools/pictures: the pictures of docs/PICTURES.md are those the tool draws, and the page shows each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import Bless

from stagecut.backend.pictures.render import PURE
from stagecut.tools.bench.pictures import FOLDER, PICTURES, main
from stagecut.tools.dump_ir.main import main as dump_ir

ROOT = Path(__file__).parent.parent


def _lines(picture: Path) -> list[str]:
    """A picture line by line, without the numbers of source lines in its tooltips, which are other ones in another torch."""
    return re.sub(r"(\w\.py):\d+((, |&#45;)\d+)*", r"\1", picture.read_text(encoding="utf-8")).split("\n")


def test_the_page_shows_every_picture() -> None:
    page = (ROOT / "docs" / "PICTURES.md").read_text(encoding="utf-8")
    assert {*re.findall(r"\(pictures/([\w-]+)\.svg\)", page)} == {*PICTURES}
    assert {p.stem for p in (ROOT / FOLDER).glob("*.svg")} == {*PICTURES, "readme"}


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "llama"])
def test_committed_pictures_are_what_is_drawn(name: str, tmp_path: Path) -> None:
    """To the byte: one renderer draws them on every machine."""
    assert main([str(tmp_path), name]) == 0
    assert _lines(tmp_path / f"{name}.svg") == _lines(ROOT / FOLDER / f"{name}.svg")


def test_the_picture_of_the_readme(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bless: Bless) -> None:
    """As its command draws it where no `dot` is on the PATH."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("stagecut.backend.pictures.render.RENDERERS", (PURE,))
    assert dump_ir(["examples/net.py:make", "--format", "svg"]) == 0
    bless("../../docs/stages.svg", capsys.readouterr().out)


def test_an_unknown_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "nothing"]) == 2
    assert "known: stages, modules" in capsys.readouterr().err
