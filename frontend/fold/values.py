"""Tells whether code that reads an object twice reads the same: a value that is equal for objects that a
trace cannot tell apart.
"""

from __future__ import annotations

import logging
import re
import types
from collections import deque
from contextvars import ContextVar
from enum import Enum
from functools import _lru_cache_wrapper, partial
from typing import Any

import torch
from torch import nn

from stagecut.frontend.source import is_users_file
from stagecut.frontend.watch.attributes import SIMPLE, is_memory

MOST = 20_000
"""Objects of more parts than these are not compared."""

_LITERALS = (
    *SIMPLE,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch.device,
    torch.Size,
    range,
    slice,
    type(...),
)
_NAMED = (types.ModuleType, logging.Logger, re.Pattern, Enum)
"""Kinds of objects that are what they are: one and the same object says the same at any time."""

_CODE = (types.FunctionType, staticmethod, classmethod, property)
"""What a class has that may have a closure."""

_NOT_USERS = ("torch", "builtins", "typing", "abc", "collections", "enum", "functools")


class Unknown(Exception):
    """An object may say something else at any time, or nobody can tell whether another one says the same."""


class Values:
    """Compares what is read for one call of a block. `modules` maps the id of a module of the block to its
    path there.
    """

    def __init__(self, modules: dict[int, str]) -> None:
        self._modules = modules
        self._left = MOST
        self._seen: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._inside: list[int] = []

    def of(self, part: Any) -> Any:
        """A value that is equal for an object that is read alike. Raises Unknown."""
        if isinstance(part, _LITERALS):
            return type(part), repr(part)
        if isinstance(part, nn.Module):
            path = self._modules.get(id(part))
            if path is None:
                raise Unknown(f"a {type(part).__name__} outside of the block")
            return "module", path
        if isinstance(part, (torch.Tensor, *_NAMED)):
            self._kept.append(part)
            return type(part), id(part)
        known = self._seen.get(id(part))
        if known is not None:
            return known
        if id(part) in self._inside:
            return "around", self._inside.index(id(part))
        self._left -= 1
        if self._left < 0:
            raise Unknown("too many parts")
        self._inside.append(id(part))
        value = self._composed(part)
        self._inside.pop()
        self._seen[id(part)] = value
        self._kept.append(part)
        return value

    def _composed(self, part: Any) -> Any:
        if is_memory(part):
            numbers = bytes(part) if isinstance(part, bytearray) else part.tobytes()
            return type(part), numbers
        if isinstance(part, (dict, types.MappingProxyType)):
            pairs = [(self.of(key), self.of(value)) for key, value in part.items()]
            return type(part), pairs, self._attributes(part)
        if isinstance(part, (list, tuple, deque)):
            return (
                type(part),
                [self.of(inner) for inner in part],
                self._attributes(part),
            )
        if isinstance(part, (set, frozenset)):
            return type(part), sorted(repr(self.of(inner)) for inner in part)
        if isinstance(part, type):
            return "class", id(part), self._of_class(part)
        return self._of_code(part) or self._of_object(part)

    def _of_code(self, part: Any) -> Any:
        """The value of something that can be called; None for another object."""
        if isinstance(part, types.FunctionType):
            return "function", id(part), self._of_function(part)
        if isinstance(part, types.MethodType):
            return "method", self.of(part.__func__), self.of(part.__self__)
        if isinstance(part, (staticmethod, classmethod, _lru_cache_wrapper)):
            return type(part), self.of(part.__wrapped__)
        if isinstance(part, property):
            return "property", self.of(part.fget)
        if isinstance(part, partial):
            return "partial", self.of([part.func, part.args, part.keywords])
        if isinstance(part, (types.BuiltinFunctionType, types.MethodWrapperType)):
            return "builtin", part.__name__, self.of(part.__self__)
        # an op of torch's, a method of a built-in class, an annotation
        if _module_of(type(part)) in ("torch", "builtins", "typing") and callable(part):
            return type(part), id(part)
        return None

    def _of_function(self, part: types.FunctionType) -> Any:
        closure = part.__closure__ or ()
        if not is_users_file(part.__code__.co_filename):
            # it may go around a function of the user's
            inner = [cell for cell in closure if _is_function(cell)]
            return id(part.__code__), [self._of_cell(cell) for cell in inner]
        cells = [self._of_cell(cell) for cell in closure]
        return (
            id(part.__code__),
            self.of([part.__defaults__, part.__kwdefaults__]),
            cells,
            self._attributes(part),
        )

    def _of_cell(self, cell: Any) -> Any:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return "empty"

    def _of_class(self, part: type) -> Any:
        """The plain attributes of a class of the user's, and which functions it has."""
        if _module_of(part) in _NOT_USERS:
            return None
        found = []
        for name, value in vars(part).items():
            if name.startswith("__") and name.endswith("__") and not callable(value):
                continue
            if isinstance(value, (*SIMPLE, list, dict, set, deque, tuple, *_CODE)):
                found.append((name, self.of(value)))
            else:
                self._kept.append(value)
                found.append((name, id(value)))
        return found

    def _of_object(self, part: Any) -> Any:
        if isinstance(part, ContextVar):
            return "variable", id(part), self.of(part.get(None))
        cls = type(part)
        home = _module_of(cls)
        has_slots = any(vars(base).get("__slots__") for base in cls.__mro__)
        if home in ("torch", "builtins") or has_slots or not hasattr(part, "__dict__"):
            raise Unknown(f"a {cls.__name__}")
        return self.of(cls), self.of(vars(part))

    def _attributes(self, part: Any) -> Any:
        """The value of what an object of the user's holds besides its items."""
        own = getattr(part, "__dict__", None)
        return self.of(own) if own else None


def _is_function(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, types.FunctionType | types.MethodType)
    except ValueError:
        return False


def _module_of(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]
