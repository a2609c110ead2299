"""Ops that suit any order stand in the order in which what follows reads them.

A model may go through a set, such as that of the kinds of its layers, and every Python goes through a set of
strings in an order of its own. Where the model makes masks or angles on the way, processes would have
programs of another order, which ranks cannot run together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from stagecut.ir.graph import (
    WHOLE,
    Frame,
    Op,
    Program,
    Scope,
    StateEntry,
    Value,
    nested_ops,
)
from stagecut.ir.ops import facts
from stagecut.ir.types import carries_grad

_NAMESPACES = ("aten", "operator", "_operator")


@dataclass(frozen=True)
class _Run:
    """Ops that follow each other, any order of which computes the same, as units: a call of a module that
    lies in the run as a whole, or an op of the module around it. `depth` is how deep that one lies.
    """

    begin: int
    depth: int
    units: Sequence[Sequence[Op]]


def settle(program: Program) -> None:
    """Ops without effects or gradients that depend on no parameter stand in the order in which later ops read
    them, calls of modules as they are. They keep their run: the ops between two that are no such ones.

    The numbers of calls follow the order.
    """
    places = {op: place for place, op in enumerate(program.ops)}
    for place, op in enumerate(program.ops):
        for region in op.regions:
            inner = nested_ops(region.ops)
            places |= dict.fromkeys(inner, place)
    places[program.output] = len(program.ops)
    readers = _Readers(places)
    # a later run first: the order in which it reads decides about the earlier ones
    runs = [*_runs(program)]
    runs.reverse()
    for run in runs:
        before = [op for unit in run.units for op in unit]
        after = [op for unit in _by_readers(run, readers) for op in unit]
        if after == before:
            continue
        for place, op in enumerate(after, run.begin):
            program.ops[place] = op
            places[op] = place
        _number(run.depth, before, after)


def _runs(program: Program) -> Iterator[_Run]:
    extents = _Extents(program.ops)
    free = _free(program)
    places = range(len(program.ops))
    for is_free, group in groupby(places, lambda place: program.ops[place] in free):
        if not is_free:
            continue
        stretch = [*group]
        begin, end = stretch[0], stretch[-1]

        def around(place: int, begin: int = begin, end: int = end) -> Scope:
            scope = program.ops[place].scope
            return extents.around(scope, begin, end)

        for anchor, part in groupby(stretch, around):
            ops = [program.ops[place] for place in part]
            units = _units(ops, len(anchor))
            if units is not None and len(units) > 1:
                yield _Run(begin, len(anchor), units)
            begin += len(ops)


class _Extents:
    """The places of the first and the last op of each call."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self._first: dict[Scope, int] = {}
        self._last: dict[Scope, int] = {}
        for place, op in enumerate(ops):
            for call in _prefixes(op.scope):
                self._first.setdefault(call, place)
                self._last[call] = place

    def around(self, scope: Scope, begin: int, end: int) -> Scope:
        """The innermost of the calls around an op that has ops before or behind these places."""
        for call in reversed(_prefixes(scope)):
            if self._first[call] < begin or self._last[call] > end:
                return call
        return ()


def _prefixes(scope: Scope) -> list[Scope]:
    return [scope[:depth] for depth in range(1, len(scope) + 1)]


def _units(ops: Sequence[Op], depth: int) -> list[list[Op]] | None:
    """None where the ops of a call do not follow each other. A guard belongs to the op that comes next."""
    units: list[list[Op]] = []
    calls: set[Scope] = set()
    for op in ops:
        call = op.scope[: depth + 1]
        is_call = len(call) > depth
        last = units[-1][-1] if units else None
        if last is not None:
            goes_on = is_call and last.scope[: depth + 1] == call
            if goes_on or not last.results:
                units[-1].append(op)
                continue
        if is_call and call in calls:
            return None
        calls.add(call)
        units.append([op])
    return units


def _free(program: Program) -> set[Op]:
    """The ops that may change places with their neighbours."""
    free: set[Op] = set()
    trained: set[Value] = set()
    for op in program.ops:
        if any(value in trained or _kind(value) == "param" for value in op.reads):
            trained.update(op.definitions())
        elif _is_plain(op):
            free.add(op)
    return free


def _kind(value: Value) -> str:
    return value.owner.kind if isinstance(value.owner, StateEntry) else ""


def _is_plain(op: Op) -> bool:
    if facts(op).guard:
        return True
    # the name of a constant is its place among the constants
    if any(_kind(value) == "const" for value in op.reads):
        return False
    effects = op.effects
    if effects.writes or effects.random or effects.effect:
        return False
    if op.versions or op.regions:
        return False
    if op.target.partition(".")[0] not in _NAMESPACES:
        return False
    if any(context.kind in WHOLE for context in op.context):
        return False
    if any(carries_grad(value.type) for value in op.results):
        return False
    return bool(op.results)


def _by_readers(run: _Run, readers: _Readers) -> list[Sequence[Op]]:
    """The units in the order in which ops behind the run read them, those that a unit reads before it; last
    those that nothing reads.
    """
    home: dict[Op, int] = {}
    for number, unit in enumerate(run.units):
        home |= dict.fromkeys(unit, number)
    read: list[tuple[tuple[int, int], int]] = []
    for op, number in home.items():
        for value in op.results:
            first = readers.first(value, home)
            if first is not None:
                read.append((first, number))
    order: dict[int, None] = {}
    for _, number in sorted(read):
        _append(number, run.units, home, order)
    for number in range(len(run.units)):
        _append(number, run.units, home, order)
    return [run.units[number] for number in order]


class _Readers:
    """The places of the ops that read a value, among all ops, and of the value among what they read."""

    def __init__(self, places: dict[Op, int]) -> None:
        self._places = places
        self._operands: dict[Op, dict[Value, int]] = {}

    def first(self, value: Value, besides: dict[Op, int]) -> tuple[int, int] | None:
        """The first one that is not in `besides`, None for none."""
        found = [
            (self._places[user], self._operand(user, value))
            for user in value.uses
            if user not in besides and user in self._places
        ]
        return min(found, default=None)

    def _operand(self, user: Op, value: Value) -> int:
        if user not in self._operands:
            read = [*dict.fromkeys(user.reads)]
            self._operands[user] = {
                operand: number for number, operand in enumerate(read)
            }
        return self._operands[user][value]


def _append(
    number: int,
    units: Sequence[Sequence[Op]],
    home: dict[Op, int],
    order: dict[int, None],
) -> None:
    """`order` gains a unit, behind those that it reads."""
    stack = [(number, _read_by(units[number], home))]
    while stack:
        unit, others = stack[-1]
        other = next((o for o in others if o != unit and o not in order), None)
        if other is not None:
            stack.append((other, _read_by(units[other], home)))
            continue
        order[unit] = None
        stack.pop()


def _read_by(unit: Sequence[Op], home: dict[Op, int]) -> Iterator[int]:
    for op in unit:
        for value in op.reads:
            if isinstance(value.owner, Op) and value.owner in home:
                yield home[value.owner]


def _number(depth: int, before: Sequence[Op], after: Sequence[Op]) -> None:
    """The calls of each module have the numbers that they had, in their order."""
    numbers: dict[tuple[str, ...], list[int]] = {}
    for scope in _calls(depth, before):
        path = tuple(frame.name for frame in scope)
        own = scope[-1].call
        numbers.setdefault(path, []).append(own)
    for found in numbers.values():
        found.sort(reverse=True)
    renamed: dict[Scope, Scope] = {}
    for scope in _calls(depth, after):
        path = tuple(frame.name for frame in scope)
        above = renamed.get(scope[:-1], scope[:-1])
        frame = Frame(path[-1], numbers[path].pop())
        renamed[scope] = (*above, frame)
    for op in after:
        scope = renamed.get(op.scope, op.scope)
        op.place = op.place._replace(scope=scope)


def _calls(depth: int, ops: Sequence[Op]) -> list[Scope]:
    """The calls below a depth, outer ones first, in the order in which they begin."""
    scopes = (prefix for op in ops for prefix in _prefixes(op.scope)[depth:])
    return [*dict.fromkeys(scopes)]
