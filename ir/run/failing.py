"""Which call of a module an exception went through, and what the module was given."""

from __future__ import annotations

import traceback
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_CALL = nn.Module._call_impl.__code__
MOST_GIVEN = 4
"""So many tensors are listed."""


class FailedCall(NamedTuple):
    """A call of a module that did not return. given: the dtypes and shapes of its tensors, '' for none."""

    module: nn.Module
    given: str


def failed_calls(error: BaseException) -> list[FailedCall]:
    """The calls of modules through which an exception went, the outermost first."""
    calls: list[FailedCall] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is not _CALL:
            continue
        given = frame.f_locals
        inputs = given.get("args"), given.get("kwargs")
        call = FailedCall(given["self"], _types(inputs))
        calls.append(call)
    return calls


def failed_at(path: str, given: str, line: str) -> str:
    """The place of a failure: the module and what it was given, as far as they are known, and the line."""
    parts: list[str] = []
    if path:
        parts.append(f"module '{path}'")
    if path and given:
        parts.append(f"which was given {given}")
    if line:
        parts.append(line)
    return ", ".join(parts)


def _types(inputs: Any) -> str:
    leaves = tree_leaves(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    shown: list[str] = []
    for tensor in tensors[:MOST_GIVEN]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = [*map(int, tensor.shape)]
        shown.append(f"{dtype}{shape}")
    left = len(tensors) - len(shown)
    if left:
        shown.append(f"{left} more")
    return " and ".join(shown)
