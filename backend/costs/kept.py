"""What the stages of a pipe keep in memory for a backward by graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stagecut.backend.costs.setting import Setting
from stagecut.backend.stages.memory import (
    REFUSALS,
    Span,
    TracedStage,
    shared,
    traced_stage,
)
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import BudgetError
from stagecut.ir.roles import Budget, Flight
from stagecut.ir.text.printer import size_text


@dataclass(frozen=True)
class KeptByGraphs:
    """The bytes that a stage saves, with all its micro-batches in flight: as it is set, where nothing is
    computed again, where light ops are, and where heavy ones are too.
    """

    chosen: int
    everything: int
    light_again: int
    least: int
    flight: Flight

    HEAD: ClassVar = (
        "in flight",
        "saves",
        "nothing again",
        "recompute=True",
        "at least",
    )

    def row(self) -> tuple[str, ...]:
        """The columns of HEAD."""
        sizes = (self.chosen, self.everything, self.light_again, self.least)
        return str(self.flight.weights), *map(size_text, sizes)


def kept_by_graphs(
    pipe: Staged, setting: Setting, sizes: Mapping[str, int]
) -> list[KeptByGraphs | None]:
    """For each stage what graphs save; None where autograd runs it. Raises BudgetError where the stages of a
    rank do not fit the budget of the setting.
    """
    flights = setting.flights(pipe.num_stages)
    traced: dict[int, TracedStage] = {}
    spans: dict[int, Span] = {}
    for index, flight in enumerate(flights):
        try:
            traced[index] = traced_stage(pipe, index, sizes)
            spans[index] = Span.of(traced[index], flight)
        except REFUSALS:
            continue
    budgets = _budgets(setting, setting.placement(pipe.num_stages), spans)
    kept: list[KeptByGraphs | None] = [None] * pipe.num_stages
    for index, span in spans.items():
        flight = span.flight
        stage = traced[index]
        light = stage.memory(True).during(flight)
        chosen = light if setting.recompute else span.most
        if index in budgets:
            chosen = stage.memory(budgets[index]).during(flight)
        kept[index] = KeptByGraphs(chosen, span.most, light, span.least, flight)
    return kept


def _budgets(
    setting: Setting, placement: list[int], spans: Mapping[int, Span]
) -> dict[int, Budget]:
    """The budget of each stage, none where there is none for the ranks."""
    limit = setting.activation_budget
    if limit is None:
        return {}
    if isinstance(limit, float):
        return {index: Budget(limit, span.flight) for index, span in spans.items()}
    budgets: dict[int, Budget] = {}
    for rank in dict.fromkeys(placement):
        own = {index: span for index, span in spans.items() if placement[index] == rank}
        try:
            budgets |= shared(own, limit)
        except BudgetError as error:
            raise error.at(f"rank {rank}, {error.where}") from None
    return budgets
