"""Tells whose fault an exception is: the model's, or ours."""

from __future__ import annotations

import contextlib
import dis
import os
from collections.abc import Callable
from types import TracebackType

from stagecut.ir.errors import StagecutError

OWN_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
OWN_FOLDERS = (
    OWN_DIR,
    *(
        os.path.realpath(OWN_DIR + name) + os.sep
        for name in ("ir", "passes", "frontend", "backend", "tools")
    ),
)

_MANAGERS = contextlib.__file__
"""Its steps stand between the body of a `with` of ours and the code around it."""

_MODULES = os.path.join("torch", "nn", "modules", "module.py")
"""Where steps of torch stand between a call of a module and its forward."""

_HANDS_ON = dis.opmap["CALL_FUNCTION_EX"]
"""A call `f(*args, **kwargs)`: it hands the model's arguments on to a function of the model's or of
torch's.
"""


class OnPurpose(Exception):
    """Raised by our code within the model's code, because of something that the model does. It is no bug."""


def raise_ours(error: BaseException) -> None:
    """Returns when the model, or torch in its name, is to blame for `error`. If `error`, or an exception that
    led to it, is a bug of ours, that is raised as it is.
    """
    link: BaseException | None = error
    while link is not None:
        if _is_bug(link):
            raise link
        link = _cause_of(link)


def _is_bug(error: BaseException) -> bool:
    """True for an exception raised in a frame of ours. Nobody is to blame where the stack or the memory
    ends.
    """
    if (
        isinstance(error, (StagecutError, OnPurpose, RecursionError, MemoryError))
        or error.__traceback__ is None
    ):
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return _is_ours(last) and last.tb_frame.f_code.co_code[last.tb_lasti] != _HANDS_ON


def _cause_of(error: BaseException) -> BaseException | None:
    """The exception that caused `error`, or during whose handling it was raised. One that our own code caught
    does not count, because our code expected it.
    """
    cause = error.__cause__ or (
        None if error.__suppress_context__ else error.__context__
    )
    if cause is None or cause.__traceback__ is None or _is_ours(cause.__traceback__):
        return None
    return cause


def drop_our_steps(error: BaseException) -> None:
    """The traceback of the error has no steps of ours: its message is for users, and has the place. The
    traceback has all steps where the environment has STAGECUT_TRACEBACK=full.
    """
    _keep_steps(error, _is_users)


def _is_users(step: TracebackType) -> bool:
    """False also for the steps of others that lead to code of ours, or from it to the user's."""
    calls_module = step.tb_frame.f_code.co_filename.endswith(_MODULES)
    return not (_is_ours(step) or _is_in(step, _MANAGERS) or calls_module)


def drop_all_steps(error: BaseException) -> None:
    """The error has no traceback, except where the environment has STAGECUT_TRACEBACK=full."""
    _keep_steps(error, lambda step: False)


def _keep_steps(error: BaseException, is_kept: Callable[[TracebackType], bool]) -> None:
    if os.environ.get("STAGECUT_TRACEBACK") == "full":
        return
    steps: list[TracebackType] = []
    step = error.__traceback__
    while step is not None:
        if is_kept(step):
            steps.append(step)
        step = step.tb_next
    linked: TracebackType | None = None
    for step in reversed(steps):
        linked = TracebackType(linked, step.tb_frame, step.tb_lasti, step.tb_lineno)
    error.__traceback__ = linked


def _is_ours(step: TracebackType) -> bool:
    return _is_in(step, OWN_FOLDERS)


def _is_in(step: TracebackType, places: str | tuple[str, ...]) -> bool:
    return step.tb_frame.f_code.co_filename.startswith(places)
