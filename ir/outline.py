"""Outlining: the live-ins and live-outs of a contiguous run of ops.

Stages, module scopes inside a stage and anything else that is cut out of a list of ops use this one
mechanism. Number all ops once; a run is then an interval. A value is live-in when it is defined before the
interval, live-out when it is used at or after its end.
"""

from __future__ import annotations

from collections.abc import Iterable

from stagecut.ir.graph import Op, Program, Value

BEFORE = -1
"""Position of the values that exist before the first op: user inputs and state."""


class Positions:
    """The position of every op in program order, and of the last use of every value.

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
        last |= dict.fromkeys(output.operands, self.end)

    def defined(self, value: Value) -> int:
        """The position of the op that defines `value`, BEFORE for inputs and state."""
        owner = value.owner
        if not isinstance(owner, Op):
            return BEFORE
        return self.at[owner]

    def live_ins(self, ops: list[Op]) -> list[Value]:
        """Values that `ops`, an interval, read but do not define, in order of first use; state included."""
        if not ops:
            return []
        at = self.at
        start = at[ops[0]]
        live: dict[Value, None] = {}
        for op in ops:
            for value in op.reads:
                owner = value.owner
                if not isinstance(owner, Op) or at[owner] < start:
                    live[value] = None
        return list(live)

    def live_outs(self, ops: list[Op]) -> list[Value]:
        """Values that `ops`, an interval, define and something after it reads, in order of definition."""
        if not ops:
            return []
        last = self.last
        stop = self.at[ops[-1]]
        live: list[Value] = []
        for op in ops:
            for value in op.definitions():
                if last.get(value, BEFORE) > stop:
                    live.append(value)
        return live


def positions(program: Program) -> Positions:
    """The positions of all ops of `program`."""
    return Positions(program.all_ops(), program.output)
