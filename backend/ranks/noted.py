"""What a driver notes about a step that may train otherwise than was meant."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stagecut.ir.graph import Program, Value
from stagecut.ir.types import carries_grad

NO_LOSS = (
    "step makes no gradients without a loss function, so nothing is trained: Driver(..., loss_fn=...), or "
    "driver.eval(...) for a forward alone"
)


def notes_of_step(program: Program, has_losses: bool) -> Iterator[str]:
    """What is to be noted about a step."""
    if not has_losses and torch.is_grad_enabled() and _returns_grad(program):
        yield NO_LOSS


def _returns_grad(program: Program) -> bool:
    """True when gradients could start from an output."""
    values = [leaf for leaf in program.outputs if isinstance(leaf, Value)]
    return any(carries_grad(value.type) for value in values)
