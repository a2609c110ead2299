"""torch values -> types and literals of the IR."""

from __future__ import annotations

from typing import Any

import torch

from stagecut.ir.errors import CaptureError
from stagecut.ir.graph import Token
from stagecut.ir.run.storage import SHORT
from stagecut.ir.types import (
    NONE,
    OBJECT,
    Dim,
    ScalarType,
    TensorType,
    Type,
    contiguous_strides,
)


def _dim(size: Any) -> Dim:
    return size if type(size) is int else str(size)


def tensor_type(tensor: torch.Tensor) -> TensorType:
    """The type of a tensor, real or fake. It carries gradient when the tensor requires it."""
    shape = tuple(map(_dim, tensor.shape))
    strides = None
    if tensor.layout is torch.strided:
        strides = tuple(map(_dim, tensor.stride()))
        if _is_contiguous(shape, strides):
            strides = None
    if tensor.dtype not in SHORT:
        raise CaptureError(
            f"the model makes a tensor of {tensor.dtype}, which no program can hold",
            hint="keep the module that makes it, and all that read it, whole: leaf_modules=[...]",
        )
    return TensorType(
        SHORT[tensor.dtype], shape, strides, str(tensor.device), tensor.requires_grad
    )


def _is_contiguous(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> bool:
    sizes = [s if isinstance(s, int) else None for s in shape]
    if None in sizes:
        return _symbolic_contiguous(shape, strides)
    known = tuple(s for s in sizes if s is not None)
    want = contiguous_strides(known)
    return 0 in known or all(
        s == 1 or a == b for s, a, b in zip(known, strides, want, strict=True)
    )


def _symbolic_contiguous(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> bool:
    import sympy

    step: Any = sympy.Integer(1)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if sympy.simplify(sympy.sympify(str(stride)) - step) != 0:
            return False
        step = step * sympy.sympify(str(size))
    return True


def type_of(value: Any) -> Type:
    """The type of a traced value that is no container."""
    if isinstance(value, torch.Tensor):
        return tensor_type(value)
    if value is None:
        return NONE
    for symbolic, kind in (
        (torch.SymInt, "int"),
        (torch.SymFloat, "float"),
        (torch.SymBool, "bool"),
    ):
        if isinstance(value, symbolic):
            return ScalarType(kind, str(value).replace("\n", " "))
    return SCALARS.get(type(value), OBJECT)


SCALARS: dict[type, Type] = {
    t: ScalarType(t.__name__) for t in (int, float, bool, complex, str)
}

_PLAIN = (type(None), bool, int, float, complex, str, type(...))
_TOKENS = (torch.dtype, torch.layout, torch.memory_format)


def literal(item: Any) -> Any:
    """A literal operand in the IR's own terms; raises TypeError for what has none."""
    if isinstance(item, _PLAIN):
        return item
    if isinstance(item, _TOKENS):
        return Token(str(item))
    if isinstance(item, torch.device):
        return Token(f'device("{item}")')
    raise TypeError(f"{type(item).__name__} is no literal")


def specialised(value: Any) -> Type:
    """The type of a Python scalar that the trace burned in: it carries the value."""
    if isinstance(value, (bool, int, float, complex, str)):
        return ScalarType(type(value).__name__, repr(value))
    return NONE if value is None else OBJECT
