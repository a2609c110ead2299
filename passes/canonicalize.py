"""Removes ops that only the tracer needed: guards, dead ops, superfluous split markers.

The names of what is left count on without those.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.aliases import Aliases, viewed_value
from stagecut.ir.counted import count_names
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.ops import facts


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
        if dead:
            count_names(program)
        return bool(dead)


def _dead_ops(ops: list[Op]) -> set[Op]:
    dead: set[Op] = set()
    # values written after the present op, and their roots: an earlier read of such a view must stay, because
    # torch rebuilds its autograd history there
    written_later: set[Value] = set()
    aliases = Aliases(ops)
    first_writes = _first_writes(ops, aliases)
    for place, op in reversed([*enumerate(ops)]):
        roots = [(value, aliases.root(value)) for value in op.operands]
        renews = any(
            _is_renewed(
                value, root, written_later, first_writes.get(root, place) < place
            )
            for value, root in roots
        )
        keep = op.is_split or (not facts(op).guard and (op.has_effect or renews))
        for value in op.effects.writes:
            written_later.update((value, aliases.root(value)))
        if not keep and all(
            user in dead for value in op.definitions() for user in value.uses
        ):
            dead.add(op)
    return dead


def _is_renewed(
    value: Value, root: Value, written_later: set[Value], was_written: bool
) -> bool:
    """True for a value whose autograd history torch rebuilds when the value is read, because of a write.

    Such a value is a view that is written later. A tensor of the caller's or of the model's may be a view
    too: its history is out of date where it was written before (`was_written`).
    """
    if value in written_later and viewed_value(value) is not None:
        return True
    return was_written and root in written_later and not isinstance(root.owner, Op)


def _first_writes(ops: list[Op], aliases: Aliases) -> dict[Value, int]:
    """Root -> the place of the first op that writes it or a view of it."""
    places = {op: place for place, op in enumerate(ops)}
    first: dict[Value, int] = {}
    for op, root in aliases.writes:
        first.setdefault(root, places[op])
    return first


def _idle_markers(ops: list[Op]) -> set[Op]:
    """Markers with no op between them and the marker before, the start or the end."""
    idle: set[Op] = set()
    pending: Op | None = None
    has_begun = False
    for op in ops:
        if not op.is_split:
            pending, has_begun = None, True
        elif pending is not None or not has_begun:
            idle.add(op)
        else:
            pending = op
    if pending is not None:
        idle.add(pending)
    return idle
