"""Torch traces without a word on standard error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import IO, Any, cast

import torch

from stagecut.ir.blame import OWN_DIR

_EXPORT = os.path.join(os.path.dirname(torch.__file__), "export", "")


@contextmanager
def quiet_torch() -> Iterator[None]:
    """While open, torch logs nothing and prints no graph of a trace that failed. Output of the model itself
    still appears.

    A capture may fail and be tried again with a module kept whole; the program's notes tell of that. Nothing
    is silenced for a user who sets TORCH_LOGS.
    """
    if "TORCH_LOGS" in os.environ or sys.stderr is None:
        yield
        return
    names = [
        name
        for name in logging.root.manager.loggerDict
        if name.partition(".")[0] == "torch"
    ]
    handlers = [
        handler for name in names for handler in logging.getLogger(name).handlers
    ]
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        with redirect_stderr(cast(IO[str], _WithoutExport(sys.stderr))):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


class _WithoutExport:
    """A stream that leaves out what torch.export prints."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text, unless torch.export prints it."""
        caller = sys._getframe(1)
        # a function of ours may stand in the place of print
        while caller.f_back is not None and caller.f_code.co_filename.startswith(
            OWN_DIR
        ):
            caller = caller.f_back
        by_export = caller.f_code.co_filename.startswith(_EXPORT)
        return len(text) if by_export else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
