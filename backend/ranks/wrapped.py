"""A stage is moved and wrapped once, however many drivers run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import refuse_meta
from stagecut.ir.errors import StagecutError

Wrap = Callable[[nn.Module, int], nn.Module] | None

_wrappings: WeakKeyDictionary[Staged, dict[int, tuple[Any, nn.Module]]] = (
    WeakKeyDictionary()
)
"""Pipe -> stage -> the code of the wrap, and the module that it made."""

trained: WeakSet[Staged] = WeakSet()
"""The pipes for which a driver with a loss function was made."""


def wrapped(pipe: Staged, index: int, device: torch.device, wrap: Wrap) -> nn.Module:
    """The module that runs in the place of a stage, on `device`. `wrap` is called once for each stage, by the
    first driver of the pipe that asks.

    Raises StagecutError while the stage is on meta, or where it was wrapped in another way.
    """
    refuse_meta(pipe.program, pipe.stages[index])
    stage = pipe.stages[index].to(device)
    wrappings = _wrappings.setdefault(pipe, {})
    code = getattr(wrap, "__code__", wrap)
    if index not in wrappings and wrap is None:
        return stage
    if index not in wrappings and wrap is not None:
        wrappings[index] = code, wrap(stage, index)
    first_code, module = wrappings[index]
    if wrap is not None and code != first_code:
        raise StagecutError(
            f"stage {index} was wrapped by another function, by an earlier driver of this pipe",
            where=f"wrap of that driver: {first_code}",
            hint="give every driver of a pipe the same wrap, or make a pipe anew",
        )
    return module
