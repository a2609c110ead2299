"""Limits of stages that run in processes of their own, and rules for the values that they receive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagecut.ir.aliases import (
    Aliases,
    passed_through,
    storage_root,
    unwritten,
    writes_of,
)
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import (
    BY_MODE,
    WHOLE,
    Mode,
    Op,
    Program,
    Stage,
    StateEntry,
    Value,
)
from stagecut.ir.ops import facts, module_path
from stagecut.ir.run.storage import storage_of
from stagecut.ir.types import carries_grad


def refuse_feedback(program: Program, training: bool = True) -> None:
    """Returns when every write stays in one stage; raises StagecutError naming what would have to flow
    backward.

    Outside of training, an op with a training flag does not count as a write.
    """
    _refuse_writes_past_autograd(program)
    for entry in program.state:
        if entry.share != "feedback":
            continue
        ops = [op for op in program.all_ops() if _touches(op, entry)]
        if not training and all(_follows_mode(op) for op in ops if op.effects.writes):
            continue
        raise StagecutError(
            f"'{entry.name}' is written in one stage and read or written in another, so the next step would "
            "read a stale copy",
            where="; ".join(dict.fromkeys(op.where() for op in ops[:4])),
            hint="cut so that all of it lies in one stage; one process can run this pipe, several cannot",
        )


def _refuse_writes_past_autograd(program: Program) -> None:
    """Raises StagecutError where a stage writes through `.data` to a tensor that another stage made: the
    backward there would see the old values.
    """
    for stage in program.stages:
        own = {*stage.ops, stage.output}
        for op in stage.ops:
            if not facts(op).past_autograd or not carries_grad(op.operands[0].type):
                continue
            root = storage_root(op.operands[0])
            if isinstance(root.owner, StateEntry) or root.owner in own:
                continue
            if root.owner is None and root.uses.keys() <= own:
                continue
            for writer, _ in writes_of(stage.ops, op.results):
                raise StagecutError(
                    f"stage {stage.index} writes {root!r} through .data, which backward sees where it was "
                    "made, and another stage made it",
                    where=writer.where(),
                    hint=(
                        "cut so that both lie in one stage, or write into a clone; one process can run this "
                        "pipe, several cannot"
                    ),
                )


def written_buffers(block: Stage) -> list[StateEntry]:
    """The buffers of a stage that it writes in eval mode."""
    writers = [op for op in block.ops if op.effects.writes and not _follows_mode(op)]
    roots = {storage_root(value) for op in writers for value in op.effects.writes}
    return [
        entry for entry in block.state if entry.kind != "param" and entry.value in roots
    ]


def _follows_mode(op: Op) -> bool:
    if op.target == BY_MODE:
        return False
    return any(isinstance(operand, Mode) and operand.is_flag for operand in op.args)


def _touches(op: Op, entry: StateEntry) -> bool:
    return any(unwritten(value) is entry.value for value in op.reads)


def written_inputs(stage: Stage) -> set[Value]:
    """The inputs that a stage writes in place, directly or through a view, in either mode. A receiver must
    own them: they cannot be leaves.
    """
    aliases = Aliases(stage.ops, roots=stage.inputs)
    written = set(aliases.written)
    for op in reversed(stage.ops):
        for result, operand in passed_through(op):
            if aliases.root(result) in written:
                written.add(aliases.root(operand))
    return written.intersection(stage.inputs)


def written_arguments(program: Program) -> tuple[int, ...]:
    """The places of the inputs of a program that one of its stages writes in place, in either mode."""
    written: set[Value] = set()
    for stage in program.stages:
        written |= written_inputs(stage)
    places = range(len(program.inputs))
    return tuple(place for place in places if program.inputs[place] in written)


def refuse_shared(
    program: Program, written: Sequence[int], flat: Sequence[Any]
) -> None:
    """Returns when no argument at one of the places `written` shares memory with another that is used.

    Raises InputError. Ranks write into copies of their own, so the write would not show in the other.
    """
    for place in written:
        storage = storage_of(flat[place])
        for other, value in enumerate(program.inputs):
            if other == place or not value.uses or storage_of(flat[other]) != storage:
                continue
            raise InputError(
                f"input '{program.inputs[place].hint}' is written, and shares memory with input "
                f"'{value.hint}': a rank has a copy of each, and the write would not show in the other",
                hint="give a clone of one of them; one process can run this, several cannot",
            )


def lives_in_buffer(value: Value) -> bool:
    """True when the value is a buffer of the stage or shares its storage: the next micro-batch may
    write it.
    """
    owner = storage_root(value).owner
    return isinstance(owner, StateEntry) and owner.kind == "buffer"


def backward_is_whole(stage: Stage, received: set[Value], sent: set[Value]) -> bool:
    """True when the backward of a stage must not be split into one for its inputs and one for its weights.

    torch's split follows each weight to the point where it meets a received value. It misses a weight that
    reaches an output without meeting one, and it takes a graph apart twice where a weight meets received
    values in two places. It is not known what happens inside a module kept whole or a body.
    """
    if any(map(_is_closed, stage.ops)):
        return True
    meets = set(received)
    own = {entry.value for entry in stage.state if entry.kind == "param"}
    for op in stage.ops:
        carrying = [value for value in op.definitions() if carries_grad(value.type)]
        if any(value in meets for value in op.operands):
            meets.update(carrying)
        elif any(value in own for value in op.operands):
            own.update(carrying)
    ops = set(stage.ops)
    return any(value in own for value in sent) or any(
        sum(user in ops for user in value.uses) > 1 for value in own
    )


def _is_closed(op: Op) -> bool:
    """True for a module kept whole, an op with a body, and an op in a region that runs as a whole."""
    if module_path(op) or op.regions:
        return True
    return any(context.kind in WHOLE for context in op.context)
