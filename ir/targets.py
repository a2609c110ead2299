"""Op targets as names: a callable -> its name in the IR, and a name -> the callable and its Python spelling.

A name is `aten.add.Tensor` for torch.ops.aten, `torch.ops.NS.NAME.OVERLOAD` for another namespace, a plain
dotted path below an allowed root, `method.NAME`, `module.PATH` or `extern.NAME`. Nothing else is ever resolved,
so IR text cannot reach a callable outside this list.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from stagecut.ir.errors import EmitError

ROOTS: dict[str, Any] = {"torch": torch, "operator": operator, "math": math}
BUILTINS = frozenset({"getattr", "abs", "round", "min", "max", "len", "sum", "pow", "divmod", "int", "float", "bool", "str", "tuple", "list", "slice", "isinstance"})
_REFUSED_PARTS = ("load", "save", "hub", "serialization", "utils", "_dynamo", "_inductor", "compile", "jit", "package", "multiprocessing", "library", "classes", "distributed", "storage")


def resolve(target: str) -> Callable[..., Any]:
    """The callable behind a target. Raises EmitError for a name that does not exist or is not allowed."""
    head, _, rest = target.partition(".")
    if head == "aten":
        head, rest = "torch", "ops." + target
    if head == "builtins" and rest in BUILTINS:
        return getattr(builtins, rest)  # type: ignore[no-any-return]
    found: Any = ROOTS.get(head)
    parts = rest.split(".")
    if found is None or not all(_allowed(part) for part in parts):
        raise EmitError(f"'{target}' is no op that may be called", hint="ops of torch, operator and math are known")
    for part in parts:
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):
            raise EmitError(f"unknown op '{target}'", hint=f"{part!r} does not exist; is its library imported?") from None
    if not callable(found):
        raise EmitError(f"'{target}' cannot be called")
    return found  # type: ignore[no-any-return]


def _allowed(part: str) -> bool:
    return part.isidentifier() and not part.startswith("__") and part not in _REFUSED_PARTS or part in _DUNDER_OPS


_DUNDER_OPS = frozenset({"__and__", "__or__", "__xor__", "__iand__", "__ior__", "__ixor__", "__lshift__", "__rshift__", "__ilshift__", "__irshift__"})


def name_of(function: Callable[..., Any]) -> str | None:
    """The target name of a callable, or None when only the callable itself can stand for it."""
    if isinstance(function, torch._ops.OpOverload):
        name = str(function)
        return name if name.startswith("aten.") else f"torch.ops.{name}"
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{function.name()}"
    name = getattr(function, "__name__", "")
    module = {"_operator": "operator"}.get(getattr(function, "__module__", "") or "", getattr(function, "__module__", "") or "")
    for path in (module, "torch", "torch.nn.functional", "torch._C._nn", "torch.special", "torch.linalg", "torch.fft", "builtins"):
        candidate = f"{path}.{name}"
        if _resolves_to(candidate, function):
            return candidate
    return None


def _resolves_to(target: str, function: Callable[..., Any]) -> bool:
    try:
        return resolve(target) is function
    except EmitError:
        return False
