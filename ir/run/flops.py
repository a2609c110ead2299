"""What an op computes, by torch's own formulas. No op runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from stagecut.ir.graph import Kind, Op, Value, transform
from stagecut.ir.types import TensorType


def flops_of(op: Op) -> int:
    """The FLOPs of an op whose sizes are known; 0 for one that torch has no formula for."""
    if op.target.kind is not Kind.ATEN:
        return 0
    formula: Any = flop_registry.get(getattr(torch.ops.aten, op.target.name, None))
    if formula is None:
        return 0
    args, kwargs = transform((op.args, op.kwargs), _shape)
    results = [_shape(result) for result in op.results]
    result = results[0] if len(results) == 1 else tuple(results)
    return int(formula(*args, **kwargs, out_val=result))


def _shape(leaf: Any) -> Any:
    """The sizes of a tensor in its place; other leaves as they are."""
    if isinstance(leaf, Value) and isinstance(leaf.type, TensorType):
        return torch.Size(size for size in leaf.type.shape if isinstance(size, int))
    return leaf
