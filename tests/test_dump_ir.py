"""dump-ir: every option has a test that would fail without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stagecut.ir.text.parser import parse
from stagecut.tools.dump_ir.main import main

ROOT = Path(__file__).parent.parent
NET = f"{ROOT}/examples/net.py:make"
TEXT = f"{ROOT}/tests/cases/differentiated.ir"  # torch is not imported for it

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
        (["{model}:make", "--print-before", "partion"], "did you mean 'partition'"),
        (["{model}:make", "--stop-after", "partion"], "did you mean 'partition'"),
        (["{model}:make", "--passes", "canonicalise"], "did you mean 'canonicalize'"),
        (["{model}:make", "--passes", "canonicalize", "--format", "dot"], "run all passes"),
        (["nowhere.py:make"], "there is no file 'nowhere.py'"),
        (["no_such_package:make"], "No module named 'no_such_package'"),
        (["{model}:make", "--passes", "canonicalize", "--print-after", "partition"], "--print-after partition: this pass is not run"),
        (["{model}:make", "--stop-after", "canonicalize", "--print-before", "route"], "--print-before route: this pass is not run"),
        (["{model}:make", "--leaf", "secnd"], "--leaf names module 'secnd'"),
        (["nowhere.ir"], "there is no file 'nowhere.ir'"),
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
    command = f"{sys.executable} -m stagecut.tools.dump_ir.main {TEXT} | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "program @N"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("- <&-", "standard input is closed\n  try: dump-ir SOURCE | dump-ir -"),
        (f"{NET} >&-", "standard output is closed\n  try: -o DIR"),
    ],
)
def test_closed_streams(command: str, why: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m stagecut.tools.dump_ir.main {command}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"dump-ir: error: {why}")


def test_closed_streams_that_nobody_needs(tmp_path: Path) -> None:
    command = f"{sys.executable} -m stagecut.tools.dump_ir.main {NET} -o {tmp_path} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert parse((tmp_path / "program.ir").read_text()).name == "Net"
    failing = subprocess.run(["bash", "-c", command.replace(":make", ":mak")], capture_output=True, check=False)
    assert (failing.returncode, failing.stdout) == (1, b"")


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
        (["--report", "--passes", "canonicalize"], "costs are those of linked programs"),
        (["--format", "dot", "--passes", "canonicalize"], "a picture of stages is of a linked program, this one is traced"),
        (["--report", "--device", "H1000"], "did you mean 'H100' or 'H200' or 'A100'?\n"),
        (["--report", "--device", "cpu"], "did you mean 'CPU'?\n"),
        (["--report", "--schedule", "ZBVZeroBubble"], "cut into 4 (2 ranks), or another --schedule"),
        (["--timeline", "--format", "svg", "--microbatches", "1000000"], "2000000 steps, and no more than 50000 are shown"),
        (["--format", "html", "--microbatches", "1000000"], "try: --microbatches 25000"),
        (["--report", "--microbatches", "1000000"], "try: --microbatches 500000"),
        (["--stages", "2", "--schedule", "1F2B"], "did you mean '1F1B'"),
        (["--stages", "99"], "each stage has at least one op"),
    ],
)
def test_reports_that_cannot_be(model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    assert why in failure(capsys, f"{model}:make", *arguments)


def test_print_before_shows_what_the_pass_gets(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = (f"{model}:make", "--split-at", "second")
    before = output(capsys, *source, "--print-before", "liveness")
    assert before.startswith("# 08-share-state\n")
    assert before.split("\n", 1)[1] == output(capsys, *source, "--print-after", "share-state").split("\n", 1)[1]
    assert output(capsys, *source, "--print-before", "all").count("program @Two") == 7


def test_stop_after_runs_no_further_pass(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(output(capsys, f"{model}:make", "--split-at", "second", "--stop-after", "partition")).phase == "partitioned"
    assert "this pass is not run" in failure(capsys, f"{model}:make", "--passes", "canonicalize", "--stop-after", "partition")


def test_diff_shows_what_each_pass_changes(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = (f"{model}:make", "--split-at", "second", "--diff")
    shown = output(capsys, *source)
    assert "--- 03-infer-gradients\n+++ 04-find-splits\n" in shown
    assert "\n+  split" in shown
    assert "\033" not in shown
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[32m+  split" in output(capsys, *source)
    monkeypatch.setenv("NO_COLOR", "1")
    assert output(capsys, *source) == shown
    assert main([*source, "-o", str(tmp_path / "out")]) == 0
    assert "+  split" in (tmp_path / "out" / "04-find-splits.diff").read_text()


def test_stats_count_after_each_pass(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, f"{model}:make", "--split-at", "second", "--stats").splitlines()
    assert lines[0].split() == ["after", "changed", "ops", "values", "state", "stages", "crossing", "bytes"]
    assert lines[1].split() == ["input", "yes", "2", "7", "4", "0", "0", "0", "B"]
    assert lines[-2].split() == ["10-route", "yes", "2", "7", "4", "2", "1", "32", "B"]
    assert len(lines) == 14


def test_time_is_that_of_tracing_and_of_each_pass(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, f"{model}:make", "--time").splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["input", "00-canonicalize"]
    assert sum(float(line.split()[-2]) for line in lines[1:]) == pytest.approx(100, abs=1)


def test_verify_each_notices_a_pass_that_breaks_the_program(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagecut.passes.canonicalize.Canonicalize.run", lambda self, program: program.ops.reverse() or True)
    assert "invalid program after pass 'canonicalize'" in failure(capsys, f"{model}:make", "--verify-each")


def test_only_one_stage_or_module(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = (f"{model}:make", "--split-at", "second")
    stage = output(capsys, *source, "--only", "stage=1")
    assert "stage 1" in stage
    assert "stage 0" not in stage
    assert "@second.weight" in stage
    assert "@first.weight" not in stage
    assert "in first" in output(capsys, *source, "--only", "scope=first")
    assert "in second" not in output(capsys, *source, "--only", "scope=first")
    assert "# 1 op left out" in output(capsys, f"{model}:make", "--only", "scope=first")
    part = Path(model).parent / "part.ir"
    part.write_text(stage)
    assert "part.ir:1:27: this is a part of a program" in failure(capsys, str(part))
    both = output(capsys, *source, "--only", "stage=1", "--only", "scope=second")
    assert both == output(capsys, *source, "--only", "scope=second")
    assert "no op is in both" in failure(capsys, *source, "--only", "stage=0", "--only", "scope=second")
    data = json.loads(output(capsys, *source, "--only", "stage=1", "--format", "json"))
    assert [len(s["ops"]) for s in data["stages"]] == [0, 1]


@pytest.mark.parametrize(
    ("spec", "why"),
    [("stage=7", "there are 2 stages"), ("scope=frist", "did you mean 'first'"), ("second", "--only stage=N or --only scope=MODULE")],
)
def test_only_what_is_there(spec: str, why: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why in failure(capsys, f"{model}:make", "--split-at", "second", "--only", spec)


def test_json_has_the_whole_program(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(output(capsys, f"{model}:make", "--split-at", "second", "--format", "json"))
    assert data["phase"] == "linked"
    assert [s["inputs"] for s in data["stages"]] == [["%x"], ["%linear"]]
    assert data["stages"][1]["ops"][0]["operands"] == ["%linear", "@second.weight", "@second.bias"]
    assert data["transfers"] == [
        {"value": "%x", "source": None, "target": 0, "route": "feed", "via": [], "made": None, "bytes": 32},
        {"value": "%linear", "source": 0, "target": 1, "route": "send", "via": [], "made": None, "bytes": 32},
    ]
    assert data["state"][0] | {"stages": None} == {
        "names": ["first.weight"], "kind": "param", "persistent": ["first.weight"], "stages": None, "share": None,
        "type": "f32[4,4] grad", "bytes": 64,
    }  # fmt: skip


def test_an_architecture_of_transformers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ("--config", "num_hidden_layers=2", "--batch", "3", "--length", "5")
    program = parse(output(capsys, "hf:LlamaForCausalLM", *sizes, "--passes", ""))
    assert program.name == "LlamaForCausalLM"
    assert str(program.inputs[0].type) == "i64[3,5] batch(0)"
    assert not any(e.name.startswith("model.layers.2.") for e in program.state)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_hidden_layers": 1}))
    by_type = parse(output(capsys, "hf:llama", "--config", str(config), "--meta", "--passes", ""))
    assert not any(e.name.startswith("model.layers.1.") for e in by_type.state)
    assert by_type.state[0].type.device == "meta"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["hf:LamaForCausalLM"], "did you mean 'LlamaForCausalLM'"),
        (["hf:llama", "--config", "num_layer=2"], "num_hidden_layers"),
        (["hf:llama", "--config", "nowhere.json"], "there is no file 'nowhere.json'"),
        (["hf:DecisionTransformerModel"], "what to pass as 'states'"),
        (["hf:autoformer"], "no small config of AutoformerModel runs: ValueError: The `prediction_length` config needs to be specified"),
        (["hf:autoformer"], "--config KEY=VALUE"),
    ],
)
def test_architectures_that_cannot_be(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why in failure(capsys, *argv)


def test_an_exported_program_is_opened_only_when_trusted(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "linear.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(4, 2), (torch.randn(3, 4),)), path)
    assert "a pickle can run any code" in failure(capsys, str(path))
    assert parse(output(capsys, str(path), "--trust")).state[0].name == "weight"
    assert "there is no file" in failure(capsys, str(tmp_path / "other.pt2"), "--trust")


def test_shells_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert stop.value.code == 0
    assert "--print-before" in capsys.readouterr().out


def test_help_fits_two_screens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 80


def test_a_file_that_cannot_be_written_leaves_no_half(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "program.ir").mkdir()
    assert "cannot write" in failure(capsys, f"{model}:make", "-o", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


HARD = """
import sys
import torch
from torch import nn
from stagecut import pipe_split

class Hard(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, scale=1.5):
        h = self.a(x)
        out = torch.empty_like(h)
        out.copy_(h)
        v = out.view(-1)
        v.add_(1)
        pipe_split()
        y = self.b(out)
        out.mul_(2)
        return y * scale, v

def make():
    print("made")
    torch.manual_seed(0)
    return Hard(), (torch.randn(2, 4), 1.5), {}

def meta():
    with torch.device("meta"):
        return Hard(), (torch.randn(2, 4), 1.5), {}

def leaves():
    sys.exit(0)

def two():
    return Hard(), ()
"""


@pytest.fixture
def hard(tmp_path: Path) -> str:
    path = tmp_path / "hard_model.py"
    path.write_text(HARD)
    return str(path)


def test_memory_that_nobody_set_and_views_taken_anew_are_no_faults(hard: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no pass changes what the program computes" in output(capsys, f"{hard}:make", "--bisect")
    text = tmp_path / "hard.ir"
    text.write_text(output(capsys, f"{hard}:make", "--passes", ""))
    assert "made" not in text.read_text()
    assert "no pass changes" in output(capsys, str(text), "--passes", "all", "--bisect")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["{hard}:meta", "--bisect"], "on the meta device"),
        (["{hard}:leaves"], "SystemExit"),
        (["{hard}:two"], "returned a tuple of 2"),
        (["{hard}:make", "--stages", "2"], "cuts are to be searched as well"),
        (["{hard}:make", "--split-at", ""], "names no module"),
        (["{hard}:make", "--passes", "canonicalize", "--stages", "2"], "the pass that cuts is not run"),
    ],
)
def test_more_mistakes(argv: list[str], why: str, hard: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([a.format(hard=hard) for a in argv]) == 1
    shown = capsys.readouterr()
    assert why in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_text_runs_no_pass_unless_it_is_told_to(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "traced.ir"
    text.write_text(output(capsys, f"{model}:make", "--passes", ""))
    assert "this pass is not run\n  try: --passes all" in failure(capsys, str(text), "--print-after", "route")


def test_text_that_is_cut_is_not_cut_again(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "cut.ir"
    text.write_text(output(capsys, f"{model}:make", "--split-at", "second"))
    assert "its cuts are made" in failure(capsys, str(text), "--passes", "all", "--stages", "2")


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [("-o", "", "the name is empty"), ("-o", "page.html", "DIR is a folder"), ("--depth", "-1", "-1 opens no modules")],
)
def test_values_that_cannot_be(option: str, value: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([NET, option, value])
    assert stop.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--stages", "--microbatches", "--batch", "--length"])
def test_numbers_are_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([NET, option, "0"])
    assert stop.value.code == 2
    assert "less than 1" in capsys.readouterr().err


def test_a_full_disk_is_no_traceback() -> None:
    command = f"{sys.executable} -m stagecut.tools.dump_ir.main {TEXT} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("dump-ir: error: ")


def test_an_exported_program_with_markers_opens(hard: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(hard).parent)!r}); import torch, hard_model; m, a, k = hard_model.make()\n"
    code += f"torch.export.save(torch.export.export(m, a, k), {str(tmp_path / 'hard.pt2')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "stagecut.tools.dump_ir", str(tmp_path / "hard.pt2"), "--trust"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "stages=2" in done.stdout
