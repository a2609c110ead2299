"""Does a model compute the same when it is called again? Asked when a pipe does not compute what its model
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from stagecut.backend.stages.modules import copied
from stagecut.check import difference, fresh
from stagecut.frontend.source import gpus
from stagecut.frontend.watch.globals import random_state
from stagecut.ir.blame import raise_ours
from stagecut.ir.run.objects import opened


@dataclass
class _Call:
    path: str
    inputs: list[Any]
    results: list[Any]


def changing(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """The path of the innermost module that gives other results in a second call, with equal inputs,
    parameters, buffers and random numbers of torch's. None where all results are alike, and where this cannot
    be told. Runs a copy of `model` twice.
    """
    try:
        twin = copied(model)[0]
        state = {
            tensor: tensor.detach().clone()
            for tensor in (*twin.parameters(), *twin.buffers())
        }
        runs: list[list[_Call]] = []
        for _ in range(2):
            seed_again = random_state(model, gpus(model, args, kwargs))
            seed_again()
            runs.append(_calls(twin, state, args, kwargs, seed_again))
    except Exception as error:
        # whatever the code of a model raises when it is called again
        raise_ours(error)
        return None
    first, second = runs
    for call, repeated in zip(first, second, strict=False):
        if call.path != repeated.path:
            return ""
        if _same(call.inputs, repeated.inputs) and not _same(
            call.results, repeated.results
        ):
            return call.path
    if len(first) == len(second):
        return None
    return ""


def _calls(
    twin: nn.Module,
    state: Mapping[torch.Tensor, torch.Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    seed_again: Callable[[], None],
) -> list[_Call]:
    """The calls of all modules, inner ones before those around them."""
    calls: list[_Call] = []
    pending: list[list[Any]] = []
    hooks = []
    for path, module in twin.named_modules():
        hooks += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: pending.append(_leaves((args, kwargs))),
                with_kwargs=True,
            ),
            module.register_forward_hook(
                lambda _, args, result, path=path: calls.append(
                    _Call(path, pending.pop(), _leaves(result))
                )
            ),
        ]
    try:
        with torch.no_grad():
            for tensor, values in state.items():
                tensor.copy_(values)
        own_args, own_kwargs = fresh((tuple(args), dict(kwargs)))
        twin(*own_args, **own_kwargs)
    finally:
        seed_again()
        for hook in hooks:
            hook.remove()
    return calls


def _leaves(tree: Any) -> list[Any]:
    return [
        leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
        for leaf in tree_leaves(opened(tree))
    ]


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        difference("", first_leaf, second_leaf) is None
        for first_leaf, second_leaf in zip(first, second, strict=True)
    )
