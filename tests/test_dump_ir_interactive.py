"""dump-ir --interactive: one trace, and line after line of a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stagecut.tools.dump_ir import interactive, main, session
from stagecut.tools.dump_ir.main import parser

ROOT = Path(__file__).parent.parent
NET = "examples/language_model.py:make"


def said(*lines: str, source: str = NET, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The process that was told these lines."""
    command = [sys.executable, "-m", "stagecut.tools.dump_ir", source, "--interactive", *options]
    told = "".join(f"{line}\n" for line in lines)
    return subprocess.run(command, input=told, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def printed(*options: str) -> str:
    """What the command line prints."""
    command = [sys.executable, "-m", "stagecut.tools.dump_ir", NET, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_line_shows_what_the_command_line_shows() -> None:
    cut = ("--stages", "3")
    done = said("report", "only stage=1", options=cut)
    looks = (("--report",), ("--only", "stage=1"))
    assert done.stdout == "".join(printed(*cut, *look) for look in looks)
    assert (done.stderr, done.returncode) == ("", 0)


def test_cuts_hold_until_others_replace_them() -> None:
    done = said("stages 2", "device A100", "stats", "split-at layers.1 layers.2 layers.3", "text", "uncut", "cut")
    assert done.stderr == ""
    assert "in 2 stages" in done.stdout
    assert "--stages=2 --device=A100" in done.stdout
    assert "phase=linked stages=4" in done.stdout
    assert "in 1 stage" in done.stdout


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("repport", "'repport' is not known\n  try: did you mean 'report'"),
        ("xyzzy", "known: 'stages', 'split-at', 'uncut', 'cut', 'report', 'text', 'trace-value', 'help' and "),
        ("stages", "stages takes one value"),
        ("stages 0", "0 is less than 1"),
        ("stages 1000", "--stages 1 to --stages"),
        ("split-at", "split-at names no module"),
        ("split-at layer.1", "did you mean 'layers.1'"),
        ("trace-value nothing", "nothing"),
        ("print-after rout", "did you mean 'route'"),
        ("timeline", "--timeline needs --format svg"),
        ("depth 3", "--depth needs --format dot"),
        ("text --nonsense", "unrecognized arguments: --nonsense"),
        ('text "', "No closing quotation"),
        ("interactive", "this is --interactive already"),
    ],
)
def test_a_wrong_line_is_told_and_ends_nothing(
    line: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lines = opened(monkeypatch)
    assert lines.onecmd(line) is False
    shown = capsys.readouterr()
    assert why in shown.err
    assert shown.err.startswith("error: ")
    assert shown.out == ""
    lines.onecmd("cut")
    assert "in 1 stage" in capsys.readouterr().out
    assert lines.failed


def opened(monkeypatch: pytest.MonkeyPatch) -> interactive.Interactive:
    """A session in this process."""
    kept: list[interactive.Interactive] = []
    monkeypatch.setattr(interactive.Interactive, "cmdloop", lambda lines: kept.append(lines))
    assert main.main([NET, "--interactive"]) == 0
    return kept[0]


def test_it_traces_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    traced: list[str] = []
    load = session.load

    def counting(options: object) -> object:
        traced.append("once")
        return load(options)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "load", counting)
    monkeypatch.chdir(ROOT)
    lines = opened(monkeypatch)
    for line in ("stages 2", "report", "trace-param head.weight"):
        lines.onecmd(line)
    lines.onecmd("roles")
    assert traced == ["once"]
    assert "backward_input" in capsys.readouterr().out
    assert not lines.failed


def test_names_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = opened(monkeypatch)
    assert lines.completenames("trace-") == ["trace-param", "trace-value"]
    assert "head.weight" in lines.completedefault("head", "trace-param head")
    assert lines.completedefault("layers.1", "split-at layers.1")[0] == "layers.1"
    assert lines.completedefault("rou", "print-after rou") == ["route"]
    assert "scope=layers.1" in lines.completedefault("scope=layers.1", "only scope=layers.1")
    names = lines.completedefault("", "trace-value ")
    lines.onecmd(f"trace-value {names[0]}")
    assert not lines.failed


def test_every_option_of_the_command_line_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = opened(monkeypatch)
    options = {name[2:] for action in parser()._actions for name in action.option_strings if name.startswith("--")}
    assert options <= {*lines.completenames("")}


def test_the_session_on_the_page() -> None:
    page = (ROOT / "docs" / "DUMP_IR.md").read_text(encoding="utf-8")
    block = page.split("--interactive\n", 1)[1].split("```", 1)[0]
    parts = block.split("dump-ir> ")[1:]
    lines = [part.partition("\n")[0] for part in parts]
    command = [sys.executable, "-m", "stagecut.tools.dump_ir", NET, "--interactive"]
    done = subprocess.run(
        command, input="\n".join(lines), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=os.environ
    )
    assert done.stdout.replace(f"{ROOT}/", "") == "".join(part.partition("\n")[2] for part in parts)
