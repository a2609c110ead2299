"""Computes which values carry gradient. The trace cannot tell, because it runs without gradients."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.gradients import infer_gradients
from stagecut.ir.graph import Program


@dataclass(frozen=True)
class InferGradients:
    """A value carries gradient when its dtype can carry one, an operand of its op carries one, and the op
    passes it on.
    """

    name = "infer-gradients"

    def run(self, program: Program) -> bool:
        return infer_gradients(program.all_ops())
