"""A stage is moved and wrapped once, however many drivers run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import refuse_meta
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.run.shown import shown_value

Wrap = Callable[[nn.Module, int], nn.Module] | None

_wrappings: WeakKeyDictionary[Staged, dict[int, tuple[Any, nn.Module]]] = (
    WeakKeyDictionary()
)
"""Pipe -> stage -> the wrap, and the module that it made."""

trained: WeakSet[Staged] = WeakSet()
"""The pipes for which a driver with a loss function was made."""


def wrapped(pipe: Staged, index: int, device: torch.device, wrap: Wrap) -> nn.Module:
    """The module that runs in the place of a stage, on `device`. `wrap` is called once for each stage, by the
    first driver of the pipe that asks.

    Raises StagecutError while the stage is on meta, or where it was wrapped in another way, and InputError
    where `wrap` returns no module.
    """
    refuse_meta(pipe.program, pipe.stages[index])
    stage = pipe.stages[index].to(device)
    wrappings = _wrappings.setdefault(pipe, {})
    if index not in wrappings and wrap is None:
        return stage
    if index not in wrappings and wrap is not None:
        wrappings[index] = wrap, _made(wrap, stage, index)
    before, module = wrappings[index]
    if wrap is not None and not _does_the_same(wrap, before):
        raise StagecutError(
            f"stage {index} was wrapped by another function, by an earlier driver of this pipe",
            where=f"wrap of that driver: {getattr(before, '__code__', before)}",
            hint="give every driver of a pipe the same wrap, or make a pipe anew",
        )
    return module


def _made(wrap: Callable[..., Any], stage: nn.Module, index: int) -> nn.Module:
    """The module that `wrap` returns. Raises InputError where it returns none."""
    module = wrap(stage, index)
    if isinstance(module, nn.Module):
        return module
    raise InputError(
        f"wrap(module, {index}) returned {shown_value(module)}, and no module to run",
        hint="return the module, also where it is changed in place: fully_shard(module); return module",
    )


def _does_the_same(wrap: Any, before: Any) -> bool:
    """True for one function, and for two that were made by the same code around the same values."""
    if wrap == before:
        return True
    if isinstance(wrap, partial) and isinstance(before, partial):
        return _does_the_same(wrap.func, before.func) and (
            (wrap.args, wrap.keywords) == (before.args, before.keywords)
        )
    if not (isinstance(wrap, FunctionType) and isinstance(before, FunctionType)):
        return False
    return wrap.__code__ == before.__code__ and around(wrap) == around(before)


def around(function: FunctionType) -> tuple[Any, ...]:
    """The values that a function takes from where it was made."""
    cells = function.__closure__ or ()
    return (
        [cell.cell_contents for cell in cells],
        function.__defaults__,
        function.__kwdefaults__,
    )
