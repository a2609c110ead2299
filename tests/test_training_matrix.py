"""Models that people train, under all schedules on two and four ranks: losses, metrics, clipped norms and three optimizer steps, all as in
one process."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from cluster.matrix import SCHEDULES, on_ranks, stages_of
from cluster.recipes import RECIPES, Recipe
from cluster.training import OK, gradients_differ, micro_batches
from torch import nn
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, pipeline

SAMPLES, LIMIT = 2, 0.5


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_training_equals_one_process(name: str, ranks: int) -> None:
    recipe = RECIPES[name]
    found: dict[str, set[str]] = {schedule: set() for schedule in SCHEDULES}
    for stages in dict.fromkeys(stages_of(schedule, ranks) for schedule in SCHEDULES):
        chosen = [schedule for schedule in SCHEDULES if stages_of(schedule, ranks) == stages]
        torch.manual_seed(3)
        model = recipe.make().double()
        pipe = pipeline(model, recipe.inputs(SAMPLES)[0], split_policy=equal_ops(stages), check=None)
        for answers in on_ranks(ranks, _each, model, pipe, name, chosen):
            for schedule, answer in zip(chosen, answers, strict=True):
                found[schedule].add(answer)
    assert found == OK


def _each(model: nn.Module, pipe: Pipe, name: str, schedules: list[str]) -> list[str]:
    start = deepcopy(model.state_dict())
    answers = []
    for schedule in schedules:
        model.load_state_dict(start)
        model.zero_grad()
        answers.append(_train(model, pipe, RECIPES[name], schedule) or "ok")
    return answers


def _train(model: nn.Module, pipe: Pipe, recipe: Recipe, schedule: str) -> str:
    reference, count = deepcopy(model), micro_batches()
    driver = Driver(pipe, schedule, count, recipe.loss, normalize_by=recipe.per)
    mine, theirs = (torch.optim.AdamW(p, 0.01) for p in (driver.parameters(), reference.parameters()))
    driver.attach(mine)
    for step in range(3):
        torch.manual_seed(step)
        inputs, target = recipe.inputs(SAMPLES * count)
        output, losses = driver.step(*inputs, target=target)
        loss, metrics = _one_process(reference, recipe, inputs, target, count, output if driver.is_last else None)
        torch.testing.assert_close(losses.batch, loss)
        torch.testing.assert_close(losses.metrics, metrics)
        norm = driver.clip_grad_norm_(LIMIT)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), LIMIT))
        assert norm > LIMIT
        if wrong := gradients_differ(driver, reference):
            return f"step {step}: {wrong}"
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for index in driver.stage_indices:
        for key, parameter in driver.pipe.stages[index].named_parameters():
            torch.testing.assert_close(parameter, reference.get_parameter(key))
    return ""


def _one_process(
    model: nn.Module, recipe: Recipe, inputs: tuple[torch.Tensor, ...], target: Any, count: int, output: Any
) -> tuple[Any, Any]:
    """The loss and the metrics of a batch, whose gradients the model has; its outputs are `output`, where there is one."""
    runs = list(zip(*(part.chunk(count) for part in (*inputs, target)), strict=True)) if recipe.alone else [(*inputs, target)]
    parts = []
    for *given, labels in runs:
        returned = model(*given)
        loss, metrics = recipe.loss(returned, *([] if labels is None else [labels]))
        (loss / (metrics[recipe.per] if recipe.per else len(runs))).backward()
        parts.append((returned, loss.detach() / (metrics[recipe.per] if recipe.per else 1), metrics))
    if output is not None:
        torch.testing.assert_close(output, _joined([part[0] for part in parts]))
    loss = torch.stack([part[1] for part in parts]).mean()
    return loss, {key: _number([part[2][key] for part in parts]) for key in parts[0][2]}


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
