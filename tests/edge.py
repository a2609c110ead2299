"""The one checker behind the edge-case tests: a case is a small model, and its stages do what it does or it is refused.

A case is a class, or a function `f(self, ...)` that becomes the forward of one; `has` gives such a function its attributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from stagecut import Pipe, StagecutError, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.ir.run.objects import opened

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
    bug: why it fails today, or why in one way of running, as {how: why}.
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
    bug: str | dict[str, str] = ""
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
        """Every case in every way of running it."""
        return [*self._params()]

    def _params(self) -> Iterator[Any]:
        for name, case in self.cases.items():
            for how in case.how if not case.refused else (PIPE,):
                reason = case.bug if isinstance(case.bug, str) else case.bug.get(how, "")
                marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
                yield pytest.param(case, how, id=f"{name}-{how}", marks=marks)


def check(case: Case, how: str) -> None:
    """The stages of the case do what its model does, in every mode it names; or it is refused as it says."""
    for training in case.modes:
        if case.refused and not (case.traced_since and TorchVersion(torch.__version__) >= case.traced_since):
            check_refused(case, training)
        else:
            check_equal(case, how, training)


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


def check_equal(case: Case, how: str, training: bool) -> None:
    """Outputs, gradients, buffers, inputs and random numbers of three calls."""
    model, twin = case.build().train(training), case.build().train(training)
    before, random = snapshot(model), torch.get_rng_state()
    pipe = case.cut(model)
    assert torch.equal(torch.get_rng_state(), random), "tracing drew random numbers"
    assert_same(snapshot(model), before, "the model after it was cut")
    if case.stages is not None:
        assert pipe.num_stages == case.stages
    check_names(model, pipe)
    if how == MAILBOX and case.feedback:
        assert_refusal(case, lambda: Posted(pipe), case.feedback)
        return
    runner: Any = pipe.module() if how == PIPE else Posted(pipe)
    for step in range(0, case.steps().stop):
        compare_call(case, twin, runner, step)
    if case.switch:
        twin.train(not training)
        runner.train(not training)
        compare_call(case, twin, runner, 1)
        twin.train(training)
        runner.train(training)
        compare_call(case, twin, runner, 2)


class Posted:
    """The stages as separate processes would run them: they get copies, and share no tensor."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.box = Mailbox(pipe.program, pipe.stages)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec: Any = self.pipe._call_spec
        return spec.unflatten(self.box.forward(spec.flatten(args, kwargs)))

    def train(self, mode: bool) -> None:
        for stage in self.box._stages:
            stage.train(mode)

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        names = self.box.gradients()
        yield from ((n, x) for n, x in self.box.state().items() if n in names)

    def named_buffers(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        names = self.box.gradients()
        yield from ((n, x) for n, x in self.box.state().items() if n not in names)


def compare_call(case: Case, twin: nn.Module, runner: Any, step: int) -> None:
    """One call of both and its backward. Through the mailbox, what is given is not written and strides are not kept."""
    posted = isinstance(runner, Posted)
    expected, found = (observe(case, run, step) for run in (twin, runner))
    assert tree_flatten(found.outputs)[1] == tree_flatten(expected.outputs)[1], "the output structure"
    for part in ("outputs", "inputs", "input_grads", "grads", "parameters", "buffers", "random"):
        if (part == "grads" and not case.compare_grad) or (part == "inputs" and posted):
            continue
        assert_same(getattr(found, part), getattr(expected, part), f"{part} of call {step}", strides=not posted, rtol=case.rtol)
    if not posted:
        assert found.aliases == expected.aliases, "which outputs, inputs and state share storage"


@dataclass
class Observed:
    """What one call did."""

    outputs: Any
    inputs: Any
    input_grads: Any
    grads: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    random: torch.Tensor
    aliases: list[Any]


def observe(case: Case, run: Any, step: int) -> Observed:
    """Calls `run` and goes backward through all its outputs."""
    args, kwargs = case.inputs(step)
    torch.manual_seed(100 + step)
    outputs = opened(run(*args, **kwargs))
    random = torch.get_rng_state()
    parameters = dict(run.named_parameters(remove_duplicate=False))
    buffers = dict(run.named_buffers(remove_duplicate=False))
    shown = opened(tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x, outputs))
    aliases = sharing(tree_leaves(outputs), {f"input {i}": x for i, x in enumerate(tree_leaves((args, kwargs)))} | parameters | buffers)
    losses = [weighted(o) for o in tree_leaves(outputs) if isinstance(o, torch.Tensor) and o.requires_grad]
    if losses and case.compare_grad:
        torch.stack(losses).sum().backward()
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if isinstance(run, Posted):
        run.box.backward()
        grads, input_grads = run.box.gradients(), posted_input_grads(run.box, tree_leaves((args, kwargs)))
    else:
        grads, input_grads = {n: p.grad for n, p in parameters.items()}, [x.grad if x.is_leaf else None for x in given]
    grads = {n: g if g is None else g.clone() for n, g in grads.items()}
    state = ({n: x.detach().clone() for n, x in named.items()} for named in (parameters, buffers))
    return Observed(shown, [x.detach() for x in given], input_grads, grads, *state, random, aliases)


def posted_input_grads(box: Mailbox, given: list[Any]) -> list[Any]:
    """Per tensor given, the sum of the gradients of all inputs it was given as."""
    sums: dict[int, Any] = {}
    for tensor, grad in zip(given, box.input_gradients(), strict=True):
        if isinstance(tensor, torch.Tensor):
            before = sums.get(id(tensor))
            sums[id(tensor)] = grad if before is None else before if grad is None else before + grad
    return [sums[id(x)] for x in given if isinstance(x, torch.Tensor)]


def weighted(output: torch.Tensor) -> torch.Tensor:
    """A loss that tells all elements apart."""
    real = (torch.view_as_real(output) if output.is_complex() else output).double()
    return (real * torch.arange(1, real.numel() + 1).view(real.shape)).sum()


def sharing(outputs: list[Any], others: dict[str, Any]) -> list[Any]:
    """Per output, the names of what is it, and of what shares its storage."""
    known = {n: x for n, x in others.items() if isinstance(x, torch.Tensor)}
    found: list[Any] = []
    for number, output in enumerate(outputs):
        if isinstance(output, torch.Tensor):
            where = output.untyped_storage()._cdata
            found.append(
                (
                    sorted(n for n, x in known.items() if x is output),
                    sorted(n for n, x in known.items() if x.untyped_storage()._cdata == where),
                )
            )
            known[f"output {number}"] = output
    return found


def snapshot(model: nn.Module) -> dict[str, Any]:
    """State by name, copied."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in named}


def check_names(model: nn.Module, pipe: Pipe) -> None:
    """Names: each stage's are the model's, their union is all of the model's, and the tensors are its own."""
    own = model.state_dict(keep_vars=True)
    union: set[str] = set()
    for stage in pipe.stages:
        held = stage.state_dict(keep_vars=True)
        assert all(tensor is own[name] for name, tensor in held.items())
        union |= set(held)
    assert union == set(own)
    assert list(pipe.state_dict()) == list(own)
    for listing in ("named_parameters", "named_buffers"):
        names = {n for n, _ in getattr(model, listing)(remove_duplicate=False)}
        assert {n for n, _ in getattr(pipe, listing)(remove_duplicate=False)} == names
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for stage in pipe.stages:
        assert {name for name, _ in stage.named_modules(remove_duplicate=False)} <= modules


def assert_same(found: Any, expected: Any, what: str, strides: bool = True, rtol: float = 0.0) -> None:
    """Tensors bit for bit, gradients up to rounding, everything else by type and ==."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key, item in expected.items():
            assert_same(found[key], item, f"{what}: {key}", strides, rtol)
        return
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not isinstance(other, torch.Tensor):
            assert type(one) is type(other), what
            assert one == other, what
            continue
        assert isinstance(one, torch.Tensor), f"{what}: {one} is no tensor"
        assert one.requires_grad == other.requires_grad, f"{what}: requires_grad is {one.requires_grad}"
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{what}: {one} for {other}"
        assert not strides or one.stride() == other.stride(), f"{what}: strides {one.stride()} for {other.stride()}"
        loose = "grad" in what
        if other.dtype.itemsize == 1 and other.is_floating_point():
            one, other = one.float(), other.float()
        near = 0.0 if not loose else rtol or (0.02 if other.dtype.itemsize <= 2 else 1e-5 if other.dtype == torch.float32 else 1e-9)
        torch.testing.assert_close(one.detach(), other.detach(), rtol=near, atol=near, equal_nan=True, msg=lambda m: f"{what}: {m}")
