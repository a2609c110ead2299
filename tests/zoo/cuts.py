"""Where to cut a model of which nothing is known: boundaries of its own modules, or positions of ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn

from stagecut.ir.graph import Program


def cut_points(model: nn.Module, inputs: dict[str, Any], stages: int, leaves: tuple[str, ...] = ()) -> list[str] | None:
    """Modules in front of which to cut `model` into `stages` parts of about equal length, None when none fit.

    Repeated blocks are preferred to other modules; one that runs twice, or inside one of `leaves`, is no place to cut.
    """
    calls, total = _calls(model, inputs)
    inside = tuple(f"{leaf}." for leaf in leaves)
    once = {n: times[0] for n, times in calls.items() if len(times) == 1 and 0 < times[0] < total and not n.startswith(inside)}
    return _spread(_blocks(model, once), total, stages) or _spread(_with_state(model, once), total, stages)


def equal_ops(stages: int) -> Callable[[Program], list[int]]:
    """The policy that cuts a program into `stages` runs of as many ops each."""

    def policy(program: Program) -> list[int]:
        count = sum(not op.is_split for op in program.ops)
        return [count * stage // stages for stage in range(1, stages)]

    return policy


def _calls(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, list[int]], int]:
    """Per module, how many calls of leaf modules came before each of its own; and how many there are."""
    twin = deepcopy(model)
    calls: dict[str, list[int]] = {}
    passed = 0

    def enter(name: str, leaf: bool) -> None:
        nonlocal passed
        calls.setdefault(name, []).append(passed)
        passed += leaf

    for name, module in twin.named_modules():
        leaf = next(module.children(), None) is None
        module.register_forward_pre_hook(lambda *_, name=name, leaf=leaf: enter(name, leaf))
    twin(**inputs)
    return calls, passed


def _blocks(model: nn.Module, times: dict[str, int]) -> dict[str, int]:
    """Those modules that have siblings of their own kind in a list."""
    found = {}
    for name, time in times.items():
        path, _, last = name.rpartition(".")
        kinds = Counter(type(child) for child in model.get_submodule(path).children())
        if last.isdigit() and kinds[type(model.get_submodule(name))] > 1:
            found[name] = time
    return _with_state(model, found)


def _with_state(model: nn.Module, times: dict[str, int]) -> dict[str, int]:
    return {name: time for name, time in times.items() if next(model.get_submodule(name).parameters(), None) is not None}


def _spread(times: dict[str, int], total: int, stages: int) -> list[str] | None:
    chosen: list[str] = []
    last = 0
    for stage in range(1, stages):
        behind = [name for name, time in times.items() if time > last]
        if not behind:
            return None
        chosen.append(min(behind, key=lambda name: abs(times[name] - total * stage / stages)))
        last = times[chosen[-1]]
    return chosen
