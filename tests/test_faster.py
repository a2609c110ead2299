"""faster: calls on the same kept tensors are recorded once and replayed."""

from __future__ import annotations

import threading
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


def test_other_tensors_at_the_same_place_are_others() -> None:
    # as a CUDA graph, a recording does not keep what it reads alive
    graphed = Graphed(lambda cache, x: cache.add_(x) * 2, [True, False], lambda run: (lambda: None, run()))
    memory = torch.zeros(3)
    for _ in range(4):  # a cache is gone, and another one lies where it lay
        cache = memory.view(3)
        graphed(cache, torch.ones(3))
        del cache
    assert not graphed._recordings
    assert not graphed._seen
    cache = memory.view(3)
    for _ in range(2):
        graphed(cache, torch.ones(3))
    assert len(graphed._recordings) == 1
    del cache
    assert not graphed._recordings
    assert not graphed._seen


def test_nothing_is_recorded_in_a_thread_before_it_has_run_there() -> None:
    runs: list[threading.Thread] = []
    recorded: list[threading.Thread] = []

    def step(cache: torch.Tensor) -> torch.Tensor:
        runs.append(threading.current_thread())
        return cache * 2

    def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recorded.append(threading.current_thread())
        return record_on_cpu(run)

    graphed, cache = Graphed(step, [True], record), torch.ones(3)
    graphed(cache)
    thread = threading.Thread(target=lambda: [graphed(cache) for _ in range(3)])
    thread.start()
    thread.join()
    assert runs[:2] == [threading.main_thread(), thread]
    assert recorded == [thread]


def test_only_programs_that_write_in_place_are_captured() -> None:
    state = Plain(first=torch.ones(5, 4), second=torch.ones(1, 4), at=torch.tensor([2]))
    with torch.no_grad():
        pipe = cut(Writes(), X[:1], state)
    assert isinstance(faster(pipe, 0, False, record_on_cpu), Graphed)
    assert faster(pipe, 0, False, None) is pipe.stages[0]
