"""Models that people train, under all schedules on two and four ranks: losses, metrics, clipped norms and three optimizer steps, all as in
one process."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cluster.matrix import SCHEDULES, on_ranks, stages_of
from cluster.recipes import RECIPES, Recipe
from cluster.training import OK, gradients_differ, micro_batches
from torch import nn
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, pipeline

SAMPLES, LIMIT, STEPS = 2, 0.5, 3


@dataclass(frozen=True)
class Alone:
    """What one process has of a step: outputs, loss, metrics, the norm, and clipped gradients by name."""

    output: Any
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    norm: torch.Tensor
    gradients: dict[str, torch.Tensor | None]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_training_equals_one_process(name: str, ranks: int) -> None:
    recipe = RECIPES[name]
    found: dict[str, set[str]] = {schedule: set() for schedule in SCHEDULES}
    alone = _alone(recipe, 2 * ranks)
    for stages in dict.fromkeys(stages_of(schedule, ranks) for schedule in SCHEDULES):
        chosen = [schedule for schedule in SCHEDULES if stages_of(schedule, ranks) == stages]
        model = _made(recipe)
        pipe = pipeline(model, recipe.inputs(SAMPLES)[0], split_policy=equal_ops(stages), check=None)
        for answers in on_ranks(ranks, _each, model, pipe, name, chosen, *alone):
            for schedule, answer in zip(chosen, answers, strict=True):
                found[schedule].add(answer)
    assert found == OK


def _made(recipe: Recipe) -> nn.Module:
    """The model, always the same."""
    torch.manual_seed(3)
    return recipe.make().double()


def _alone(recipe: Recipe, count: int) -> tuple[list[Alone], dict[str, torch.Tensor]]:
    """Three steps in this process, and the parameters after them: the same for every schedule and every rank."""
    model = _made(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    steps: list[Alone] = []
    for step in range(STEPS):
        torch.manual_seed(step)
        inputs, target = recipe.inputs(SAMPLES * count)
        output, loss, metrics = _one_process(model, recipe, inputs, target, count)
        norm = nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        steps.append(Alone(output, loss, metrics, norm, gradients))
        optimizer.step()
        optimizer.zero_grad()  # to None: the gradients stay
    return steps, {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def _each(model: nn.Module, pipe: Pipe, name: str, schedules: list[str], steps: list[Alone], trained: dict[str, torch.Tensor]) -> list[str]:
    start = deepcopy(model.state_dict())
    answers = []
    for schedule in schedules:
        model.load_state_dict(start)
        model.zero_grad()
        answers.append(_train(model, pipe, RECIPES[name], schedule, steps, trained) or "ok")
    return answers


def _train(model: nn.Module, pipe: Pipe, recipe: Recipe, schedule: str, steps: list[Alone], trained: dict[str, torch.Tensor]) -> str:
    reference, count = deepcopy(model), micro_batches()
    driver = Driver(pipe, schedule, count, recipe.loss, normalize_by=recipe.per)
    optimizer = torch.optim.AdamW(driver.parameters(), 0.01)
    driver.attach(optimizer)
    for step, alone in enumerate(steps):
        torch.manual_seed(step)
        inputs, target = recipe.inputs(SAMPLES * count)
        output, losses = driver.step(*inputs, target=target)
        if driver.is_last:
            torch.testing.assert_close(output, alone.output)
        torch.testing.assert_close(losses.batch, alone.loss)
        torch.testing.assert_close(losses.metrics, alone.metrics)
        norm = driver.clip_grad_norm_(LIMIT)
        torch.testing.assert_close(norm, alone.norm)
        assert norm > LIMIT
        for key, parameter in reference.named_parameters():
            parameter.grad = alone.gradients[key]
        if wrong := gradients_differ(driver, reference):
            return f"step {step}: {wrong}"
        optimizer.step()
        optimizer.zero_grad()
    for index in driver.stage_indices:
        for key, parameter in driver.pipe.stages[index].named_parameters():
            torch.testing.assert_close(parameter.detach(), trained[key])
    return ""


def _one_process(
    model: nn.Module, recipe: Recipe, inputs: tuple[torch.Tensor, ...], target: Any, count: int
) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """The outputs, the loss and the metrics of a batch, whose gradients the model has."""
    runs = list(zip(*(part.chunk(count) for part in (*inputs, target)), strict=True)) if recipe.alone else [(*inputs, target)]
    parts = []
    for *given, labels in runs:
        returned = model(*given)
        loss, metrics = recipe.loss(returned, *([] if labels is None else [labels]))
        (loss / (metrics[recipe.per] if recipe.per else len(runs))).backward()
        parts.append((returned, loss.detach() / (metrics[recipe.per] if recipe.per else 1), metrics))
    loss = torch.stack([part[1] for part in parts]).mean()
    return _joined([part[0] for part in parts]), loss, {key: _number([part[2][key] for part in parts]) for key in parts[0][2]}


def _joined(items: list[Any]) -> Any:
    """Rows are joined. A number of which nobody can tell how those of micro-batches go together is a list."""
    if isinstance(items[0], tuple):
        return tuple(_joined(list(column)) for column in zip(*items, strict=True))
    if items[0].dim():
        return torch.cat(items).detach()
    return [item.detach() for item in items]


def _number(items: list[torch.Tensor]) -> torch.Tensor:
    """Counts are summed, other numbers averaged."""
    stacked = torch.stack(items).detach()
    return stacked.mean() if stacked.is_floating_point() else stacked.sum()
