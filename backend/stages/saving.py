"""What the stages of a rank save for their backwards by graphs: within a budget, and as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.memory import REFUSALS, Span, shared, traced_stage
from stagecut.backend.stages.staged import Staged
from stagecut.ir.graph import Value
from stagecut.ir.roles import Budget, Flight


class Saving:
    """The graphs of this rank's stages and their budget, as `Driver` takes it. `flights()` gives the
    micro-batches in flight of all stages.
    """

    def __init__(
        self,
        pipe: Staged,
        graphs: Mapping[int, Graphs],
        budget: int | float | None,
        flights: Callable[[], Sequence[Flight]],
    ) -> None:
        self._pipe = pipe
        self._graphs = graphs
        self._budget = budget
        self._flights = flights
        self.is_open = False
        """Whether the stages have no budgets yet, though the rank has one."""
        self.reopen()

    def reopen(self) -> None:
        """The stages share the budget anew: others of their parameters are trained."""
        self.is_open = self._budget is not None

    def share(
        self,
        sizes: Mapping[str, int],
        device: torch.device,
        dtypes: Mapping[Value, torch.dtype],
    ) -> None:
        """Every stage that graphs run has a budget of its own. Together they are that of the rank, for
        micro-batches of these sizes. Raises BudgetError.
        """
        budget = self._budget
        flights = self._flights()
        running = {i: graphs for i, graphs in self._graphs.items() if not graphs.note}
        if budget is None:
            return
        if isinstance(budget, float) or len(running) == 1:
            for index, graphs in running.items():
                graphs.recompute = Budget(budget, flights[index])
            self.is_open = False
            return
        spans: dict[int, Span] = {}
        for index in running:
            try:
                traced = traced_stage(self._pipe, index, sizes, device, dtypes)
                spans[index] = Span.of(traced, flights[index])
            except REFUSALS:
                # the stage will say so itself, and run by autograd
                continue
        for index, share in shared(spans, budget).items():
            running[index].recompute = share
        self.is_open = False

    def lines(self) -> Iterator[str]:
        """For each stage that runs by graphs, what it saves, as soon as that is known."""
        for index, graphs in self._graphs.items():
            saved = graphs.saved
            if saved is None:
                if not graphs.note:
                    yield f"  stage {index} will run by graphs"
                continue
            flight = self._flights()[index]
            yield (
                f"  stage {index} saves {saved.forward:,} bytes for a micro-batch, and at most "
                f"{saved.during(flight):,} with {flight.weights} in flight"
            )
