"""Losses, metrics, evaluation, unfreezing and random numbers of a Driver equal those of one process."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from cluster.training import OK, Hidden, Words, batch, gradients_differ, micro_batches, on_schedules, per_token
from torch import nn
from torch.nn import functional as F

from stagecut import Driver, InputError, Pipe

Loss = Callable[..., Any]


def _train_per_token(model: nn.Module, pipe: Pipe, schedule: str) -> str:
    reference = deepcopy(model)
    driver = Driver(pipe, schedule, micro_batches(), per_token, normalize_by="tokens")
    mine, theirs = torch.optim.SGD(driver.parameters(), 0.3), torch.optim.SGD(reference.parameters(), 0.3)
    driver.attach(mine)
    for step in range(3):
        for _ in range(1 + step % 2):  # gradients accumulate over two batches in the second step
            tokens, target = batch()
            _, losses = driver.step(tokens, target=target, loss_kwargs={"smoothing": 0.1})
            loss, metrics = per_token(reference(tokens), target, 0.1)
            whole = loss / metrics["tokens"]
            whole.backward()
            assert losses.batch is not None
            torch.testing.assert_close(losses.batch, whole.detach())
            assert len(losses) == micro_batches()
            for name in ("tokens", "right", "accuracy", "best"):
                torch.testing.assert_close(losses.metrics[name], metrics[name], check_dtype=False)
        mine.step()
        if wrong := gradients_differ(driver, reference):
            return f"step {step}: {wrong}"
        theirs.step()
        mine.zero_grad()
        theirs.zero_grad()
    return ""


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_loss_per_token_and_its_metrics_are_those_of_the_whole_batch(ranks: int) -> None:
    assert on_schedules(ranks, _train_per_token, Words) == OK


def _linear_cross_entropy(model: nn.Module) -> Loss:
    def loss_fn(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, model.head.weight)  # type: ignore[arg-type]
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    return loss_fn


def _train_linear(model: nn.Module, pipe: Pipe, schedule: str) -> str:
    reference = deepcopy(model)
    pipe._model = lambda: model
    driver = Driver(pipe, schedule, micro_batches(), _linear_cross_entropy(model))
    mine, theirs = torch.optim.SGD(driver.parameters(), 0.3), torch.optim.SGD(reference.parameters(), 0.3)
    driver.attach(mine)
    for step in range(3):
        tokens, target = batch()
        target = target.clamp(min=0)
        _, losses = driver.step(tokens, target=target)
        want = _linear_cross_entropy(reference)(reference(tokens), target)
        want.backward()
        assert losses.batch is not None
        torch.testing.assert_close(losses.batch, want.detach())
        mine.step()
        if wrong := gradients_differ(driver, reference):
            return f"step {step}: {wrong}"
        theirs.step()
        mine.zero_grad()
        theirs.zero_grad()
    _, losses = driver.eval(tokens, target=target)
    assert losses.batch is not None
    torch.testing.assert_close(losses.batch, _linear_cross_entropy(reference)(reference(tokens), target).detach())
    return ""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("make", [Hidden, lambda: Hidden(tied=False), Words], ids=["tied", "only in the loss", "in both"])
def test_a_loss_may_read_a_weight_of_any_stage(make: Callable[[], nn.Module], ranks: int) -> None:
    work = _train_linear if make is not Words else _train_both
    assert on_schedules(ranks, work, make) == OK


def _penalised(model: nn.Module) -> Loss:
    def loss_fn(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()) + model.head.weight.square().sum()  # type: ignore[operator,union-attr,no-any-return]

    return loss_fn


def _train_both(model: nn.Module, pipe: Pipe, schedule: str) -> str:
    reference = deepcopy(model)
    driver = Driver(pipe, schedule, micro_batches(), _penalised(model))
    tokens, target = batch()
    target = target.clamp(min=0)
    for _ in range(2):
        driver.step(tokens, target=target)
        _penalised(reference)(reference(tokens), target).backward()
    driver.sync_shared_gradients()
    return gradients_differ(driver, reference)


def _thaw(model: nn.Module, pipe: Pipe, schedule: str) -> str:
    reference = deepcopy(model)
    driver = Driver(pipe, schedule, micro_batches(), lambda out, target: per_token(out, target)[0])
    plans = [range(11), range(5, 11), range(0), range(11), range(3), range(2, 6), range(11)]
    for place, frozen in enumerate(plans):
        for net in (model, reference):
            net.zero_grad()
            parts = [net.emb, *net.layers]  # type: ignore[misc]
            for number, part in enumerate(parts):
                part.requires_grad_(number not in frozen)
            net.head.requires_grad_(True)  # type: ignore[union-attr]
        tokens, target = batch()
        driver.step(tokens, target=target)
        for part in range(micro_batches()):
            rows = slice(2 * part, 2 * part + 2)
            (per_token(reference(tokens[rows]), target[rows])[0] / micro_batches()).backward()
        if wrong := gradients_differ(driver, reference):
            return f"plan {place}: {wrong}"
    return ""


@pytest.mark.parametrize("ranks", [2, 4])
def test_parameters_are_frozen_and_unfrozen_after_the_cut(ranks: int) -> None:
    assert on_schedules(ranks, _thaw, lambda: Words(tied=False)) == OK


def _evaluate_between(model: nn.Module, pipe: Pipe, schedule: str) -> str:
    reference = deepcopy(model)
    frozen = pipe.stages[-1].get_submodule("drop")
    driver = Driver(pipe, schedule, micro_batches(), lambda out, target: (per_token(out, target)[0], {"rows": len(out)}))
    for _ in range(2):
        tokens, target = batch()
        driver.step(tokens, target=target)
        frozen.eval()
        out, losses = driver.eval(tokens)
        assert (list(losses), losses.batch, losses.metrics) == ([], None, None)
        with torch.no_grad():
            want = reference.eval()(tokens)
        if driver.is_last:
            torch.testing.assert_close(out, want)
        _, losses = driver.eval(tokens, target=target)
        assert losses.metrics == {"rows": 2 * micro_batches()}
        torch.testing.assert_close(torch.stack(losses).sum(), per_token(want, target)[0])
        assert (pipe.training, frozen.training) == (True, False)
        assert any(part.training for part in pipe.stages[0].modules())
        frozen.train()
    with pytest.raises(InputError, match="loss_fn takes a target"):
        driver.step(tokens)
    driver.step(tokens, target=target)
    return ""


@pytest.mark.parametrize("ranks", [2, 4])
def test_eval_is_in_eval_mode_and_needs_no_target(ranks: int) -> None:
    assert on_schedules(ranks, _evaluate_between, lambda: Words(drop=0.5)) == OK


def _draw_as_the_model(model: nn.Module, pipe: Pipe, schedule: str) -> str:
    reference = deepcopy(model)
    driver = Driver(pipe, schedule, micro_batches(), lambda out, target: per_token(out, target)[0], seed=11, scale_grads=False)
    for call in range(2):
        tokens, target = batch()
        before = torch.get_rng_state()
        out, _ = driver.step(tokens, target=target)
        assert torch.equal(before, torch.get_rng_state())
        with torch.random.fork_rng():
            for part in range(micro_batches()):
                rows = slice(2 * part, 2 * part + 2)
                torch.manual_seed(11 + call * micro_batches() + part)
                want = reference(tokens[rows])
                per_token(want, target[rows])[0].backward()
                if driver.is_last:
                    torch.testing.assert_close(out[rows], want.detach())
    driver.sync_shared_gradients()
    return gradients_differ(driver, reference)


@pytest.mark.parametrize("ranks", [2, 4])
def test_with_a_seed_the_stages_draw_what_the_model_draws(ranks: int) -> None:
    assert on_schedules(ranks, _draw_as_the_model, lambda: Words(drop=0.5)) == OK
