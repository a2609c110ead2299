"""Removes what only the tracer needed: guards, dead ops, superfluous split markers."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.ops import facts
from stagecut.ir.outline import viewed_value


@dataclass(frozen=True)
class Canonicalize:
    """No guards, no dead op without effect, one marker per boundary and none at either end."""

    name = "canonicalize"

    def run(self, program: Program) -> bool:
        if program.phase != "traced":
            return False
        dead = _dead_ops(program.ops)
        dead |= _idle_markers([op for op in program.ops if op not in dead])
        program.remove_ops(dead)
        return bool(dead)


def _dead_ops(ops: list[Op]) -> set[Op]:
    dead: set[Op] = set()
    behind: set[Value] = set()  # what is written behind the present op, and the roots of that
    roots = _roots(ops)
    before = _first_writes(ops, roots)
    for place, op in reversed([*enumerate(ops)]):
        renews = any(_is_renewed(v, roots.get(v, v), behind, before.get(roots.get(v, v), place) < place) for v in op.operands)
        keep = op.is_split or (not facts(op).guard and (op.has_effect or renews))
        for index in op.effects.writes:
            value = op.operands[index]
            behind.update((value, roots.get(value, value)))
        if not keep and all(user in dead for value in op.definitions() for user in value.uses):
            dead.add(op)
    return dead


def _is_renewed(value: Value, root: Value, behind: set[Value], before: bool) -> bool:
    """True for a value of which reading has torch bring the history up to date, for a write behind it.

    That is a view. What the caller or the model brings along may be one too: its history is out of date where it was written before.
    """
    if value in behind and viewed_value(value) is not None:
        return True
    return before and root in behind and not isinstance(root.owner, Op)


def _roots(ops: list[Op]) -> dict[Value, Value]:
    """View -> what it is a view of in the end."""
    roots: dict[Value, Value] = {}
    for op in ops:
        for result, viewed in zip(op.results, op.effects.views, strict=False):
            if viewed is not None:
                roots[result] = roots.get(op.operands[viewed], op.operands[viewed])
    return roots


def _first_writes(ops: list[Op], roots: dict[Value, Value]) -> dict[Value, int]:
    """Root -> the place of the first op that writes it or a view of it."""
    first: dict[Value, int] = {}
    for place, op in enumerate(ops):
        for index in op.effects.writes:
            value = op.operands[index]
            first.setdefault(roots.get(value, value), place)
    return first


def _idle_markers(ops: list[Op]) -> set[Op]:
    """Markers with no op between them and the marker before, the start or the end."""
    idle: set[Op] = set()
    pending: Op | None = None
    work_before = False
    for op in ops:
        if not op.is_split:
            pending, work_before = None, True
        elif pending is not None or not work_before:
            idle.add(op)
        else:
            pending = op
    if pending is not None:
        idle.add(pending)
    return idle
