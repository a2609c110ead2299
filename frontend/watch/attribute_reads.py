"""Notes which plain attributes of its modules a model reads while it is traced."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from stagecut.ir.run.remembered import Remembered, remembered

_OF_EVERY_MODULE = frozenset((*dir(nn.Module()), *vars(nn.Module())))
"""Names that are nothing special to a model: `training`, hooks, methods."""


class AttributeReads:
    """Open while a module is traced. `remembered` says afterwards what has been read."""

    def __init__(self, module: nn.Module) -> None:
        # by the module's dict: a tracer may put another object in front of a module
        self._owners = {
            id(vars(owner)): (path, owner) for path, owner in module.named_modules()
        }
        self._read: dict[tuple[int, str], None] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """While open, each read of an attribute of a module is noted, but in branches and bodies of control
        flow: torch compiles them, and compiles no module that looks on.
        """
        get = object.__getattribute__
        noted = self._read

        def read(owner: nn.Module, name: str) -> Any:
            if name not in _OF_EVERY_MODULE:
                noted[id(get(owner, "__dict__")), name] = None
            return get(owner, name)

        make = torch.compile

        def compiled(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            return unseen(made) if isinstance(made, FunctionType) else made

        def unseen(function: Any) -> Any:
            @wraps(function)
            def run(*args: Any, **kwargs: Any) -> Any:
                if vars(nn.Module).get("__getattribute__") is not read:
                    return function(*args, **kwargs)
                del nn.Module.__getattribute__
                try:
                    return function(*args, **kwargs)
                finally:
                    look_on()

            return run

        def look_on() -> None:
            nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]

        look_on()
        try:
            with patch.object(torch, "compile", compiled):
                yield
        finally:
            del nn.Module.__getattribute__

    def add(self, owner: nn.Module, name: str) -> None:
        """The attribute has been read where nobody looked on, as in a call that is not traced by itself."""
        if name not in _OF_EVERY_MODULE:
            self._read[id(vars(owner)), name] = None

    def remembered(
        self, written: Collection[tuple[int, str]], whole: Sequence[str]
    ) -> Iterator[Remembered]:
        """The plain attributes that have been read, as they are now. Left out are those of modules that are
        kept `whole`, which read them again, and those that forward has `written`: id of a module and name.
        """
        for address, name in self._read:
            path, owner = self._owners.get(address, ("", None))
            if owner is None or (id(owner), name) in written:
                continue
            if any(f"{path}.".startswith(f"{root}.") for root in whole):
                continue
            found = remembered(path, owner, name)
            if found is not None:
                yield found
