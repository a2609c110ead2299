"""The texts of a program after each pass -> one table of lines, and for each pass the difference between its
text and the previous one.

Lines are compared without their indentation, because a pass that puts ops into stages moves all of them to
the right. They are aligned by what they define (`%relu`, `state @w`, `stage 3`), so that a line which only
gained a word is a changed line, not a lost and a new one. Aligning takes n log n steps: keys that stand once
in both texts are the anchors, as in a patience diff.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

KEPT = "="
LOST = "-"
NEW = "+"
CHANGED = "~"
"""Kinds of hunks."""

Hunk = tuple[str, int] | tuple[str, list[int]]
"""Kept and lost lines are counted. New and changed lines are listed: first, count, first, count, ... Each
changed line stands in the place of one old line.
"""

_KEY = re.compile(
    r"%\S+(?:, %\S+)*(?= = )|(?:state|input) .+?(?= : )|transfer .+? : \S+ -> \d+|"
    r"stage \d+|(?:program|output|holds)\b|[^(]+"
)


@dataclass
class Column:
    """A pass: its name, the seconds it took, and how its text differs from the one before. indents: width,
    count, width, count, ...
    """

    name: str
    seconds: float
    hunks: list[Hunk]
    indents: list[int]
    changed: bool


@dataclass
class Columns:
    """All passes. `lines` holds every different line once, without its indentation."""

    columns: list[Column] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def columns_of(history: Sequence[tuple[str, str, float]]) -> Columns:
    """The columns of (name, text, seconds), in order."""
    table = Columns()
    numbers: dict[str, int] = {}
    old: list[int] = []
    previous_text = None
    for name, text, seconds in history:
        new: list[int] = []
        indents: list[int] = []
        for line in text.splitlines():
            bare = line.lstrip(" ")
            if bare not in numbers:
                numbers[bare] = len(numbers)
                table.lines.append(bare)
            new.append(numbers[bare])
            indents.append(len(line) - len(bare))
        column = Column(
            name,
            seconds,
            hunks=_hunks(old, new, table.lines),
            indents=_counted(indents),
            changed=text != previous_text,
        )
        table.columns.append(column)
        old = new
        previous_text = text
    return table


def align(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (position in old, position in new) of equal keys; both positions increase."""
    first = (-1, -1)
    last = (len(old), len(new))
    anchors = [first, *_anchors(old, new), last]
    pairs: list[tuple[int, int]] = []
    for (a, b), anchor in pairwise(anchors):
        begin = (a + 1, b + 1)
        pairs += _ends(old, new, begin, anchor)
        pairs.append(anchor)
    return pairs[:-1]


def _anchors(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """The longest increasing line of pairs among keys that stand once in both."""
    positions = _single(old)
    pairs: list[tuple[int, int]] = []
    for key, position in _single(new).items():
        if key in positions:
            pairs.append((positions[key], position))
    return _rising(pairs)


def _single(keys: Sequence[str]) -> dict[str, int]:
    """The keys that stand once, in order, and their positions."""
    counts = Counter(keys)
    positions: dict[str, int] = {}
    for position, key in enumerate(keys):
        if counts[key] == 1:
            positions[key] = position
    return positions


def _rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence whose first numbers increase; the second numbers increase already."""
    ends: list[int] = []
    last: list[int] = []
    previous = [-1] * len(pairs)
    for i, (a, _) in enumerate(pairs):
        at = bisect_left(ends, a)
        if at:
            previous[i] = last[at - 1]
        if at == len(ends):
            ends.append(a)
            last.append(i)
        else:
            ends[at] = a
            last[at] = i
    if not last:
        return []
    rising: list[tuple[int, int]] = []
    i = last[-1]
    while i >= 0:
        rising.append(pairs[i])
        i = previous[i]
    rising.reverse()
    return rising


def _ends(
    old: Sequence[str], new: Sequence[str], begin: tuple[int, int], end: tuple[int, int]
) -> list[tuple[int, int]]:
    """The equal keys at the beginning and at the end of a gap between two anchors."""
    a, b = begin
    c, d = end
    head: list[tuple[int, int]] = []
    while a < c and b < d and old[a] == new[b]:
        head.append((a, b))
        a += 1
        b += 1
    tail: list[tuple[int, int]] = []
    while c > a and d > b and old[c - 1] == new[d - 1]:
        c -= 1
        d -= 1
        tail.append((c, d))
    tail.reverse()
    return head + tail


def _hunks(old: list[int], new: list[int], lines: list[str]) -> list[Hunk]:
    old_keys = [_key(lines[i]) for i in old]
    new_keys = [_key(lines[i]) for i in new]
    pairs = align(old_keys, new_keys)
    steps = _steps(old, new, pairs)
    hunks: list[Hunk] = []
    for kind, group in groupby(steps, lambda step: step[0]):
        numbers = [line for _, line in group]
        hunks.append(_hunk(kind, numbers))
    return hunks


def _steps(
    old: list[int], new: list[int], pairs: list[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    a = 0
    b = 0
    for c, d in [*pairs, (len(old), len(new))]:
        for line in old[a:c]:
            yield LOST, line
        for line in new[b:d]:
            yield NEW, line
        if c == len(old):
            return
        kind = CHANGED
        if old[c] == new[d]:
            kind = KEPT
        yield kind, new[d]
        a = c + 1
        b = d + 1


def _hunk(kind: str, lines: list[int]) -> Hunk:
    if kind in (KEPT, LOST):
        return kind, len(lines)
    return kind, _runs(lines)


def _key(line: str) -> str:
    match = _KEY.match(line)
    if match is None:
        return line
    return match[0]


def _runs(numbers: Sequence[int]) -> list[int]:
    """Numbers that increase by one, as first, count, first, count, ..."""
    flat: list[int] = []
    following: int | None = None
    for number in numbers:
        if number == following:
            flat[-1] += 1
        else:
            flat += [number, 1]
        following = number + 1
    return flat


def _counted(numbers: Sequence[int]) -> list[int]:
    """Equal numbers in a row, as number, count, number, count, ..."""
    flat: list[int] = []
    current: int | None = None
    for number in numbers:
        if number == current:
            flat[-1] += 1
        else:
            flat += [number, 1]
        current = number
    return flat
