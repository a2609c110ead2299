"""`dump-ir A --against B`, and `--no-source`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stagecut.ir.text.parser import parse
from stagecut.tools.dump_ir.main import main

NET = f"{Path(__file__).parent.parent}/examples/net.py:make"
MODEL = """
from torch import nn, ones

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.{act}()

    def forward(self, x):
        return self.second(self.first(x))

def make():
    return Two(), (ones(2, 4),), {{}}
"""


def model(folder: Path, act: str = "ReLU", above: str = "") -> str:
    """A model in a file of that folder, with lines above it."""
    folder.mkdir()
    (folder / "model.py").write_text(above + MODEL.format(act=act))
    return f"{folder}/model.py:make"


def asked(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    status = main(argv)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_equal_programs_differ_in_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(capsys, NET, "--against", NET) == (0, "", "")


def test_a_change_of_the_model_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other", act="Tanh")
    status, shown, _ = asked(capsys, one, "--against", other, "--no-source")
    assert status == 1
    assert shown.startswith(f"--- {one}\n+++ {other}\n")
    changed = [line[:1] + line.split()[3] for line in shown.splitlines() if line.startswith(("-  ", "+  ")) and "aten" in line]
    assert changed == ["-aten.relu.default(%linear)", "+aten.tanh.default(%linear)"]


@pytest.mark.parametrize("name", ["before.ir", "before.txt"])
@pytest.mark.parametrize("is_first", [False, True])
def test_text_that_was_written_before_is_taken_as_it_is(
    name: str, is_first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any phase; with an option that cuts, too."""
    if is_first and name == "before.txt":
        pytest.skip("SOURCE has to end in .ir")
    for options in ([], ["--stop-after", "partition"], ["--split-at", "lin"]):
        model = NET
        if options == ["--split-at", "lin"]:
            model = NET.replace("net.py", "language_model.py")
            options = ["--split-at", "layers.4"]
        _, text, _ = asked(capsys, model, *options)
        file = tmp_path / name
        file.write_text(text)
        sides = (str(file), model) if is_first else (model, str(file))
        assert asked(capsys, sides[0], "--against", sides[1], *options) == (0, "", "")
        assert "aten.linear.default" in text
        file.write_text(text.replace("aten.linear.default", "aten.bilinear.default"))
        status, shown, _ = asked(capsys, sides[0], "--against", sides[1], *options)
        assert status == 1
        assert "aten.bilinear.default" in shown


def test_the_lines_of_the_source_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then a model in another folder, lower in its file, has the same text."""
    one, other = model(tmp_path / "one"), model(tmp_path / "other", above="# moved\n\n")
    assert asked(capsys, one, "--against", other)[0] == 1
    assert asked(capsys, one, "--against", other, "--no-source")[0] == 0
    texts = [asked(capsys, source, "--no-source")[1] for source in (one, other)]
    assert texts[0] == texts[1]
    assert "model.py" not in texts[0]
    parse(texts[0])


def test_a_note_counts_lines_that_differ_in_their_place_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And names the option that leaves the places out."""
    one, moved = model(tmp_path / "one"), model(tmp_path / "moved", above="# moved\n\n")
    other = model(tmp_path / "other", act="Tanh", above="# moved\n\n")
    for source in (moved, other):
        _, shown, told = asked(capsys, one, "--against", source)
        _, bare, untold = asked(capsys, one, "--against", source, "--no-source")
        changed, left = (sum(line[:1] in "+-" for line in text.splitlines()[2:]) for text in (shown, bare))
        assert changed > left
        assert f"dump-ir: note: {changed - left} of {changed} changed lines differ only in the file and line" in told
        assert told.endswith("  try: --no-source\n")
        assert untold == ""


@pytest.mark.parametrize("is_first", [False, True])
def test_text_without_lines_of_the_source_is_compared_without(is_first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other", act="Tanh")
    before = tmp_path / "before.ir"
    before.write_text(asked(capsys, one, "--no-source")[1])
    for source, status in ((one, 0), (other, 1)):
        sides = (str(before), source) if is_first else (source, str(before))
        found, shown, told = asked(capsys, sides[0], "--against", sides[1])
        assert found == status
        assert told == f"dump-ir: note: '{before}' has no lines of the source: compared without them\n"
        assert (shown == "") == (status == 0)
        assert "model.py:1" not in shown


@pytest.mark.parametrize("look", [["--print-after", "liveness"], ["--diff"], ["--format", "json"], ["--only", "stage=1"]])
def test_no_look_has_the_lines(look: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "net.py" in asked(capsys, NET, *look)[1]
    status, shown, _ = asked(capsys, NET, *look, "--no-source")
    assert status == 0
    assert shown
    assert "net.py" not in shown


def test_a_part_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other", act="Tanh")
    for scope, has_it in (("first", False), ("second", True)):
        status, shown, _ = asked(capsys, one, "--against", other, "--no-source", "--only", f"scope={scope}")
        assert status == 1  # the stage returns another value in either case
        assert ("aten.tanh" in shown) == has_it


def test_the_diff_may_go_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other", act="Tanh")
    assert asked(capsys, one, "--against", other, "--no-source", "-o", str(tmp_path / "out")) == (1, "", "")
    assert "tanh" in (tmp_path / "out" / "against.diff").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--against", "nowhere.py:make"], "there is no file 'nowhere.py'"),
        (["--against", NET, "--stats"], "--stats does not go with --against"),
        (["--against", NET, "--report"], "--report does not go with --against"),
        (["--against", NET, "--interactive"], "--interactive does not go with --against"),
        (["--against", __file__.replace(".py", ".txt")], "is no SOURCE"),
    ],
)
def test_an_error_is_no_difference(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its status is 2, as diff's."""
    status, shown, told = asked(capsys, NET, *argv)
    assert (status, shown) == (2, "")
    assert message in told


def test_standard_input_is_read_once(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, told = asked(capsys, "-", "--against", "-")
    assert status == 2
    assert "--against - reads standard input" in told


def test_text_that_is_no_program_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no program\n")
    status, shown, told = asked(capsys, NET, "--against", str(file))
    assert (status, shown) == (2, "")
    assert f"{file}:1:1" in told


@pytest.mark.parametrize("option", [["--only", "stage=1"], ["--unfold"], []])
@pytest.mark.parametrize("saved", [[], ["--unfold"]])
def test_text_of_a_model_does_not_differ_from_the_model(
    option: list[str], saved: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it was saved, and whatever part is compared."""
    cut = ["hf:llama", "--split-at", "model.layers.2"]
    assert main([*cut, *saved, "--no-source"]) == 0
    text = tmp_path / "saved.ir"
    text.write_text(capsys.readouterr().out)
    assert main([*cut, *option, "--no-source", "--against", str(text)]) == 0


def test_a_name_is_the_same_value_in_the_model_and_in_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = ["hf:llama", "--split-at", "model.layers.2"]
    assert main(cut) == 0
    text = tmp_path / "saved.ir"
    text.write_text(capsys.readouterr().out)
    assert main([*cut, "--unfold"]) == 0
    names = re.findall(r"%(\w+) = aten\.(?:linear|mul|scaled)", capsys.readouterr().out)
    for name in names[:: len(names) // 3]:
        lives: list[str] = []
        for source in (cut, [str(text)]):
            assert main([*source, "--trace-value", name]) == 0
            lives.append(capsys.readouterr().out)
        assert lives[0] == lives[1]
