"""Names of op targets: a callable -> its name in the IR, and a name -> the callable.

A name is `aten.add.Tensor` for torch.ops.aten, `torch.ops.NS.NAME.OVERLOAD` for another namespace, a function
of one of the listed modules (`torch.relu`, `operator.add`), `method.NAME`, `module.PATH` or `extern.NAME`.
Nothing else is ever resolved: IR text is read from files, and no name in it may reach a callable outside of
this list.
"""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Callable
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from stagecut.ir.errors import EmitError
from stagecut.ir.graph import Kind, Op, Token

BUILTINS = frozenset(
    "getattr abs round min max len sum pow divmod int float bool str tuple list slice isinstance".split()
)
_TORCH_OWN = frozenset(
    "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum sym_sqrt _check checkpoint".split()
)
_REFUSED = frozenset(
    "from_file tofile apply_ map_ map2_ register_hook register_post_accumulate_grad_hook".split()
)
_REFUSED_NAMESPACES = frozenset("prim debugprims debug_mode_ops".split())
_FILES = frozenset("filename file path".split())
"""Arguments of registered ops that name a file."""
DEVICE = re.compile(r'device\("([a-z]+(?::[0-9]+)?)"\)')
_CONSTANT = re.compile(r"torch\.[a-z0-9_]+")
_OWNERS = (torch.Tensor, dict, list, tuple, str, torch.Size)


def _functions(
    module: Any,
    types: tuple[type, ...] = (BuiltinFunctionType, FunctionType),
) -> frozenset[str]:
    """The names of the functions in a module."""
    members = vars(module).items()
    return frozenset(name for name, member in members if isinstance(member, types))


_OPERATOR = _functions(operator, (BuiltinFunctionType,)) - {"call", "__call__"}


@cache
def _members() -> dict[str, tuple[Any, frozenset[str]]]:
    """Module path -> the module and the names of it that may be called."""
    functional = torch.nn.functional
    return {
        "torch": (torch, _torch_functions()),
        "torch.nn.functional": (functional, _functional()),
        "torch._C._nn": (torch._C._nn, _functions(torch._C._nn)),
        "torch.special": (
            torch.special,
            _functions(torch.special) | frozenset(torch.special.__all__),
        ),
        "torch.linalg": (
            torch.linalg,
            frozenset(
                name
                for name in vars(torch.linalg)
                if not name.startswith("_") and name.islower()
            ),
        ),
        "torch.fft": (torch.fft, frozenset(torch.fft.__all__)),
        "operator": (operator, _OPERATOR),
        "math": (math, _functions(math, (BuiltinFunctionType,))),
        "builtins": (builtins, BUILTINS),
    }


def _torch_functions() -> frozenset[str]:
    overridable = {
        function.__name__
        for function in torch.overrides.get_overridable_functions().get(torch, ())
        if hasattr(function, "__name__")
    }
    of_tensors = {
        name for name in dir(torch._C._VariableFunctions) if not name.startswith("__")
    }
    return (frozenset(overridable | of_tensors) | _TORCH_OWN) - _REFUSED


def _functional() -> frozenset[str]:
    """The functions of torch.nn.functional: its own, builtin ones, and those that it chooses by a flag."""
    functional = torch.nn.functional
    homes = ("torch.nn.functional", "torch._jit_internal", None)
    its_own = frozenset(
        name
        for name in _functions(functional)
        if getattr(functional, name).__module__ in homes
    )
    builtin = _functions(functional, (BuiltinFunctionType,))
    return (its_own | builtin) - {"boolean_dispatch"}


@cache
def resolve(target: str) -> Callable[..., Any]:
    """The callable behind a target. Raises EmitError for a name that does not exist or is not allowed."""
    if target.startswith("aten."):
        return _registered_op(f"torch.ops.{target}", target)
    if target.startswith("torch.ops."):
        return _registered_op(target, target)
    module, _, name = target.rpartition(".")
    owner, allowed = _members().get(module, (None, frozenset()))
    function = getattr(owner, name, None) if name in allowed else None
    if not callable(function) or (isinstance(function, type) and owner is not builtins):
        raise EmitError(
            f"'{target}' is no op that may be called",
            hint="ops of torch, operator and math are known",
        )
    return function  # type: ignore[no-any-return]


def _registered_op(path: str, target: str) -> Callable[..., Any]:
    member: Any = torch
    for part in path.split(".")[1:]:
        try:
            member = getattr(member, part)
        except (AttributeError, RuntimeError):
            raise EmitError(
                f"unknown op '{target}'",
                hint=f"{part!r} does not exist; is its library imported?",
            ) from None
    if not isinstance(
        member,
        torch._ops.OpOverload
        | torch._ops.OpOverloadPacket
        | torch._ops.HigherOrderOperator,
    ):
        raise EmitError(
            f"'{target}' is no op that may be called",
            hint="name an overload, such as aten.add.Tensor",
        )
    if isinstance(member, torch._ops.HigherOrderOperator):
        return member
    if not _is_harmless(member):
        raise EmitError(
            f"'{target}' is no op that may be called",
            hint="it reads or writes files, or attributes by name",
        )
    return member


def _is_harmless(op: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> bool:
    """True for an op of which no overload names a file."""
    if isinstance(op, torch._ops.OpOverload):
        return _is_harmless_overload(op)
    overloads = (getattr(op, name) for name in op.overloads())
    return all(map(_is_harmless_overload, overloads))


def _is_harmless_overload(overload: torch._ops.OpOverload) -> bool:
    if overload.namespace in _REFUSED_NAMESPACES:
        return False
    return not any(
        argument.name in _FILES and "str" in str(argument.type)
        for argument in overload._schema.arguments
    )


def check_op(op: Op) -> None:
    """Returns when calling `op` can reach nothing but tensor code; raises EmitError otherwise."""
    kind, name = op.target.kind, op.target.name
    if kind is Kind.METHOD and not _is_method(name):
        raise EmitError(f"'{name}' is no method that may be called", where=op.where())
    if kind is Kind.METHOD and not op.args:
        raise EmitError("a method needs something to be called on", where=op.where())
    if kind is Kind.MODULE and not _is_leaf_call(op.args):
        raise EmitError(
            "a module takes (positional operands), {keywords}, [state]",
            where=op.where(),
        )
    if op.target == "builtins.getattr" and not (
        len(op.args) > 1 and isinstance(op.args[1], str) and _is_public(op.args[1])
    ):
        raise EmitError(
            f"attribute {op.args[1:2]!r} may not be read",
            where=op.where(),
            hint="public attributes of tensors may be",
        )
    is_higher = op.target.startswith("torch.ops.higher_order.")
    if kind is Kind.LIBRARY and is_higher and not op.regions:
        raise EmitError(
            f"'{op.target}' runs regions, and has none",
            where=op.where(),
            hint="a program holds functions as regions only",
        )


def _is_method(name: str) -> bool:
    """True for a public method of a tensor or of a container that may be called."""
    if name.startswith("_") or name in _REFUSED:
        return False
    return any(hasattr(owner, name) for owner in _OWNERS)


def _is_leaf_call(args: tuple[Any, ...]) -> bool:
    return (
        len(args) == 3
        and isinstance(args[0], (tuple, list))
        and isinstance(args[1], dict)
        and isinstance(args[2], (tuple, list))
    )


def attribute(owner: Any, name: str, *default: Any) -> Any:
    """`getattr` that gives data only. Raises EmitError for a function or a class, because no op of a program
    may call an object that it finds at run time.
    """
    data = getattr(owner, name, *default) if _is_public(name) else attribute
    if callable(data) and not isinstance(data, torch.Tensor):
        raise EmitError(
            f"attribute '{name}' of a {type(owner).__name__} may not be read",
            hint="it is no data; call it as a method",
        )
    return data


def constant(token: Token) -> Any:
    """The dtype, layout, memory format or device behind a token; raises EmitError for anything else."""
    device = DEVICE.fullmatch(token.text)
    if device:
        return torch.device(device[1])
    constant_of_torch: Any = None
    if _CONSTANT.fullmatch(token.text):
        constant_of_torch = getattr(torch, token.text.removeprefix("torch."), None)
    if not isinstance(
        constant_of_torch, (torch.dtype, torch.layout, torch.memory_format)
    ):
        raise EmitError(
            f"'{token.text}' is no constant of torch",
            hint="a dtype, a layout, a memory format or a device",
        )
    return constant_of_torch


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def name_of(function: Callable[..., Any]) -> str | None:
    """The target name of a callable, or None when only the callable itself can stand for it."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(function)
        return name if name.startswith("aten.") else f"torch.ops.{name}"
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{function.name()}"
    return _names().get(id(function))


@cache
def _names() -> dict[int, str]:
    """The identity of every callable that may be called -> its name; the first module that has it wins."""
    names: dict[int, str] = {}
    for module, (owner, allowed) in _members().items():
        public_first = sorted(allowed, key=lambda name: (name.startswith("_"), name))
        for name in public_first:
            if hasattr(owner, name):
                names.setdefault(id(getattr(owner, name)), f"{module}.{name}")
    return names
