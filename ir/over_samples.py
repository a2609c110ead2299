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
    op = value.owner
    kind = value.type
    if depth > _MOST or not isinstance(op, Op):
        return ""
    if not isinstance(kind, TensorType):
        return ""
    if kind.shape:
        return _listed(op, depth)
    op_facts = facts(op)
    if op_facts.reduction is not None:
        return _of_loss(op, op_facts.reduction)
    way = op_facts.over_samples
    if way in (MEAN, SUM):
        return _reduced(op, way, depth)
    if way == "same":
        return _of_all(op, depth)
    if way == "added":
        return _added(op, depth)
    if way == "scaled":
        return _scaled(op, depth)
    return ""


def _of_loss(op: Op, position: int) -> str:
    """The result of torch's loss functions, with `reduction` at that position."""
    reduction: object = 1
    if position < len(op.args):
        reduction = op.args[position]
    reduction = op.kwargs.get("reduction", reduction)
    if not isinstance(reduction, int):
        return ""
    if reduction == 1:
        return MEAN
    if reduction == 2:
        return SUM
    return ""


def _reduced(op: Op, way: str, depth: int) -> str:
    """The result of a mean or a sum of elements. Elements that are numbers themselves decide."""
    if not op.operands:
        return ""
    source = op.operands[0]
    if _is_listed(source.owner) or not getattr(source.type, "shape", ()):
        return over_samples(source, depth + 1)
    return way


def _listed(op: Op, depth: int) -> str:
    """A tensor that is made of numbers."""
    if not _is_listed(op):
        return ""
    return _of_all(op, depth)


def _is_listed(owner: object) -> bool:
    return isinstance(owner, Op) and facts(owner).over_samples == "listed"


def _of_all(op: Op, depth: int) -> str:
    """The kind of the operands, when they are of one kind."""
    operands = leaves(op.args[:1])
    kinds = {over_samples(operand, depth + 1) for operand in operands}
    if len(kinds) != 1:
        return ""
    return kinds.pop()


def _added(op: Op, depth: int) -> str:
    kinds = [over_samples(operand, depth + 1) for operand in op.operands]
    if not kinds or len(set(kinds)) != 1:
        return ""
    if len(kinds) == 1 and kinds[0] != MEAN:
        return ""  # a sum and a number of the code
    return kinds[0]


def _scaled(op: Op, depth: int) -> str:
    if not op.args:
        return ""
    if len(op.operands) != 1:
        return ""
    if not isinstance(op.args[0], Value):
        return ""
    for factor in op.args:
        if not isinstance(factor, Value | float):
            return ""
    kind = over_samples(op.operands[0], depth + 1)
    if kind != MEAN:
        return ""
    return kind
