"""The one checker behind the edge-case tests: a case is a small model, and its stages do what it does or it is refused.

A case is a class, or a function `f(self, ...)` that becomes the forward of one; `has` gives such a function its attributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from compare import APART, Near, Posted, assert_same, differences, names, observe, snapshot, weighted
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves

from stagecut import Pipe, StagecutError, pipeline

PIPE, MAILBOX = "pipe", "mailbox"
HOW = (PIPE, MAILBOX)


def t(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A tensor of that shape, always the same, with values of both signs around 1."""
    count = torch.Size(shape).numel()
    return (torch.arange(1, count + 1, dtype=torch.float64).mul(0.7).sin() + 0.3).view(shape).to(dtype)


def linear(d: int = 4) -> nn.Linear:
    """A square layer in double precision."""
    return nn.Linear(d, d).double()


def weight(*shape: int) -> nn.Parameter:
    """A parameter in double precision."""
    return nn.Parameter(torch.randn(shape or (4, 4), dtype=torch.float64))


def buffer(*shape: int, persistent: bool = True, value: float | None = None) -> nn.Buffer:
    """A buffer in double precision."""
    data = torch.randn(shape, dtype=torch.float64) if value is None else torch.full(shape, value, dtype=torch.float64)
    return nn.Buffer(data, persistent=persistent)


@dataclass
class Case:
    """A model and how it is cut and called.

    stages: how many there must be. modes: the training flags it is captured under. switch: also called in the other mode.
    grad: whether floating inputs require gradient. rtol: how near gradients must be where the default is too strict.
    refused: what pipeline() must say instead, as a pattern; where `traced_since` is a version of torch, before that one.
    feedback: the same for running the stages in several processes.
    owns: whether what is returned shares storage with state where it does in the model.
    bug: why it fails today. how: the ways in which it is run.
    """

    name: str
    make: Any
    args: tuple[Any, ...]
    stages: int | None = None
    kw: dict[str, Any] = field(default_factory=dict)
    has: dict[str, Callable[[], Any]] = field(default_factory=dict)
    modes: tuple[bool, ...] = (True,)
    switch: bool = False
    grad: bool = True
    compare_grad: bool = True
    rtol: float = 0.0
    spec: dict[str, Any] | None = None
    policy: Any = None
    dynamic: Any = None
    calls: tuple[tuple[Any, ...], ...] = ()
    refused: str = ""
    traced_since: str = ""
    feedback: str = ""
    owns: bool = True
    bug: str = ""
    how: tuple[str, ...] = HOW

    def build(self) -> nn.Module:
        """The model, the same each time."""
        torch.manual_seed(11)
        if isinstance(self.make, type):
            return self.make()
        model: nn.Module = type(self.name, (nn.Module,), {"forward": as_forward(self.make), "__module__": self.make.__module__})()
        for name, attribute in self.has.items():
            value = attribute() if not isinstance(attribute, (int, float, str)) else attribute
            setattr(model, name, value)
        return model

    def cut(self, model: nn.Module) -> Pipe:
        """The pipe of the model."""
        args, kwargs = self.inputs(0)
        return pipeline(model, args, kwargs, split_spec=self.spec, split_policy=self.policy, dynamic_shapes=self.dynamic)

    def inputs(self, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call, new tensors each time; tensors that share storage go on sharing it."""
        args, kwargs = deepcopy((self.calls[(step - 1) % len(self.calls)] if step and self.calls else self.args, self.kw))
        for leaf in dict.fromkeys(x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
            if leaf.is_floating_point() or leaf.is_complex():
                if step and leaf._base is None:
                    leaf.add_(0.1 * step) if leaf.element_size() > 1 else None
                if self.grad and leaf._base is None:
                    leaf.requires_grad_()
        return args, kwargs

    def steps(self) -> range:
        """The calls after the first."""
        return range(1, max(3, len(self.calls) + 1))

    def lines(self) -> list[str]:
        """Where its source stands, as file:line."""
        source, first = inspect.getsourcelines(self.make)
        file = Path(inspect.getsourcefile(self.make) or "").name
        return [f"{file}:{line}" for line in range(first, first + len(source))]


def as_forward(function: Any) -> Any:
    """The function under the name `forward`: torch notes source lines only of frames of that name."""
    code = function.__code__.replace(co_name="forward")
    made = FunctionType(code, function.__globals__, "forward", function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Family:
    """The cases of one file: call it on inputs and options to get the decorator that adds one."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}

    def __call__(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        def add(make: Any) -> Any:
            assert make.__name__ not in self.cases
            self.cases[make.__name__] = Case(make.__name__, make, args, **options)
            return make

        return add

    def params(self) -> list[Any]:
        """Every case."""
        return [pytest.param(case, id=name, marks=_marks(case)) for name, case in self.cases.items()]


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xfail(strict=True, reason=case.bug)] if case.bug else []


def check(case: Case, how: tuple[str, ...] = HOW) -> None:
    """The stages of the case do what its model does, in every mode it names; or it is refused as it says."""
    for training in case.modes:
        if case.refused and not (case.traced_since and TorchVersion(torch.__version__) >= case.traced_since):
            check_refused(case, training)
        else:
            check_equal(case, training, [way for way in how if way in case.how])


def check_refused(case: Case, training: bool) -> None:
    """The error says why, where in the user's source, and what to do."""
    assert_refusal(case, lambda: case.cut(case.build().train(training)), case.refused)


def assert_refusal(case: Case, action: Callable[[], Any], pattern: str) -> None:
    """The action raises a StagecutError of that pattern, which names a line of the case and a remedy."""
    with pytest.raises(StagecutError, match=pattern) as caught:
        action()
    message = str(caught.value)
    places = case.lines() if not case.spec else [f"'{name}'" for name in case.spec]
    assert any(place in message for place in places), f"names no source line: {message}"
    assert caught.value.hint, f"gives no remedy: {message}"


def check_equal(case: Case, training: bool, how: list[str]) -> None:
    """Cut once, and run in those ways: outputs, gradients, buffers, inputs and random numbers of three calls."""
    model, twin = case.build().train(training), case.build().train(training)
    before, random = snapshot(model), torch.get_rng_state()
    pipe = case.cut(model)
    assert torch.equal(torch.get_rng_state(), random), "tracing drew random numbers"
    assert_same(snapshot(model), before, "the model after it was cut")
    if case.stages is not None:
        assert pipe.num_stages == case.stages
    assert not names(model, pipe)
    runners: list[Any] = [Posted(pipe)] if MAILBOX in how and not case.feedback else []
    if MAILBOX in how and case.feedback:
        assert_refusal(case, lambda: Posted(pipe), case.feedback)
    if PIPE in how:
        runners.append(pipe.module())
    for step in range(0, case.steps().stop):
        compare_call(case, step, twin, *runners)
    if case.switch:
        for step, mode in ((1, not training), (2, training)):
            for runner in (twin, *runners):
                runner.train(mode)
            compare_call(case, step, twin, *runners)


def compare_call(case: Case, step: int, twin: nn.Module, *runners: Any) -> None:
    """One call of all and its backward: `runners` do as `twin`. What is posted shares nothing with what is given, and does not write it."""
    loss = weighted if case.compare_grad else lambda _: None
    expected = observe(twin, case.inputs(step), 100 + step, loss)
    for runner in runners:
        apart = isinstance(runner, Posted)
        without = APART if apart else () if case.owns else ("aliases of state",)
        found = observe(runner, case.inputs(step), 100 + step, loss)
        wrong = differences(expected, found, Near(case.rtol or None, gradient_strides=not apart), without)
        assert not wrong, "\n".join([f"call {step}{', posted' * apart}:", *wrong])
