"""Masks that say where rows of an input go, such as those of image patches among tokens.

The rows of all samples are in one input, one after the other, and the masks take as many as they have places.
Divided equally, they reach their places only where every micro-batch has as many places as rows. No op would
complain where it has fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagecut.backend.ranks.wire import Sizes, size
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Op, Program, Value, leaves
from stagecut.ir.ops import facts
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import Machine
from stagecut.ir.types import TensorType


@dataclass(frozen=True)
class Filling:
    """An op that puts rows where a mask says; the ops that make the mask of the inputs of the model; the
    inputs, by place, of which the mask and the rows are made.
    """

    op: Op
    makers: tuple[Op, ...]
    sources: tuple[int, ...]

    @property
    def operands(self) -> tuple[Value, Value, Value]:
        """The tensor that is filled, the mask, the rows."""
        filled, mask, rows = leaves(self.op.args[:3])
        return filled, _unexpanded(mask), rows

    def check(self, program: Program, flat: Sequence[Any], sizes: Sizes) -> None:
        """Returns when a micro-batch has as many rows as its mask takes."""
        filled, mask, rows = self.operands
        env = dict(zip(program.inputs, flat, strict=True))
        with torch.no_grad():
            Machine(Bindings()).run(self.makers, env)
        whole_mask = torch.broadcast_to(env[mask], _shape(filled, sizes))
        places = whole_mask.sum().item()
        numbers = torch.Size(_shape(rows, sizes)).numel()
        if places != numbers:
            raise InputError(
                f"a micro-batch has {numbers} numbers to put where a mask has {places} places: its samples "
                "take fewer or more than an equal part",
                where=self.op.where(),
                hint="give each micro-batch what its samples take: step(arg_mbs=[...], kwarg_mbs=[...])",
            )


def _shape(value: Value, sizes: Sizes) -> list[int]:
    assert isinstance(value.type, TensorType)
    return [size(dim, sizes, value) for dim in value.type.shape]


def fillings(program: Program) -> list[Filling]:
    """The ops that put rows of an input where a mask says that follows from the inputs alone."""
    all_fillings: list[Filling] = []
    for op in program.all_ops():
        if not facts(op).fills:
            continue
        operands = list(leaves(op.args[:3]))
        if len(operands) != 3:
            continue
        mask = _unexpanded(operands[1])
        makers, used = _ancestry(mask)
        if not used <= {*program.inputs}:
            continue
        if not all(map(_can_run_alone, makers)):
            continue
        ops = [maker for maker in program.all_ops() if maker in makers]
        used |= _ancestry(operands[2])[1]
        places: list[int] = []
        for place, value in enumerate(program.inputs):
            if value in used:
                places.append(place)
        filling = Filling(op, tuple(ops), tuple(places))
        all_fillings.append(filling)
    return all_fillings


def _can_run_alone(op: Op) -> bool:
    return not (op.has_effect or op.is_users or op.regions)


def _unexpanded(mask: Value) -> Value:
    """The mask before it was expanded to the shape of what is filled."""
    while isinstance(mask.owner, Op) and facts(mask.owner).expands:
        mask = mask.owner.operands[0]
    return mask


def _ancestry(value: Value) -> tuple[set[Op], set[Value]]:
    """The ops that make a value, and the inputs and the state that go into it."""
    makers: set[Op] = set()
    used: set[Value] = set()
    todo = [value]
    while todo:
        needed = todo.pop()
        op = needed.owner
        if not isinstance(op, Op):
            used.add(needed)
        elif op not in makers:
            makers.add(op)
            todo += op.reads
    return makers, used
