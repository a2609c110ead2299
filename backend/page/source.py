"""The lines of Python that ops come from, with the lines around them, as far as they can be read."""

from __future__ import annotations

import linecache
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stagecut.ir.text.life import Site

AROUND = 8
"""So many lines before and behind a line that ops name are shown with it."""

MOST_LINES = 4_000
"""The page has so many lines of source at most."""

Part = tuple[int, list[str]]
"""The number of the first line, and the lines."""


def source_of(files: Mapping[str, str], sites: Iterable[Site]) -> dict[str, list[Part]]:
    """Short name of a file -> its parts. Files come in the order of their ops; those that cannot be read, and
    all lines that are too many, are left out.
    """
    named: dict[str, set[int]] = {}
    for site in sites:
        if site.loc is not None:
            named.setdefault(site.loc.file, set()).add(site.loc.line)
    left = MOST_LINES
    sources: dict[str, list[Part]] = {}
    for file, numbers in named.items():
        parts = _parts(_lines(file), sorted(numbers))
        left -= sum(len(lines) for _, lines in parts)
        if left < 0:
            break
        if parts:
            sources[files.get(file, file)] = parts
    return sources


def _lines(file: str) -> list[str]:
    """The lines of a Python file, or of a cell of a notebook. Nothing else that a program names is read."""
    is_python = file.endswith(".py") and Path(file).is_file()
    if is_python or file in linecache.cache:
        return [line.rstrip("\n") for line in linecache.getlines(file)]
    return []


def _parts(lines: Sequence[str], numbers: Sequence[int]) -> list[Part]:
    """The lines of these numbers, and those around them; parts that touch are one."""
    parts: list[Part] = []
    end = 0
    for number in numbers:
        if number > len(lines):
            continue
        begin = max(number - AROUND, end + 1)
        last = min(number + AROUND, len(lines))
        shown = [*lines[begin - 1 : last]]
        if parts and begin == end + 1:
            parts[-1][1].extend(shown)
        elif shown:
            parts.append((begin, shown))
        end = max(end, last)
    return parts
