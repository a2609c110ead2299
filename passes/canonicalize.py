"""Removes what only the tracer needed: guards, dead ops, superfluous split markers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.ops import is_guard
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
    written: set[Value] = set()  # views that are written behind; who reads one before has torch bring its history up to date for the write
    for op in reversed(ops):
        keep = op.is_split or (
            not is_guard(op) and (op.has_effect or any(base in written for value in op.operands for base in _bases(value)))
        )
        written.update(op.operands[i] for i in op.effects.writes if _may_be_view(op.operands[i]))
        if not keep and all(user in dead for value in op.definitions() for user in value.uses):
            dead.add(op)
    return dead


def _bases(value: Value) -> Iterator[Value]:
    """A value, and what it is a view of."""
    base: Value | None = value
    while base is not None:
        yield base
        base = viewed_value(base)


def _may_be_view(value: Value) -> bool:
    """True for a view, and for what the caller or the model brings along: of that nobody knows."""
    return viewed_value(value) is not None or not isinstance(value.owner, Op)


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
