"""Errors: what, where, what to do; one root; nearest names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stagecut import pipeline
from stagecut.ir import errors
from stagecut.ir.errors import CaptureError, InputError, ParseError, SplitError, StagecutError, VerifyError, nearest


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
