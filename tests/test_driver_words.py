"""What a Driver says where a step trains nothing, or otherwise than was meant, and where an argument is no such thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from torch import nn

from stagecut import Driver, InputError, Pipe, pipeline


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    place = Path(tmp_path_factory.mktemp("store")) / "meet"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Two(nn.Module):
    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self.a(x)))  # type: ignore[no-any-return]


X = torch.ones(4, 4)


def cut(model: nn.Module | None = None, stages: int = 1) -> Pipe:
    """The pipe of a model, for two micro-batches of X."""
    return pipeline(model or Two(), (X[:2],), stages=stages, check=None)


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


# --- no loss function ---------------------------------------------------------------------------------


def test_a_target_without_a_loss_function_is_refused_by_all_ranks() -> None:
    assert on_ranks(2, _target_for_nothing, cut(stages=2)) == ["ok", "ok"]


def _target_for_nothing(pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 2)
    is_last = dist.get_rank() == 1
    words = r"step was called with target=, and no loss_fn takes it.*\n  try: Driver\(\.\.\., loss_fn=.*driver\.eval\("
    with pytest.raises(InputError, match=words):
        driver.step(X, target=X)
    with pytest.raises(InputError, match=words):
        driver.step(X, target=X if is_last else None)
    with pytest.raises(InputError, match="step was called with target_mbs="):
        driver.step(arg_mbs=[(X[:2],)] * 2, target_mbs=[X[:2]] * 2)
    with pytest.raises(InputError, match="step was called with loss_kwargs="):
        driver.step(X, loss_kwargs={"smoothing": 0.1})
    with pytest.raises(InputError, match="eval was called with target="):
        driver.eval(X, target=X)
    output, _ = driver.eval(X)  # the group goes on
    assert (output is not None) == is_last
    return "ok"


def test_a_step_that_trains_nothing_is_noted_once(alone: None) -> None:
    driver = Driver(cut(), "GPipe", 2)
    driver.eval(X)
    assert driver.notes == ()
    driver.step(X)
    driver.step(X)
    (note,) = driver.notes
    assert "no gradients" in note
    assert "loss_fn=" in note


def test_a_step_that_has_nothing_to_train_or_is_told_not_to_has_no_note(alone: None) -> None:
    frozen = Driver(cut(Two().requires_grad_(False)), "GPipe", 2)
    frozen.step(X)
    assert frozen.notes == ()
    driver = Driver(cut(), "GPipe", 2)
    with torch.no_grad():
        driver.step(X)
    assert driver.notes == ()


def test_a_loss_function_has_no_note(alone: None) -> None:
    for loss, labels in ((mse, {"target": X}), (lambda output: output.mean(), {})):
        driver = Driver(cut(), "GPipe", 2, loss)
        driver.step(X, **labels)
        assert driver.notes == ()


# --- the mode of the pipe -----------------------------------------------------------------------------


class Rows(nn.Module):
    """The output of an LSTM."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x[None])[0][0]  # type: ignore[no-any-return]


MODES = [
    (lambda: nn.Dropout(0.5), True),
    (lambda: nn.BatchNorm1d(4), True),
    (lambda: nn.RReLU(), True),
    (lambda: Rows(nn.LSTM(4, 4, 2, dropout=0.5)), True),
    (lambda: nn.Dropout(0.0), False),
    (lambda: Rows(nn.LSTM(4, 4)), False),
    (lambda: nn.ReLU(), False),
]


@pytest.mark.parametrize(("between", "follows"), MODES)
def test_training_in_eval_mode_is_noted_where_the_mode_changes_something(alone: None, between: Any, follows: bool) -> None:
    driver = Driver(cut(Two(between()).eval()), "GPipe", 2, mse)
    driver.eval(X, target=X)
    assert driver.notes == ()
    driver.step(X, target=X)
    driver.step(X, target=X)
    assert ["the pipe is in eval mode" in note and "driver.train()" in note for note in driver.notes] == [True] * follows


def test_a_pipe_in_train_mode_has_no_note(alone: None) -> None:
    dropping = Two(nn.Dropout(0.5))
    driver = Driver(cut(dropping), "GPipe", 2, mse)
    driver.step(X, target=X)
    switched = Driver(cut(dropping.eval()), "GPipe", 2, mse).train()
    switched.step(X, target=X)
    assert driver.notes == switched.notes == ()


def test_a_branch_and_a_module_kept_whole_may_follow_the_mode(alone: None) -> None:
    for pipe in (cut(Two(Branch()).eval()), pipeline(Two(nn.Dropout(0.5)).eval(), (X[:2],), leaf_modules=["between"], check=None)):
        driver = Driver(pipe, "GPipe", 2, mse)
        driver.step(X, target=X)
        assert "eval mode" in driver.notes[0]


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand_like(x) if self.training else x


def test_a_driver_prints_the_mode_of_its_pipe(alone: None) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    assert "2 micro-batches, train mode, this is rank 0" in str(driver)
    assert "2 micro-batches, eval mode, this is rank 0" in str(driver.train(False))


# --- arguments that there are not ---------------------------------------------------------------------


def test_an_argument_that_nobody_knows_is_named_where_the_target_is_missing(alone: None) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    words = r"without one; the model's forward has no argument 'targets'\n.*\n  try: .*target=...\) in the place of targets="
    with pytest.raises(InputError, match=words):
        driver.step(X, targets=X)
    with pytest.raises(InputError, match="has no arguments 'labels', 'targets'"):
        driver.step(X, labels=X, targets=X)
    with pytest.raises(InputError, match="called without one\n"):
        driver.step(X)
    with pytest.raises(InputError, match="called without one\n"):
        driver.step(x=X)
    with pytest.raises(InputError, match="forward names no argument 'targets'"):
        driver.step(X, target=X, targets=X)
    driver.step(X, target=X)


def test_an_argument_that_nobody_knows_is_named_by_a_pipe_without_names(alone: None) -> None:
    program = torch.export.export(Two(), (X[:2],))
    driver = Driver(pipeline(program, stages=1), "GPipe", 2, mse)
    with pytest.raises(InputError, match="has no argument 'targets'"):
        driver.step(X, targets=X)
