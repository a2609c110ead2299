"""Finds which values share storage, and which ops write it. No torch here.

A value is a version of another one, a view of another one, or the first in its storage, the root. `Aliases`
finds the roots of a run of ops in one pass. The functions follow one value through the whole program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from stagecut.ir.graph import BY_MODE, Op, StateEntry, Value
from stagecut.ir.types import same_layout


def unwritten(value: Value) -> Value:
    """The value that `value` is a version of; `value` itself when it is none."""
    while value.version_of is not None:
        value = value.version_of
    return value


def first_versions(ops: Iterable[Op]) -> dict[Value, Value]:
    """Version -> the value that it is a version of, as `unwritten` gives it, for all versions that `ops`
    make. One pass, however often a value is written.
    """
    first: dict[Value, Value] = {}
    for op in ops:
        for old, new in op.versions.items():
            first[new] = first.get(old, old)
    return first


def viewed_value(value: Value) -> Value | None:
    """The value that `value` was made a view of; None when it is no view."""
    op = value.owner
    if not isinstance(op, Op) or value.version_of is not None:
        return None
    return op.effects.viewed_by(value.index)


def storage_root(value: Value) -> Value:
    """The value in whose storage `value` lives, found through all versions and views."""
    value = unwritten(value)
    while (base := viewed_value(value)) is not None:
        value = unwritten(base)
    return value


def is_what_it_wrote(value: Value) -> bool:
    """True when a result is the very tensor that its op wrote. An in-place op returns that tensor; an op with
    regions may return any view of it. The user's own code may return it in one call, or in one mode, and not
    in another.
    """
    op, viewed = value.owner, viewed_value(value)
    if not isinstance(op, Op) or viewed is None or viewed not in op.effects.writes:
        return False
    if op.is_users:
        return False
    return not op.regions or same_layout(value.type, viewed.type)


def _shares(op: Op) -> bool:
    return True


class Aliases:
    """The values that share storage in a run of ops, as far as these ops make them do so.

    A value that these ops do not define is a root, and so is each of `roots`. State that overlaps in memory
    has one root. `shares` tells whether the result of an op shares with the viewed operand the thing that the
    caller asks about: the storage, or only the history.
    """

    def __init__(
        self,
        ops: Iterable[Op],
        state: Iterable[StateEntry] = (),
        roots: Iterable[Value] = (),
        shares: Callable[[Op], bool] = _shares,
    ) -> None:
        self._roots: dict[Value, Value] = {root: root for root in roots}
        self.writes: list[tuple[Op, Value]] = []
        """Every write in place, in order: the op, and the root of what it writes."""
        homes: dict[int, Value] = {}
        for entry in state:
            self._roots[entry.value] = (
                homes.setdefault(entry.storage, entry.value)
                if entry.storage >= 0
                else entry.value
            )
        for op in ops:
            self._add(op, shares(op))
        self.written = {root for _, root in self.writes}
        """The roots of all storage that is written."""

    def _add(self, op: Op, shares: bool) -> None:
        root = self.root
        for result, viewed in zip(op.results, op.effects.views, strict=False):
            if viewed is not None and shares:
                self._roots.setdefault(result, root(viewed))
        for old, new in op.versions.items():
            self.add_version(old, new)
        self.writes += [(op, root(value)) for value in op.effects.writes]

    def add_version(self, old: Value, new: Value) -> None:
        """`new`, a version of `old`, has the root of `old`, unless it is a root by itself."""
        self._roots.setdefault(new, self.root(old))

    def root(self, value: Value) -> Value:
        """The first value in the storage of `value`."""
        return self._roots.get(value, value)

    def is_written(self, value: Value) -> bool:
        """True when an op writes the storage of `value`."""
        return self.root(value) in self.written


def passed_through(op: Op) -> Iterator[tuple[Value, Value]]:
    """The results of an op that is another in each mode which are, in a mode, an operand or a view of it, and
    that operand.
    """
    if op.target != BY_MODE:
        return
    for region in op.regions:
        operands = dict(zip(region.inputs, op.args[3], strict=True))
        aliases = Aliases(region.ops, roots=region.inputs)
        for result, value in zip(op.results, region.output.operands, strict=True):
            operand = operands.get(aliases.root(value))
            if operand is not None:
                yield result, operand


def writes_of(ops: Iterable[Op], values: Iterable[Value]) -> Iterator[tuple[Op, Value]]:
    """Every write in place of one of `values`, directly or through a view, and the op that does it."""
    roots = dict.fromkeys(values)
    return (
        (op, root) for op, root in Aliases(ops, roots=roots).writes if root in roots
    )


def written_in(ops: Iterable[Op], values: Iterable[Value]) -> set[Value]:
    """The values among `values` that `ops` write in place, directly or through a view."""
    return {value for _, value in writes_of(ops, values)}
