"""Marks that the parts of the frontend leave for each other: keys in the meta of nodes, ops that stand in for
others, calls of modules and functions kept whole.
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
"""Meta key that marks the copy that stands for `self.buffer = new`."""


LEAF = "torch.ops.stagecut.leaf.default"
"""The op that stands in for a module kept whole."""


FUNCTION = "torch.ops.stagecut.function.default"
"""The op that stands in for an autograd.Function of the user's."""


CALL = "stagecut_call"
"""Meta key on a node: the call of such a function."""


GRAD = "stagecut_grad"
"""Meta key on a switch of the grad mode: the mode that forward asks for after it; None means the caller's
mode.
"""


FOLLOWS = "stagecut_follows"
"""Meta key on an op with a training flag: the paths of the module whose flag it takes; none for a flag of its
own.
"""


SAME = "stagecut_same"
"""Meta key that marks an alias that stands for its operand itself."""


CHOICES = "stagecut_choices"
"""Meta key on a traced module: module path -> the place at which Python chose by mode."""


FIXED = "stagecut_fixed"
"""Meta key on a traced module: the paths of modules whose training flag forward sets itself, with the
line.
"""


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Numbers that the trace computes: they depend on sizes or on data."""


SYMBOLS = (torch.Tensor, *SYMBOLIC)
"""The types that stand for data while a model is traced."""


@dataclass
class LeafCall:
    """One call of a module or function kept whole: how tensors and symbolic numbers sit in its arguments and
    results, and what it does besides.

    `path` is the module's path; `function` is the user's function, where the call is not of a module.
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


AGAIN = "stagecut_again"
"""Meta key on the node that stands for a call that was traced like an earlier one, and its name."""


BEGINS = "stagecut_begins"
"""Meta key on the node in front of the trace of such an earlier call, and its name."""


STEP = "stagecut_step"
"""Meta key on the nodes of the trace of an earlier call."""


@dataclass(frozen=True)
class Template:
    """A call that later ones may be like: its number, and the path of its module."""

    number: int
    path: str


@dataclass(frozen=True)
class StepOf:
    """The place of a node in the trace of the call of that number."""

    number: int
    place: int


@dataclass(frozen=True)
class Repeated:
    """A call that is traced like that of a number: the path of its module, the names of its nodes, and the
    places of those whose tensors it returns.
    """

    number: int
    path: str
    names: list[str]
    results: list[int]
