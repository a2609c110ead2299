"""Is a number that a model returns a mean or a sum over the samples? Told by the ops that make it."""

from __future__ import annotations

from stagecut.ir.graph import Op, Value, leaves
from stagecut.ir.ops import facts
from stagecut.ir.types import MEAN, SUM, TensorType

_MOST = 64
"""The longest chain of ops that is followed."""


def over_samples(value: Value, depth: int = 0) -> str:
    """`mean` or `sum`, where the ops tell: what the values of several micro-batches are put together by. ''
    where they do not.

    A mean stays a mean under a factor that is no whole number, because a whole one may be the number of
    samples. A sum of means is a mean, a sum of sums a sum.
    """
    op, kind = value.owner, value.type
    if not isinstance(op, Op) or not isinstance(kind, TensorType) or depth > _MOST:
        return ""
    known = facts(op)
    if kind.shape:
        return _of_all(op, depth) if known.over_samples == "listed" else ""
    if known.reduction is not None:
        return _of_loss(op, known.reduction)
    if known.over_samples in (MEAN, SUM):
        return _reduced(op, known.over_samples, depth)
    if known.over_samples == "same":
        return _of_all(op, depth)
    if known.over_samples == "added":
        return _added(op, depth)
    return _scaled(op, depth) if known.over_samples == "scaled" else ""


def _of_loss(op: Op, position: int) -> str:
    given = op.args[position] if position < len(op.args) else 1
    way = op.kwargs.get("reduction", given)
    return {1: MEAN, 2: SUM}.get(way, "") if isinstance(way, int) else ""


def _reduced(op: Op, way: str, depth: int) -> str:
    """The result of a mean or a sum of elements. Elements that are numbers themselves decide."""
    source = op.operands[0] if op.operands else None
    if source is None:
        return ""
    maker = source.owner
    is_list = isinstance(maker, Op) and facts(maker).over_samples == "listed"
    if is_list or not getattr(source.type, "shape", ()):
        return over_samples(source, depth + 1)
    return way


def _of_all(op: Op, depth: int) -> str:
    """The kind of the operands, when they are of one kind."""
    kinds = {over_samples(item, depth + 1) for item in leaves(op.args[:1])}
    return kinds.pop() if len(kinds) == 1 else ""


def _added(op: Op, depth: int) -> str:
    kinds = [over_samples(item, depth + 1) for item in op.operands]
    if len(kinds) == 1:  # and a number of the code
        return MEAN if kinds == [MEAN] else ""
    return kinds[0] if kinds and len(set(kinds)) == 1 else ""


def _scaled(op: Op, depth: int) -> str:
    numbers = [item for item in op.args if not isinstance(item, Value)]
    if len(op.operands) != 1 or not all(isinstance(item, float) for item in numbers):
        return ""
    kind = over_samples(op.operands[0], depth + 1)
    return kind if kind == MEAN and isinstance(op.args[0], Value) else ""
