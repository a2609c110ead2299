"""A block that runs once for all its calls on fake tensors shows the batch as running each call does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from repeated import DIFFERENCES, WIDTH, Block, model_of, outcome
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from stagecut.frontend.fold import runs
from stagecut.frontend.fold.runs import RepeatedRuns

COUNT, SAMPLES = 6, 4


class Rows(nn.Module):
    """Repeats the rows of many samples so many times; few samples stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(WIDTH, WIDTH), 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x.repeat(self.times, 1) if len(x) > SAMPLES else x


class Kept(Rows):
    """Keeps what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class Written(Rows):
    """Writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Chain(nn.Module):
    """Blocks in a row, and what comes between."""

    def __init__(self, made: Callable[[], Rows], between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(made() for _ in range(COUNT))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(self.between(x))
        return x


def skipped(model: nn.Module, x: Tensor) -> tuple[int, Any]:
    """How many calls did not run, and the size of the result."""
    mode = FakeTensorMode()
    mode.allow_non_fake_inputs = True
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            owner._parameters[name] = nn.Parameter(mode.from_tensor(parameter))  # type: ignore[arg-type]
    repeats = RepeatedRuns(model)
    with mode, repeats.open():
        result = model(mode.from_tensor(x))
    return repeats.skipped, tuple(result.shape)


@pytest.mark.parametrize(("made", "wanted"), [(Rows, COUNT - 3), (Kept, 0), (Written, 0)])
def test_calls_alike_run_twice(made: Callable[[], Rows], wanted: int) -> None:
    # the first call is given what has no gradient
    assert skipped(Chain(made), torch.ones(2 * SAMPLES, WIDTH)) == (wanted, (2 * SAMPLES, WIDTH))


def test_a_call_that_differs_only_with_more_samples_runs() -> None:
    model = Chain(Rows)
    model.blocks[4].times = 3
    assert skipped(model, torch.ones(2 * SAMPLES, WIDTH)) == (1, (6 * SAMPLES, WIDTH))


def test_a_gradient_through_a_call_makes_the_model_run_whole() -> None:
    folded, whole = (outcome(Chain(Rows, _with_gradient), (torch.ones(SAMPLES, WIDTH),), fold) for fold in (True, False))
    assert folded == whole
    assert folded[0].count("batch(0)") == 2


def _with_gradient(x: Tensor) -> Tensor:
    if len(x) <= SAMPLES or not x.requires_grad:
        return x
    start = x.detach().requires_grad_()
    return torch.autograd.grad(start.cos().sum(), start)[0] + torch.autograd.grad(x.sum(), x)[0].sum()


@pytest.mark.parametrize("times", [1, 2])
def test_the_batch_is_marked_as_without_fold(times: int) -> None:
    model = Chain(Rows)
    model.blocks[3].times = times
    folded, whole = (outcome(model, (torch.ones(SAMPLES, WIDTH),), fold) for fold in (True, False))
    assert folded == whole
    assert folded[0].count("batch(0)") == 3 - times


@pytest.mark.parametrize(
    "difference", ["nothing", "input shape", "number", "hook", "dropout before", "place", "in place", "inference mode"]
)
def test_marks_are_equal(difference: str) -> None:
    change = DIFFERENCES[difference]
    folded, whole = (outcome(model_of(Block, 5, [1], change, True), (torch.ones(4, WIDTH),), fold) for fold in (True, False))
    assert folded == whole


def test_a_run_that_sees_no_reads_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecut.frontend.fold.reads._attribute", lambda *_: None)
    model = Chain(Rows)
    model.blocks[4].times = 3
    assert skipped(model, torch.ones(2 * SAMPLES, WIDTH)) != (1, (6 * SAMPLES, WIDTH))


def test_a_run_that_sees_no_writes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs._Steps, "_versions_now", lambda _: [])
    assert skipped(Chain(Written), torch.ones(2 * SAMPLES, WIDTH))[0] != 0
