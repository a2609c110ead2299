"""Tells which files and lines are the user's."""

from __future__ import annotations

import dis
import inspect
import linecache
import os
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
import typing_extensions
from torch import nn
from torch.utils._pytree import tree_leaves

from stagecut.ir.blame import OWN_DIR
from stagecut.ir.errors import StagecutError, without_addresses
from stagecut.ir.graph import Loc

Line = tuple[str, int, str]
"""File, line and function."""


_TYPING = typing_extensions.__file__
"""What later versions of Python have in their library: `typing` calls it where torch makes a type."""

_PYTHON_DIR = os.path.dirname(os.__file__) + os.sep


def gpus(*trees: Any) -> list[int]:
    """The CUDA devices on which tensors of modules and trees lie."""
    leaves: list[Any] = []
    for tree in trees:
        if isinstance(tree, nn.Module):
            leaves += [*tree.parameters(), *tree.buffers()]
        else:
            leaves += tree_leaves(tree)
    devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


def is_pythons_file(file: str) -> bool:
    """True for a source file of Python's own library, and for code without a file."""
    return (
        file.startswith("<")
        or file == _TYPING
        or (file.startswith(_PYTHON_DIR) and "-packages" not in file)
    )


def is_users_file(file: str) -> bool:
    """True for a source file that is neither torch's, nor ours, nor one of Python's own library."""
    return not file.startswith((TORCH_DIR, OWN_DIR)) and not is_pythons_file(file)


def at_users_lines(error: StagecutError) -> StagecutError:
    """The error, to be raised from None. Its traceback has steps of ours, then those of the model's code, and
    none of torch's. The exception that led to it is `error.cause`.
    """
    error.cause = error.cause or error.__cause__
    steps = [step for step in _steps(error) if not _is_librarys_file(_file_of(step))]
    if error.cause is not None:
        steps += [step for step in _steps(error.cause) if is_users_file(_file_of(step))]
    linked: TracebackType | None = None
    for step in reversed(steps):
        linked = TracebackType(linked, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return error.with_traceback(linked)


def _steps(error: BaseException) -> Iterator[TracebackType]:
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _file_of(step: TracebackType) -> str:
    return step.tb_frame.f_code.co_filename


def _is_librarys_file(file: str) -> bool:
    return file.startswith(TORCH_DIR) or is_pythons_file(file)


def failing_line(error: BaseException, cls: type | None = None) -> str:
    """file:line and source of the user's innermost frame; else the place of the forward of `cls`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = os.path.abspath(frame.filename)
        if is_users_file(path) and os.path.exists(path):
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return place_of(cls) if cls is not None else "no frame of the model's own source"


_RAISE = dis.opmap["RAISE_VARARGS"]


def is_raised_by_user(error: BaseException) -> bool:
    """True for an exception of a `raise` or `assert` in the user's code."""
    last = deque(_steps(error), 1)
    return any(
        is_users_file(_file_of(step))
        and step.tb_frame.f_code.co_code[step.tb_lasti] == _RAISE
        for step in last
    )


def first_line(error: BaseException) -> str:
    """The class of an exception, and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_addresses(
        f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    )


def outside_of_modes(frame: FrameType) -> FrameType:
    """The innermost frame, from `frame` outwards, that is no mode's."""
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def user_line(frame: FrameType | None = None) -> Line:
    """File, line and function of the user's innermost frame, from `frame` or from the caller outwards."""
    frame = frame or sys._getframe(1)
    while frame.f_back is not None and not is_users_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def shown(line: Line) -> str:
    """A line for a message, with its source."""
    return f"{line[0]}:{line[1]} in {line[2]}: {linecache.getline(line[0], line[1]).strip()}"


def place_of(cls: type) -> str:
    """The place of the forward of a module class."""
    try:
        code = inspect.unwrap(cls.forward).__code__  # type: ignore[attr-defined]
        return f"{code.co_filename}:{code.co_firstlineno}, {cls.__name__}.forward"
    except AttributeError:
        return f"class {cls.__name__}"


TORCH_DIR = os.path.dirname(torch.__file__) + os.sep


def user_loc(trace: str) -> Loc | None:
    """The innermost frame of a stack trace that is the user's, neither torch's nor ours; else the innermost
    frame.
    """
    innermost: Loc | None = None
    for line in reversed(trace.splitlines()):
        text = line.strip()
        if not text.startswith('File "') or text.startswith('File "<eval_with_key>'):
            continue
        path, _, rest = text[6:].partition('", line ')
        number = rest.partition(",")[0]
        loc = Loc(path, int(number)) if number.isdigit() else None
        if loc and not path.startswith((TORCH_DIR, OWN_DIR)):
            return loc
        innermost = innermost or loc
    return innermost
