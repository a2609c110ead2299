"""Cuts the list of ops at the markers: every op gets its stage."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import Op, Program, Stage


@dataclass(frozen=True)
class Partition:
    """Every op is in one stage, and no stage is empty."""

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
        return True
