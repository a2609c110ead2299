"""The pages that show `dump-ir`: every command on them runs, and prints what the page says. `pytest --bless` writes it anew."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from stagecut.tools.dump_ir.main import main, parser

ROOT = Path(__file__).parent.parent
PAGES = ("DUMP_IR.md", "READ_THE_IR.md", "FIND_A_WRONG_GRADIENT.md", "FIND_A_SLOW_STAGE.md", "BACKWARD.md")
_BLOCK = re.compile(r"```console\n(.*?)```|```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
_COMMAND = re.compile(r"^\$ (dump-ir .*)\n((?:(?!^\$ ).*\n)*)", re.MULTILINE)


def filtered(text: str, filters: list[str]) -> str:
    """What `| head -N`, `| tail -N` and `| grep WORD` leave of a text."""
    lines = text.splitlines()
    for command in filters:
        name, *rest = shlex.split(command)
        count = int(rest[0].removeprefix("-")) if name != "grep" else 0
        if name == "head":
            lines = lines[:count]
        elif name == "tail":
            lines = lines[-count:]
        else:
            lines = [line for line in lines if rest[0] in line]
    return "".join(f"{line}\n" for line in lines)


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command of a page prints, errors included."""
    first, *filters = command.split(" | ")
    words = shlex.split(first)[1:]
    code = main([w for w in words if w != "2>&1"])
    shown = capsys.readouterr()
    assert bool(shown.err) == (code != 0)
    return filtered(shown.out + shown.err, filters)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_prints_what_the_page_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    page = ROOT / "docs" / name
    text = page.read_text(encoding="utf-8")

    names: dict[str, Any] = {}

    def real(block: re.Match[str]) -> str:
        if block[1] is None:
            exec(block[2], names)
            return f"```python\n{block[2]}```\n\n```text\n{capsys.readouterr().out.replace(f'{ROOT}/', '')}```"
        commands = [(m[1], run(m[1], capsys)) for m in _COMMAND.finditer(block[1])]
        return "```console\n" + "".join(f"$ {command}\n{output}" for command, output in commands) + "```"

    actual = _BLOCK.sub(real, text)
    if request.config.getoption("--bless"):
        page.write_text(actual, encoding="utf-8")
    assert actual == page.read_text(encoding="utf-8"), f"docs/{name} shows something else; pytest --bless rewrites it"


def test_every_option_is_on_the_page() -> None:
    shown = (ROOT / "docs" / "DUMP_IR.md").read_text(encoding="utf-8")
    options = [o for action in parser()._actions for o in action.option_strings if o.startswith("--") or o == "-o"]
    assert [o for o in options if o not in shown] == []


def test_the_timeline_of_a_slow_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bless: Any) -> None:
    monkeypatch.chdir(ROOT)
    shown = run("dump-ir examples/language_model.py:make --stages 4 --timeline --format svg", capsys)
    bless("../../docs/slow-stage.svg", shown)
