"""Merges state entries that are one tensor under several names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stagecut.ir.graph import KINDS, Program, StateEntry


@dataclass(frozen=True)
class ResolveAliases:
    """One state entry per distinct tensor; every name of the model belongs to exactly one, read or not."""

    name = "resolve-aliases"

    def run(self, program: Program) -> bool:
        firsts: dict[int, StateEntry] = {}
        for entry in program.state:
            first = firsts.setdefault(entry.tensor, entry)
            if first is not entry:
                _merge(first, entry)
        changed = len(firsts) < len(program.state)
        program.state = list(firsts.values())
        return changed


def _merge(first: StateEntry, other: StateEntry) -> None:
    # a lifted constant's name is the tracer's, not the model's
    both = [first, other]
    named = [entry for entry in both if entry.kind != "const"] or both
    first.names = sum((entry.names for entry in named), ())
    first.transient = frozenset().union(*(entry.transient for entry in named))
    first.kind = min(first.kind, other.kind, key=KINDS.index)
    if first.type != other.type:
        grad = first.requires_grad or other.requires_grad
        first.type = replace(first.type, grad=grad)  # type: ignore[arg-type]
        first.value.type = first.type
    other.value.replace_uses(first.value)
