"""The invariants V20 to V24, of `differentiated` programs. `stagecut.ir.check.verifier` lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from stagecut.ir.graph import (
    ROLES,
    Block,
    Op,
    Program,
    Stage,
    StateEntry,
    Transfer,
    Value,
)
from stagecut.ir.types import TensorType

Faults = Iterator[tuple[str, str]]


def backward_faults(program: Program) -> Faults:
    """The faults of the backward of a program, each with the number of its invariant."""
    arriving = _arriving(program)
    for stage in program.stages:
        yield from _roles(program, stage)
        yield from _saved(stage)
        for block in stage.backward:
            yield from _reads(
                stage,
                block,
                arriving.get(stage.index, set()),
            )
            yield from _gradients(stage, block)
    for value in program.cotangents:
        if value.gradient_of not in program.output.operands or value.owner is not None:
            yield "V23", f"{value!r} is no gradient of a value that the model returns"
    yield from _transfers(program)


def _arriving(program: Program) -> dict[int, set[Value]]:
    """Stage -> the gradients that arrive there."""
    arriving: dict[int, set[Value]] = {}
    for transfer in program.backward_transfers:
        arriving.setdefault(transfer.target, set()).add(transfer.value)
    for stage in program.stages:
        arriving.setdefault(stage.index, set()).update(
            value for value in program.cotangents if value.gradient_of in stage.outputs
        )
    return arriving


def _roles(program: Program, stage: Stage) -> Faults:
    names = [block.name for block in stage.backward]
    wanted = list(ROLES[1:]) if program.phase == "differentiated" else []
    if names != wanted:
        yield "V20", f"stage {stage.index} has the backward {names}, not {wanted}"


def _saved(stage: Stage) -> Faults:
    own = {value for op in stage.ops for value in op.definitions()}
    available = own.union(stage.inputs)
    read = {value for block in stage.backward for value in block.inputs}
    for value in stage.saved:
        if value not in available:
            yield (
                "V22",
                f"stage {stage.index} saves {value!r}, which it neither defines nor receives",
            )
        elif value not in read:
            yield (
                "V22",
                f"stage {stage.index} saves {value!r}, which its backward never reads",
            )
    if len(set(stage.saved)) != len(stage.saved):
        yield "V22", f"stage {stage.index} saves a value twice"


def _reads(stage: Stage, block: Block, arriving: set[Value]) -> Faults:
    given = arriving.union(stage.saved)
    if block.name == ROLES[2]:
        given.update(stage.backward[0].outputs)
    own = {value for op in block.ops for value in op.definitions()}
    listed = set(block.inputs)
    read = {value for op in (*block.ops, block.output) for value in op.reads}
    where = f"the {block.name} of stage {stage.index}"
    for value in block.inputs:
        if value not in given:
            yield (
                "V21",
                f"{where} lists {value!r}, which is not saved and does not arrive",
            )
        if value not in read:
            yield "V21", f"{where} lists {value!r}, which it never reads"
    for value in read - listed - own:
        if not (isinstance(value.owner, StateEntry) and value.owner in stage.state):
            yield "V21", f"{where} reads {value!r}, which it does not list"
    for op in block.ops:
        if op.effects.random or op.effects.writes:
            yield "V21", f"{where} writes, or draws random numbers, in {op.where()}"


def _gradients(stage: Stage, block: Block) -> Faults:
    """The gradients in a block are those of its role, and each is of the type of what it is the gradient
    of.
    """
    own = {value for op in block.ops for value in op.definitions()}
    weights = block.name == ROLES[2]
    homes = {entry.value for entry in stage.state}
    if not weights:
        homes.update(stage.inputs)
    where = f"the {block.name} of stage {stage.index}"
    for value in block.outputs:
        whose = value.gradient_of
        if whose is None:
            if weights:
                yield (
                    "V23",
                    f"{where} returns {value!r}, which is the gradient of nothing",
                )
            continue
        if whose not in homes:
            yield (
                "V23",
                f"{where} returns a gradient of {whose!r}, which is not its own",
            )
        if value not in own:
            yield (
                "V23",
                f"{where} returns {value!r} as a gradient that it does not compute",
            )
        if not _fits(value, whose):
            yield "V23", f"{value!r}, the gradient of {whose!r}, is of another type"


def _fits(gradient: Value, value: Value) -> bool:
    one, other = gradient.type, value.type
    if not isinstance(one, TensorType) or not isinstance(other, TensorType):
        return False
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _transfers(program: Program) -> Faults:
    """A gradient goes once, backward, from the stage that computes it to the one that made the value."""
    count = Counter(transfer.value for transfer in program.backward_transfers)
    for value, times in count.items():
        if times > 1:
            yield "V24", f"{times} transfers of the gradient {value!r}"
    for transfer in program.backward_transfers:
        if not _is_way_back(program, transfer):
            yield (
                "V24",
                f"{transfer.value!r} does not go back from stage {transfer.source} to the stage that made "
                f"what it is the gradient of",
            )
    for stage in program.stages:
        for value in stage.backward[0].outputs if stage.backward else ():
            whose = value.gradient_of
            if whose is not None and isinstance(whose.owner, Op) and not count[value]:
                yield "V24", f"no transfer of {value!r}, which another stage needs"


def _is_way_back(program: Program, transfer: Transfer) -> bool:
    source, target, value = transfer.source, transfer.target, transfer.value
    if source is None or not 0 <= target < source < len(program.stages):
        return False
    backward = program.stages[source].backward
    route = "send" if source == target + 1 else "relay"
    return (
        transfer.route == route
        and bool(backward)
        and value in backward[0].outputs
        and value.gradient_of in program.stages[target].outputs
    )
