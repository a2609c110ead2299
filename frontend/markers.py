"""Split markers: the `pipe_split()` op, and `SplitPoint`, which names a place beside a module."""

from __future__ import annotations

from enum import Enum

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

MARKERS = frozenset({"torch.ops.stagecut.pipe_split.default", "torch.ops.pippy._pipe_split.default", "torch.ops.stagecut.pipe_split", "torch.ops.pippy._pipe_split"})
"""Names of the ops that mark a boundary: ours and that of torch.distributed.pipelining."""


def pipe_split() -> None:
    """Marks the boundary between two stages at this place of a model's forward. Does nothing when run eagerly."""
    torch.ops.stagecut.pipe_split()


class SplitPoint(Enum):
    """Where a split lies beside a named module: before its forward runs, or after."""

    BEGINNING = 1
    END = 2
