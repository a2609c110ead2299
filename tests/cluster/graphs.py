"""Trains a model by graphs and by autograd: losses, gradients and buffers must be the same, bit for bit."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from cluster.models import Subject
from cluster.training import micro_batches

from stagecut import Driver, Pipe
from stagecut.backend.stages.graphs import Graphs

Batches = list[tuple[Any, dict[str, Any]]]


def compare_subject(pipe: Pipe, subject: Subject, batches: Batches, schedules: list[str]) -> list[str]:
    """As `compare_each`, for a model of cluster.models."""
    return compare_each(pipe, subject.loss, batches, schedules)


def compare_each(pipe: Pipe, loss: Any, batches: Batches, schedules: list[str], **options: Any) -> list[str]:
    """For each schedule 'ok', or the first thing that differs."""
    start = [deepcopy(stage.state_dict()) for stage in pipe.stages]
    answers = []
    for schedule in schedules:
        ways: list[dict[str, Any]] = [{}, {"backward": "graph"}]
        runs = [_run(pipe, start, Driver(pipe, schedule, micro_batches(), loss, **options, **way), batches) for way in ways]
        answers.append(_first_difference(*runs) or "ok")
    return answers


def compare_models(models: list[tuple[Pipe, Any, Batches]], schedules: list[str]) -> list[list[str]]:
    """As `compare_each`, for several pipes with their losses and batches."""
    return [compare_each(*model, schedules) for model in models]


def compare_in_autocast(*args: Any) -> list[str]:
    """As `compare_each`, under an autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return compare_each(*args)


def compare_unseeded_and_seeded(pipe: Pipe, loss: Any, batches: Batches, unseeded: list[str], seeded: list[str]) -> list[str]:
    """As `compare_each`, for some schedules with random numbers of each rank, for others with those that cross from stage to stage."""
    return compare_each(pipe, loss, batches, unseeded) + compare_each(pipe, loss, batches, seeded, seed=3)


def unfreeze_and_compare(pipe: Pipe, loss: Any, batches: Batches) -> list[str]:
    """Trains with a frozen layer, and then with the same drivers all of it; compares each."""
    drivers = [Driver(pipe, "1F1B", 4, loss), Driver(pipe, "1F1B", 4, loss, backward="graph")]
    start = [deepcopy(stage.state_dict()) for stage in pipe.stages]
    answers = []
    for trained in (False, True):
        for index in drivers[0].stage_indices:
            next(pipe.stages[index].parameters()).requires_grad_(trained)
        answers.append(_first_difference(*(_run(pipe, start, driver, batches) for driver in drivers)) or "ok")
    return answers


def compare_one_by_autograd(pipe: Pipe, loss: Any, xs: list[torch.Tensor], schedule: str) -> str:
    """As `compare_each`, for micro-batches of which the second, of another size, has no graphs."""
    made = Graphs._made

    def refused(self: Graphs, tensors: Any, handed_on: Any) -> Any:
        return "not of this size" if tensors[-1].shape[0] == len(xs[1]) else made(self, tensors, handed_on)

    Graphs._made = refused  # type: ignore[method-assign]
    results = []
    for backward in ("autograd", "graph"):
        pipe.zero_grad()
        driver = Driver(pipe, schedule, len(xs), loss, backward=backward)
        driver.step(arg_mbs=[(x,) for x in xs], target_mbs=xs)
        results.append({f"{i} {n}": p.grad for i, m in driver.modules.items() for n, p in m.named_parameters()})
    assert all("not of this size" in note for note in driver.notes)
    return _first_difference(*(result | {"notes": ()} for result in results)) or "ok"


def _run(pipe: Pipe, start: list[Any], driver: Driver, batches: Batches) -> dict[str, Any]:
    """What some steps leave behind, by name."""
    for stage, state in zip(pipe.stages, start, strict=True):
        stage.load_state_dict(state)
        stage.zero_grad()
    result: dict[str, Any] = {}
    for step, (args, kwargs) in enumerate(batches):
        torch.manual_seed(step)
        _, losses = driver.step(*args, **kwargs)
        result[f"losses of step {step}"] = torch.stack(losses)
    for index, module in driver.modules.items():
        result |= {f"gradient of {name} in stage {index}": p.grad for name, p in module.named_parameters()}
        result |= {f"buffer {name} in stage {index}": b.clone() for name, b in module.named_buffers()}
    driver.pipe.zero_grad()
    result["notes"] = [note for note in driver.notes if "autograd" in note]
    return result


def _first_difference(expected: dict[str, Any], actual: dict[str, Any]) -> str:
    for name, tensor in expected.items():
        if name == "notes":
            if actual[name]:
                return str(actual[name])
        elif (tensor is None) != (actual[name] is None):
            return f"{name}: {tensor} and {actual[name]}"
        elif tensor is not None and not (torch.equal(tensor, actual[name]) and tensor.stride() == actual[name].stride()):
            return f"{name}: {(tensor - actual[name]).abs().max()}"
    return ""
