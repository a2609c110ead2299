"""Computes which values cross: each stage's inputs and outputs are exactly its live-ins and live-outs."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import Program, Stage, StateEntry, Transfer, Value
from stagecut.ir.outline import positions


@dataclass(frozen=True)
class Liveness:
    """Every stage lists its inputs and outputs, and every value that crosses has a transfer to each stage
    that uses it.

    Inputs: the user inputs that the stage reads in signature order, then the rest as the stages before it
    list them. Outputs: the parameters that it sends on, then values in order of definition; the outputs of
    the last stage stand in the order in which the model returns them.
    """

    name = "liveness"

    def run(self, program: Program) -> bool:
        if program.phase != "partitioned" or _linked(program):
            return False
        where = positions(program)
        order = {value: (-1, index) for index, value in enumerate(program.inputs)}
        for stage in program.stages:
            live = _received(where.live_ins(stage.ops), stage)
            _send_parameters(program, live, order)
            stage.inputs = _in_order(live, order)
            stage.set_outputs(where.live_outs(stage.ops))
            order |= {
                value: (stage.index, len(program.state) + place)
                for place, value in enumerate(stage.outputs)
            }
        returned = _received(program.output.operands, program.stages[-1])
        _send_parameters(program, returned, order)
        _returned_last(program)
        for stage in program.stages:
            for value in stage.inputs:
                home, _ = order[value]
                source = home if home >= 0 else None
                program.transfers.append(Transfer(value, source, stage.index))
        return _linked(program)


def _linked(program: Program) -> bool:
    return any(stage.inputs or stage.outputs for stage in program.stages)


def _received(values: list[Value], stage: Stage) -> list[Value]:
    """The values that are no state of the stage."""
    return [value for value in values if value.owner not in stage.state]


def _in_order(live: list[Value], order: dict[Value, tuple[int, int]]) -> list[Value]:
    return sorted(live, key=order.__getitem__)


def _send_parameters(
    program: Program, live: list[Value], order: dict[Value, tuple[int, int]]
) -> None:
    """The stages that hold the parameters among `live` list them first among their outputs."""
    for value in live:
        if isinstance(value.owner, StateEntry) and value not in order:
            owner = program.stages[value.owner.stages[0]]
            sent = owner.outputs
            place = sum(isinstance(output.owner, StateEntry) for output in sent)
            owner.set_outputs([*sent[:place], value, *sent[place:]])
            order[value] = (owner.index, place)


def _returned_last(program: Program) -> None:
    last = program.stages[-1]
    own = set(last.outputs)
    returned = [
        value
        for value in dict.fromkeys(program.output.operands)
        if value in own or value.owner in last.state
    ]
    last.set_outputs(returned)
