"""Calls in a graph that change the contexts of the ops after them: the grad mode, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stagecut.frontend.marks import GRAD
from stagecut.ir.graph import Context

_ENTER = torch.amp.autocast_mode._enter_autocast
_LEAVE = torch.amp.autocast_mode._exit_autocast
SWITCHES = frozenset({torch._C._set_grad_enabled, _ENTER, _LEAVE})
"""Calls that change the contexts of all ops after them."""


def switched(
    node: fx.Node,
    args: tuple[Any, ...],
    context: tuple[Context, ...],
    outer: tuple[Context, ...],
) -> tuple[Context, ...]:
    """The contexts after a switch. A grad mode is marked where forward asks for one, or, where that is not
    known, where it differs from the mode around the graph.
    """
    if node.target is _ENTER:
        return (*context, Context("autocast", args))
    inner = context[len(outer) :]
    casts = [position for position, mark in enumerate(inner) if mark.kind == "autocast"]
    if node.target is _LEAVE:
        return (
            *outer,
            *(mark for position, mark in enumerate(inner) if position != casts[-1]),
        )
    asked = node.meta.get(GRAD, None if args[0] == _grad_mode(outer) else args[0])
    marks = [mark for mark in inner if mark.kind not in ("no_grad", "enable_grad")]
    return (
        (*outer, *marks)
        if asked is None
        else (*outer, *marks, Context("enable_grad" if asked else "no_grad"))
    )


def _grad_mode(context: tuple[Context, ...]) -> bool:
    return next(
        (
            mark.kind == "enable_grad"
            for mark in reversed(context)
            if mark.kind != "autocast"
        ),
        True,
    )
