"""Names of values that count: each has the number after that of the last one of its kind, in the order of the
program. So a text says the names of what is inside of a function's calls without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from stagecut.ir.graph import CALL, Op, Program, Value

_NUMBERS = re.compile(r"(?<=.)((?:_\d+)+)\Z")
_VERSION = re.compile(r"(.*)\.(\d+)\Z")


def base_of(name: str) -> str:
    """A name without the numbers that tell it from others."""
    return _NUMBERS.sub("", name)


def values_of(ops: Iterable[Op]) -> Iterator[Value]:
    """What ops define, in order, with the inputs and values of their regions, but not those of functions."""
    for op in ops:
        regions = op.regions
        if op.target == CALL:
            regions = ()
        for region in regions:
            yield from region.inputs
            yield from values_of(region.ops)
        yield from op.definitions()


def count_names(program: Program) -> None:
    """The values of a traced program have names that count; inputs keep theirs."""
    count = Count(value.hint for value in program.inputs)
    for value in values_of(program.ops):
        value.hint = count.name(value, value.hint)


class Count:
    """The names that are next, where those of all values before are known."""

    def __init__(self, inputs: Iterable[str]) -> None:
        self._last: dict[str, int] = {}
        for name in inputs:
            number = _number(name)
            if number is None:
                continue
            base = base_of(name)
            last = self._last.get(base, 0)
            self._last[base] = max(number, last)
        self._names: dict[Value, str] = {}

    def seen(self, value: Value, name: str) -> None:
        """The next value has this name."""
        self._names[value] = name
        number = _number(name)
        if number is None:
            return
        base = base_of(name)
        self._last[base] = number

    def name(self, value: Value, wish: str, taken: Iterable[str] = ()) -> str:
        """The name of the next value, of the kind of `wish`, which none of those `taken` has."""
        name = self.expected(value, wish)
        while name in taken:
            self.seen(value, name)
            name = self.expected(value, wish)
        self.seen(value, name)
        return name

    def expected(self, value: Value, wish: str) -> str:
        """The name that counts for the next value."""
        old = value.version_of
        if old is not None and old in self._names:
            return next_version(self._names[old])
        base = base_of(wish) or "v"
        last = self._last.get(base)
        if last is None:
            return base
        return f"{base}_{last + 1}"


def next_version(name: str) -> str:
    """The name of a value after one more write: `x` -> `x.1` -> `x.2`."""
    found = _VERSION.match(name)
    if found is None:
        return f"{name}.1"
    number = int(found[2])
    return f"{found[1]}.{number + 1}"


def _number(name: str) -> int | None:
    """The number in a name, 0 without one; None where several follow each other, as in a copy's."""
    found = _NUMBERS.search(name)
    if found is None:
        return 0
    numbers = found[1].split("_")[1:]
    if len(numbers) > 1:
        return None
    return int(numbers[0])
