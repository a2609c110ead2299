"""Finds the line of the user's that does something, by looking after every line, in a trace made only for
this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from stagecut.frontend.source import Line, is_users_file, user_line


class LineFinder:
    """Between `start` and `stop`, `line` becomes the first line of the user's after which `happened` is
    true.
    """

    def __init__(self, happened: Callable[[], Any]) -> None:
        self._happened = happened
        self._last: Line | None = None
        self._outer: Any = None
        self.line: Line | None = None

    def start(self) -> None:
        """Every function that is called from now on is followed."""
        self._outer = sys.gettrace()
        sys.settrace(self._step)

    def stop(self) -> None:
        """Functions are followed no more, and the previous trace function is restored."""
        if sys.gettrace() == self._step:
            sys.settrace(self._outer)
            self._look()

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not is_users_file(frame.f_code.co_filename):
            return None
        self._look()
        # after a call, the line that made it goes on
        self._last = user_line(frame.f_back if event == "return" else frame)
        return None if self.line else self._step

    def _look(self) -> None:
        if self.line is None and self._last is not None and self._happened():
            self.line = self._last
