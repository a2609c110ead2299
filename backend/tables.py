"""Rows of cells -> columns of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 1_000_000
"""Characters of a line that no cell is folded for."""


def time_text(seconds: float) -> str:
    """A short text for some seconds: `12.3 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{_short(seconds * scale)} {unit}"
    return ""


def count_text(number: float) -> str:
    """A short text for a count: `12.3 M`."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{_short(number / scale)} {unit}"
    return f"{number:.0f}"


def _short(number: float) -> str:
    """A number with three digits, and no power of ten."""
    return f"{float(f'{number:.3g}'):g}"


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows as aligned lines: the columns in `left` to the left, the others to the right."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for number in range(len(rows[0]) if rows else 0):
        grid.add_column(justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console(file=StringIO(), width=_WIDE, color_system=None)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
