"""find-splits: module names and policies become markers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import Bless, diff_of, leaves_alone, load
from torch import nn

from stagecut import SplitPoint, pipeline
from stagecut.ir.errors import SplitError
from stagecut.ir.graph import Program
from stagecut.ir.text.parser import parse
from stagecut.passes.find_splits import BEGINNING, END, FindSplits


def test_beginning_of_a_module_called_twice(bless: Bless) -> None:
    bless("find-splits-beginning.diff", diff_of(FindSplits((("shared", BEGINNING),)), load("modules")))


def test_end_of_a_module_called_twice(bless: Bless) -> None:
    bless("find-splits-end.diff", diff_of(FindSplits((("shared", END),)), load("modules")))


def test_adjacent_cuts_are_one(bless: Bless) -> None:
    points = (("layers.0", END), ("shared", BEGINNING), ("layers.0", BEGINNING), ("embed", END))
    bless("find-splits-adjacent.diff", diff_of(FindSplits(points), load("modules")))


def test_nested_module(bless: Bless) -> None:
    bless("find-splits-nested.diff", diff_of(FindSplits((("layers.1.attn", BEGINNING), ("layers.1.attn", END))), load("modules")))


@pytest.mark.parametrize("point", [("embed", BEGINNING), ("head", END)])
def test_cut_at_an_end_of_the_model_is_dropped(point: tuple[str, str]) -> None:
    leaves_alone(FindSplits((point,)), load("modules"))


def test_nothing_asked_nothing_done() -> None:
    leaves_alone(FindSplits(), load("modules"))


def test_policy_positions_do_not_count_markers(bless: Bless) -> None:
    program = load("modules", FindSplits((("embed", END),)))
    bless("find-splits-policy.diff", diff_of(FindSplits(policy=lambda p: [0, 1, 4, 9]), program))


def test_policy_and_names_together() -> None:
    program = load("modules", FindSplits((("head", BEGINNING),), lambda p: [2]))
    assert [i for i, op in enumerate(program.ops) if op.is_split] == [2, 9]


@pytest.mark.parametrize("position", [-1, 10, "3", 1.5, None])
def test_bad_position(position: object) -> None:
    def policy(program: Program) -> Sequence[int]:
        return [1, position]  # type: ignore[list-item]

    program = load("modules")
    with pytest.raises(SplitError, match=r"chose position .*\n  try: positions are numbers from 0 to 9") as caught:
        FindSplits(policy=policy).run(program)
    assert repr(position) in str(caught.value)
    leaves_alone(FindSplits(), program)


@pytest.mark.parametrize(("name", "close"), [("layers.0.atn", "'layers.0.attn'"), ("sharde", "'shared'"), ("layers.9", "'layers.0'")])
def test_unknown_module_lists_the_nearest(name: str, close: str) -> None:
    program = load("modules")
    with pytest.raises(SplitError, match="no op of the program runs in a call of module") as caught:
        FindSplits(((name, END),)).run(program)
    assert close in caught.value.hint
    assert caught.value.where == f"split point at the end of '{name}'"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x)
        return x * 2 if x.sum() > 0 else x


def test_inside_a_module_kept_whole() -> None:
    """The message says why it is."""
    model = nn.Sequential(Branching(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with pytest.raises(
        SplitError,
        match=r"lies inside module '0', which is kept whole: what its code does depends on the data .* in forward: return x \* 2 if",
    ) as caught:
        pipeline(model, (x,), split_spec={"0.lin": SplitPoint.END})
    assert caught.value.hint == "cut at '0', or change that line so that torch.export can trace it"
    with pytest.raises(SplitError, match=r"lies inside module '1', which is kept whole\n") as caught:
        pipeline(
            nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU())), (x,), split_spec={"1.0": SplitPoint.BEGINNING}, leaf_modules=["1"]
        )
    assert caught.value.hint == "cut at '1'"


def test_unknown_side() -> None:
    with pytest.raises(SplitError, match="'begining' is no side of module 'shared'") as caught:
        FindSplits((("shared", "begining"),)).run(load("modules"))
    assert "'beginning'" in caught.value.hint


def test_marker_has_the_source_line_of_what_follows() -> None:
    program = load("modules", FindSplits((("layers.1", BEGINNING),)))
    marker = next(op for op in program.ops if op.is_split)
    assert str(marker.loc) == "src/model.py:5"


REGION = """program @m phase=traced stages=0 {{
  input %x : f32[2]
  %a = aten.sin.default(%x) : f32[2]
  %b = aten.sin.default(%a) : f32[2] with {region} at m.py:5
  {marker}
  %c = aten.sin.default(%b) : f32[2] with {region}, no_grad at m.py:6
  %d = aten.sin.default(%c) : f32[2]
  output (%d,)
}}
"""


@pytest.mark.parametrize(("region", "what"), [("checkpoint(0, True)", "a checkpointed region"), ("transform(3)", "a vmap")])
def test_a_region_that_runs_as_a_whole_is_not_cut(region: str, what: str) -> None:
    """By a marker of the model's or by a policy."""
    marked = parse(REGION.format(region=region, marker="stagecut.split() at m.py:7"))
    with pytest.raises(SplitError, match=f"inside {what}") as caught:
        FindSplits().run(marked)
    assert "m.py:7" in caught.value.where
    with pytest.raises(SplitError, match=f"inside {what}") as caught:
        FindSplits(policy=lambda p: [2]).run(parse(REGION.format(region=region, marker="")))
    assert "position 2 of the split policy" in caught.value.where
    assert FindSplits(policy=lambda p: [1, 3]).run(parse(REGION.format(region=region, marker="")))
