"""Outlining: the live-ins and live-outs of a contiguous run of ops.

The one mechanism behind stages, module scopes inside a stage and anything else that is cut out of a
list of ops. Number all ops once; a run is then an interval, and a value is live-in when it is defined
before the interval, live-out when it is used at or after its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stagecut.ir.graph import Op, Program, Stage, StateEntry, Value, scope_fqn
from stagecut.ir.types import same_layout

BEFORE = -1
"""Position of everything that is there before the first op: user inputs and state."""


class Positions:
    """Where every op stands in program order, and where every value is last used.

    The program's output stands after all ops, so a returned value is live to the end.
    """

    __slots__ = ("at", "end", "last")

    def __init__(self, ops: Iterable[Op], output: Op) -> None:
        self.at: dict[Op, int] = {}
        self.last: dict[Value, int] = {}
        last = self.last
        index = BEFORE
        for index, op in enumerate(ops):
            self.at[op] = index
            for value in op.reads:
                last[value] = index
        self.end = index + 1
        for value in output.operands:
            last[value] = self.end

    def defined(self, value: Value) -> int:
        """The position of the op that defines `value`, BEFORE for inputs and state."""
        return self.at[value.owner] if isinstance(value.owner, Op) else BEFORE

    def live_ins(self, ops: list[Op]) -> list[Value]:
        """Values that `ops`, an interval, read but do not define, in order of first use; state included."""
        if not ops:
            return []
        start, at = self.at[ops[0]], self.at
        found: dict[Value, None] = {}
        for op in ops:
            for value in op.reads:
                owner = value.owner
                if owner is None or isinstance(owner, StateEntry) or at[owner] < start:
                    found[value] = None
        return list(found)

    def live_outs(self, ops: list[Op]) -> list[Value]:
        """Values that `ops`, an interval, define and something after it reads, in order of definition."""
        if not ops:
            return []
        stop, last = self.at[ops[-1]], self.last
        return [v for op in ops for v in op.definitions() if last.get(v, BEFORE) > stop]


def positions(program: Program) -> Positions:
    """The positions of all ops of `program`."""
    return Positions(program.all_ops(), program.output)


def modules_of(stage: Stage, most: int = 4) -> list[str]:
    """The modules a stage runs, at the deepest depth at which they are no more than `most`, or at the outermost."""
    paths = list(dict.fromkeys(scope_fqn(op.scope) for op in stage.ops if op.scope))
    depth = max((p.count(".") + 1 for p in paths), default=0)
    while depth > 1 and len({".".join(p.split(".")[:depth]) for p in paths}) > most:
        depth -= 1
    return list(dict.fromkeys(".".join(p.split(".")[:depth]) for p in paths))


def storage_root(value: Value) -> Value:
    """The value in whose storage `value` lives: what it is a version or a view of."""
    value = unwritten(value)
    while (base := viewed_value(value)) is not None:
        value = unwritten(base)
    return value


def viewed_value(value: Value) -> Value | None:
    """The value that `value` was made a view of, None for what is no view."""
    op = value.owner
    if not isinstance(op, Op) or value not in op.results:
        return None
    viewed = op.effects.viewed(op.results.index(value))
    return None if viewed is None else op.operands[viewed]


def is_what_it_wrote(op: Op, result: int) -> bool:
    """True when a result is the very tensor that its op wrote. An in-place op returns that, what is kept whole any view of it."""
    viewed = op.effects.viewed(result)
    if viewed is None or viewed not in op.effects.writes:
        return False
    return not (op.is_users or op.regions) or same_layout(op.results[result].type, op.operands[viewed].type)


def unwritten(value: Value) -> Value:
    """The value that `value` is a version of, itself when it is none."""
    while isinstance(value.owner, Op) and value not in value.owner.results:
        value = next(old for old, new in value.owner.versions.items() if new is value)
    return value


def written_in(ops: Iterable[Op], values: Iterable[Value]) -> set[Value]:
    """Those of `values` that `ops` write in place, directly or through a view."""
    return {value for _, value in writes_of(ops, values)}


def writes_of(ops: Iterable[Op], values: Iterable[Value]) -> Iterator[tuple[Op, Value]]:
    """Every write in place of one of `values`, directly or through a view, and the op that does it."""
    root = {value: value for value in values}
    for op in ops:
        for result, viewed in zip(op.results, op.effects.views, strict=False):
            if viewed is not None and op.operands[viewed] in root:
                root[result] = root[op.operands[viewed]]
        root |= {new: root[old] for old, new in op.versions.items() if old in root}
        yield from ((op, root[op.operands[i]]) for i in op.effects.writes if op.operands[i] in root)
