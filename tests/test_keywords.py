"""An argument of a name that nothing has: the nearest names are listed, by every public function."""

from __future__ import annotations

import inspect
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import stagecut
from stagecut import Balanced, InputError, Pipe, Setting, StagecutError, pipeline
from stagecut.ir.keywords import near_names
from stagecut.pipe import SEARCHED

CALLED = ("AtModules", "Balanced", "Device", "Driver", "Generator", "Setting")
"""The classes whose constructors people call."""
WITH_METHODS = ("Driver", "Generator", "Pipe")
TAKE_ANY = {"Driver.eval", "Driver.step", "Generator.call", "Generator.generate", "Generator.loop", "Pipe.verify"}
"""Hand further arguments on to the model."""


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Everything that people call, by name."""
    checkpoint = stagecut.checkpoint
    yield from ((f"checkpoint.{name}", getattr(checkpoint, name)) for name in checkpoint.__all__)
    for name in stagecut.__all__:
        value: Any = getattr(stagecut, name)
        if inspect.isfunction(value):
            yield name, value
        if name in CALLED:
            yield name, value
        if name in WITH_METHODS:
            yield from ((f"{name}.{key}", method) for key, method in vars(value).items() if key[0] != "_")


FUNCTIONS = {
    name: function
    for name, function in public()
    if (inspect.isfunction(function) or name in CALLED)
    and inspect.getmodule(function).__name__.startswith("stagecut.")  # type: ignore[union-attr]
    and len(inspect.signature(function).parameters) > name.count(".")
}


def test_the_list_has_what_people_call() -> None:
    assert {"pipeline", "Driver", "Pipe.to_svg", "checkpoint.save", "checkpoint.load_adapter", "Generator.generate_all"} <= {*FUNCTIONS}
    assert {*FUNCTIONS} >= TAKE_ANY


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - TAKE_ANY))
def test_every_public_function_lists_the_nearest_names(name: str) -> None:
    function = FUNCTIONS[name]
    parameter = [*inspect.signature(function).parameters][-1]
    with pytest.raises(InputError) as caught:
        function(**{f"{parameter}_": 1})
    assert f"{name.rpartition('.')[2]}() has no argument '{parameter}_'" in caught.value.what
    assert f"'{parameter}'" in caught.value.hint


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - TAKE_ANY))
def test_every_public_function_refuses_more_by_position_than_it_takes(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name.rpartition('.')[2]}\(\) takes .* by position, and was given 7 besides"):
        FUNCTIONS[name](*[7] * 50)


def test_a_file_for_a_picture_is_told_how_it_is_written() -> None:
    pipe = pipeline(nn.Linear(2, 2), (torch.ones(1, 2),), stages=1)
    with pytest.raises(InputError, match=r"^Pipe\.to_svg\(\) takes nothing .*'x\.svg' besides\n  try: it returns text: Path\('x\.svg'\)"):
        pipe.to_svg("x.svg")  # type: ignore[misc]


def test_a_slip_of_the_pen() -> None:
    with pytest.raises(InputError, match=r"^pipeline\(\) has no argument 'stage'\n  try: did you mean 'stages'\?$"):
        pipeline(nn.Linear(2, 2), (torch.randn(3, 2),), stage=1)  # type: ignore[call-arg]


def test_an_input_of_another_name_is_named() -> None:
    pipe = pipeline(nn.Linear(2, 2), (torch.randn(3, 2),))
    with pytest.raises(InputError, match=r"missing argument 'input'; the program has no 'inputs'"):
        pipe(inputs=torch.randn(3, 2))


class Losses(nn.Module):
    """Takes its labels by an argument with a default."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return idx if targets is None else idx - targets


X = torch.randn(3, 2)
EXAMPLES: dict[str, tuple[dict[Any, Any], str]] = {
    "misspelt": ({"idx": X, "target": X}, "it has no argument 'target'\n  try: did you mean 'targets'?"),
    "another word": ({"input_ids": X}, "it has no argument 'input_ids'\n  try: known: 'idx', 'targets'"),
    "no name": ({"idx": X, 3: X}, "it has no argument '3'\n  try: known: 'idx', 'targets'"),
    "left out": ({"targets": X}, "missing a required argument: 'idx'\n  try: mb_args are"),
}


@pytest.mark.parametrize(("given", "message"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_an_example_input_of_another_name_lists_the_nearest(given: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pipeline(Losses(), mb_kwargs=given)
    assert str(caught.value).startswith("the example inputs do not fit Losses.forward(")
    assert message in str(caught.value)


def test_what_belongs_to_the_search_of_cuts_says_where() -> None:
    for names, kind in zip(SEARCHED.values(), (Setting, Balanced), strict=True):
        assert {*names} == {field.name for field in fields(kind)} - {"stages"} - ({"order"} if kind is Setting else set())
    with pytest.raises(InputError, match=r"no argument 'inside'\n  try: split_policy=Balanced\(stages, inside=...\)"):
        pipeline(nn.Linear(2, 2), (torch.ones(1, 2),), stages=1, inside="never")  # type: ignore[call-arg]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a class in leaf_modules": ({"stages": 1, "leaf_modules": [nn.Linear]}, "leaf_modules holds a type"),
    "a module in leaf_modules": ({"stages": 1, "leaf_modules": [nn.ReLU()]}, "leaf_modules holds a ReLU"),
    "a class of a policy": ({"split_policy": Balanced}, "is a class"),
    "a policy that returns nothing": ({"split_policy": lambda program: None}, "returned NoneType"),
    "no device": ({"split_policy": Balanced(1, Setting(None))}, "device=None is no device"),  # type: ignore[arg-type]
    "no device in a list": ({"split_policy": Balanced(1, Setting([None]))}, "device=None is no device"),  # type: ignore[list-item]
    "pins": ({"split_policy": Balanced(1, pins=3)}, "pins=3"),  # type: ignore[arg-type]
    "budget": ({"split_policy": Balanced(1, budget="all")}, "budget='all'"),  # type: ignore[arg-type]
    "a loss": ({"split_policy": Balanced(1, loss_fn=3)}, "loss_fn=3"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_argument_of_another_kind_is_named(wrong: str) -> None:
    arguments, message = WRONG[wrong]
    with pytest.raises(StagecutError, match=message):
        pipeline(nn.Linear(2, 2), (torch.ones(1, 2),), **arguments)


def test_functions_are_what_they_were() -> None:
    assert pickle.loads(pickle.dumps(pipeline)) is pipeline
    assert [*inspect.signature(pipeline).parameters][:2] == ["module", "mb_args"]
    assert inspect.signature(Setting).parameters["ranks"].default == Setting().ranks
    assert Pipe.report.__qualname__ == "Pipe.report"


def test_a_function_that_takes_any_argument_still_does() -> None:
    def takes_any(**options: Any) -> dict[str, Any]:
        return options

    assert near_names(takes_any)(anything=1) == {"anything": 1}


def test_arguments_by_position_alone_have_no_names() -> None:
    def by_position(one: int, /, other: int = 0) -> int:
        return one + other

    with pytest.raises(InputError, match=r"has no argument 'one'\n  try: did you mean 'other'"):
        near_names(by_position)(one=1)  # type: ignore[call-arg]


class Wrong(nn.Module):
    """Branches on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def _trace() -> None:
    pipeline(Wrong(), (torch.ones(2),))


def _count() -> None:
    pipeline(nn.Linear(2, 2), (torch.ones(1, 2),), stages=99)


def _name() -> None:
    pipeline(nn.Linear(2, 2), stage=1)  # type: ignore[call-arg]


def _verify() -> None:
    pipeline(nn.Linear(2, 2), (torch.ones(1, 2),)).verify(torch.ones(3))


def _device() -> None:
    Setting(device="H1000").devices(2)


USERS = {_trace: ["_trace", "forward"], _count: ["_count"], _name: ["_name"], _verify: ["_verify"], _device: ["_device"]}


@pytest.mark.parametrize("call", USERS, ids=lambda call: call.__name__)
def test_a_traceback_has_the_users_steps(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECUT_TRACEBACK", raising=False)
    assert _steps_of(call) == USERS[call]
    monkeypatch.setenv("STAGECUT_TRACEBACK", "full")
    assert len(_steps_of(call)) > len(USERS[call])


def _steps_of(call: Callable[[], None]) -> list[str]:
    with pytest.raises(StagecutError) as caught:
        call()
    return [step.name for step in traceback.extract_tb(caught.value.__traceback__)][1:]
