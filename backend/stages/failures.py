"""Where in the model a stage has failed: the module and the line of the user's."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from stagecut.backend.stages.modules import StageModule
from stagecut.ir.errors import StagecutError
from stagecut.ir.run.failing import failed_at, failed_calls

_COMMENT = re.compile(r"\s*# ([^:]+:\d+)(: |$)")
_EMITTED = "<stagecut "


@contextmanager
def telling_place(stage: int) -> Iterator[None]:
    """An exception of torch's or of the model's that a stage raises inside has a note that says where in the
    model that is.
    """
    try:
        yield
    except StagecutError:
        raise
    except Exception as error:
        place = place_of_failure(error, _is_emitted)
        if place:
            error.add_note(f"  at: stage {stage}, {place}")
        raise


def place_of_failure(
    error: BaseException, counts: Callable[[FrameType], bool], line: str = ""
) -> str:
    """The module of a stage in which an error was raised, what that was given, and the line of the innermost
    frame that counts; or this `line`. The lines of an error of ours are ours, and are left out.
    """
    path, given = _failed_module(error)
    if isinstance(error, StagecutError):
        counts = _is_emitted
    return failed_at(path, given, line or _line(error, counts))


def _failed_module(error: BaseException) -> tuple[str, str]:
    """The path of the innermost module of a stage, and what it was given."""
    calls = failed_calls(error)
    calls.reverse()
    for call in calls:
        if isinstance(call.module, StageModule) and call.module._path:
            return call.module._path, call.given
    return "", ""


def _line(error: BaseException, counts: Callable[[FrameType], bool]) -> str:
    steps = [*traceback.walk_tb(error.__traceback__)]
    steps.reverse()
    for frame, number in steps:
        if counts(frame):
            return _location(frame, number)
    return ""


def _is_emitted(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_EMITTED)


def _location(frame: FrameType, line: int) -> str:
    """file:line, of the model where the code is a stage's."""
    file = frame.f_code.co_filename
    if not _is_emitted(frame):
        return f"{Path(file).name}:{line}"
    for number in range(line, 0, -1):
        match = _COMMENT.match(linecache.getline(file, number))
        if match is not None:
            return match[1]
    return ""
