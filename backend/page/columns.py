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

KEPT, LOST, NEW, CHANGED = "=", "-", "+", "~"
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
    made = Columns()
    known: dict[str, int] = {}
    old: list[int] = []
    before = None
    for name, text, seconds in history:
        raw = text.splitlines()
        new = [known.setdefault(line.lstrip(" "), len(known)) for line in raw]
        made.lines += list(known)[len(made.lines) :]
        hunks = _hunks(old, new, made.lines)
        made.columns.append(
            Column(
                name,
                seconds,
                hunks,
                _counted([len(line) - len(line.lstrip(" ")) for line in raw]),
                text != before,
            )
        )
        old, before = new, text
    return made


def align(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (place in old, place in new) of equal keys; both places increase."""
    anchors = [(-1, -1), *_anchors(old, new), (len(old), len(new))]
    pairs: list[tuple[int, int]] = []
    for (a, b), (c, d) in pairwise(anchors):
        pairs += _ends(old, new, (a + 1, b + 1), (c, d))
        pairs.append((c, d))
    return pairs[:-1]


def _anchors(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """The longest increasing line of pairs among keys that stand once in both."""
    here, there = Counter(old), Counter(new)
    place = {key: i for i, key in enumerate(old) if here[key] == 1}
    return _rising(
        [
            (place[key], j)
            for j, key in enumerate(new)
            if key in place and there[key] == 1
        ]
    )


def _rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence whose first numbers increase; the second numbers increase already."""
    ends: list[int] = []
    last: list[int] = []
    before = [-1] * len(pairs)
    for i, (a, _) in enumerate(pairs):
        at = bisect_left(ends, a)
        before[i] = last[at - 1] if at else -1
        ends[at : at + 1], last[at : at + 1] = [a], [i]
    found: list[tuple[int, int]] = []
    i = last[-1] if last else -1
    while i >= 0:
        found.append(pairs[i])
        i = before[i]
    return found[::-1]


def _ends(
    old: Sequence[str], new: Sequence[str], begin: tuple[int, int], end: tuple[int, int]
) -> list[tuple[int, int]]:
    """The equal keys at the beginning and at the end of a gap between two anchors."""
    (a, b), (c, d) = begin, end
    head: list[tuple[int, int]] = []
    while a < c and b < d and old[a] == new[b]:
        head.append((a, b))
        a, b = a + 1, b + 1
    tail: list[tuple[int, int]] = []
    while c > a and d > b and old[c - 1] == new[d - 1]:
        c, d = c - 1, d - 1
        tail.append((c, d))
    return head + tail[::-1]


def _hunks(old: list[int], new: list[int], lines: list[str]) -> list[Hunk]:
    steps = _steps(
        old, new, align([_key(lines[i]) for i in old], [_key(lines[i]) for i in new])
    )
    return [
        _hunk(kind, [line for _, line in group])
        for kind, group in groupby(steps, lambda step: step[0])
    ]


def _steps(
    old: list[int], new: list[int], pairs: list[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    for (a, b), (c, d) in pairwise([(-1, -1), *pairs, (len(old), len(new))]):
        yield from ((LOST, line) for line in old[a + 1 : c])
        yield from ((NEW, line) for line in new[b + 1 : d])
        if c < len(old):
            yield KEPT if old[c] == new[d] else CHANGED, new[d]


def _hunk(kind: str, lines: list[int]) -> Hunk:
    return (kind, len(lines)) if kind in (KEPT, LOST) else (kind, _runs(lines))


def _key(line: str) -> str:
    found = _KEY.match(line)
    return found[0] if found else line


def _runs(numbers: Sequence[int]) -> list[int]:
    """Numbers that increase by one, as first, count, first, count, ..."""
    flat: list[int] = []
    for number in numbers:
        if flat and number == flat[-2] + flat[-1]:
            flat[-1] += 1
        else:
            flat += [number, 1]
    return flat


def _counted(numbers: Sequence[int]) -> list[int]:
    """Equal numbers in a row, as number, count, number, count, ..."""
    return [
        item for number, group in groupby(numbers) for item in (number, len([*group]))
    ]
