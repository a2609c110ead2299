"""The list of passes: its order, and passes by name."""

from __future__ import annotations

import inspect
import sys
from dataclasses import FrozenInstanceError, is_dataclass
from types import FrameType
from typing import Any

import pytest

from stagecut.ir.errors import PassError
from stagecut.ir.text.parser import parse
from stagecut.passes import pipeline
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.pipeline import NAMES, ORDER, PASSES, default_pipeline, pass_by_name

DESIGNED = (
    "canonicalize resolve-aliases version-mutations infer-gradients find-splits partition recompute rebase-views share-state"
    " liveness route place-lanes"
)


def test_the_list_is_the_designed_one() -> None:
    assert " ".join(NAMES) == DESIGNED


def test_constraints_name_passes_and_hold() -> None:
    for before, after in ORDER:
        assert NAMES.index(before) < NAMES.index(after)


@pytest.mark.parametrize(("before", "after"), ORDER)
def test_a_wrong_order_is_refused_at_import(before: str, after: str) -> None:
    """The module with the two passes swapped does not import."""
    one, other = (PASSES[NAMES.index(name)].__name__ for name in (before, after))
    head, literal, tail = inspect.getsource(pipeline).partition("PASSES: tuple[type[Any], ...] = (")
    body, _, rest = tail.partition("\n)\n")
    swapped = body.replace(f"    {one},", "    @").replace(f"    {other},", f"    {one},").replace("    @", f"    {other},")
    assert swapped != body
    with pytest.raises(PassError, match="the order of passes breaks an ordering constraint"):
        exec(compile(head + literal + swapped + "\n)\n" + rest, "swapped", "exec"), {"__name__": "swapped"})


@pytest.mark.parametrize("kind", PASSES)
def test_a_pass_is_a_frozen_dataclass_with_defaults(kind: type) -> None:
    assert is_dataclass(kind)
    made = kind()
    with pytest.raises(FrozenInstanceError):
        setattr(made, "name", "other")  # noqa: B010
    assert kind() == made


@pytest.mark.parametrize("name", NAMES)
def test_pass_by_name(name: str) -> None:
    assert pass_by_name(name).name == name


def test_options_are_fields() -> None:
    assert pass_by_name("find-splits", {"at": (("a", "end"),)}) == FindSplits((("a", "end"),))


def test_default_pipeline_takes_the_splits() -> None:
    splits = FindSplits((("a", "end"),))
    assert [p for p in default_pipeline(splits) if p.name == "find-splits"] == [splits]
    assert [p for p in default_pipeline() if p.name == "find-splits"] == [FindSplits()]
    assert tuple(p.name for p in default_pipeline(splits)) == NAMES


@pytest.mark.parametrize(("name", "close"), [("livenes", "'liveness'"), ("find_splits", "'find-splits'")])
def test_unknown_pass_lists_the_nearest(name: str, close: str) -> None:
    with pytest.raises(PassError, match=f"^unknown pass '{name}'") as caught:
        pass_by_name(name)
    assert close in caught.value.hint


def test_unknown_option_is_refused() -> None:
    with pytest.raises(PassError, match=r"^pass 'find-splits' has no option 'att'") as caught:
        pass_by_name("find-splits", {"att": 1})
    assert caught.value.hint == "did you mean 'at'?"
    with pytest.raises(PassError, match="has no option 'at'"):
        pass_by_name("route", {"at": ()})


def test_the_work_of_every_pass_grows_as_the_program_does() -> None:
    """Lines that run, for some writes into one tensor and twice as many."""
    counts = [_lines_that_run(writes) for writes in (100, 200)]
    assert {name for name, lines in counts[1].items() if lines > 2.2 * counts[0][name] + 100} == set()


def _lines_that_run(writes: int) -> dict[str, int]:
    lines = [" %y = aten.mul.Tensor(%x, 2) : f32[4,4]", " %row = aten.select.int(%y, 0, 0) : f32[4] view(%y)"]
    lines += [f" %a{i} = aten.add_.Tensor(%row, 1) : f32[4] view(%row) writes(%row)" for i in range(writes)]
    lines[2 + writes // 2 : 2 + writes // 2] = [" split"]
    lines += [" %z = aten.neg.default(%y) : f32[4,4]", " output (%z,)"]
    program = parse("\n".join(["program @P phase=traced {", " input %x : f32[4,4]", *lines, "}"]))
    counts: dict[str, int] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        counts[step.name] += event == "line"
        return trace

    before = sys.gettrace()
    for step in default_pipeline():
        counts[step.name] = 0
        sys.settrace(trace)
        try:
            step.run(program)
        finally:
            sys.settrace(before)
    assert len(program.stages) == 2
    return counts
