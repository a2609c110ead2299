"""Spells the call of an op in generated code.

`torch.ops.aten.add.Tensor(x, y)` matches its arguments against the op's schema in every call. `torch.add(x,
y)`, torch's own binding of the same op, does not, and takes a microsecond less. Between kernels on a GPU this
is noticeable.
"""

from __future__ import annotations

from functools import cache

import torch

from stagecut.ir.graph import Kind, Op, Value
from stagecut.ir.ops import facts
from stagecut.ir.run.targets import resolve
from stagecut.ir.types import TensorType


def callee(op: Op) -> str:
    """The name under which generated code calls an op of torch. Raises EmitError for a name that may not be
    called.
    """
    resolve(op.target)
    binding = (
        facts(op).bindings.get(op.target.overload)
        if op.target.kind is Kind.ATEN
        else None
    )
    if binding is None or op.kwargs:
        return op.target
    places = _tensor_places(op.target)
    operands = [op.args[place] for place in places if place < len(op.args)]
    return binding if all(map(_is_tensor, operands)) else op.target


def _is_tensor(operand: object) -> bool:
    return isinstance(operand, Value) and isinstance(operand.type, TensorType)


@cache
def _tensor_places(target: str) -> list[int]:
    arguments = resolve(target)._schema.arguments  # type: ignore[attr-defined]
    return [
        place
        for place, argument in enumerate(arguments)
        if isinstance(argument.type, torch.TensorType)
    ]


def is_iteration(op: Op) -> bool:
    """True when the results are what Python gets when it iterates over the operand. Compilers fuse iteration
    better than `unbind`.
    """
    whole = op.form is None and not op.kwargs and op.args[1:] in ((), (0,))
    return (
        whole
        and len(op.results) > 1
        and op.target.kind is Kind.ATEN
        and facts(op).iteration == op.target.overload
    )
