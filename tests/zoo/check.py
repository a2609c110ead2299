"""Cuts an architecture of the zoo in eval and in train mode, and compares the pipe with a copy of the model in both modes each time."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from compare import Near, Seen, differences, names, observe, snapshot
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from zoo.cuts import cut_points, equal_ops
from zoo.models import HERE, Architecture, Place

from stagecut import ModeError, Pipe, SplitPoint, pipeline
from stagecut.ir.errors import SplitError, VerifyError
from stagecut.ir.run.given import opening
from stagecut.ir.run.objects import opened

NEAR = Near(gradients=1e-6, others=1e-6, least=0.0, strides=False, gradient_strides=False)
ELSEWHERE = ("random state", "aliases", "input", "parameter", "gradient of input")
"""What is not compared: a trace of a large model may share storage and draw otherwise."""


class Wrong(Exception):
    """Something the pipe does not do as the model does."""


class Void(Exception):
    """The model itself does not run there."""


VOID = "void"
"""How the result begins of a model that itself does not run there."""
ONE_MODE = "one mode"
"""How the result begins of a pipe that is right in the mode it was cut in, and refuses to be switched to the other."""


def check(architecture: Architecture, stages: int, notes: list[str] | None = None, place: Place = HERE) -> str:
    """'ok', what begins with ONE_MODE, or the first thing that is wrong. Cut in each mode, and switched to the other and back.

    What the pipes note is added to `notes`.
    """
    refused = ""
    for mode in architecture.modes:
        try:
            refused = _check(architecture, stages, mode == "train", notes if notes is not None else [], place) or refused
        except Void as error:
            return f"{VOID}: {error}"
        except Wrong as error:
            return f"{mode}: {error}"
        except Exception as error:
            return f"{mode}: {_summary(error)}"
    return refused or "ok"


def _summary(error: Exception) -> str:
    """Of an error: the first line, or the first of the violations it lists."""
    if isinstance(error, VerifyError):
        return f"VerifyError: {error.violations[0]}"
    return f"{type(error).__name__}: {next((line.strip() for line in str(error).splitlines() if line.strip()), 'no message')}"


def made(architecture: Architecture, training: bool, place: Place) -> tuple[nn.Module, dict[str, Any]]:
    """A new model and its inputs. Raises Void where the model itself does not run there."""
    torch.manual_seed(0)
    model, inputs = architecture.make().train(training).to(place.device, place.dtype), place.put(architecture.inputs())
    if architecture.warm:
        _run(model, inputs)
    elif place != HERE:
        try:
            _loss(deepcopy(model)(**deepcopy(inputs))).backward()
        except Exception as error:
            raise Void(_summary(error)) from error
    return model, inputs


def _check(architecture: Architecture, stages: int, training: bool, notes: list[str], place: Place) -> str:
    model, inputs = made(architecture, training, place)
    twin = deepcopy(model)
    pipe = _cut(model, inputs, stages, architecture.leaves)
    notes += pipe.notes
    _unchanged(model, twin)
    _hold("", names(model, pipe))
    first = _compare(pipe, twin, inputs)
    if not training:
        outputs = {name: leaf for name, leaf in first.items() if name.startswith(("output", "structure"))}
        again = _step(model, inputs, loss=lambda _: None)  # a model that keeps what its first call made goes backward once
        _hold("the model itself afterwards: ", differences(outputs, again, NEAR, (*ELSEWHERE, "gradient", "buffer")))
    return _switch(pipe, twin, inputs, training) if len(architecture.modes) > 1 else ""


def _switch(pipe: Pipe, twin: nn.Module, inputs: dict[str, Any], training: bool) -> str:
    """Compares in the other mode, and again in the first; says so where the stages refuse to go there."""
    for mode in (not training, training):
        name = "train" if mode else "eval"
        try:
            pipe.train(mode)
        except ModeError as error:
            if pipe.training is not training or any(stage.training is not training for stage in pipe.stages):
                raise Wrong("a refused switch has switched something") from None
            return f"{ONE_MODE}: cut in {'train' if training else 'eval'} mode: {error.where}"
        try:
            _compare(pipe, twin.train(mode), inputs)
        except Wrong as error:
            raise Wrong(f"switched to {name} mode: {error}") from error
    return ""


def _compare(pipe: Pipe, twin: nn.Module, inputs: dict[str, Any]) -> Seen:
    """The step of the model, which that of the pipe is equal to."""
    traced = _copy(twin)
    expected, found = _held(pipe, _step(twin, inputs)), _step(pipe.module(), inputs)
    if not any(name.startswith("gradient") for name in expected):
        raise Wrong("no parameter of the model has a gradient: the check is void")
    near = replace(NEAR, gradients=_rounding(twin))
    wrong = differences(expected, found, near, ELSEWHERE)
    if wrong and traced is not None:
        wrong = steady(wrong, expected, _step(deepcopy(traced), inputs))
    if wrong:
        _hold("", differences(expected, found, replace(NEAR, gradients=1e-3, others=1e-3), (*ELSEWHERE, "buffer")))
        exported = _exported(traced, inputs) if traced is not None else None
        if exported is None:
            _hold("", wrong)
        _hold("", differences(_step(exported, inputs), found, replace(NEAR, gradients=0.0, others=0.0), (*ELSEWHERE, "buffer")))
        _hold("", differences(expected, found, near, (*ELSEWHERE, "output", "gradient")))
    return expected


def _rounding(model: nn.Module) -> float:
    """By how much gradients may differ that are added in another order: a value that several stages read has one from each."""
    return max(torch.finfo(parameter.dtype).eps for parameter in model.parameters()) * 8


def steady(wrong: list[str], expected: Seen, again: Seen, near: Near = NEAR) -> list[str]:
    """The differences in what is the same in two runs of one and the same: Reformer draws its seeds from the system, and GPUs add in
    any order."""
    unsteady = [name for name in expected if differences({name: expected[name]}, {name: again.get(name)}, near)]
    return [line for line in wrong if not line.startswith(tuple(f"{name} " for name in unsteady))]


def _hold(when: str, wrong: list[str]) -> None:
    """Raises Wrong for the first of the differences, if there is one."""
    if wrong:
        raise Wrong(when + wrong[0])


def _copy(model: nn.Module) -> nn.Module | None:
    """A copy, None of a model that keeps what its last call made."""
    try:
        return deepcopy(model)
    except RuntimeError:
        return None


def _cut(model: nn.Module, inputs: dict[str, Any], stages: int, leaves: tuple[str, ...]) -> Pipe:
    names = cut_points(model, inputs, stages, leaves)
    flags = {name: module.training for name, module in model.named_modules()}
    random_states = torch.get_rng_state(), random.getstate()
    pipe = _pipeline(model, inputs, names, stages, leaves)
    if pipe.num_stages != stages:
        raise Wrong(f"{pipe.num_stages} stages instead of {stages}, cut at {names}")
    if not torch.equal(torch.get_rng_state(), random_states[0]) or random.getstate() != random_states[1]:
        raise Wrong("pipeline() moved the random state")
    if {name: module.training for name, module in model.named_modules()} != flags:
        raise Wrong("pipeline() changed a training flag of the model")
    return pipe


def _pipeline(model: nn.Module, inputs: dict[str, Any], names: list[str] | None, stages: int, leaves: tuple[str, ...]) -> Pipe:
    """Cut at `names`, or by count where there are none or they lie in a module that tracing had to keep whole."""
    spec = dict.fromkeys(names or (), SplitPoint.BEGINNING)
    if spec:
        try:
            return pipeline(model, mb_kwargs=inputs, split_spec=spec, leaf_modules=leaves)
        except SplitError as error:
            refused = error
    pipe = pipeline(model, mb_kwargs=inputs, split_policy=equal_ops(stages), leaf_modules=leaves)
    if spec and not pipe.notes:
        raise refused
    return pipe


def _unchanged(model: nn.Module, twin: nn.Module) -> None:
    """`model` holds what it held before it was cut, and nothing that a tracer left behind."""
    _hold("of the model: ", differences(snapshot(twin), snapshot(model)))
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(value)):
                raise Wrong(f"pipeline() left a fake tensor in {name}.{key} of the model")


def _exported(model: nn.Module, inputs: dict[str, Any]) -> nn.Module | None:
    """What torch.export traces: it may round otherwise than the model, and the pipe has to follow it to the bit."""
    try:
        with opening(model):
            return torch.export.export(model, (), inputs).module(check_guards=False)
    except Exception:
        return None


def _held(pipe: Pipe, seen: Seen) -> Seen:
    """Without those buffers that a pipe need not hold: non-persistent ones that nothing reads may be gone."""
    held = {f"buffer {name}" for name in (*dict(pipe.named_buffers(remove_duplicate=False)), *pipe.state_dict())}
    return {name: item for name, item in seen.items() if not name.startswith("buffer") or name in held}


def _step(module: nn.Module, inputs: dict[str, Any], loss: Callable[[Any], torch.Tensor | None] | None = None) -> Seen:
    """A step of training, from a fixed random state."""
    module.zero_grad()
    random.seed(1)
    seen = observe(module, ((), inputs), 1, loss if loss is not None else _loss)
    return {name: item for name, item in seen.items() if item is not None or not name.startswith("gradient")}


def _run(module: nn.Module, inputs: dict[str, Any]) -> None:
    torch.manual_seed(1)
    random.seed(1)
    module(**inputs)


def _loss(output: Any) -> torch.Tensor:
    """The model's own loss, or the mean of the means of its outputs."""
    loss = getattr(output, "loss", None)
    if loss is None:
        leaves = [leaf for leaf in tree_leaves(opened(output)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        loss = torch.stack([leaf.float().mean() for leaf in leaves]).mean()
    if not loss.isfinite():
        raise Wrong(f"the loss is {loss.item()}: the check is void")
    return loss.mean()  # type: ignore[no-any-return]
