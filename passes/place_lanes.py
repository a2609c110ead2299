"""Gives every lane the stages that touch it."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.graph import Program
from stagecut.ir.lanes import touching


@dataclass(frozen=True)
class PlaceLanes:
    """Every lane lists the stages that touch it.

    What one stage touches stays there from call to call: it is fed to that stage alone, and crosses nowhere.
    What several stages touch has to travel.
    """

    name = "place-lanes"

    def run(self, program: Program) -> bool:
        if program.phase != "linked" or not program.lanes:
            return False
        changed = False
        for lane, stages in touching(program).items():
            changed |= lane.stages != stages
            lane.stages = stages
        return changed
