"""Which call of a module an exception went through, and what the module was given."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_is_leaf

from stagecut.ir.run.shown import listed, shown_value

_CALL = nn.Module._call_impl.__code__


class FailedCall(NamedTuple):
    """A call of a module that did not return. given: its tensors, by dtypes and shapes, and its containers;
    '' for neither.
    """

    module: nn.Module
    given: str


def failed_calls(error: BaseException) -> list[FailedCall]:
    """The calls of modules through which an exception went, the outermost first."""
    calls: list[FailedCall] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is not _CALL:
            continue
        given = frame.f_locals
        inputs = *given.get("args", ()), *given.get("kwargs", {}).values()
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


def _types(inputs: Sequence[Any]) -> str:
    told = (each for each in inputs if _tells(each))
    return listed(map(shown_value, told))


def _tells(given: Any) -> bool:
    return isinstance(given, torch.Tensor) or not tree_is_leaf(given)
