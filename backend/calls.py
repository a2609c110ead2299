"""How generated code spells the call of an op.

`torch.ops.aten.add.Tensor(x, y)` turns its arguments over by the op's schema in every call; `torch.add(x, y)`, torch's own binding of the
same op, does not, and takes a microsecond less. Between kernels of a GPU that is noticed.
"""

from __future__ import annotations

from functools import cache

import torch

from stagecut.ir.graph import Op, Value
from stagecut.ir.targets import resolve
from stagecut.ir.types import TensorType

_TORCH = """
add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Scalar neg.default rsqrt.default sqrt.default exp.default tanh.default
sigmoid.default sin.default cos.default relu.default mean.dim softmax.int dropout.default matmul.default mm.default bmm.default
embedding.default layer_norm.default rms_norm.default group_norm.default batch_norm.default conv1d.default conv2d.default
cat.default stack.default chunk.default transpose.int permute.default unsqueeze.default squeeze.dim flatten.using_ints
unflatten.int reshape.default
"""
_FUNCTIONAL = "linear.default gelu.default scaled_dot_product_attention.default"
_METHODS = "view.default expand.default contiguous.default"
_PRIVATE = "silu.default"


def _table() -> dict[str, str]:
    homes = {"torch": _TORCH, "torch.nn.functional": _FUNCTIONAL, "torch.Tensor": _METHODS, "torch._C._nn": _PRIVATE}
    return {f"aten.{name}": f"{home}.{name.partition('.')[0]}" for home, names in homes.items() for name in names.split()}


BINDINGS = _table()
"""Overload -> the binding that takes the same arguments in the same order and calls just that overload when its tensors are tensors."""


def callee(op: Op) -> str:
    """What generated code calls for an op of torch. Raises EmitError for a name that may not be called."""
    resolve(op.target)
    binding = BINDINGS.get(op.target)
    if binding is None or op.kwargs:
        return op.target
    given = [op.args[place] for place in _tensor_places(op.target) if place < len(op.args)]
    return binding if all(isinstance(item, Value) and isinstance(item.type, TensorType) for item in given) else op.target


@cache
def _tensor_places(target: str) -> list[int]:
    arguments = resolve(target)._schema.arguments  # type: ignore[attr-defined]
    return [place for place, argument in enumerate(arguments) if isinstance(argument.type, torch.TensorType)]


def is_iteration(op: Op) -> bool:
    """True when the results are what Python gets that iterates over the operand. Compilers fuse that better than they do `unbind`."""
    return op.target == "aten.unbind.int" and len(op.results) > 1 and op.form is None and not op.kwargs and op.args[1:] in ((), (0,))
