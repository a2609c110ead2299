"""Cuts an architecture of the zoo in train mode, and compares its stages run by graphs with the same stages under autograd."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

from by_graphs import ByGraphs, Packed
from compare import Near, Posted, Seen, differences, observe
from zoo.check import VOID, Void, _cut, _loss, _summary, made, steady
from zoo.models import HERE, Architecture, Place

from stagecut import Pipe, StagecutError

BY_AUTOGRAD = "autograd"
"""How the result begins of a pipe of which a stage has no graphs. What follows says why."""
REFUSED = "refused"
"""How the result begins of a pipe whose stages cannot run in processes of their own, by graphs or not."""
EXACT = Near(gradients=0.0, least=0.0, gaps=False)


def check_backward(architecture: Architecture, stages: int, place: Place = HERE) -> str:
    """'ok' where outputs, gradients and buffers are the same bit for bit, whether light ops are computed again or not; else what begins
    with BY_AUTOGRAD or REFUSED, or the first thing that differs."""
    try:
        model, inputs = made(architecture, "train" in architecture.modes, place)
        return _compared(_cut(model, inputs, stages, architecture.leaves), inputs)
    except Void as error:
        return f"{VOID}: {error}"
    except Exception as error:
        return _summary(error)


def _compared(pipe: Pipe, inputs: dict[str, Any]) -> str:
    try:
        expected = _step(Packed(pipe), inputs)
    except StagecutError as error:
        return f"{REFUSED}: {_summary(error)}"
    if not any(item is not None for name, item in expected.items() if name.startswith("gradient")):
        return "no parameter of the model has a gradient: the check is void"
    notes: list[str] = []
    for recompute in (False, True):
        graphs = ByGraphs(pipe, recompute)
        wrong = differences(expected, _step(graphs, inputs), EXACT)
        if wrong:
            wrong = steady(wrong, expected, _step(Packed(pipe), inputs), EXACT)
        if wrong:
            return f"{'with recompute: ' if recompute else ''}{len(wrong)} differ: {wrong[0]}"
        notes = [f"stage {stage}: {note}" for stage, note in enumerate(graphs.notes) if note]
    return f"{BY_AUTOGRAD}: {'; '.join(notes)}" if notes else "ok"


def _step(stages: Posted, inputs: dict[str, Any]) -> Seen:
    random.seed(1)
    return observe(stages, ((), deepcopy(inputs)), 1, _loss)
