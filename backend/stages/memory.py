"""What stages keep in memory for a backward by graphs, and how the stages of a rank share a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagecut.backend.stages.modules import Stage
from stagecut.backend.stages.pure import PureStage, example_of
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import BudgetError, CaptureError, RolesError
from stagecut.ir.graph import Value
from stagecut.ir.roles import Budget, Flight, Roles, Saved
from stagecut.ir.run.bindings import Bindings

REFUSALS = (RolesError, CaptureError)
"""The errors that say why a stage has no graphs."""


class TracedStage:
    """A stage and its gradients, traced once for state and inputs like these. Raises CaptureError."""

    def __init__(
        self, pipe: Staged, pure: PureStage, tensors: Sequence[torch.Tensor]
    ) -> None:
        arguments = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        self._pipe = pipe
        self._pure = pure
        self._graph: Any = pipe.joint_graph(pure, arguments)
        self._handed_on = pure.handed_on

    def roles(self, recompute: bool | Budget = False) -> tuple[Roles, Bindings]:
        """The roles of the stage, and the constants that they read. Raises RolesError and BudgetError."""
        pure = self._pure
        state = len(pure.slots)
        names = [slot.name for slot in pure.slots]
        names += [value.hint for value in pure.block.inputs]
        results = len(pure.block.outputs)
        same = {
            results + number: state + place
            for number, place in enumerate(self._handed_on)
        }
        return self._pipe.roles(
            self._graph, names, range(state), same, pure.resident, recompute
        )

    def memory(self, recompute: bool | Budget = False) -> Saved:
        """What a micro-batch leaves in memory. Raises as `roles`."""
        roles, _ = self.roles(recompute)
        return roles.memory


def traced_stage(
    pipe: Staged,
    index: int,
    sizes: Mapping[str, int],
    device: torch.device | None = None,
    dtypes: Mapping[Value, torch.dtype] | None = None,
    stage: Stage | None = None,
) -> TracedStage:
    """A stage, traced for inputs of these sizes, on the device and of the dtypes of the program unless others
    are given. Raises RolesError and CaptureError.
    """
    pure = PureStage(stage or pipe.stages[index], pipe.program.stages[index])
    state = [slot.tensor for slot in pure.slots]
    known = dtypes or {}
    inputs = [
        example_of(value, sizes, device, known.get(value))
        for value in pure.block.inputs
    ]
    return TracedStage(pipe, pure, [*state, *inputs])


@dataclass(frozen=True)
class Span:
    """What a stage keeps in memory at most, when nothing is computed again, and at least, when all that may
    be is, with so many micro-batches in flight.
    """

    most: int
    least: int
    flight: Flight

    @staticmethod
    def of(traced: TracedStage, flight: Flight) -> Span:
        """That of a stage."""
        most = traced.memory().during(flight)
        least = traced.memory(Budget(0.0, flight)).during(flight)
        return Span(most, least, flight)


def shared(spans: Mapping[int, Span], limit: int) -> dict[int, Budget]:
    """The budgets of the stages of a rank: each gets the least that it needs, and the same part of what it
    would have besides. Raises BudgetError where they do not fit together.
    """
    least = sum(span.least for span in spans.values())
    wanted = sum(span.most for span in spans.values()) - least
    if least > limit:
        raise BudgetError(least, limit, where=titled(spans))
    spare = min(limit - least, wanted)
    return {
        index: Budget(
            span.least + (span.most - span.least) * spare // max(1, wanted), span.flight
        )
        for index, span in spans.items()
    }


def titled(indices: Mapping[int, object]) -> str:
    """Some stages, as an error names them."""
    numbers = ", ".join(map(str, indices))
    return f"stage {numbers}" if len(indices) == 1 else f"the stages {numbers}"
