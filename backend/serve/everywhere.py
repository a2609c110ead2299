"""Small state that every rank keeps up to date by itself, such as how many tokens are in a cache.

A counter of a static cache is written by the stage whose layers it counts for, and Python code of the model
looks at it on every rank. What it becomes depends on nothing but small inputs, so each rank computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagecut.backend.ranks.wire import Sizes, known_number
from stagecut.ir.aliases import Aliases
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.lanes import reads_sizes_only
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import Machine
from stagecut.ir.types import TensorType

MOST_ELEMENTS = 64
"""Tensors of more elements are no counters."""


class Everywhere:
    """The ops of other stages that write small inputs in place, and what these ops read.

    Raises StagecutError for such a write that depends on more than small inputs and sizes.
    """

    def __init__(self, program: Program, rank: int) -> None:
        self._machine = Machine(Bindings())
        self._inputs = [value for value in program.inputs if _is_small(value)]
        self._numbers: list[Value] = []
        self._ops: list[Op] = []
        known: set[Value] = set(self._inputs)
        aliases = Aliases(program.all_ops(), roots=program.inputs)
        small = {lane.given for lane in program.lanes} & known
        for stage in program.stages:
            for op in stage.ops:
                if reads_sizes_only(op):
                    self._numbers += op.results
                    known.update(op.results)
                elif _depends_on(op, known):
                    known.update(op.definitions())
                    if stage.index != rank:
                        self._ops.append(op)
                elif stage.index != rank:
                    _refuse_write(op, aliases, small)
        self._ops = _needed(self._ops, aliases, small)

    def write(self, values: Mapping[Value, Any], sizes: Sizes) -> None:
        """The small inputs that other stages write hold what they hold there."""
        if not self._ops:
            return
        env = {value: values[value] for value in self._inputs}
        env |= {value: known_number(value, sizes) for value in self._numbers}
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


def _written(op: Op, aliases: Aliases, small: set[Value]) -> set[Value]:
    """The small inputs that an op writes."""
    return small.intersection(map(aliases.root, op.effects.writes))


def _refuse_write(op: Op, aliases: Aliases, small: set[Value]) -> None:
    for value in _written(op, aliases, small):
        raise StagecutError(
            f"{value.hint} is written on another rank, from more than small inputs, and the loop may look at "
            "it on this one",
            where=op.where(),
            hint="run all stages in one process, or give the model another cache",
        )


def _needed(ops: list[Op], aliases: Aliases, small: set[Value]) -> list[Op]:
    """The ops that write small inputs, and those that make what they read."""
    needed: set[Value] = set()
    kept: list[Op] = []
    for op in reversed(ops):
        if _written(op, aliases, small) or not needed.isdisjoint(op.definitions()):
            needed.update(op.reads)
            kept.append(op)
    return kept[::-1]
