"""Traces a model in both modes where its trace differs between train and eval mode. The program then does
what the model does in either mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stagecut.frontend.lower.align import Alignment, CannotFollow
from stagecut.frontend.lower.lower import returns_what_it_is_given
from stagecut.frontend.lower.merge import Flags, Merge
from stagecut.frontend.watch.watch import same_constant
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import CaptureError, InputError, SplitError
from stagecut.ir.graph import Kind, Namer, Op, Program, nested_ops, scope_fqn, target_of
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.targets import resolve

Traced = tuple[Program, Bindings]


def follow(
    module: nn.Module, traced: Traced, again: Callable[[], Traced], asked: Iterable[str]
) -> None:
    """The traced program does what `module` does in either mode, also where Python chose by `training` during
    the trace.

    Where it cannot, `bindings.branches` says for each module by whose flag Python chose where it did so and
    why the program cannot follow. `again` traces the module as it stands when called. Afterwards the module
    has the flags and the state that it had. `asked` are the modules at which the user cuts.
    """
    bindings = traced[1]
    if not bindings.choices:
        return
    choices = dict(bindings.choices)
    try:
        if bindings.branches:
            raise CannotFollow(
                f"its mode is more than flags: {next(iter(bindings.branches.values()))}"
            )
        with in_other_mode(module):
            traced_again = _traced(module, again)
        choices |= {
            path: place
            for path, place in traced_again[1].choices.items()
            if path not in choices
        }
        _merge(module, traced, traced_again, choices, asked)
    except CannotFollow as error:
        refuse_to_follow(bindings, choices, str(error))
        return
    stays = {
        path: place
        for path, place in choices.items()
        if bindings.flag(path) == traced_again[1].flag(path)
    }
    refuse_to_follow(bindings, stays, "its flag was not that of the model")


def refuse_to_follow(bindings: Bindings, choices: dict[str, str], why: str) -> None:
    """The stages cannot follow these modules to the other mode, and say so when they are asked to."""
    for path, place in choices.items():
        bindings.learn(path, branch=f"{place}: {why}")
    bindings.choices = {}


def hold_one_mode(traced: Traced, why: str) -> None:
    """The program does what the model does in its present mode only."""
    program, bindings = traced
    choices = dict(bindings.choices)
    for op in filter(returns_what_it_is_given, program.ops):
        op.effects = replace(op.effects, views=())
        choices[scope_fqn(op.scope)] = op.where()
    refuse_to_follow(bindings, choices, why)


@contextmanager
def in_other_mode(module: nn.Module) -> Iterator[None]:
    """While open, `module` is in the opposite of its mode. Afterwards all flags are as before."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        module.train(not module.training)
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def _traced(module: nn.Module, again: Callable[[], Traced]) -> Traced:
    try:
        return again()
    except (CaptureError, SplitError, InputError) as error:
        mode = "train" if module.training else "eval"
        raise CannotFollow(
            f"in {mode} mode it cannot be traced: {error.what} ({error.where})"
        ) from error


def _merge(
    module: nn.Module,
    traced: Traced,
    traced_again: Traced,
    choices: dict[str, str],
    asked: Iterable[str],
) -> None:
    program, bindings = traced
    their_program, theirs = traced_again
    if bindings.call.out_spec != theirs.call.out_spec:
        raise CannotFollow("the model returns another structure in the other mode")
    if bindings.call.ranges != theirs.call.ranges:
        raise CannotFollow("the other mode takes other sizes")
    functions = _with_our_names(their_program, bindings, theirs)

    def are_equal(our_name: str, their_name: str) -> bool:
        ours, their_tensor = bindings.tensors[our_name], theirs.tensors[their_name]
        if (ours.dtype, ours.shape) != (their_tensor.dtype, their_tensor.shape):
            return False
        return same_constant(ours, their_tensor)

    flags = Flags(
        {path: facts.training for path, facts in bindings.facts.items()},
        {path: facts.training for path, facts in theirs.facts.items()},
        list(choices),
        _first_names(module),
    )
    merge = Merge(Alignment(program, their_program, are_equal, filled), flags, asked)
    merge.run()
    bindings.functions |= functions
    bindings.modules |= theirs.modules
    bindings.tensors |= {
        entry.name: theirs.tensors[name] for name, entry in merge.constants.items()
    }
    bindings.choices = {}
    verify(program, after="both modes were made one")


def _with_our_names(
    their_program: Program, bindings: Bindings, theirs: Bindings
) -> dict[str, Callable[..., Any]]:
    """Their program calls the user's functions by the names that ours has for them, and functions that only
    they have by new names.
    """
    namer = Namer(bindings.functions)
    our_names = {function: name for name, function in bindings.functions.items()}
    names = {
        name: our_names.get(function) or namer(name)
        for name, function in theirs.functions.items()
    }
    for op in nested_ops(their_program.all_ops()):
        op.target = target_of(names.get(op.target, op.target))
    return {names[name]: function for name, function in theirs.functions.items()}


def _first_names(module: nn.Module) -> dict[str, str]:
    """Module path -> the first path of the same module."""
    first: dict[int, str] = {}
    return {
        path: first.setdefault(id(owner), path)
        for path, owner in module.named_modules(remove_duplicate=False)
    }


def filled(op: Op, like: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an op of torch. Arguments that the op leaves out but `like` gives have the defaults of
    its schema.
    """
    target = resolve(op.target) if op.target.kind in (Kind.ATEN, Kind.LIBRARY) else None
    if not isinstance(target, torch._ops.OpOverload):
        return op.args, op.kwargs
    args, kwargs = list(op.args), dict(op.kwargs)
    for position, argument in enumerate(target._schema.arguments):
        wanted = position < len(like.args) or argument.name in like.kwargs
        if (
            not wanted
            or position < len(args)
            or argument.name in kwargs
            or not argument.has_default_value()
        ):
            continue
        if position == len(args) and not argument.kwarg_only:
            args.append(argument.default_value)
        else:
            kwargs[argument.name] = argument.default_value
    return tuple(args), {key: kwargs[key] for key in sorted(kwargs)}
