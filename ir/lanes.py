"""Finds the stages that touch the state that a caller's objects hold. No torch here."""

from __future__ import annotations

from stagecut.ir.aliases import Aliases
from stagecut.ir.graph import Lane, Op, Program, Stage, Value
from stagecut.ir.types import ScalarType, TensorType


def left_value(program: Program, lane: Lane) -> Value:
    """The value that stands in the lane after a call: an output, or the input itself."""
    if lane.left is None:
        return lane.given
    value = program.outputs[lane.left]
    assert isinstance(value, Value)
    return value


def goes_on(given: Value, left: object) -> bool:
    """True for an output that may stand where an input stood."""
    return (
        isinstance(left, Value)
        and isinstance(given.type, TensorType)
        and isinstance(left.type, TensorType)
        and given.type.dtype == left.type.dtype
    )


def reads_sizes_only(op: Op) -> bool:
    """True for an op that only makes numbers which follow from the sizes of its operands."""
    return bool(op.results) and all(
        isinstance(result.type, ScalarType) and result.type.expr is not None
        for result in op.results
    )


def touching(program: Program) -> dict[Lane, tuple[int, ...]]:
    """The stages that read or write what each lane holds before or after a call, its sizes apart. One pass
    over the ops.
    """
    ops = [*program.all_ops()]
    aliases = Aliases(ops, roots=[lane.given for lane in program.lanes])
    lanes_of: dict[Value, list[Lane]] = {}
    for lane in program.lanes:
        for value in dict.fromkeys([lane.given, left_value(program, lane)]):
            lanes_of.setdefault(aliases.root(value), []).append(lane)
    stages: dict[Lane, set[int]] = {lane: set() for lane in program.lanes}
    for stage in program.stages:
        for root in _roots(stage, aliases):
            for lane in lanes_of.get(root, ()):
                stages[lane].add(stage.index)
    return {lane: tuple(sorted(touched)) for lane, touched in stages.items()}


def _roots(stage: Stage, aliases: Aliases) -> set[Value]:
    """The storages that a stage reads or makes."""
    roots: set[Value] = set()
    for op in stage.ops:
        if reads_sizes_only(op):
            continue
        roots.update(map(aliases.root, _values(op)))
    return roots


def _values(op: Op) -> list[Value]:
    return [*op.reads, *op.definitions()]
