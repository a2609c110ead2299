"""Makes writes visible: after a write, the value and every view of it go by a new version."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.aliases import Aliases, is_what_it_wrote, viewed_value
from stagecut.ir.graph import Op, Program, StateEntry, Value
from stagecut.ir.outline import positions


@dataclass(frozen=True)
class VersionMutations:
    """Every use names the version it sees, so that the order of reads and writes shows in the operands
    alone.
    """

    name = "version-mutations"

    def run(self, program: Program) -> bool:
        ops = [*program.all_ops()]
        if not any(op.effects.writes for op in ops) or any(op.versions for op in ops):
            return False
        classes = _Classes(program, ops)
        for index, op in enumerate(ops):
            classes.rename_operands(op)
            if op.effects.writes:
                classes.write(op, index)
            classes.add_results(op)
        classes.rename_operands(program.output)
        return any(op.versions for op in ops)


class _Classes:
    """Values that share storage, by root, and the current version of each value written so far."""

    def __init__(self, program: Program, ops: list[Op]) -> None:
        self._last = positions(program).last
        self._aliases = Aliases(ops, program.state)
        self._current: dict[Value, Value] = {}
        self._members: dict[Value, list[Value]] = {}
        self._count: dict[Value, int] = {}
        self._anchor: dict[Value, Value | None] = {}
        self._lost: set[Value] = set()
        for entry in program.state:
            self._join(entry.value)

    def _join(self, value: Value) -> None:
        root = self._aliases.root(value)
        self._members.setdefault(root, []).append(value)
        self._anchor.setdefault(root, root)

    def rename_operands(self, op: Op) -> None:
        for value in dict.fromkeys(op.operands):
            if value in self._current:
                op.replace_operand(value, self._current[value])

    def add_results(self, op: Op) -> None:
        for result in op.results:
            base = viewed_value(result)
            if base is None:
                continue
            if self._aliases.root(base) not in self._members:
                self._join(base)
            self._join(result)
        self._move_anchors(op)

    def _move_anchors(self, op: Op) -> None:
        """If nothing reads the root any more, the result of an in-place op stands for the whole tensor from
        here on.
        """
        for result in op.results:
            if is_what_it_wrote(result) and self._aliases.root(result) in self._lost:
                self._anchor[self._aliases.root(result)] = result
        self._lost = set()

    def write(self, op: Op, index: int) -> None:
        """Every value in the storage that `op` writes gets a new version if it is read later or is state. The
        values that `op` names come first.
        """
        written = list(op.effects.writes)
        for value in written:
            if self._aliases.root(value) not in self._members:
                self._join(value)
        rank = {value: place for place, value in enumerate(dict.fromkeys(written))}
        roots = dict.fromkeys(map(self._aliases.root, written))
        members = [
            member
            for root in roots
            for member in self._alive(root, index, len(written))
        ]
        for root in roots:
            anchor = self._anchor[root]
            if anchor is not None and anchor not in members:
                self._lost.add(root)
                self._anchor[root] = None
        members.sort(key=lambda member: rank.get(self._latest(member), len(rank)))
        for member in members:
            self._renew(op, member)

    def _alive(self, root: Value, index: int, written: int) -> list[Value]:
        """The members that are read later, and state. The anchor, which is the whole tensor, lives as long as
        two values share its storage, or while it is the user's: the written values can then be derived from
        it anew.
        """
        members = [
            member
            for member in self._members[root]
            if self._last.get(member, -1) > index
            or isinstance(member.owner, StateEntry)
        ]
        anchor = self._anchor[root]
        if (
            anchor is not None
            and anchor not in members
            and (root.owner is None or len(members) + written > 1)
        ):
            members.insert(0, anchor)
        self._members[root] = members
        return members

    def _latest(self, member: Value) -> Value:
        return self._current.get(member, member)

    def _renew(self, op: Op, member: Value) -> None:
        number = self._count[member] = self._count.get(member, 0) + 1
        old = self._latest(member)
        new = self._current[member] = op.add_version(old, f"{member.hint}.{number}")
        self._aliases.add_version(old, new)
