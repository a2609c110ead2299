"""rebase-views: a stage that writes a value receives its storage once."""

from __future__ import annotations

import pytest
from helpers import Bless, defining, diff_of, leaves_alone, load, named

from stagecut.ir.check.validator import Trace, validate
from stagecut.ir.errors import SplitError
from stagecut.ir.graph import Program
from stagecut.ir.text.parser import parse
from stagecut.passes.liveness import Liveness
from stagecut.passes.partition import Partition
from stagecut.passes.rebase_views import RebaseViews
from stagecut.passes.route import Route
from stagecut.passes.share_state import ShareState
from stagecut.passes.version_mutations import VersionMutations


def staged(case: str) -> Program:
    """The program of a case, with versions and stages."""
    return load(case, VersionMutations(), Partition())


def test_view_and_base_and_several_writes(bless: Bless) -> None:
    bless("rebase-views-view-and-base.diff", diff_of(RebaseViews(), staged("view-and-base")))


def test_view_of_a_view(bless: Bless) -> None:
    bless("rebase-views-view-of-view.diff", diff_of(RebaseViews(), staged("view-of-view")))


def test_view_of_an_input_and_of_state(bless: Bless) -> None:
    bless("rebase-views-view-of-input.diff", diff_of(RebaseViews(), staged("view-of-input")))


def test_view_written_without_its_base(bless: Bless) -> None:
    bless("rebase-views-view-alone.diff", diff_of(RebaseViews(), staged("view-alone")))


@pytest.mark.parametrize("case", ["views-unwritten", "own-writes", "crossing"])
def test_nothing_shared_is_written_nothing_to_do(case: str) -> None:
    program = staged(case) if case.startswith("view") else load(case)
    leaves_alone(RebaseViews(), program)


def test_traced_and_linked_programs_stay() -> None:
    leaves_alone(RebaseViews(), load("view-and-base"))
    leaves_alone(RebaseViews(), load("linked"))


@pytest.mark.parametrize("case", ["view-and-base", "view-of-view", "view-of-input", "view-alone"])
def test_what_is_rebased_is_still_the_trace(case: str) -> None:
    program = load(case)
    trace = Trace(program)
    for step in (VersionMutations(), Partition(), RebaseViews(), ShareState(), Liveness(), Route()):
        step.run(program)
    validate(trace, program)


def test_what_arrives() -> None:
    """The base alone; a view that nothing takes any more in its old stage is gone from there."""
    program = load("view-of-view", VersionMutations(), Partition(), RebaseViews(), Liveness())
    assert program.stages[2].inputs == [named(program, "%base")]
    assert [op.target for op in program.stages[0].ops] == ["aten.mul.Tensor"]


def test_a_view_taken_anew_keeps_its_origin_and_place() -> None:
    """So that errors and the validator know where it comes from."""
    program = staged("view-of-view")
    before = defining(program, "%row")
    RebaseViews().run(program)
    twin = program.stages[2].ops[0]
    assert (twin.target, twin.origin, twin.loc, twin.scope) == (before.target, before, before.loc, before.scope)


def test_a_view_by_chance_is_refused() -> None:
    with pytest.raises(SplitError, match=r"stage 1 writes the result of aten\.dropout\.default") as caught:
        RebaseViews().run(staged("view-by-chance"))
    assert "net.py:7" in caught.value.where
    assert "clone" in caught.value.hint


def test_no_stage_is_left_empty() -> None:
    """A stage of nothing but views that are taken elsewhere keeps them."""
    program = parse(
        "program @P phase=partitioned {\n  input %x : f32[4,4]\n"
        "  stage 0 {\n    %base = aten.mul.Tensor(%x, 2) : f32[4,4]\n  }\n"
        "  stage 1 {\n    %row = aten.select.int(%base, 0, 0) : f32[4] view(%base)\n  }\n"
        "  stage 2 {\n    aten.add_.Tensor(%row, 1) writes(%row -> %row.1) renews(%base -> %base.1)\n"
        "    %y = aten.add.Tensor(%base.1, %row.1) : f32[4,4]\n  }\n  output (%y)\n}\n"
    )
    assert RebaseViews().run(program)
    assert [len(stage.ops) for stage in program.stages] == [1, 1, 3]
