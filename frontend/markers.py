"""Split markers: the `pipe_split()` op, and `SplitPoint`, which names a place beside a module."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch.fx.node import has_side_effect

torch.library.define("stagecut::pipe_split", "() -> ()")


@torch.library.impl("stagecut::pipe_split", "BackendSelect")
def _pipe_split() -> None:
    return None


@torch.library.register_fake("stagecut::pipe_split")
def _pipe_split_fake() -> None:
    return None


has_side_effect(torch.ops.stagecut.pipe_split.default)

_OPS = ("stagecut.pipe_split", "pippy._pipe_split")
_FUNCTIONS = (
    ("stagecut.frontend.markers", "pipe_split"),
    ("torch.distributed.pipelining._IR", "pipe_split"),
)


def is_marker(target: Any) -> bool:
    """True for a target that marks a boundary when called: our op, that of torch.distributed.pipelining, and
    the functions around them.
    """
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).removesuffix(".default") in _OPS
    return (
        getattr(target, "__module__", ""),
        getattr(target, "__name__", ""),
    ) in _FUNCTIONS


def pipe_split() -> None:
    """Marks the boundary between two stages at this place of a model's forward. Does nothing when run
    eagerly.
    """
    torch.ops.stagecut.pipe_split()


class SplitPoint(Enum):
    """The place of a split beside a named module: before its forward runs, or after."""

    BEGINNING = 1
    END = 2
