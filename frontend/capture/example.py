"""The calling convention of a model: user arguments -> the flat inputs of a program, flat outputs -> the
model's structure.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.parameter import is_lazy
from torch.utils._pytree import (
    tree_leaves,
    tree_map,
)

from stagecut.frontend.source import failing_line, first_line
from stagecut.ir.errors import CaptureError, InputError
from stagecut.ir.keywords import names_taken, refuse_unknown
from stagecut.ir.run.call import is_size
from stagecut.ir.run.failing import failed_at, failed_calls


@contextmanager
def giving_sizes(module: torch.nn.Module, inputs: Any) -> Iterator[None]:
    """While open, `module` is given a torch.Size where these inputs have one, in the place of the tracer's
    tuple.
    """

    def give(_: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(
            lambda example, leaf: torch.Size(leaf) if is_size(example) else leaf,
            inputs,
            (args, kwargs),
            is_leaf=is_size,
        )

    if not any(map(is_size, tree_leaves(inputs, is_leaf=is_size))):
        yield
        return
    hook = module.register_forward_pre_hook(give, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def failing_on_example(
    cls: type, error: Exception, otherwise: str = ""
) -> CaptureError:
    """The refusal of a model of this class that fails with `error` on its example inputs. `otherwise` is
    another cure.
    """
    hint = "change the inputs or the model until model(*mb_args, **mb_kwargs) runs"
    refusal = CaptureError(
        f"{cls.__name__} fails on the example inputs: {first_line(error)}",
        where=_failing_place(error, cls),
        hint=f"{hint}{otherwise}",
    )
    refusal.cause = error
    return refusal


def _failing_place(error: Exception, cls: type) -> str:
    """The innermost module of the model that fails, what it was given, and the line."""
    line = failing_line(error, cls)
    calls = failed_calls(error)
    if not calls:
        return line
    # by the dict of the module: a tracer may put another object in front of it
    paths = {id(vars(owner)): path for path, owner in calls[0].module.named_modules()}
    calls.reverse()
    for call in calls:
        path = paths.get(id(vars(call.module)), "")
        if path:
            return failed_at(path, call.given, line)
    return line


_NESTED = hasattr(import_module("torch.export._trace"), "_combine_args_for_tracing")
"""True for the torch that has the shapes of keywords without a parameter under the name of `**kwargs`."""


@contextmanager
def keywords_by_name() -> Iterator[None]:
    """While open, torch.export has dynamic shapes of each keyword argument under its name.

    Before torch 2.14 it goes by two orders, and takes none where forward has keywords that its signature does
    not name.
    """
    if _NESTED:
        yield
        return

    def combined(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        named = inspect.signature(module.forward).bind_partial(*args).arguments
        return {**named, **(kwargs or {})}

    with ExitStack() as stack:
        for place in ("torch._export.non_strict_utils", "torch.export._trace"):
            stack.enter_context(patch(f"{place}._combine_args", combined))
        yield


def shapes_by_name(module: torch.nn.Module, shapes: Any) -> Any:
    """The dynamic shapes of all keyword arguments by name. Those that no parameter names are among them, or
    under the name of the parameter that takes them, as the version of torch has it.
    """
    if not isinstance(shapes, dict):
        return shapes
    by_name = dict(shapes)
    parameters = inspect.signature(module.forward).parameters
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            by_name |= by_name.pop(name, None) or {}
            if _NESTED and not by_name.keys() <= parameters.keys():
                others = [key for key in by_name if key not in parameters]
                by_name[name] = {key: by_name.pop(key) for key in others}
    return by_name


def check_containers(args: Any, kwargs: Any) -> None:
    """Returns for a tuple or list and a dict, or None. Raises InputError with what was meant otherwise."""
    if args is not None and not isinstance(args, tuple | list):
        hint = "write (x,) for a single argument"
        if isinstance(args, Mapping):
            hint = "mb_kwargs= takes arguments by name"
        elif kwargs is not None and not isinstance(kwargs, Mapping):
            hint = "mb_args=(x, y): all positional arguments in one tuple"
        raise InputError(
            f"mb_args must be a tuple, not {type(args).__name__}",
            hint=hint,
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        hint = 'mb_kwargs={"name": value}; mb_args=(x, y) has all positional ones'
        if isinstance(kwargs, Mapping):
            hint = "mb_kwargs=dict(...) of it"
        raise InputError(
            f"mb_kwargs must be a dict, not {type(kwargs).__name__}", hint=hint
        )


def check_example(
    module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Returns when the example call fits `module.forward`; raises InputError naming the argument
    otherwise.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "no model can be traced under torch.inference_mode",
            hint="call it outside; the stages run under it",
        )
    check_containers(args, kwargs)
    _check_can_be_called(module)
    signature = inspect.signature(module.forward)
    misfit = f"the example inputs do not fit {type(module).__name__}.forward{signature}"
    names = names_taken(signature)
    if names is not None:
        refuse_unknown(f"{misfit}: it", names, kwargs)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{misfit}: {error}",
            hint="mb_args are its positional and mb_kwargs its keyword arguments",
        ) from None


def _check_can_be_called(module: torch.nn.Module) -> None:
    """Returns for a module with a Python forward whose tensors have sizes; raises InputError naming what has
    none.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"the model is a {type(module).__name__}, which torch.jit has compiled: it has no Python "
            "forward to trace",
            where=f"the {module.original_name} given to pipeline()",
            hint="give the nn.Module that it was made of",
        )
    lazy = next(
        (
            name
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if is_lazy(tensor)
        ),
        None,
    )
    if lazy is not None:
        raise InputError(
            f"'{lazy}' has no size before the first call of its module",
            where=f"the lazy module at '{lazy.rpartition('.')[0]}'",
            hint="call the model once on the example inputs, then cut it",
        )
