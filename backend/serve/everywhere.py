"""Small state that every rank keeps up to date by itself, such as how many tokens are in a cache.

A counter of a static cache is written by the stage whose layers it counts for, and Python code of the model
looks at it on every rank. What it becomes depends on nothing but small inputs, so each rank computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stagecut.backend.ranks.recorded import Record
from stagecut.backend.serve.faster import Graphed, Ready, Run
from stagecut.backend.stages.emit import emit
from stagecut.ir.aliases import Aliases
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Op, Program, Stage, Value
from stagecut.ir.lanes import reads_sizes_only
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.types import TensorType

MOST_ELEMENTS = 64
"""Tensors of more elements are no counters."""


class Everywhere:
    """The ops of other stages that write small inputs in place, and what these ops read. `inputs` are the
    inputs and numbers that they need; `written` the small inputs that each rank so keeps up to date, the same
    on all ranks.

    Raises StagecutError for such a write that depends on more than small inputs and sizes.
    """

    def __init__(
        self, program: Program, rank: int, device: torch.device, record: Record | None
    ) -> None:
        inputs = {value for value in program.inputs if _is_small(value)}
        known = set(inputs)
        numbers: set[Value] = set()
        aliases = Aliases(program.all_ops(), roots=program.inputs)
        lanes = {lane.given for lane in program.lanes}
        small = lanes & known
        ops: list[Op] = []
        self.written: set[Value] = set()
        for stage in program.stages:
            for op in stage.ops:
                if reads_sizes_only(op):
                    numbers.update(op.results)
                    known.update(op.results)
                elif _depends_on(op, known):
                    known.update(op.definitions())
                    self.written |= _written(op, aliases, small)
                    if stage.index != rank:
                        ops.append(op)
                elif stage.index != rank:
                    _refuse_write(op, aliases, small)
        ops = _needed(ops, aliases, small)
        read = [value for op in ops for value in op.reads]
        self.inputs = [
            value for value in dict.fromkeys(read) if value in inputs | numbers
        ]
        self._run: Run | None = None
        if ops:
            run = _function(ops, self.inputs, device)
            kept = [value in lanes for value in self.inputs]
            self._run = run if record is None else Graphed(run, kept, record)

    def ready(self) -> Callable[[Mapping[Value, Any]], None]:
        """Writes what other stages write into the small inputs, for calls on the same caches."""
        if self._run is None:
            return lambda values: None
        run = Ready(self._run)

        def write(values: Mapping[Value, Any]) -> None:
            run(*(values[value] for value in self.inputs))

        return write


def _function(ops: list[Op], inputs: list[Value], device: torch.device) -> Run:
    """These ops as a function of `inputs` that runs on a device and returns nothing."""
    swap = {value: Value(value.type, value.hint) for value in inputs}
    program = Program("everywhere")
    program.phase = "linked"
    program.inputs = [*swap.values()]
    stage = Stage(0, [op.elsewhere(swap) for op in ops])
    stage.inputs = program.inputs
    program.stages = [stage]
    return emit(program, Bindings(device=device))[0]


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
