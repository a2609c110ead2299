"""Notes which lines of a model print while it is traced: stages are made of ops, and print nothing."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from stagecut.frontend.source import is_users_file
from stagecut.frontend.watch.lost_lines import LostLines, behind_python


@contextmanager
def noting_prints(lines: LostLines) -> Iterator[None]:
    """While open, `print` prints, and what it does for the trace of a model is noted."""
    print_it, thread = builtins.print, threading.get_ident()

    @wraps(print_it)
    def print_noted(*args: Any, **kwargs: Any) -> None:
        # torch compiles branches of torch.cond, and compiles no code that looks at frames
        compiles = torch.compiler.is_dynamo_compiling()
        if not compiles and threading.get_ident() == thread:
            _note(lines)
        print_it(*args, **kwargs)

    with patch.object(builtins, "print", print_noted):
        yield


def _note(lines: LostLines) -> None:
    frame = behind_python(sys._getframe(2))
    if not is_users_file(frame.f_code.co_filename):
        return
    lines.note(
        frame,
        "print() is called while {forward} is traced, and the stages do not print",
        "return the value as an output and print that",
        "prints each time",
    )
