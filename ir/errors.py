"""The errors a user may meet. Every one says what is wrong, where, and what to do.

Each names `stagecut` as its module, from which a user imports it, and so tracebacks and pickles name it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")


def without_addresses(text: str) -> str:
    """`text`, in which objects print as they do in every process."""
    return _ADDRESS.sub("", text)


class StagecutError(Exception):
    """The root of every error this project raises for a user's mistake.

    what: the mistake. where: the op, stage, module path or file:line, if known. hint: the cure. The message
    has a line for each, and each is an attribute. cause: the exception of torch or of the model's code that
    led to it, with its whole traceback, where the model could not be traced.
    """

    __module__ = "stagecut"

    cause: BaseException | None = None

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.hint = hint
        lines = [what]
        if where:
            lines.append(f"  at: {where}")
        if hint:
            lines.append(f"  try: {hint}")
        super().__init__(without_addresses("\n".join(lines)))

    def __reduce__(self) -> tuple[Any, ...]:
        # the exceptions of a tracer hold what cannot be pickled
        return _unpickled, (type(self), self.args), {**vars(self), "cause": None}


def _unpickled(cls: type[StagecutError], args: tuple[str]) -> StagecutError:
    """An error with that message, whose attributes pickle sets."""
    return cls.__new__(cls, *args)


class CaptureError(StagecutError):
    """The model could not be turned into a program.

    module: the path of the module that is to blame, where it could be kept whole instead; else empty.
    """

    __module__ = "stagecut"

    module: str = ""


class SplitError(StagecutError, ValueError):
    """A split point names something that does not exist or that cannot be divided."""

    __module__ = "stagecut"


class InputError(StagecutError, TypeError):
    """The arguments of a call do not fit the model's signature or the traced program."""

    __module__ = "stagecut"


class EmitError(StagecutError):
    """A program could not be turned into executable stages."""

    __module__ = "stagecut"


class RolesError(StagecutError):
    """The backward of a stage cannot be made of graphs."""

    __module__ = "stagecut"


class BudgetError(StagecutError, ValueError):
    """A stage cannot keep as little for its backward as a budget allows.

    least: the bytes that it must keep. limit: those that it may. where: the stage, or the rank.
    """

    __module__ = "stagecut"

    def __init__(self, least: int, limit: int, *, where: str = "") -> None:
        self.least = least
        self.limit = limit
        super().__init__(
            f"the backward needs at least {least:,} bytes of saved values, and the budget is {limit:,}",
            where=where,
            hint="a larger activation_budget=, smaller micro-batches, fewer in flight, or more stages",
        )

    def at(self, where: str) -> BudgetError:
        """The same error, which says where."""
        return BudgetError(self.least, self.limit, where=where)


class ModeError(StagecutError):
    """The stages cannot follow a switch to train or eval mode. Nothing is switched."""

    __module__ = "stagecut"


class PassError(StagecutError):
    """A pass was misused: an unknown name, a wrong order, or a wrong claim about its own effect."""

    __module__ = "stagecut"


class UnknownNameError(StagecutError, LookupError):
    """A program has no value or state of that name; the message lists the nearest ones."""

    __module__ = "stagecut"


_SHOWN = 200
"""Characters of a long line that are shown on either side of an error."""


class ParseError(StagecutError):
    """IR text could not be read. The message points at file:line:column with a caret.

    what: the fault. file, line, column: where it is, counted from 1. source: the text of that line.
    """

    __module__ = "stagecut"

    def __init__(
        self, what: str, *, file: str, line: int, column: int, source: str
    ) -> None:
        self.file, self.line, self.column = file, line, column
        left = max(0, column - _SHOWN)
        source, leading = source[left : column + _SHOWN], source[left : column - 1]
        caret = "".join("\t" if char == "\t" else " " for char in leading) + "^"
        super().__init__(f"{file}:{line}:{column}: {what}\n    {source}\n    {caret}")


class VerifyError(StagecutError):
    """A program breaks the invariants of its phase.

    violations: every one that was found. after: the pass that ran before, or an empty name.
    """

    __module__ = "stagecut"

    def __init__(self, violations: list[str], *, after: str = "") -> None:
        self.violations = violations
        head = f"invalid program after pass '{after}'" if after else "invalid program"
        super().__init__(
            "\n".join(
                [
                    f"{head}: {len(violations)} violation(s)",
                    *("  " + violation for violation in violations),
                ]
            )
        )


def wrong_kind(name: str, value: object) -> str:
    """`seed='x' is a str`."""
    shown = " ".join(repr(value).split())
    return f"{name}={shown:.60} is a {type(value).__name__}"


_ALIKE, _LESS_ALIKE = 0.6, 0.5
"""How much a name must be alike, as difflib counts, to be listed; the second where no name is as much."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """A phrase that lists the known names closest to `name`, or all of them when there are few."""
    distinct = list(dict.fromkeys(names))
    if not distinct:
        return "there are none"
    folded = name.casefold()
    close = [candidate for candidate in distinct if candidate.casefold() == folded]
    if not close:
        among = distinct[:5000]
        close = difflib.get_close_matches(name, among, count, _ALIKE)
        close = close or difflib.get_close_matches(name, among, count, _LESS_ALIKE)
    if close:
        return f"did you mean {' or '.join(map(_quoted, close))}?"
    more = f" and {len(distinct) - 8} more" if len(distinct) > 8 else ""
    return f"known: {', '.join(map(_quoted, distinct[:8]))}{more}"


def _quoted(name: str) -> str:
    return f"'{name}'"
