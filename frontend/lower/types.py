"""torch values -> types and literals of the IR."""

from __future__ import annotations

from typing import Any

import torch

from stagecut.ir.errors import CaptureError, StagecutError
from stagecut.ir.graph import Token
from stagecut.ir.run.storage import SHORT
from stagecut.ir.sizes import expression
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
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) < len(shape):
        return _symbolic_contiguous(shape, strides)
    wanted = contiguous_strides(sizes)
    return 0 in sizes or all(
        size == 1 or stride == stride_wanted
        for size, stride, stride_wanted in zip(sizes, strides, wanted, strict=True)
    )


def _symbolic_contiguous(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> bool:
    """True for strides that are contiguous whatever the sizes are. False where that cannot be told, which
    states the strides.
    """
    import sympy

    step = expression("1", {})
    try:
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            if size == 1:
                continue
            if sympy.simplify(expression(str(stride), {}) - step) != 0:
                return False
            step = step * expression(str(size), {})
    except StagecutError:
        return False
    return True


def type_of(value: Any) -> Type:
    """The type of a traced value that is no container."""
    if isinstance(value, torch.Tensor):
        return tensor_type(value)
    if value is None:
        return NONE
    for symbolic, name in _SYMBOLIC_NAMES.items():
        if isinstance(value, symbolic):
            return ScalarType(name, str(value).replace("\n", " "))
    return SCALARS.get(type(value), OBJECT)


_SYMBOLIC_NAMES: dict[type, str] = {
    torch.SymInt: "int",
    torch.SymFloat: "float",
    torch.SymBool: "bool",
}


SCALARS: dict[type, Type] = {
    cls: ScalarType(cls.__name__) for cls in (int, float, bool, complex, str)
}

_LITERALS = (type(None), bool, int, float, complex, str, type(...))
_TOKENS = (torch.dtype, torch.layout, torch.memory_format)


def as_literal(operand: Any) -> Any:
    """A literal operand in the IR's own terms; raises TypeError for what has none."""
    if isinstance(operand, _LITERALS):
        return operand
    if isinstance(operand, _TOKENS):
        return Token(str(operand))
    if isinstance(operand, torch.device):
        return Token(f'device("{operand}")')
    raise TypeError(f"{type(operand).__name__} is no literal")


def specialised(value: Any) -> Type:
    """The type of a Python scalar that the trace burned in: it carries the value."""
    if isinstance(value, (bool, int, float, complex, str)):
        return ScalarType(type(value).__name__, repr(value))
    return NONE if value is None else OBJECT
