"""nn.Module + example inputs -> ExportedProgram, with errors that point at the user's source line."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from stagecut.frontend.call import check_example
from stagecut.frontend.lower import TORCH_DIR
from stagecut.ir.errors import CaptureError

_OWN_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def capture(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None) -> ExportedProgram:
    """The exported program of `module` on the example inputs.

    Raises InputError when the inputs do not fit the signature, CaptureError when the model cannot be traced.
    """
    check_example(module, args, kwargs)
    args, kwargs = distinct_tensors((tuple(args), dict(kwargs)))
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} cannot be traced: {_first_line(error)}",
            where=_user_frame(error),
            hint=_advice(error),
        ) from error


def distinct_tensors(tree: Any) -> Any:
    """`tree` with every repeated tensor object replaced by a copy: a tracer takes one tensor given twice for one input."""
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in seen:
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        seen.add(id(leaf))
        return leaf

    return tree_map(once, tree)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _user_frame(error: Exception) -> str:
    """file:line and source of the innermost frame that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = os.path.abspath(frame.filename)
        foreign = not path.startswith((TORCH_DIR, _OWN_DIR))
        if foreign and os.path.exists(path):
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return "no frame of the model's own source"


def _advice(error: Exception) -> str:
    name = type(error).__name__
    text = str(error)
    if "DataDependent" in name or "data-dependent" in text.lower():
        return "the model branches on a value of a tensor: use torch.where or torch.cond there"
    if "dynamic" in text and "constraint" in text.lower():
        return "loosen or correct dynamic_shapes: the model fixes a size that was declared to vary"
    if "pytree" in text:
        return "return tensors in tuples, lists, dicts or dataclasses registered with torch.utils._pytree"
    return "make this line traceable by torch.export (no data-dependent Python control flow, no foreign libraries on tensors)"
