"""Small state that every rank keeps up to date by itself, such as how many tokens are in a cache.

A counter of a static cache is written by the stage whose layers it counts for, and Python code of the model
looks at it on every rank. What it becomes depends on nothing but small inputs, so each rank computes it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from stagecut.ir.aliases import storage_root
from stagecut.ir.graph import Op, Program, Value, leaves
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import Machine
from stagecut.ir.types import TensorType

MOST_ELEMENTS = 64
"""Tensors of more elements are no counters."""


class Everywhere:
    """The ops of other stages that write small inputs in place and read small inputs alone."""

    def __init__(self, program: Program, rank: int) -> None:
        self._machine = Machine(Bindings())
        self._inputs = [value for value in program.inputs if _is_small(value)]
        known: set[Value] = set(self._inputs)
        self._ops: list[Op] = []
        for stage in program.stages:
            for op in stage.ops:
                if _depends_on(op, known):
                    known.update(op.definitions())
                    if stage.index != rank:
                        self._ops.append(op)
        self._ops = _needed(self._ops)

    def write(self, values: MutableMapping[Value, Any]) -> None:
        """The small inputs that other stages write hold what they hold there."""
        if not self._ops:
            return
        env = {value: values[value] for value in self._inputs}
        self._machine.run(self._ops, env)


def _is_small(value: Value) -> bool:
    kind = value.type
    if not isinstance(kind, TensorType):
        return True
    elements = 1
    for size in kind.shape:
        if not isinstance(size, int):
            return False
        elements *= size
    return elements <= MOST_ELEMENTS


def _depends_on(op: Op, known: set[Value]) -> bool:
    """True for an op that computes from known values alone, the same whenever it does."""
    effects = op.effects
    if effects.random or effects.effect or op.regions or op.is_users:
        return False
    return bool(op.reads) and all(value in known for value in op.reads)


def _needed(ops: list[Op]) -> list[Op]:
    """The ops that write inputs in place, and those that make what they read."""
    needed: set[Value] = set()
    kept: list[Op] = []
    for op in reversed(ops):
        writes = any(storage_root(value).owner is None for value in op.effects.writes)
        if writes or any(value in needed for value in op.definitions()):
            needed.update(leaves((op.args, op.kwargs)))
            kept.append(op)
    return kept[::-1]
