"""A pipe, its plan, its report and a comparison in a REPL and a notebook; long steps on a terminal."""

from __future__ import annotations

import inspect
import itertools
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stagecut import Balanced, Pipe, Setting, SplitPoint, pipe_split, pipeline
from stagecut.backend.pictures import render
from stagecut.backend.pictures.stages import MOST_LAYERS, PART, homes_of, modules_text
from stagecut.backend.pictures.summary import MOST_STAGES
from stagecut.ir.graph import Program

ROOT = Path(__file__).parent.parent
X = torch.randn(4, 8)


class Block(nn.Module):
    """Two linears, with a cut between them where it is asked for."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.up, self.down, self.cut = nn.Linear(8, 16), nn.Linear(16, 8), cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        if self.cut:
            pipe_split()
        return x + self.down(h)


class Tied(nn.Module):
    """Eight blocks, of which the sixth is cut in two, around a weight that the first and the last stage read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.layers = nn.ModuleList(Block(i == 5) for i in range(8))
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def cut() -> Pipe:
    return pipeline(Tied(), (X,), split_spec={"layers.4": SplitPoint.BEGINNING})


def test_a_pipe_shows_its_stages_on_a_screen() -> None:
    """Layers by range, parameters, bytes that cross, tied state; by repr, str and print."""
    pipe = cut()
    assert repr(pipe) == str(pipe) == str(pipe.summary())
    assert repr(pipe).splitlines()[:5] == [
        "Tied in 3 stages, train mode, 2.3 k parameters",
        "stage  parameters  receives  sends  runs",
        "    0      1.18 k         -  128 B  embed, layers.0-3",
        "    1         424     128 B  384 B  layers.4, part of layers.5",
        "    2         760     384 B      -  part of layers.5, layers.6-7, head",
    ]
    assert repr(pipe).splitlines()[5] == "tied: embed.weight = head.weight in stages 0, 2 (replicate)"
    assert "eval mode" in repr(pipe.eval())
    assert pipe.ir().startswith("program @Tied phase=linked stages=3 {")


def test_a_plus_is_explained_where_sizes_vary() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(4, 4)
    line = "a + stands for values whose sizes vary"
    assert line not in str(pipeline(model, (x,), stages=2))

    class Sums(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, total = x * 2, x.sum()
            pipe_split()
            return y + total

    batch = torch.export.Dim("batch", min=2)
    shown = str(pipeline(Sums(), (x,), dynamic_shapes=({0: batch},)))
    assert "4 B+" in shown
    assert line in shown


def test_the_bytes_are_those_of_the_report() -> None:
    pipe = cut()
    for row, stage in zip(pipe.summary().rows, pipe.report().stages, strict=True):
        sizes = [int(cell.split()[0].replace("-", "0")) for cell in row[2:4]]
        assert sizes == [stage.received, stage.sent]


def test_many_stages_fit_on_a_screen() -> None:
    """The middle ones are left out, and counted."""
    count = MOST_STAGES + 6
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    pipe = pipeline(model, (torch.randn(2, 2),), stages=count)
    lines = str(pipe).splitlines()
    assert len(lines) == MOST_STAGES + 5
    (gap,) = [number for number, line in enumerate(lines) if "..." in line]
    left_out = int(re.findall(r"(\d+) stages more", lines[gap])[0])
    assert int(lines[gap - 1].split()[0]) + left_out + 1 == int(lines[gap + 1].split()[0])


class Tags(HTMLParser):
    """The tags of a page, open and closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_searched_cut_says_for_what_and_how_to_have_another() -> None:
    """Under the table; `inside` is named where a cut divides a block. Cuts that were asked for say nothing."""
    assert "cut for" not in str(cut())
    model = nn.Sequential(*(Block(cut=False) for _ in range(3)))
    setting = Setting(["A100", "A100", "L4"], "GPipe", 4)
    for inside, what in (("always", ', one cut inside a block (none with Balanced(..., inside="never"))'), ("never", "")):
        pipe = pipeline(model, (X,), split_policy=Balanced(2, setting, inside=inside))
        call = f'Balanced(2, Setting(["A100", "A100", "L4"], "GPipe", 4), inside="{inside}")'
        lines = [
            f"cut for A100, L4 and GPipe with 4 micro-batches{what}",
            f"for another device or schedule: split_policy={call}",
        ]
        for line in lines:
            assert line in str(pipe).splitlines()
            assert line in str(pipe.plan).splitlines()
            assert escape(line) in pipe._repr_html_()
    asked = eval(how_to(str(pipe)), {"Balanced": Balanced, "Setting": Setting})
    other = pipeline(model, (X,), split_policy=replace(asked, setting=Setting()))
    assert "cut for H100 (the preset) and 1F1B with 8 micro-batches" in str(other)


def how_to(shown: str) -> str:
    """The policy that a summary names for other cuts."""
    return re.findall(r"split_policy=(.*)", shown)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("drawn", [True, False])
def test_a_notebook_shows_table_and_picture(drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a program that draws, the table alone."""
    if not drawn:
        monkeypatch.setattr(render, "find_renderer", lambda: None)
    tags = Tags()
    shown = cut()._repr_html_()
    tags.feed(shown)
    assert tags.open == []
    assert tags.seen.count("tr") == 4
    assert ("svg" in tags.seen) is drawn
    assert "part of layers.5" in shown


def test_names_of_the_model_are_text_in_a_notebook() -> None:
    model = nn.Sequential()
    model.add_module("<b>&", nn.Linear(8, 8))
    assert "&lt;b&gt;&amp;" in pipeline(model, (X,)).summary().to_html()


def test_plans_reports_and_comparisons_echo_as_tables() -> None:
    """In a REPL, where the echo is the repr."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    pipe = pipeline(model, (X,), stages=2)
    compared = pipe.verify(X)
    for shown, word in ((pipe.plan, "cuts"), (pipe.report(), "stage"), (compared, "equal")):
        assert repr(shown) == str(shown)
        assert repr(shown).startswith(word)


# --- progress -----------------------------------------------------------------------------------------

STEPS = f"""
import sys, tempfile, torch
sys.path.insert(0, {str(ROOT)!r})
import stagecut
from stagecut.programs import Programs
with torch.device("meta"):
    model, x = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))), torch.randn(4, 8)
pipe = stagecut.pipeline(model, (x,), stages=2)
pipe.materialize([0, 1], init_fn=lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
pipe.save(tempfile.mkdtemp() + "/saved")
Programs(torch.nn.Sequential(torch.nn.Linear(8, 8)), {{}}, None).fitting({{"input": torch.randn(4, 8)}})
print("done")
"""


def on_a_terminal(**environment: str) -> tuple[str, str]:
    """What STEPS writes to standard output, which is a pipe, and to standard error, which is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", STEPS], stdout=subprocess.PIPE, stderr=theirs, env=os.environ | environment) as run:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert run.stdout is not None
        printed = run.stdout.read()
    assert run.returncode == 0, shown.decode()
    return printed.decode(), shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other side is closed
        return b""


def test_long_steps_are_told_on_a_terminal() -> None:
    """Standard output has what the program prints, and nothing else."""
    printed, shown = on_a_terminal(TERM="xterm")
    assert printed == "done\n"
    for step in ("tracing Sequential", "cutting Sequential", "making stages 0-1 real", "saving to", "tracing Sequential, program 1"):
        assert step in shown


def test_only_the_first_process_of_a_machine_talks() -> None:
    assert on_a_terminal(TERM="xterm", LOCAL_RANK="1") == ("done\n", "")


def test_without_a_terminal_nothing_is_told() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


class Branches(nn.Module):
    """Cannot be traced: it is kept whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class Alone(nn.Linear):
    """Cannot be copied, so it cannot be compared."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("only one of me")


def test_a_pipe_says_whether_its_notes_ask_for_something() -> None:
    assert "note" not in str(pipeline(nn.Linear(8, 8), (X,)))
    whole = nn.Sequential(nn.Linear(8, 8), Branches())
    assert "\n1 note in pipe.notes, with nothing to do\n" in str(pipeline(whole, (X,)))
    alone = nn.Sequential(Alone(8, 8))
    assert "\n1 note in pipe.notes, 1 with something to do\n" in str(pipeline(alone, (X,)))


def test_table_and_picture_name_the_same_modules_in_the_order_in_which_they_run() -> None:
    blocks = nn.Sequential(nn.Linear(8, 8), Branches(), Block(cut=False), Block(cut=True), nn.Linear(8, 8))
    pipe = pipeline(blocks, (X,))
    assert [row[-1] for row in pipe.summary().rows] == ["0-2, part of 3", "part of 3, 4"]
    homes = homes_of(pipe.program)
    assert [modules_text(pipe.program, stage, homes) for stage in pipe.program.stages] == [["0-2", "part of 3"], ["part of 3", "4"]]


class Named(nn.Module):
    """Linears, each a module of its own name, and two lists of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.names = [f"part_{chr(ord('a') + i)}" for i in range(count)]
        for name in self.names:
            self.add_module(name, nn.Linear(8, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.last(x)
        return logits


@pytest.mark.parametrize("count", [MOST_LAYERS - 2, MOST_LAYERS - 1, MOST_LAYERS + 3])
def test_modules_are_named_as_long_as_they_fit_and_counted_behind(count: int) -> None:
    """Those that are not shown are counted one by one, in words, in the table as in the picture; the last one is always shown."""
    pipe = pipeline(Named(count), (X,), stages=1)
    names = [*Named(count).names, "layers.0-3", "last"]
    if len(names) > MOST_LAYERS:
        hidden = count + 4 - (MOST_LAYERS - 2)
        names[MOST_LAYERS - 2 : -1] = [f"{hidden} more modules"]
    assert pipe.summary().rows[0][-1] == ", ".join(names)
    shown = modules_text(pipe.program, pipe.program.stages[0], homes_of(pipe.program))
    assert shown == names
    assert pipe.report().stages[0].modules == tuple(names)


class Nested(nn.Module):
    """Blocks that hold a list each, called one by one, with an op of the model's own in front."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        for block in self.blocks:
            x = block(x)
        return x


class _AtOps:
    """A policy: cuts in front of these ops."""

    def __init__(self, *cuts: int) -> None:
        self._cuts = cuts

    def __call__(self, program: Program) -> list[int]:
        return [*self._cuts]


def test_no_module_is_named_twice_nor_in_a_range_of_parts() -> None:
    """Whatever the cuts are: a part of a block stands for what is inside of it, and has a name of its own."""
    program = pipeline(Nested(), (X,), stages=1, check=None).program
    count = len(program.stages[0].ops)
    for first, second in itertools.combinations(range(1, count), 2):
        pipe = pipeline(Nested(), (X,), split_policy=_AtOps(first, second), check=None)
        homes = homes_of(pipe.program)
        for stage in pipe.program.stages:
            texts = modules_text(pipe.program, stage, homes)
            parts = [text.removeprefix(PART) for text in texts if text.startswith(PART)]
            names = [text.removeprefix(PART) for text in texts]
            assert not any("-" in part for part in parts)
            assert not [name for name in names for part in parts if name.startswith(f"{part}.")]
            assert len({*names}) == len(names)


def test_ops_of_no_module_are_told_by_their_line() -> None:
    pipe = pipeline(Nested(), (X,), split_policy=lambda program: [1], check=None)
    line = inspect.getsourcelines(Nested.forward)[1] + 1
    assert [row[-1] for row in pipe.summary().rows] == [f"forward of Nested (test_summary.py:{line})", "blocks.0-2"]
    assert pipe.report().stages[0].modules == (f"forward of Nested (test_summary.py:{line})",)


class Counting(nn.Module):
    """A batch norm of which one op may stand in front of a cut."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(8)
        self.norm = nn.Sequential(norm) if listed else norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x)
        return normed.relu()


@pytest.mark.parametrize(("listed", "name"), [(True, "norm.0"), (False, "norm")])
def test_a_module_of_two_stages_is_a_part_in_both(listed: bool, name: str) -> None:
    pipe = pipeline(Counting(listed), (X,), split_policy=lambda program: [1])
    assert [row[-1].split(", ")[0] for row in pipe.summary().rows] == [f"part of {name}", f"part of {name}"]
