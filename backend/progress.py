"""Long steps say what they are doing on a terminal, and nothing anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn, TimeElapsedColumn

_BUSY: list[Progress] = []
"""The bar that is on the terminal; one at a time."""


def on_terminal() -> bool:
    """True where a person watches standard error, and this process is the one that talks: the first of those
    that torchrun started on this machine.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    return first and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def bar(*columns: ProgressColumn) -> Iterator[Progress | None]:
    """A bar of these columns on the terminal, gone afterwards. None where there is no terminal, or a bar
    already. It never takes what others print.
    """
    if _BUSY or not on_terminal():
        yield None
        return
    shown = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    _BUSY.append(shown)
    try:
        with shown:
            yield shown
    finally:
        _BUSY.clear()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """While the block runs, a terminal shows `what` and for how long."""
    columns = TextColumn("stagecut: {task.description}"), TimeElapsedColumn()
    with bar(*columns) as shown:
        if shown is not None:
            shown.add_task(what, total=None)
        yield


def first_call(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A function that does the same, whose first call, in which torch compiles it, is told as `what`."""
    is_first = True

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_first
        if not is_first:
            return function(*args, **kwargs)
        is_first = False
        with doing(what):
            return function(*args, **kwargs)

    return called
