"""Makes writes visible: after a write, the value and every view of it go by a new version."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import Op, Program, StateEntry, Value
from stagecut.ir.outline import is_what_it_wrote, positions


@dataclass(frozen=True)
class VersionMutations:
    """Every use names the version it sees, so that the order of reads and writes shows in the operands alone."""

    name = "version-mutations"

    def run(self, program: Program) -> bool:
        ops = [*program.all_ops()]
        if not any(op.effects.writes for op in ops) or any(op.versions for op in ops):
            return False
        classes = _AliasClasses(program)
        for index, op in enumerate(ops):
            classes.rename_operands(op)
            if op.effects.writes:
                classes.write(op, index)
            classes.add_results(op)
        classes.rename_operands(program.output)
        return any(op.versions for op in ops)


class _AliasClasses:
    """Values that share storage, by root, and the current version of each value written so far."""

    def __init__(self, program: Program) -> None:
        self._last = positions(program).last
        self._current: dict[Value, Value] = {}
        self._root: dict[Value, Value] = {}
        self._members: dict[Value, list[Value]] = {}
        self._count: dict[Value, int] = {}
        self._anchor: dict[Value, Value | None] = {}
        self._lost: set[Value] = set()
        self._version_of: dict[Value, Value] = {}
        homes: dict[int, Value] = {}
        for entry in program.state:
            root = homes.setdefault(entry.storage, entry.value)
            self._join(entry.value, root)

    def _join(self, value: Value, root: Value) -> None:
        self._root[value] = root
        self._members.setdefault(root, []).append(value)
        self._anchor.setdefault(root, root)

    def rename_operands(self, op: Op) -> None:
        for value in dict.fromkeys(op.operands):
            if value in self._current:
                op.replace_operand(value, self._current[value])

    def add_results(self, op: Op) -> None:
        for result, viewed in zip(op.results, op.effects.views, strict=False):
            if viewed is not None:
                base = op.operands[viewed]
                if base not in self._root:
                    self._join(base, base)
                self._join(result, self._root[base])
        self._move_anchors(op)

    def _move_anchors(self, op: Op) -> None:
        """A root nobody reads gets no new version. What an in-place op returns is then all of it that is still in use, up to date."""
        for index, result in enumerate(op.results):
            if is_what_it_wrote(op, index) and self._root[result] in self._lost:
                self._anchor[self._root[result]] = result
        self._lost = set()

    def write(self, op: Op, index: int) -> None:
        """Everything in the classes `op` writes that is read later, or is state, gets a new version: what `op` names first."""
        written = [op.operands[position] for position in op.effects.writes]
        for value in written:
            if value not in self._root:
                self._join(value, value)
        rank = {value: place for place, value in enumerate(dict.fromkeys(written))}
        roots = dict.fromkeys(self._root[value] for value in written)
        members = [member for root in roots for member in self._alive(root, index, len(written))]
        for root in roots:
            anchor = self._anchor[root]
            if anchor is not None and anchor not in members:
                self._lost.add(root)
                self._anchor[root] = None
        for member in sorted(members, key=lambda m: rank.get(self._now(m), len(rank))):
            self._renew(op, member)

    def _alive(self, root: Value, index: int, written: int) -> list[Value]:
        """Members read later, and state. The anchor, which is the whole tensor, lives as long as two values share its
        storage, or while it is the user's: what is written can then be derived from it anew."""
        members = [m for m in self._members[root] if self._last.get(m, -1) > index or isinstance(m.owner, StateEntry)]
        anchor = self._anchor[root]
        if anchor is not None and anchor not in members and (root.owner is None or len(members) + written > 1):
            members.insert(0, anchor)
        self._members[root] = members
        return members

    def _member(self, value: Value) -> Value:
        """The value a version is a version of."""
        return self._version_of.get(value, value)

    def _now(self, member: Value) -> Value:
        return self._current.get(member, member)

    def _renew(self, op: Op, member: Value) -> None:
        now = self._now(member)
        number = self._count[member] = self._count.get(member, 0) + 1
        new = op.add_version(now, f"{member.hint}.{number}")
        self._current[member] = new
        self._version_of[new] = member
        self._root[new] = self._root[member]
