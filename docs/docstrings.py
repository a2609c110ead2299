"""Docstrings for the site: what they say of parameters and attributes, a line each, becomes a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

_HEAD = re.compile(r"^(\w+)\n-+$", re.MULTILINE)
_ENTRY = re.compile(r"(?:^|(?<=\. ))((?:\w+, )*\w+): ", re.MULTILINE)


class Lists(Extension):
    """Makes lists of the lines of a docstring that begin with names of the object's."""

    def on_function(self, *, func: Any, **_: Any) -> None:
        """For a function, the names are its parameters."""
        self._rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """For a class, they are its attributes and the parameters of its constructor."""
        names = set(cls.members)
        if "__init__" in cls.members:
            names |= {
                parameter.name for parameter in cls.members["__init__"].parameters
            }
        self._rewrite(cls, names)

    @staticmethod
    def _rewrite(of: Any, names: set[str]) -> None:
        if of.docstring is None:
            return

        def entry(line: re.Match[str]) -> str:
            listed = line[1].split(", ")
            known = all(name in names or name.endswith("Error") for name in listed)
            if not known:
                return line[0]
            marked = ", ".join(f"`{name}`" for name in listed)
            return f"\n- {marked}: "

        text = _HEAD.sub(r"**\1**\n", of.docstring.value)
        of.docstring.value = _ENTRY.sub(entry, text)
