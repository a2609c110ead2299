"""Computes what crosses: each stage's inputs and outputs are exactly its live-ins and live-outs."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import Op, Program, Stage, StateEntry, Transfer, Value
from stagecut.ir.outline import Positions, positions


@dataclass(frozen=True)
class Liveness:
    """Every stage lists its inputs and outputs, and every value that crosses has a transfer to each stage that uses it.

    Inputs: the user inputs it reads in signature order, then the rest in order of definition. Outputs: in
    order of definition; those of the last stage in the order the model returns them.
    """

    name = "liveness"

    def run(self, program: Program) -> bool:
        if program.phase != "partitioned" or _linked(program):
            return False
        where = positions(program)
        order = {value: index for index, value in enumerate(program.inputs)}
        home: dict[Value, int] = {}
        for stage in program.stages:
            _link(stage, where, order)
            home.update((v, stage.index) for op in stage.ops for v in op.definitions())
        _returned_last(program)
        for stage in program.stages:
            program.transfers += [Transfer(v, home.get(v), stage.index) for v in stage.inputs]
        return _linked(program)


def _linked(program: Program) -> bool:
    return any(stage.inputs or stage.outputs for stage in program.stages)


def _link(stage: Stage, where: Positions, order: dict[Value, int]) -> None:
    live = [v for v in where.live_ins(stage.ops) if not isinstance(v.owner, StateEntry)]
    fed = sorted((v for v in live if v.owner is None), key=order.__getitem__)
    received = sorted((v for v in live if v.owner is not None), key=where.defined)
    stage.inputs = fed + _by_definition(received)
    stage.outputs = where.live_outs(stage.ops)


def _by_definition(values: list[Value]) -> list[Value]:
    """Values of one op in the order it defines them; the list is sorted by op already."""
    ranks: dict[Value, int] = {}
    for value in values:
        if isinstance(value.owner, Op) and value not in ranks:
            ranks.update({v: len(ranks) + i for i, v in enumerate(value.owner.definitions()) if v not in ranks})
    return sorted(values, key=ranks.__getitem__)


def _returned_last(program: Program) -> None:
    last = program.stages[-1]
    own = set(last.outputs)
    returned = [v for v in dict.fromkeys(program.output.operands) if v in own or isinstance(v.owner, StateEntry)]
    last.outputs = returned
