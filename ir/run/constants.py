"""Computes values that are the same in every call, because they depend on no input, no trained or written
state, and no random number. Needs torch.
"""

from __future__ import annotations

import math

import torch

from stagecut.ir.aliases import Aliases
from stagecut.ir.graph import Op, Program, StateEntry, Value
from stagecut.ir.ops import facts
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import Environment, Machine
from stagecut.ir.types import TensorType

MOST_ELEMENTS = 2**24
"""Elements of the largest tensor that is computed."""


class Constants:
    """The tensors of those values of a traced program that are the same in every call."""

    def __init__(self, program: Program, bindings: Bindings) -> None:
        self._machine = Machine(bindings)
        self._bindings = bindings
        self._places = {op: place for place, op in enumerate(program.ops)}
        self._aliases = Aliases(program.ops)
        self._values: Environment = {}
        self._varying: set[Value] = set()

    def value(self, value: Value) -> torch.Tensor | None:
        """The tensor that `value` is in every call; None where it may differ, or is too large to be worth the
        time.
        """
        steps: dict[Op, None] = {}
        todo = [value]
        while todo:
            operand = todo.pop()
            if operand in self._values or operand.owner in steps:
                continue
            if not self._is_constant(operand):
                self._varying.add(operand)
                return None
            if isinstance(operand.owner, Op):
                steps[operand.owner] = None
                todo += operand.owner.operands
        with torch.no_grad():
            self._machine.run(sorted(steps, key=self._places.__getitem__), self._values)
        result = self._values[value]
        return (
            result if isinstance(result, torch.Tensor) and not result.is_meta else None
        )

    def _is_constant(self, value: Value) -> bool:
        """True where the op that makes `value` makes the same result of the same operands, and for a constant
        of the model, whose tensor is then known.
        """
        if (
            value in self._varying
            or not _is_small(value)
            or self._aliases.is_written(value)
        ):
            return False
        if isinstance(value.owner, StateEntry):
            return self._lift(value, value.owner)
        return isinstance(value.owner, Op) and _is_pure(value.owner)

    def _lift(self, value: Value, entry: StateEntry) -> bool:
        tensor = self._bindings.tensors.get(entry.name)
        if entry.kind != "const" or tensor is None or tensor.is_meta:
            return False
        self._values[value] = tensor
        return True


def _is_small(value: Value) -> bool:
    """True for a tensor of known sizes that is not too large."""
    if not isinstance(value.type, TensorType):
        return False
    sizes = [size for size in value.type.shape if isinstance(size, int)]
    return len(sizes) == len(value.type.shape) and math.prod(sizes) <= MOST_ELEMENTS


def _is_pure(op: Op) -> bool:
    """True for an op of torch's that computes its results from its operands, and does nothing else."""
    if op.has_effect or op.is_users or op.regions or facts(op).uninitialised:
        return False
    return not any(
        context.kind in ("transform", "checkpoint") for context in op.context
    )
