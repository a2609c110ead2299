"""render: which program draws, where it is looked for, what is said where there is none or where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import load

from stagecut.backend.pictures.dot import to_dot, to_svg
from stagecut.backend.pictures.render import PURE, RENDERERS, find_renderer, render
from stagecut.ir.errors import InputError, StagecutError
from stagecut.tools.dump_ir.main import main

NET = str(Path(__file__).parent.parent / "examples" / "net.py") + ":make"


class Machine:
    """One on which no program is installed but those put on the PATH or beside Python; each prints where it is, and what it was given."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.beside = root / "path", root / "beside"
        for folder in (self.path, self.beside):
            folder.mkdir()
        patch.setenv("PATH", str(self.path))
        patch.setattr("sysconfig.get_path", lambda name: str(self.beside))

    def put(self, folder: Path, name: str, script: str = '/bin/echo "<svg>$0 $@"; /bin/cat') -> None:
        program = folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_the_installed_renderer_draws() -> None:
    svg = render("digraph { a -> b }", PURE)
    assert "graphviz-pure" in svg
    assert svg.count('class="node"') == 2


def test_dot_on_the_path_is_asked_first(machine: Machine) -> None:
    machine.put(machine.path, "dot")
    machine.put(machine.beside, PURE)
    assert render("digraph é") == f"<svg>{machine.path}/dot -Kdot -Tsvg\ndigraph é"


@pytest.mark.parametrize("name", RENDERERS)
def test_what_lies_beside_python_comes_before_the_path(name: str, machine: Machine) -> None:
    machine.put(machine.path, name)
    assert find_renderer() == f"{machine.path}/{name}"
    machine.put(machine.beside, name)
    assert find_renderer() == f"{machine.beside}/{name}"


def test_the_renderer_that_is_named_draws(machine: Machine) -> None:
    for name in RENDERERS:
        machine.put(machine.path, name)
    for name in RENDERERS:
        assert to_svg(load("pictures"), renderer=name).startswith(f"<svg>{machine.path}/{name} ")


def test_a_missing_renderer_is_told_with_what_to_install(machine: Machine) -> None:
    with pytest.raises(
        StagecutError, match=r"no program .* looked for `dot` and `graphviz-pure`(?s:.*)pip install \"stagecut\[pictures\]\""
    ) as told:
        to_svg(load("pictures"))
    assert "apt-get install graphviz" in str(told.value)
    assert to_dot(load("pictures"))


def test_a_renderer_that_is_named_and_missing_is_not_replaced(machine: Machine) -> None:
    machine.put(machine.path, "dot")
    with pytest.raises(StagecutError, match="looked for `graphviz-pure`, beside"):
        render("digraph { }", PURE)


def test_an_unknown_renderer_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'graphviz-pure'"):
        render("digraph { }", "graphviz")


@pytest.mark.parametrize("format", ["svg", "html"])
def test_a_renderer_that_fails_is_told_with_what_it_said(format: str, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """By the page too, which draws without one only where none is installed."""
    machine.put(machine.path, "dot", "echo 'no layout engine' >&2; exit 3")
    assert main([NET, "--format", format]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "non-zero exit status 3. no layout engine" in shown.err


def test_a_renderer_that_does_not_start_is_told(machine: Machine) -> None:
    (machine.path / "dot").write_bytes(b"\x7fELF")
    (machine.path / "dot").chmod(0o755)
    with pytest.raises(StagecutError, match=f"Exec format error(?s:.*)install it anew: {machine.path}/dot"):
        render("digraph { }")


def test_dump_ir_without_a_renderer(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture is refused in one message; the page has none."""
    assert main([NET, "--format", "svg"]) == 1
    assert "--format dot needs no program" in capsys.readouterr().err
    assert main([NET, "--format", "html"]) == 0
    assert 'Stage graph</h2><div class="picture"></div>' in capsys.readouterr().out
