"""dump-ir: every option has a test that would fail without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stagecut.ir.parser import parse
from stagecut.tools.dump_ir import main

ROOT = Path(__file__).parent.parent
NET = f"{ROOT}/examples/net.py:make"

MODEL = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x))

def make():
    return Two(), (torch.randn(2, 4),), {}

def wrong():
    return 3

def fails():
    raise RuntimeError("no such luck")

def misfit():
    return Two(), (torch.randn(2, 4), 1), {}

number = 5
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "two_linears.py"
    path.write_text(MODEL)
    return str(path)


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert shown.err.startswith("dump-ir: error: ")
    return shown.err


def test_model_becomes_linked_program(capsys: pytest.CaptureFixture[str]) -> None:
    program = parse(output(capsys, NET))
    assert program.phase == "linked"
    assert len(program.stages) == 3


def test_split_at(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(parse(output(capsys, f"{model}:make")).stages) == 1
    assert len(parse(output(capsys, f"{model}:make", "--split-at", "second")).stages) == 2
    assert len(parse(output(capsys, f"{model}:make", "--split-at", "first:end")).stages) == 2


def test_print_after_one_pass(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, f"{model}:make", "--split-at", "second", "--print-after", "find-splits")
    assert shown.startswith("# 04-find-splits\n")
    program = parse(shown)
    assert program.phase == "traced"
    assert sum(op.is_split for op in program.ops) == 1


def test_print_after_all_writes_a_file_per_pass_that_changed(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert output(capsys, f"{model}:make", "--split-at", "second", "--print-after", "all", "-o", str(out)) == ""
    names = sorted(p.name for p in out.iterdir())
    assert names == [
        "03-infer-gradients.ir", "04-find-splits.ir", "05-partition.ir", "08-share-state.ir", "09-liveness.ir", "10-route.ir",
        "input.ir", "program.ir",
    ]  # fmt: skip
    assert (out / "program.ir").read_text() == (out / "10-route.ir").read_text()


def test_dot(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, f"{model}:make", "--split-at", "second", "--format", "dot")
    assert shown.startswith("digraph")
    assert 'id="stage-1"' in shown
    assert "f32[2,4]" in shown


def test_text_is_read_back_and_passes_run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traced = tmp_path / "traced.ir"
    traced.write_text(output(capsys, f"{model}:make", "--passes", ""))
    assert parse(traced.read_text()).phase == "traced"
    assert output(capsys, str(traced)) == traced.read_text()
    partitioned = output(capsys, str(traced), "--passes", "find-splits,partition", "--split-at", "second")
    assert parse(partitioned).phase == "partitioned"
    whole = output(capsys, str(traced), "--passes", "all", "--split-at", "second")
    assert whole == output(capsys, f"{model}:make", "--split-at", "second")


def test_module_source(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(model).parent))
    assert parse(output(capsys, "two_linears:make")).name == "Two"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{model}:maek"], "did you mean 'make'"),
        (["{model}:number"], "is no callable"),
        (["{model}:wrong"], "must return (module, args, kwargs)"),
        (["{model}:fails"], 'two_linears.py:20: raise RuntimeError("no such luck")'),
        (["{model}:misfit"], "too many positional arguments"),
        (["{model}:make", "--split-at", "thrid"], "'second'"),
        (["{model}:make", "--split-at", "first:middle"], "is no side of a module"),
        (["{model}:make", "--print-after", "partion"], "did you mean 'partition'"),
        (["{model}:make", "--passes", "canonicalise"], "did you mean 'canonicalize'"),
        (["{model}:make", "--passes", "canonicalize", "--format", "dot"], "run all passes"),
        (["nowhere.py:make"], "there is no file 'nowhere.py'"),
        (["no_such_package:make"], "No module named 'no_such_package'"),
        (["nonsense"], "is neither"),
        (["nowhere.ir"], "cannot read 'nowhere.ir'"),
    ],
)
def test_mistakes_exit_1_without_a_traceback(argv: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failure(capsys, *[a.format(model=model) for a in argv])


def test_bad_text_shows_file_line_column_and_caret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.ir"
    path.write_text("program @P phase=traced {\n  input %x : f33[2]\n  output (%x,)\n}\n")
    shown = failure(capsys, str(path))
    assert f"{path}:2:14: unknown dtype 'f33'" in shown
    line, caret = shown.splitlines()[1:3]
    assert line[caret.index("^")] == "f"


def test_wrong_command_line_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--format", "png"])
    assert stop.value.code == 2
    assert "usage: dump-ir" in capsys.readouterr().err


def test_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m stagecut.tools.dump_ir {NET} | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "program @N"
    assert done.stderr == ""


def test_stages_are_balanced(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(parse(output(capsys, f"{model}:make", "--stages", "2")).stages) == 2


def test_a_report_instead_of_the_program(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = (f"{model}:make", "--stages", "2", "--report")
    table = output(capsys, *source, "--schedule", "GPipe", "--microbatches", "5", "--device", "A100")
    assert "GPipe with 5 micro-batches on A100" in table
    assert json.loads(output(capsys, *source, "--format", "json"))["n_microbatches"] == 8
    assert output(capsys, *source, "--format", "svg").startswith("<svg")
    assert main([*source, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.txt").read_text().startswith("stage")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--format", "json"], "is a format of reports"),
        (["--report", "--format", "dot"], "a report is text, json or svg"),
        (["--report", "--passes", "canonicalize"], "a report is on linked programs"),
        (["--report", "--device", "H1000"], "did you mean 'H100'"),
        (["--stages", "2", "--schedule", "1F2B"], "did you mean '1F1B'"),
        (["--stages", "99"], "no stage is empty"),
    ],
)
def test_reports_that_cannot_be(model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    assert why in failure(capsys, f"{model}:make", *arguments)
