"""Running stages one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagecut.backend.stages.failures import telling_place
from stagecut.ir.graph import Block, Program, Value


def release_plan(program: Program) -> list[list[Value]]:
    """Per stage, the values that no later stage and no output needs: they are released after it."""
    last: dict[Value, int] = {}
    for stage in program.stages:
        for value in [*stage.inputs, *stage.outputs]:
            last[value] = stage.index
    kept = set(program.output.operands)
    plan: list[list[Value]] = [[] for _ in program.stages]
    for value, index in last.items():
        if value not in kept:
            plan[index].append(value)
    return plan


def run_stages(
    program: Program,
    stages: Sequence[Callable[..., Any]],
    plan: list[list[Value]],
    flat: Sequence[Any],
) -> tuple[Any, ...]:
    """The flat outputs of the stages, run in order in this process on the flat inputs."""
    values: dict[Value, Any] = dict(zip(program.inputs, flat, strict=True))
    for stage, block, dead in zip(stages, program.stages, plan, strict=True):
        arguments = [values[value] for value in block.inputs]
        with telling_place(block.index):
            result = stage(*arguments)
        results = results_of(result, block)
        values.update(zip(block.outputs, results, strict=True))
        for value in dead:
            values.pop(value, None)
    return tuple(
        values[leaf] if isinstance(leaf, Value) else leaf for leaf in program.outputs
    )


def results_of(result: Any, block: Block) -> tuple[Any, ...]:
    """The result of a stage as a tuple: a single output is returned bare."""
    if not block.outputs:
        return ()
    return (result,) if len(block.outputs) == 1 else tuple(result)
