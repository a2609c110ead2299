"""faster: calls on the same kept tensors are recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from test_given import Plain, Writes, X, cut

from stagecut.backend.serve.faster import Graphed, faster


def record_on_cpu(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As a CUDA graph: recording computes nothing, replaying computes into the same tensors."""
    result = torch.empty(3)

    def replay() -> None:
        result.copy_(run())

    return replay, result


def test_a_call_is_recorded_when_it_comes_again() -> None:
    runs: list[int] = []

    def step(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return cache.add_(x) * 2

    graphed = Graphed(step, [True, False], record_on_cpu)
    cache, other = torch.zeros(3), torch.zeros(3)
    for number in range(1, 5):
        result = graphed(cache, torch.full((3,), float(number)))
        assert result.tolist() == [number * (number + 1)] * 3
    assert cache.tolist() == [10.0] * 3
    assert graphed(other, torch.ones(3)).tolist() == [2.0] * 3
    assert other.tolist() == [1.0] * 3
    assert len(graphed._recordings) == 1


def test_only_programs_that_write_in_place_are_captured() -> None:
    state = Plain(first=torch.ones(5, 4), second=torch.ones(1, 4), at=torch.tensor([2]))
    with torch.no_grad():
        pipe = cut(Writes(), X[:1], state)
    assert isinstance(faster(pipe, 0, False, record_on_cpu), Graphed)
    assert faster(pipe, 0, False, None) is pipe.stages[0]
