"""Computes which values carry gradient: from what state is trained, through what ops do. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from stagecut.ir.aliases import Aliases
from stagecut.ir.graph import BY_MODE, Context, Op, Value
from stagecut.ir.ops import facts, state_of
from stagecut.ir.types import TensorType, carries_grad, same_elements, same_layout


def infer_gradients(ops: Iterable[Op]) -> bool:
    """A value carries gradient when its dtype can carry one, an operand of its op carries one, and the op
    passes it on. Returns whether that is news of any value.
    """
    changed = False
    ops = [*ops]
    history = Aliases(ops, shares=lambda op: not facts(op).cuts_gradient)
    for op in ops:
        grad = _passes_on_grad(op)
        if op.target == BY_MODE:
            changed |= _by_mode(op)
        else:
            places = range(len(op.results))
            grads = [_result_grad(op, place, grad) for place in places]
            changed |= _mark(op.results, grads)
        written = set(map(history.root, _carriers(op))) if grad else set()
        grads = [
            history.root(value) in written or carries_grad(value.type)
            for value in op.versions
        ]
        changed |= _mark(op.versions.values(), grads)
    return changed


def _by_mode(op: Op) -> bool:
    """A result carries gradient when the value that a region yields for it does, in at least one mode."""
    operands: list[Value] = op.args[3]
    changed = False
    grads = [False] * len(op.results)
    for region in op.regions:
        changed |= _mark(
            region.inputs, [carries_grad(value.type) for value in operands]
        )
        changed |= infer_gradients(region.ops)
        grads = [
            carries or carries_grad(value.type)
            for carries, value in zip(grads, region.output.operands, strict=True)
        ]
    return _mark(op.results, grads) or changed


def _passes_on_grad(op: Op) -> bool:
    """True when an operand carries gradient and the op passes it on."""
    if not grad_enabled(op.context) or facts(op).cuts_gradient:
        return False
    return any(carries_grad(value.type) for value in op.operands)


def grad_enabled(context: tuple[Context, ...]) -> bool:
    """True when gradients are recorded under `context`: never in inference mode, else as the innermost grad
    mode says.
    """
    kinds = [entry.kind for entry in context]
    modes = [kind for kind in kinds if kind in ("no_grad", "enable_grad")]
    return "inference_mode" not in kinds and (not modes or modes[-1] == "enable_grad")


def _result_grad(op: Op, index: int, grad: bool) -> bool:
    """True when the result carries gradient. A view does so when the value it views does. An operand written
    in place keeps its own gradient, whatever the grad mode.
    """
    viewed = op.effects.viewed_by(index)
    if viewed is None:
        return grad
    own = carries_grad(viewed.type) and not facts(op).cuts_gradient
    if viewed in op.effects.writes:
        return grad or own
    if op.is_users and grad:  # it may return something else in another call
        return True
    return own if _returns_operand(op, index, viewed) else grad and own


def _returns_operand(op: Op, index: int, viewed: Value) -> bool:
    """True for a conversion that has nothing to convert: it returns its operand itself, with all its history.
    A module or a function of the user's may do so in another mode than that of the trace, where its result
    lies in memory in another way.
    """
    kind = op.results[index].type
    if op.is_users:
        return same_elements(kind, viewed.type)
    return facts(op).returns_operand and same_layout(kind, viewed.type)


def _carriers(op: Op) -> list[Value]:
    """The operands written by `op` that carry the gradient of its operands afterwards.

    An in-place op of torch returns the operand that it wrote, or nothing. An op with results of its own
    writes only statistics on the side. The user's code may write any tensor that it is given; a module's
    writes to its own state are statistics.
    """
    written = list(op.effects.writes)
    if op.is_users:
        own = set(state_of(op))
        return [value for value in written if value not in own]
    in_place = (
        op.target == BY_MODE
        or not op.results
        or any(viewed is not None for viewed in op.effects.views)
    )
    return written if in_place else []


def _mark(values: Iterable[Value], grads: list[bool]) -> bool:
    changed = False
    for value, grad in zip(values, grads, strict=True):
        old = value.type
        if isinstance(old, TensorType) and old.grad != (grad and old.differentiable):
            value.type = replace(old, grad=not old.grad)
            changed = True
    return changed
