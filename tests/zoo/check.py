"""Cuts an architecture of the zoo in eval and in train mode, and compares the pipe with a copy of the model in both modes each time."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves
from zoo.cuts import cut_points, equal_ops
from zoo.models import Architecture

from stagecut import ModeError, Pipe, SplitPoint, pipeline
from stagecut.ir.errors import SplitError, VerifyError
from stagecut.ir.run.objects import opened, opening

State = dict[str, torch.Tensor]


@dataclass
class Step:
    """What one step of training makes."""

    output: Any
    gradients: State


class Wrong(Exception):
    """Something the pipe does not do as the model does."""


ONE_MODE = "one mode"
"""How the result begins of a pipe that is right in the mode it was cut in, and refuses to be switched to the other."""


def check(architecture: Architecture, stages: int) -> str:
    """'ok', what begins with ONE_MODE, or the first thing that is wrong. Cut in each mode, and switched to the other and back."""
    refused = ""
    for mode in architecture.modes:
        try:
            refused = _check(architecture, stages, training=mode == "train") or refused
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


def _check(architecture: Architecture, stages: int, training: bool) -> str:
    torch.manual_seed(0)
    model, inputs = architecture.make().train(training), architecture.inputs()
    if architecture.warm:
        _run(model, inputs)
    twin = deepcopy(model)
    pipe = _cut(model, inputs, stages, architecture.leaves)
    _unchanged(model, twin)
    _same_names(pipe, twin)
    first = _compare(pipe, twin, inputs)
    if not training:
        _same_tree("the model itself afterwards: output", _run(model, inputs), first.output, 1e-6)
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


def _compare(pipe: Pipe, twin: nn.Module, inputs: dict[str, Any]) -> Step:
    """The step of the model, which that of the pipe is equal to."""
    traced = _copy(twin)
    expected, found = _step(twin, inputs), _step(pipe.module(), inputs)
    try:
        _same_step(found, expected, 1e-6)
    except Wrong as error:
        _same_step(found, expected, 1e-3)
        if traced is None:
            raise
        _same_step(found, _step(_exported(traced, inputs, error), inputs), 0)
    _same_tensors("after the step, buffer", dict(pipe.named_buffers()), _held(pipe, dict(twin.named_buffers())), 1e-6)
    return expected


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
    _same_tensors("of the model: parameter", dict(model.named_parameters()), dict(twin.named_parameters()))
    _same_tensors("of the model: buffer", dict(model.named_buffers()), dict(twin.named_buffers()))
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(value)):
                raise Wrong(f"pipeline() left a fake tensor in {name}.{key} of the model")


def _same_names(pipe: Pipe, twin: nn.Module) -> None:
    union: State = {}
    for stage in pipe.stages:
        state = stage.state_dict()
        _same_tensors("in two stages: state", {n: state[n] for n in state if n in union}, {n: union[n] for n in union if n in state})
        union |= state
    _same_tensors("of the stages: state", union, twin.state_dict())
    if list(pipe.state_dict()) != list(twin.state_dict()):
        raise Wrong("the order of the state dict differs")


def _exported(model: nn.Module, inputs: dict[str, Any], error: Wrong) -> nn.Module:
    """What torch.export traces: it may round otherwise than the model, and the pipe has to follow it to the bit."""
    try:
        with opening(model):
            return torch.export.export(model, (), inputs).module(check_guards=False)
    except Exception:
        raise error from None


def _held(pipe: Pipe, buffers: State) -> State:
    """Those buffers a pipe has to hold: non-persistent ones that nothing reads may be gone."""
    held = {name for name, _ in pipe.named_buffers()} | set(pipe.state_dict())
    return {name: tensor for name, tensor in buffers.items() if name in held}


def _step(module: nn.Module, inputs: dict[str, Any]) -> Step:
    module.zero_grad()
    output = _run(module, inputs)
    _loss(output).backward()
    return Step(output, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})


def _same_step(found: Step, expected: Step, tolerance: float) -> None:
    if not expected.gradients:
        raise Wrong("no parameter of the model has a gradient: the check is void")
    _same_tree("output", found.output, expected.output, tolerance)
    _same_tensors("gradient", found.gradients, expected.gradients, tolerance)


def _run(module: nn.Module, inputs: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    return module(**inputs)


def _loss(output: Any) -> torch.Tensor:
    """The model's own loss, or the mean of the means of its outputs."""
    loss = getattr(output, "loss", None)
    if loss is None:
        leaves = [leaf for leaf in tree_leaves(opened(output)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        loss = torch.stack([leaf.float().mean() for leaf in leaves]).mean()
    if not loss.isfinite():
        raise Wrong(f"the loss is {loss.item()}: the check is void")
    return loss.mean()  # type: ignore[no-any-return]


def _same_tree(what: str, found: Any, expected: Any, tolerance: float) -> None:
    if type(found) is not type(expected):
        raise Wrong(f"{what} is a {type(found).__name__} instead of a {type(expected).__name__}")
    (given, given_spec), (wanted, wanted_spec) = tree_flatten_with_path(opened(found)), tree_flatten_with_path(opened(expected))
    if given_spec != wanted_spec:
        raise Wrong(f"{what} has another structure: {given_spec} instead of {wanted_spec}")
    for (path, leaf), (_, want) in zip(given, wanted, strict=True):
        _same_leaf(what + keystr(path), leaf, want, tolerance)


def _same_tensors(what: str, found: State, expected: State, tolerance: float = 0) -> None:
    if found.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - found.keys())[:3], sorted(found.keys() - expected.keys())[:3]
        raise Wrong(f"{what} names differ: missing {missing}, extra {extra}")
    for name, want in expected.items():
        _same_leaf(f"{what} {name}", found[name], want, tolerance)


def _same_leaf(what: str, found: Any, want: Any, tolerance: float) -> None:
    if not isinstance(want, torch.Tensor):
        if type(found) is not type(want) or found != want:
            raise Wrong(f"{what} is {found!r} instead of {want!r}")
        return
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (want.shape, want.dtype):
        raise Wrong(f"{what} is {_describe(found)} instead of {_describe(want)}")
    if found.requires_grad != want.requires_grad:
        raise Wrong(f"{what} requires_grad is {found.requires_grad} instead of {want.requires_grad}")
    if not _close(found.detach(), want.detach(), tolerance):
        off = (found.detach().double() - want.detach().double()).abs().max().item()
        raise Wrong(f"{what} differs by {off:.1e} where the largest is {want.abs().max().item():.1e}")


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)


def _close(found: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Bit for bit; floats up to `tolerance`, relative to each and to the largest."""
    if torch.equal(found, want):
        return True
    if not want.is_floating_point():
        return False
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    return torch.allclose(found, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
