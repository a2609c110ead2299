"""Lives: against the text of the program, which names a value wherever something happens to it."""

from __future__ import annotations

import re

import pytest
from helpers import CASES, load

from stagecut.ir.errors import StagecutError, UnknownNameError
from stagecut.ir.graph import Loc, Program
from stagecut.ir.text.life import Crossing, Holding, Lives, life_of_state, life_of_value
from stagecut.ir.text.parser import parse
from stagecut.passes.pipeline import default_pipeline

TOKEN = re.compile(r'@"(?:[^"\\]|\\.)*"|[%@][\w.]+')
NAMES = sorted(path.stem for path in CASES.glob("*.ir") if path.stem != "view-by-chance")  # that one is refused


def _compiled(case: str) -> Program:
    program = load(case)
    if program.phase == "traced":
        for step in default_pipeline():
            step.run(program)
    return program


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("compiled", [False, True])
def test_uses_are_the_lines_that_name_it(case: str, compiled: bool) -> None:
    lives = Lives(_compiled(case) if compiled else load(case))
    # a gradient says whose it is; it does not read it
    named = {place.number: set(TOKEN.findall(re.sub(r" gradient\([^)]*\)", "", place.text))) for place in lives.places()}
    for life in lives.values():
        made = {life.born.number} if life.born else set()
        assert {use.place.number for use in life.uses} == {n for n, found in named.items() if life.name in found} - made, life.name


@pytest.mark.parametrize("case", NAMES)
def test_every_life_can_be_read(case: str) -> None:
    lives = Lives(_compiled(case))
    for life in lives.values():
        assert str(life).startswith(f"{life.name} : {life.type}")
        assert str(lives.value(life.name)) == str(life)
    for state in lives.states():
        assert all(lives.state(name) == state for name in state.names)
        assert str(state).startswith(f"@{state.name} : {state.kind}")


def test_a_relayed_value() -> None:
    life = life_of_value(load("linked"), "%skip")
    assert life.kind == "result"
    assert life.born is not None
    assert (life.born.stage, life.born.target) == (0, "aten.neg.default")
    assert [(use.how, use.place.stage) for use in life.uses] == [("reads", 2)]
    assert life.crossings == (Crossing(0, 2, "relay", (1,), 16, None),)
    assert life.dies is life.uses[-1].place
    assert "crosses   stage 0 -> stage 2, relay through 1, 16 B" in str(life)


def test_an_input_that_is_returned() -> None:
    life = life_of_value(load("linked"), "x")
    assert (life.kind, life.born, life.dies, life.returned) == ("input", None, None, (2,))
    assert life.crossings == (Crossing(None, 0, "feed", (), 16, None),)


def test_versions_of_state() -> None:
    life = life_of_state(load("linked"), "buf")
    assert [version.name for version in life.versions] == ["@buf", "%buf.1"]
    assert life.versions[1].by is not None
    assert life.versions[1].by.stage == 1
    assert [(use.how, use.version) for use in life.uses] == [("writes", "@buf")]
    assert life.returned == (1,)
    version = life_of_value(load("linked"), "buf.1")
    assert (version.kind, version.versions) == ("version", life.versions)


def test_tied_state() -> None:
    life = life_of_state(load("linked"), "@tied.w")
    assert (life.name, life.names, life.share, life.trained) == ("w", ("w", "tied.w"), "replicate", True)
    assert life.held == (Holding(0, ("w",)), Holding(2, ("tied.w",)))
    assert [use.place.stage for use in life.uses] == [0, 2]
    assert "  also      tied.w" in str(life).splitlines()


def test_state_nobody_reads() -> None:
    assert str(life_of_state(load("linked"), "lifted")).endswith("unused    no op reads it")


def test_a_traced_program_has_no_stages() -> None:
    life = life_of_value(load("everything"), "added")
    assert life.born is not None
    assert (life.born.stage, life.view_of, life.crossings) == (None, "%view", ())
    view = life_of_value(load("everything"), "%view")
    assert [use.how for use in view.uses] == ["writes"]
    assert [version.name for version in view.versions] == ["%view", "%view.1"]
    assert "renews" in [use.how for use in life_of_value(load("everything"), "x").uses]


def test_inside_regions() -> None:
    param = life_of_value(load("everything"), "%b")
    assert param.kind == "param"
    assert [(use.place.target, use.place.text) for use in param.uses] == [("yield", "yield (%b,)")]
    assert life_of_value(load("everything"), "u").uses[0].place.target == "torch.ops.higher_order.wrap"


def test_places() -> None:
    life = life_of_value(load("everything"), "scoped")
    assert life.born is not None
    assert (life.born.loc, life.born.module) == (Loc("/src/b/model.py", 40), "layers.0.odd name.lin")
    assert str(life.born) == '/src/b/model.py:40, %scoped = aten.neg.default(%cast) : f32[4] in layers.0/"odd name"~2/lin~1'


def test_odd_names_and_storage() -> None:
    program = load("everything")
    printed, plain, alias = (life_of_state(program, name) for name in ('@"we ird/name"', "we ird/name", 'qu"ote'))
    assert printed == plain == alias
    assert printed.overlaps == ("lifted",)
    assert printed.transient == printed.names


def test_recomputed_values() -> None:
    lives = Lives(parse(RECOMPUTED))
    life, copy = lives.value("mask"), lives.value("mask_1")
    assert (life.copies, copy.copy_of) == (("%mask_1",), "%mask")
    assert life.crossings == (Crossing(0, 1, "recompute", (), 16, "%mask_1"),)
    assert "stage 0 -> stage 1, recompute as %mask_1, 16 B" in str(life)
    assert "  copy of   %mask" in str(copy).splitlines()


RECOMPUTED = """\
program @R phase=linked stages=2 {
  input %x : f32[4]
  stage 0 (%x) -> (%a) {
    %mask = aten.ones.default([4]) : f32[4]
    %a = aten.mul.Tensor(%x, %mask) : f32[4]
  }
  stage 1 (%a) -> (%b) {
    %mask_1 = aten.ones.default([4]) : f32[4]
    %b = aten.mul.Tensor(%a, %mask_1) : f32[4]
  }
  transfer %x : input -> 0 feed
  transfer %mask : 0 -> 1 recompute(%mask_1)
  transfer %a : 0 -> 1 send
  output (%b,)
}
"""


@pytest.mark.parametrize("name", ["%skap", "skap"])
def test_unknown_value(name: str) -> None:
    with pytest.raises(UnknownNameError, match="no value '%skap'\n  try: did you mean '%skip'"):
        life_of_value(load("linked"), name)


def test_unknown_state() -> None:
    with pytest.raises(UnknownNameError, match=r"constant 'tied'\n  try: did you mean 'tied\.w'"):
        life_of_state(load("linked"), "tied")
    assert issubclass(UnknownNameError, StagecutError)


def test_state_asked_for_as_a_value() -> None:
    with pytest.raises(UnknownNameError, match=r"try: 'tied\.w' is state, no value"):
        life_of_value(load("linked"), "tied.w")


def test_the_nearest_name_is_found_among_thousands() -> None:
    ops = "".join(f"  %v{i} = aten.neg.default(%x) : f32[4]\n" for i in range(8000))
    ops += "  %zebra = aten.neg.default(%x) : f32[4]\n"
    program = parse(f"program @Many phase=traced {{\n  input %x : f32[4]\n{ops}  output (%x,)\n}}\n")
    with pytest.raises(UnknownNameError, match="did you mean '%zebra'"):
        life_of_value(program, "zebro")


def test_a_line_of_versions_is_made_once() -> None:
    writes = "".join(f"  aten.add_.Tensor(%a.{i}, 1) writes(%a.{i} -> %a.{i + 1})\n" for i in range(1, 400))
    source = "program @W phase=traced {\n  input %x : f32[4]\n  %a = aten.neg.default(%x) : f32[4]\n"
    lives = Lives(parse(source + "  aten.add_.Tensor(%a, 1) writes(%a -> %a.1)\n" + writes + "  output (%a.400,)\n}\n"))
    assert lives.value("a").versions is lives.value("a.400").versions
    assert len(lives.value("a").versions) == 401
