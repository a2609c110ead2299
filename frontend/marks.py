"""What the parts of the frontend tell each other: keys in the meta of nodes, ops that stand in for others,
calls of what is kept whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

CHECKPOINT = "torch.ops.stagecut.checkpoint.default"
"""The op that stands where a checkpointed region begins and where it ends."""


ASSIGNED = "stagecut_assigned"
"""Marks, in the meta of a node, the copy that stands for `self.buffer = new`."""


LEAF = "torch.ops.stagecut.leaf.default"
"""The op that stands in for a module kept whole."""


FUNCTION = "torch.ops.stagecut.function.default"
"""The op that stands in for an autograd.Function of the user's."""


CALL = "stagecut_call"
"""Where, in the meta of a node, the call of such a function is kept."""


GRAD = "stagecut_grad"
"""Where, in the meta of a switch of the grad mode, the mode is that forward asks for behind it, None for that
of its caller.
"""


FOLLOWS = "stagecut_follows"
"""Where, in the meta of an op with a training flag, the paths of the module are whose flag it takes; none for
a flag of its own.
"""


SAME = "stagecut_same"
"""Marks, in the meta of a node, an alias that stands for its operand itself."""


CHOICES = "stagecut_choices"
"""Where, in the meta of a traced module, the places are at which Python chose by mode: by module path."""


FIXED = "stagecut_fixed"
"""Where, in the meta of a traced module, the paths of modules are whose training flag forward sets itself,
with the line.
"""


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Numbers that the trace computes: they depend on sizes or on data."""


SYMBOLS = (torch.Tensor, *SYMBOLIC)
"""What stands for data while a model is traced."""


@dataclass
class LeafCall:
    """One call of what is kept whole: how tensors and symbolic numbers sit in its arguments and results, and
    what it does besides.

    `path` is the module's, `function` the user's function where it is none.
    """

    path: str
    in_flat: list[Any]
    in_spec: TreeSpec
    out_flat: list[Any]
    out_spec: TreeSpec
    views: tuple[int | None, ...] = ()
    written_inputs: tuple[int, ...] = ()
    written_state: tuple[str, ...] = ()
    random: bool = False
    function: Any = None
    in_shapes: Sequence[tuple[int, ...]] = ()
