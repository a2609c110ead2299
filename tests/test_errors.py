"""Errors: what, where, what to do; one root; nearest names."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

from stagecut import pipeline
from stagecut.ir import errors
from stagecut.ir.errors import (
    BudgetError,
    CaptureError,
    InputError,
    ParseError,
    SplitError,
    StagecutError,
    VerifyError,
    nearest,
)


def test_three_parts() -> None:
    error = StagecutError("it broke", where="m.py:3", hint="mend it")
    assert str(error) == "it broke\n  at: m.py:3\n  try: mend it"
    assert (error.what, error.where, error.hint) == ("it broke", "m.py:3", "mend it")


def test_parts_may_be_missing() -> None:
    assert str(StagecutError("it broke")) == "it broke"
    assert str(StagecutError("it broke", hint="mend it")) == "it broke\n  try: mend it"


def test_one_root() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 8
    assert all(issubclass(kind, StagecutError) for kind in kinds)


def test_user_mistakes_are_builtin_errors_too() -> None:
    assert issubclass(SplitError, ValueError)
    assert issubclass(InputError, TypeError)


def test_parse_error() -> None:
    error = ParseError("expected 'x'", file="a.ir", line=3, column=5, source="abc def")
    assert str(error) == "a.ir:3:5: expected 'x'\n    abc def\n        ^"


def test_parse_error_caret_follows_tabs() -> None:
    error = ParseError("bad", file="a.ir", line=1, column=4, source="\ta\tb")
    assert str(error).splitlines()[1:] == ["    \ta\tb", "    \t \t^"]


def test_verify_error() -> None:
    error = VerifyError(["V1: a", "V2: b"], after="route")
    assert str(error) == "invalid program after pass 'route': 2 violation(s)\n  V1: a\n  V2: b"
    assert str(VerifyError(["V1: a"])).startswith("invalid program: 1 violation(s)")


@pytest.mark.parametrize(
    ("name", "known", "phrase"),
    [
        ("a", [], "there are none"),
        ("layer.0", ["layers.0", "layers.0", "head"], "did you mean 'layers.0'?"),
        ("weigth", ["weight", "weights", "heights"], "did you mean 'weight' or 'weights' or 'heights'?"),
        ("block.3", ["blocks.3", "blocks.7", "ln"], "did you mean 'blocks.3' or 'blocks.7'?"),
        ("num_stages", ["mb_args", "dynamic_shapes", "stages"], "did you mean 'stages'?"),
        ("arguments", ["mb_args", "stages"], "did you mean 'mb_args'?"),
        ("cpu", ["GPU", "CPU"], "did you mean 'CPU'?"),
        ("xyz", ["a", "b"], "known: 'a', 'b'"),
        ("xyz", list("abcdefghij"), "known: 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h' and 2 more"),
    ],
)
def test_nearest(name: str, known: list[str], phrase: str) -> None:
    assert nearest(name, known) == phrase


def test_an_object_in_a_message_prints_as_in_every_process() -> None:
    assert str(StagecutError(f"no literal: {object()!r}", where="at 0x1", hint="<f at 0x1f> or <g>")) == (
        "no literal: <object object>\n  at: at 0x1\n  try: <f> or <g>"
    )


class Branching(nn.Module):
    """Chooses by a value of what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y if y.sum() > 0 else -y


def test_a_branch_on_data_is_one_error_without_a_log_before_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="the model branches on a value of a tensor"):
        pipeline(Branching(), (torch.randn(3),))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["cuda:99", "hpu"])
def test_costs_are_not_timed_on_a_device_that_is_not_there(device: str) -> None:
    pipe = pipeline(nn.Linear(2, 2), (torch.randn(3, 2),))
    with pytest.raises(InputError, match="is no device of this machine"):
        pipe.report(profile_on=device)


class Adds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(3)


def test_a_model_that_fails_on_its_inputs_is_told_apart() -> None:
    with pytest.raises(CaptureError, match="call the model with these inputs"):
        pipeline(Adds(), (torch.ones(4),))


def steps(error: BaseException | None) -> list[tuple[str, str]]:
    """The functions that the traceback of an error shows, each with its file."""
    assert error is not None
    return [(step.filename, step.name) for step in traceback.extract_tb(error.__traceback__)]


class Counts(nn.Module):
    """Is refused by a rule of ours in the middle of the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("model", [Branching(), Counts(), fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))])
def test_no_line_of_torch_stands_above_a_refusal(model: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StagecutError) as caught:
        pipeline(model, (torch.randn(3),))
    shown = "".join(traceback.format_exception(caught.value))
    assert str(Path(torch.__file__).parent) not in shown
    assert shown.count("Traceback (most recent call last)") == 1
    assert "While executing" not in shown
    assert capfd.readouterr() == ("", "")


def test_the_traceback_of_a_refusal_ends_at_the_models_line() -> None:
    with pytest.raises(CaptureError) as caught:
        pipeline(nn.Sequential(Outer()), (torch.randn(3),))
    assert steps(caught.value)[-2:] == [(__file__, "forward"), (__file__, "helper")]


class Outer(nn.Module):
    """Fails in a function that it calls. Whole, it fails as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helper(x)


def helper(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.ones(7, 7)


@pytest.mark.parametrize(("stages", "why"), [(0, "there is at least one"), (500, r"each stage has at least one op")])
def test_stages_that_cannot_be_are_one_error(stages: int, why: str) -> None:
    """A model whose modes are traced apart is cut in one mode where both together cannot be cut."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    with pytest.raises(SplitError, match=f"^{stages} stages.*: {why}") as caught:
        pipeline(model, (torch.randn(3, 4),), stages=stages)
    assert caught.value.__context__ is None


def test_the_error_of_torch_is_the_cause_of_a_refusal() -> None:
    with pytest.raises(CaptureError) as caught:
        pipeline(Branching(), (torch.randn(3),))
    cause = caught.value.cause
    assert type(cause).__name__ == "GuardOnDataDependentSymNode"
    assert any(file.startswith(str(Path(torch.__file__).parent)) for file, _ in steps(cause))


def test_a_refusal_by_a_rule_of_ours_has_no_cause() -> None:
    with pytest.raises(CaptureError) as caught:
        pipeline(Counts(), (torch.randn(3),))
    assert caught.value.cause is None


def test_a_module_that_refuses_its_inputs_is_one_error() -> None:
    with pytest.raises(CaptureError, match=r"^Sequential fails on the example inputs: RuntimeError: [^;]*$") as caught:
        pipeline(nn.Sequential(Outer()), (torch.randn(3),))
    assert "in helper: return x @ torch.ones(7, 7)" in caught.value.where


@pytest.mark.parametrize("shapes", [3, ({7: Dim("n")},), {"y": {0: Dim("n")}}, (None, None)])
def test_dynamic_shapes_that_do_not_fit_are_called_so(shapes: Any) -> None:
    with pytest.raises(InputError, match=r"^dynamic_shapes does not fit the example inputs"):
        pipeline(nn.Linear(2, 2), (torch.randn(3, 2),), dynamic_shapes=shapes)


@pytest.mark.parametrize(
    "error",
    [
        StagecutError("what", where="where", hint="hint"),
        BudgetError(3, 2, where="stage 1"),
        ParseError("bad", file="a.ir", line=1, column=2, source="text"),
        VerifyError(["V1", "V2"], after="a pass"),
    ],
)
def test_an_error_is_the_same_in_another_process(error: StagecutError) -> None:
    error.cause = RuntimeError(object())
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin)) == (type(error), str(error))
    assert vars(twin) == {**vars(error), "cause": None}


def test_a_class_is_no_model() -> None:
    with pytest.raises(InputError, match=r"not the class Adds\n  try: make the module first: Adds\(\.\.\.\)"):
        pipeline(Adds, (torch.ones(3),))  # type: ignore[arg-type]


def test_a_file_is_no_setting() -> None:
    pipe = pipeline(Adds(), (torch.ones(3),))
    with pytest.raises(InputError, match=r"setting='page\.html' is a str"):
        pipe.to_html("page.html")  # type: ignore[arg-type]


def test_another_value_of_a_fixed_argument_names_the_one_of_the_trace() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
            return x * 2 if twice else x * 3

    pipe = pipeline(Scaled(), (torch.ones(3),), {"twice": True})
    with pytest.raises(InputError, match="pass twice=True, or trace again"):
        pipe(torch.ones(3), twice=False)


class Optional(nn.Module):
    """Returns a loss where it is given targets."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if targets is None else (x - targets).square().sum()


@pytest.mark.parametrize(("name", "cure"), [("target", "did you mean 'targets'"), ("targets", "add it to mb_args / mb_kwargs")])
def test_an_argument_that_the_example_left_out_has_the_cure_of_its_name(name: str, cure: str) -> None:
    pipe = pipeline(Optional(), (torch.randn(3),))
    with pytest.raises(InputError, match=cure) as caught:
        pipe(torch.randn(3), **{name: torch.randn(3)})
    assert ("add it to" in str(caught.value)) == (name == "targets")
