"""Cuts the list of ops at the markers: every op gets its stage."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import PURE, WHOLE, Op, Program, Stage, Value


@dataclass(frozen=True)
class Partition:
    """Every op is in one stage, no stage is empty, and source ops stand in the stages that use them.

    A source op (arange, full, zeros: no operands, no effect) costs less to run twice than to send, so it moves to
    its users' stages, copied when there are several.
    """

    name = "partition"

    def run(self, program: Program) -> bool:
        if program.phase != "traced":
            return False
        blocks: list[list[Op]] = [[]]
        for op in program.ops:
            if op.is_split:
                blocks.append([])
            else:
                blocks[-1].append(op)
        program.ops = []
        blocks = [block for block in blocks if block] or [[]]
        program.stages = [Stage(index, block) for index, block in enumerate(blocks)]
        program.raise_phase("partitioned")
        _sink_sources(program)
        return True


def _sink_sources(program: Program) -> None:
    home = {op: stage.index for stage in program.stages for op in stage.ops}
    written = _written([*program.all_ops()])
    arriving: dict[int, list[Op]] = {}
    for stage in program.stages:
        sources = [op for op in stage.ops if _is_source(op, written)]
        if len(sources) == len(stage.ops):
            continue  # the user asked for this stage: do not leave it empty
        leaving = {op for op in sources if _sink(op, stage.index, home, arriving)}
        stage.ops = [op for op in stage.ops if op not in leaving]
    for index, ops in arriving.items():
        program.stages[index].ops[:0] = ops


def _written(ops: list[Op]) -> set[Value]:
    """The values some op writes, directly or through a view: a copy of such a value would miss the write."""
    written: set[Value] = set()
    for op in reversed(ops):
        written.update(op.versions, (op.operands[i] for i in op.effects.writes))
        bases = zip(op.results, op.effects.views, strict=False)
        written.update(op.operands[base] for result, base in bases if base is not None and result in written)
    return written


def _is_source(op: Op, written: set[Value]) -> bool:
    alone = not any(context.kind in WHOLE for context in op.context)
    plain = alone and not op.operands and not op.regions and not op.has_effect and len(op.results) == 1 and op.effects == PURE
    return plain and op.results[0] not in written


def _sink(op: Op, here: int, home: dict[Op, int], arriving: dict[int, list[Op]]) -> bool:
    """A copy of `op` arrives in every later stage that uses it; True when none is left in stage `here`."""
    value = op.results[0]
    users = [home.get(user, here) for user in value.uses]  # the program's output keeps it here
    away = sorted({s for s in users if s != here})
    for stage in away:
        twin = op.copy({})
        result = twin.results[0]
        value.replace_uses(result, lambda user, stage=stage: home.get(user, here) == stage)  # type: ignore[misc]
        arriving.setdefault(stage, []).append(twin)
    return not value.uses
