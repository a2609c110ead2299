"""dot: what pictures show, at every level; that user text stays text; that only what is the same is folded."""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from helpers import Bless, load
from torch import nn

import stagecut
from stagecut import SplitPoint, pipeline
from stagecut.backend.pictures.dot import to_dot, to_svg
from stagecut.backend.pictures.drawing import PENS, pen, rich, short, some, spans, state_lines, tip_text
from stagecut.backend.pictures.render import PURE, RENDERERS, find_renderer
from stagecut.backend.pictures.stages import hops
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Program, Target, scope_fqn
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import Printer, text, value_names

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
VIEWS: dict[str, dict[str, Any]] = {
    "stages": {},
    "modules": {"level": "modules"},
    "modules-1": {"level": "modules", "stage": 1},
    "modules-closed": {"level": "modules", "depth": 0},
    "ops-0": {"level": "ops", "stage": 0},
    "ops": {"level": "ops"},
}
drawn = partial(to_svg, renderer=PURE)


@pytest.fixture(params=RENDERERS)
def renderer(request: pytest.FixtureRequest) -> str:
    """Each program that draws. One comes with the tests, the other is that of the machine."""
    if request.param != PURE and find_renderer((request.param,)) is None:
        pytest.skip(f"needs {request.param}: apt-get install graphviz")
    return str(request.param)


@pytest.mark.parametrize("view", ["stages", "modules", "modules-1", "ops-0"])
def test_the_pictures_of_a_small_program(view: str, bless: Bless) -> None:
    bless(f"picture-{view}.dot", to_dot(load("pictures"), **VIEWS[view]))


def _texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def _tooltips(svg: str) -> dict[str, str]:
    """Id -> tooltip."""
    root = ElementTree.fromstring(svg)
    found = {}
    for group in root.iter(f"{SVG}g"):
        for link in group.findall(f"{SVG}g/{SVG}a"):
            found[group.attrib["id"]] = link.attrib[f"{LINK}title"]
    return found


def _ids(svg: str) -> list[str]:
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return [g.attrib["id"] for g in groups if not g.attrib["id"].startswith("a_")]


@pytest.mark.parametrize("view", VIEWS)
def test_ids_are_unique_and_plain(view: str, renderer: str) -> None:
    ids = _ids(to_svg(load("pictures"), **VIEWS[view], renderer=renderer))
    assert max(Counter(ids).values()) == 1
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) for name in ids)


def test_ids_and_classes_are_those_a_page_can_count_on() -> None:
    stages, modules = drawn(load("pictures")), drawn(load("pictures"), level="modules")
    assert {"stage-0", "stage-4", "value-a", "value-b.2", "input-x", "input-mask", "output-z", "tied-0-4", "legend-stages"} <= {
        *_ids(stages)
    }
    assert {"module-embed", "module-blocks.0", "stage-2", "in-x", "out-z", "value-a", "value-n"} <= {*_ids(modules)}
    classes = [set(g.attrib["class"].split()) for g in ElementTree.fromstring(modules).iter(f"{SVG}g") if "class" in g.attrib]
    assert sum({"module-blocks.0", "module-blocks.1", "module-blocks.2"} <= names for names in classes) == 1
    assert sum("value-a" in names for names in classes) == 2


def test_names_are_those_of_the_text() -> None:
    program = load("pictures")
    names = {name for value, name in value_names(program).items() if value.uses}
    for view in VIEWS.values():
        shown = [t for t in _texts(drawn(program, **view)) if re.fullmatch(r"%[\w.]+", t)]
        assert shown
        assert {*shown} <= names


NASTY = [
    '"', "\\", "\\N", "\\\\N\\l", "<b>", "</TABLE>>", "&lt;", "&#65;", "&", "a\nb", "]; x [", "%s{}", "'", "--", "é漢",
    "\x00\x1b", "x\\", " ", ">", "#",
]  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("level", ["stages", "modules", "ops"])
def test_user_text_stays_text(name: str, level: str, renderer: str) -> None:
    """A model, a module and a parameter of that name."""
    program = load("pictures")
    program.name = name
    entry = next(e for e in program.state if e.name.startswith("we"))
    entry.names = (f"{name}.w",)
    for op in program.stages[3].ops:
        op.place = op.place._replace(scope=(op.scope[0]._replace(name=name), *op.scope[1:]))
    svg = to_svg(program, level=level, renderer=renderer)
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in name)
    texts = [t.replace("\xa0", " ").strip() for t in _texts(svg)]
    line = " ".join(shown.split("\n")).strip()
    assert (f"{shown}: 5 stages".replace("\n", " ").strip() if level == "stages" else line) in texts
    assert line in [t.partition(" / ")[0].strip() for t in texts]
    if level == "ops":
        op = program.stages[3].ops[0]
        assert _tooltips(svg)["op-t"] == Printer(program).op_line(op)
        assert scope_fqn(op.scope) == name


def test_names_of_a_tied_tensor_that_are_not_shown_are_counted() -> None:
    entry = load("pictures").state[0]
    for names, shown in (("ab", "tied @a = @b"), ("abc", "tied @a = @b = 1 more name"), ("abcd", "tied @a = @b = 2 more names")):
        entry.names = tuple(names)
        ((line, _),) = state_lines([entry], set(), None)
        assert line.partition(", also in")[0] == shown


def test_tooltips_say_where_a_thing_comes_from() -> None:
    program = load("pictures")
    stages, modules = _tooltips(drawn(program)), _tooltips(drawn(program, level="modules"))
    assert stages["value-a"] == "%a : f32[4] grad\n16 B\nmodel.py:4, module 'embed', op aten.mul.Tensor\nsend to stage 1"
    assert "\nrelay to stage 4, through stages 1-3" in next(tip for name, tip in stages.items() if name.startswith("values-"))
    assert modules["module-blocks.0"].startswith("blocks.0\nstands for blocks.0, 2 more modules\nmodel.py:8-9\n@blocks.0.w : f32[4] grad\n")


def test_a_picture_is_the_same_wherever_the_model_lies() -> None:
    here = load("pictures")
    there = parse(text(here).replace('"src/model.py"', '"/home/somebody/lib/model.py"'))
    assert text(here) != text(there)
    for view in VIEWS.values():
        assert to_dot(here, **view) == to_dot(there, **view)


# --- the stage graph


def test_a_relayed_value_goes_from_reader_to_reader() -> None:
    program = parse(
        "program @P phase=linked stages=4 {\n  input %x : f32[4]\n"
        "  stage 0 (%x) -> (%a) {\n    %a = aten.neg.default(%x) : f32[4]\n  }\n"
        "  stage 1 (%a) -> (%b) {\n    %b = aten.neg.default(%a) : f32[4]\n  }\n"
        "  stage 2 (%b) -> (%c) {\n    %c = aten.neg.default(%b) : f32[4]\n  }\n"
        "  stage 3 (%a, %c) -> (%d) {\n    %d = aten.add.Tensor(%a, %c) : f32[4]\n  }\n"
        "  transfer %x : input -> 0 feed\n  transfer %a : 0 -> 1 send\n  transfer %a : 0 -> 3 relay(1, 2)\n"
        "  transfer %b : 1 -> 2 send\n  transfer %c : 2 -> 3 send\n  output (%d)\n}\n"
    )
    names = value_names(program)
    assert ("%a", 1, 3, "relay") in [(names[h.value], h.tail, h.head, h.route) for h in hops(program)]
    dot = to_dot(program)
    far, near = (next(line for line in dot.splitlines() if edge in line) for edge in ('"stage-1" -> "stage-3"', '"stage-0" -> "stage-1"'))
    assert all(part in far for part in ('class="value-a route-relay"', 'id="value-a-to-3"', "style=dashed"))
    assert all(part in near for part in ('class="value-a route-send"', 'id="value-a"', "style=solid"))


def test_what_is_computed_again_has_its_own_edge_or_is_named_where_that_is_many_times() -> None:
    few, many = _recomputed(3), _recomputed(5)
    assert to_dot(few).count("route-recompute") == 2
    assert "arrowhead=odot" in to_dot(few)
    assert "computed again by the stage" in to_dot(few)
    assert "route-recompute" not in to_dot(many)
    assert to_dot(many).count("computes again %m<") == 4


def _recomputed(stages: int) -> Program:
    lines = ["  stage 0 (%x) -> (%a0) {\n    %m = aten.ones.default([4]) : f32[4]\n    %a0 = aten.add.Tensor(%x, %m) : f32[4]\n  }"]
    moves = ["  transfer %x : input -> 0 feed"]
    for i in range(1, stages):
        made = f"    %m{i} = aten.ones.default([4]) : f32[4]\n    %a{i} = aten.add.Tensor(%a{i - 1}, %m{i}) : f32[4]"
        lines.append(f"  stage {i} (%a{i - 1}) -> (%a{i}) {{\n{made}\n  }}")
        moves += [f"  transfer %a{i - 1} : {i - 1} -> {i} send", f"  transfer %m : 0 -> {i} recompute(%m{i})"]
    head = f"program @P phase=linked stages={stages} {{\n  input %x : f32[4]"
    return parse("\n".join([head, *lines, *moves, f"  output (%a{stages - 1})", "}"]) + "\n")


def test_more_bytes_are_a_wider_line() -> None:
    widths = [float(pen("send", [size])["penwidth"]) for size in (1, 2**10, 2**20, 2**30, 2**40)]
    assert widths == sorted(widths)
    assert widths[0] == widths[1] == 1.0
    assert all(b > a for a, b in pairwise(widths[1:]))
    assert pen("send", [None])["penwidth"] == "1.00"


def test_every_route_has_a_look_of_its_own() -> None:
    looks = [(PENS[kind]["style"], PENS[kind]["color"]) for kind in ("send", "relay", "feed", "recompute", "tied")]
    assert len({*looks}) == len(looks)


# --- folding

BLOCK = """    %a{i} = aten.mul.Tensor({x}, @blocks.{i}.w) : f32[4] grad in blocks.{i}
    %b{i} = aten.add.Tensor(%a{i}, %mask) : f32[4] grad in blocks.{i}
"""


def _blocks(count: int, change: tuple[str, str] = ("", ""), where: int = 1, output: str = "") -> Program:
    """Equal blocks in a row, of which one is changed."""
    lines = ["program @P phase=traced {", "  input %x : f32[4] grad", "  input %mask : f32[4]", "  input %other : f32[4]"]
    lines += [f"  state @blocks.{i}.w : param f32[4] grad" for i in range(count)]
    for i in range(count):
        block = BLOCK.format(i=i, x=f"%b{i - 1}" if i else "%x")
        lines.append((block.replace(*change) if i == where and change[0] else block).rstrip("\n"))
    lines.append(f"  output (%b{count - 1}{output})")
    return parse("\n".join([*lines, "}"]) + "\n")


def _drawn(program: Program) -> list[str]:
    """The titles of the blocks drawn."""
    return re.findall(r"<B>(blocks\.[^<]*)</B>", to_dot(program, level="modules"))


def test_equal_neighbours_are_one() -> None:
    assert _drawn(_blocks(7)) == ["blocks.0 to blocks.6  x 7"]
    assert "each hands on %b0" in to_dot(_blocks(7), level="modules")


@pytest.mark.parametrize(
    "change",
    [
        ("aten.mul.Tensor", "aten.div.Tensor"),
        (": f32[4] grad in", ": f32[1,4] grad in"),
        ("%mask", "%other"),
        ("@blocks.1.w", "@blocks.0.w"),
        ("(%a1, %mask)", "(%mask, %a1)"),
        ("%mask)", "%mask, alpha=2)"),
        ("in blocks.1", "in blocks.1/inner"),
        ("grad in", "grad with no_grad in"),
    ],
)
def test_a_block_that_differs_is_shown(change: tuple[str, str]) -> None:
    assert _drawn(_blocks(3)) == ["blocks.0 to blocks.2  x 3"]
    drawn = _drawn(_blocks(3, change))
    assert "blocks.0" in drawn
    assert "blocks.1" in drawn


def test_a_block_whose_result_is_read_elsewhere_is_shown() -> None:
    """%b1 goes past block 2: blocks 1 and 2 are not the same for a reader."""
    assert _drawn(_blocks(5, output=", %b1")) == ["blocks.0 to blocks.1  x 2", "blocks.2 to blocks.4  x 3"]


def test_a_copy_takes_from_the_one_before_it_or_from_where_that_takes() -> None:
    assert _drawn(_blocks(3, ("(%b0,", "(%x,"))) == ["blocks.0 to blocks.1  x 2", "blocks.2"]
    assert _drawn(_blocks(4, ("(%b1,", "(%b0,"), 2)) == ["blocks.0", "blocks.1 to blocks.2  x 2", "blocks.3"]


def test_depth_closes_modules() -> None:
    program = load("pictures")
    opened, closed = (to_dot(program, level="modules", stage=3, depth=depth) for depth in (1, 0))
    assert 'cluster_module-we_ird_"' in opened
    assert "cluster_module" not in closed
    assert 'id="module-we_ird_"' in closed


def test_all_ops_are_drawn_or_stand_folded() -> None:
    program = load("pictures")
    dot = to_dot(program, level="ops")
    assert dot.count('id="op-') == sum(len(s.ops) for s in program.stages) - 4  # blocks.1 and blocks.2 have two ops each


@pytest.mark.parametrize("change", [("", ""), ("mul", "div")])
@pytest.mark.parametrize("level", ["modules", "ops"])
def test_the_work_grows_as_the_program_does(level: str, change: tuple[str, str]) -> None:
    """Calls of functions, for some blocks and twice as many; also where blocks do not fold."""
    calls = []
    for count in (100, 200):
        program = _blocks(count)
        for i, op in enumerate(program.ops):
            op.target = Target(op.target.replace("mul", f"mul{i}")) if change[0] else op.target
        calls.append(_calls(program, level))
    assert calls[1] < 2.2 * calls[0]


def _calls(program: Program, level: str) -> int:
    count = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        to_dot(program, level=level)
    finally:
        sys.setprofile(None)
    return count


# --- the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "module"}, "did you mean 'modules'"),
        ({"level": "modules", "stage": 5}, "there is no stage 5"),
        ({"level": "modules", "depth": -1}, "opens no modules"),
        ({"stage": 1}, "are for pictures of modules and ops"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_dot(load("pictures"), **options)


class Keyed(nn.Module):
    """Returns a dict, with one value twice and a key that DOT could read as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.a(x)
        return {"logits": self.b(y), "hidden": [y, x], "<b>\\n": torch.relu(y)}


def test_outputs_have_the_keys_of_what_the_model_returns(tmp_path: Path) -> None:
    pipe = pipeline(Keyed(), (torch.randn(2, 4),), split_spec={"b": SplitPoint.BEGINNING})
    pipe.save(tmp_path / "saved")
    for again in (pipe, stagecut.load(tmp_path / "saved")):
        for view in ({}, {"level": "modules"}, {"level": "ops"}):
            texts = {text for text in _texts(again.to_svg(**view, renderer=PURE)) if text.startswith("output ")}
            assert texts == {"output 0: logits", "output 1: hidden[0]", "output 2: hidden[1]", r"output 3: ['<b>\\n']"} or view
            assert {"output 0: logits", "output 1: hidden[0]"} <= texts


def test_outputs_without_keys_have_their_numbers() -> None:
    pipe = pipeline(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),), split_spec={"1": SplitPoint.BEGINNING})
    assert "output 0" in _texts(pipe.to_svg(renderer=PURE))


def test_stages_are_those_of_a_linked_program() -> None:
    with pytest.raises(InputError, match="this one is traced"):
        to_dot(load("modules"))
    assert "module-layers.0" in to_dot(load("modules"), level="modules")


@pytest.mark.parametrize("case", ["linked", "everything", "writes", "shared", "tied", "clean"])
@pytest.mark.parametrize("level", ["modules", "ops"])
def test_programs_of_every_kind_are_drawn(case: str, level: str, renderer: str) -> None:
    program = load(case) if case != "everything" else parse((Path(__file__).parent / "cases" / "everything.ir").read_text(encoding="utf-8"))
    before = text(program)
    assert ElementTree.fromstring(to_svg(program, level=level, renderer=renderer)).tag == f"{SVG}svg"
    assert text(program) == before


def test_small_texts() -> None:
    assert spans([3, 1, 2, 5, 5]) == "1-3, 5"
    assert some(["a", "b", "c", "d"], "value") == "a, b, c, 1 more value"
    assert some(["a", "b", "c"], "value", 1) == "a, 2 more values"
    assert len(short("x" * 100)) == 48
    assert "\\" not in rich(("\\N", "n")) + tip_text("\\N")
