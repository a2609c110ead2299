"""Notes which lines of a model print while it is traced: stages are made of ops, and print nothing."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from stagecut.frontend.source import is_pythons_file, is_users_file, shown, user_line


class Prints:
    """Open while a module is traced. `notes` has one for each line of the user's that has printed.

    Modules and functions that are kept whole print in each call of the pipe, and are run without a trace.
    """

    def __init__(self, module: nn.Module) -> None:
        # by the module's dict: a tracer may put another object in front of a module
        self._paths: dict[int, str] = {
            id(vars(owner)): path for path, owner in module.named_modules()
        }
        self._notes: dict[tuple[str, int], str] = {}

    @property
    def notes(self) -> list[str]:
        """What is lost, where, and what prints in each call."""
        return [*self._notes.values()]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """While open, `print` prints, and what it does for the trace of a model is noted."""
        print_it, thread = builtins.print, threading.get_ident()

        @wraps(print_it)
        def print_noted(*args: Any, **kwargs: Any) -> None:
            # torch compiles branches of torch.cond, and compiles no code that looks at frames
            compiles = torch.compiler.is_dynamo_compiling()
            if not compiles and threading.get_ident() == thread:
                self._note(sys._getframe(1))
            print_it(*args, **kwargs)

        with patch.object(builtins, "print", print_noted):
            yield

    def _note(self, frame: FrameType) -> None:
        while frame.f_back is not None and is_pythons_file(frame.f_code.co_filename):
            frame = frame.f_back
        place = frame.f_code.co_filename, frame.f_lineno
        if place in self._notes or not is_users_file(place[0]):
            return
        if get_proxy_mode() is None:
            return
        path = self._path_of(frame)
        keep = (
            f"leaf_modules=['{path}'] keeps that module whole, and it prints each time"
        )
        if not path:
            keep = "move this line into a submodule that leaf_modules=[...] keeps whole: it prints each time"
        owner = f" of module '{path}'" if path else ""
        self._notes[place] = (
            f"print() is called while forward{owner} is traced, and the stages do not print: "
            f"{shown(user_line(frame))}\n"
            f"  try: return the value as an output and print that; or {keep}"
        )

    def _path_of(self, innermost: FrameType) -> str:
        """The path of the innermost module that a frame runs for."""
        frame: FrameType | None = innermost
        while frame is not None:
            owner = frame.f_locals.get("self")
            path = self._paths.get(id(getattr(owner, "__dict__", None)))
            if path is not None:
                return path
            frame = frame.f_back
        return ""
