"""Aligns two traces of one model: finds the ops that are the same in both, and the runs of ops that each has
between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

from stagecut.ir.graph import Block, Mode, Op, Program, StateEntry, Value, scope_fqn
from stagecut.ir.types import TensorType, Type

Pair = tuple[Value, Value]
"""The values that stand in the same place in both traces, ours first."""


class CannotFollow(Exception):
    """The two traces do not make one program; the text says why."""


@dataclass
class Part:
    """A part of both traces: an op that is the same in both, or a run of ops from each.

    joins maps the pairs of values that are one value after the part to the op that reads them first; None for
    the output.
    """

    ours: list[Op]
    theirs: list[Op]
    shared: bool = False
    joins: dict[Pair, Op | None] = field(default_factory=dict)

    @property
    def ops(self) -> list[Op]:
        """The ops of both traces."""
        return [*self.ours, *self.theirs]


class _Conflict(Exception):
    """The parts from `first` to `last` must be one, because one of them makes a value that another needs in
    one mode only.
    """

    def __init__(self, first: int, last: int) -> None:
        super().__init__(first, last)
        self.first, self.last = first, last


class Alignment:
    """The parts of two traced programs, and the value of ours for each value of theirs.

    `same_constant` tells whether two constants of these names have equal values. `filled` gives the arguments
    of an op, including those that it leaves out and another op gives.
    """

    def __init__(
        self,
        ours: Program,
        theirs: Program,
        same_constant: Callable[[str, str], bool],
        filled: Callable[[Op, Op], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        self.ours, self.theirs = ours, theirs
        self.same_constant, self.filled = same_constant, filled
        self._inputs = dict(self._interface())
        self.partner: dict[Value, Value] = {}
        self._place: dict[Value, int] = {}
        self._alone: set[Value] = set()
        self.parts = _aligned(ours.ops, theirs.ops)
        while True:
            try:
                self._walk()
                return
            except _Conflict as conflict:
                self._unite(conflict.first, conflict.last)

    def _interface(self) -> Iterator[Pair]:
        """Inputs and state, theirs first."""
        ours, theirs = self.ours, self.theirs
        if [bare(v.type) for v in ours.inputs] != [bare(v.type) for v in theirs.inputs]:
            raise CannotFollow("it takes other inputs there")
        yield from zip(theirs.inputs, ours.inputs, strict=True)
        owners = ours.name_owners()
        for entry in theirs.state:
            if entry.kind != "const":
                yield entry.value, owners[entry.name].value

    def _unite(self, first: int, last: int) -> None:
        """The parts from `first` to `last`, and the runs beside them, become one run."""
        while first > 0 and not self.parts[first - 1].shared:
            first -= 1
        while last + 1 < len(self.parts) and not self.parts[last + 1].shared:
            last += 1
        parts = self.parts[first : last + 1]
        self.parts[first : last + 1] = [
            Part(
                [op for p in parts for op in p.ours],
                [op for p in parts for op in p.theirs],
            )
        ]

    # --- one walk over all parts, which ends where two of them must be one ------------------------

    def _walk(self) -> None:
        self.partner, self._place, self._alone = dict(self._inputs), {}, set()
        for number, part in enumerate(self.parts):
            part.joins = {}
            self._visit(part, number)
            self._place |= {value: number for op in part.ops for value in op.results}
        for one, other in zip(self.ours.outputs, self.theirs.outputs, strict=True):
            if isinstance(one, Value) != isinstance(other, Value) or not (
                isinstance(one, Value) or same_literal(one, other)
            ):
                raise CannotFollow("it returns something else there")
            if isinstance(one, Value):
                self._meet(one, other, len(self.parts), None)

    def _visit(self, part: Part, number: int) -> None:
        if not part.shared:
            made = {value for op in part.ops for value in op.results}
            for value in (
                value
                for op in part.ops
                for value in op.operands
                if value in self._alone and value not in made
            ):
                raise _Conflict(self._place[value], number)
            self._alone |= made
            return
        one, other = part.ours[0], part.theirs[0]
        pairs = self.pairs(one, other)
        if pairs is None:
            raise _Conflict(number, number)
        for mine, yours in pairs:
            if isinstance(mine, Value):
                self._meet(mine, yours, number, one)
        self.partner |= zip(other.results, one.results, strict=True)

    def _meet(self, mine: Value, yours: Value, number: int, reader: Op | None) -> None:
        """The two values are one, or become one after the part that makes them."""
        if self.partner.get(yours) is mine or self._are_equal_constants(mine, yours):
            self.partner[yours] = mine
            return
        homes = [self._place[value] for value in (mine, yours) if value in self._alone]
        where = max(homes) if homes else self._run_before(number)
        first = min([where, *homes])
        last = max(where, *(self._place.get(value, -1) for value in (mine, yours)))
        if first < where or last > where:
            raise _Conflict(first, last)
        if bare(mine.type) != bare(yours.type):
            if reader is None:
                raise CannotFollow("it returns tensors of another type or size there")
            raise _Conflict(where, number)
        self.parts[where].joins.setdefault((mine, yours), reader)

    def _run_before(self, number: int) -> int:
        """The number of the run right before that part."""
        if not number or self.parts[number - 1].shared:
            self.parts.insert(number, Part([], []))
            raise _Conflict(number, number)
        return number - 1

    def _are_equal_constants(self, mine: Value, yours: Value) -> bool:
        one, other = mine.owner, yours.owner
        constants = (
            isinstance(one, StateEntry)
            and isinstance(other, StateEntry)
            and one.kind == other.kind == "const"
        )
        return constants and self.same_constant(one.name, other.name)  # type: ignore[union-attr]

    # --- pairs ------------------------------------------------------------------------------------

    def pairs(self, one: Op, other: Op) -> list[tuple[Any, Any]] | None:
        """The pairs of leaves of the operands of both, in order; None where the operands are not built
        alike.
        """
        (args, kwargs), (others, keywords) = (
            (one.args, one.kwargs),
            (other.args, other.kwargs),
        )
        if len(args) != len(others) or kwargs.keys() != keywords.keys():
            (args, kwargs), (others, keywords) = (
                self.filled(one, other),
                self.filled(other, one),
            )
        if kwargs.keys() != keywords.keys() or not all(
            map(self._same_region, one.regions, other.regions)
        ):
            return None
        found: list[tuple[Any, Any]] = []
        alike = _zip(
            (args, kwargs), (others, {key: keywords[key] for key in kwargs}), found
        )
        return found if alike else None

    def _same_region(self, one: Block, other: Block) -> bool:
        """True for regions of equal ops. Where anything in them differs by mode, they are not the same, and
        so neither are their ops.
        """
        if [p.type for p in one.inputs] != [p.type for p in other.inputs] or [
            *map(_key, one.ops)
        ] != [*map(_key, other.ops)]:
            return False
        partner = dict(zip(other.inputs, one.inputs, strict=True))
        for mine, yours in zip(
            [*one.ops, one.output], [*other.ops, other.output], strict=True
        ):
            pairs = self.pairs(mine, yours)
            if pairs is None or not all(
                partner.get(b) is a if isinstance(a, Value) else same_literal(a, b)
                for a, b in pairs
            ):
                return False
            partner |= zip(yours.results, mine.results, strict=True)
        return True


def _aligned(ours: Sequence[Op], theirs: Sequence[Op]) -> list[Part]:
    """Parts of one op each for ops that may be the same in both, and parts for the runs between them. The
    split points are the same where both traces have as many.
    """
    mine, yours = _between_splits(ours), _between_splits(theirs)
    if len(mine) != len(yours):
        mine, yours = [[*ours]], [[*theirs]]
    parts: list[Part] = []
    for one, other in zip(mine, yours, strict=True):
        for tag, start, stop, begin, end in SequenceMatcher(
            None, [*map(_key, one)], [*map(_key, other)], autojunk=False
        ).get_opcodes():
            if tag == "equal":
                parts += [
                    Part([a], [b], True)
                    for a, b in zip(one[start:stop], other[begin:end], strict=True)
                ]
            else:
                parts.append(Part(one[start:stop], other[begin:end]))
    return parts


def _between_splits(ops: Sequence[Op]) -> list[list[Op]]:
    """The ops from one split point to the next; each split point by itself."""
    runs: list[list[Op]] = [[]]
    for op in ops:
        if op.is_split:
            runs += [[op], []]
        else:
            runs[-1].append(op)
    return runs


def _key(op: Op) -> Any:
    """A key that is equal for ops that can stand for each other. It leaves out the operands, and also
    checkpoints and the numbers of calls, which change no result.
    """
    context = tuple(mark for mark in op.context if mark.kind != "checkpoint")
    return (
        op.target,
        scope_fqn(op.scope),
        repr(context),
        tuple(str(bare(r.type)) for r in op.results),
        repr(op.form),
        len(op.regions),
    )


def bare(kind: Type) -> Type:
    """A type without its gradient, which a trace does not know."""
    return (
        replace(kind, grad=False)
        if isinstance(kind, TensorType) and kind.grad
        else kind
    )


def _zip(one: Any, other: Any, found: list[tuple[Any, Any]]) -> bool:
    """`found` gains the pairs of leaves; False where the trees are not built alike."""
    if isinstance(one, (tuple, list)):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(_zip(a, b, found) for a, b in zip(one, other, strict=True))
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and [*one] == [*other]
            and all(_zip(item, other[key], found) for key, item in one.items())
        )
    if isinstance(one, slice):
        return isinstance(other, slice) and _zip(
            (one.start, one.stop, one.step),
            (other.start, other.stop, other.step),
            found,
        )
    if isinstance(one, Value) != isinstance(other, Value) or isinstance(
        other, (tuple, list, dict, slice)
    ):
        return False
    found.append((one, other))
    return True


def same_literal(one: Any, other: Any) -> bool:
    """True for equal literals, where 1 is not True and nan is nan. Two literals that follow a flag must be
    equal in both modes.
    """
    if isinstance(one, Mode) and isinstance(other, Mode):
        return same_literal(one.training, other.training) and same_literal(
            one.evaluating, other.evaluating
        )
    return type(one) is type(other) and (one == other or repr(one) == repr(other))
