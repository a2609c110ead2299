"""Tells whether code that reads an object twice reads the same: a value that is equal for objects that a
trace cannot tell apart.
"""

from __future__ import annotations

import logging
import re
import types
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import _lru_cache_wrapper, partial
from operator import is_
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


Look = Callable[[Any], Sequence[Any]]
"""Object -> its parts."""


class Unknown(Exception):
    """An object may say something else at any time, or nobody can tell whether another one says the same."""


@dataclass
class _Seen:
    """An object whose value is known: what was seen in it, and how to look at it again."""

    part: Any
    value: Any
    look: Look | None
    parts: Sequence[Any]


class Shared:
    """The values of objects that lead to no module, such as a configuration that all blocks read. They are
    known as long as each of these objects holds what it held.
    """

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.kept: list[Any] = []
        """All objects whose ids are in a value: no other object gets their ids."""
        self._seen: list[_Seen] = []

    def keep(self, seen: Sequence[_Seen]) -> None:
        """The values of these objects are known, all of them together."""
        self.values |= {id(one.part): one.value for one in seen}
        self._seen += [one for one in seen if one.look is not None]

    def look_again(self) -> None:
        """Nothing is known any more where an object holds something else."""
        for one in self._seen:
            assert one.look is not None
            now = one.look(one.part)
            if len(now) != len(one.parts) or not all(map(is_, now, one.parts)):
                self.values.clear()
                self._seen.clear()
                return


_OF_THE_BLOCK = -1


class Values:
    """Compares what is read for one call of a block. `modules` maps the id of a module of the block to its
    path there.
    """

    def __init__(self, modules: dict[int, str], shared: Shared) -> None:
        self._modules = modules
        self._shared = shared
        shared.look_again()
        self._left = MOST
        self._seen: dict[int, Any] = {}
        self._kept = shared.kept
        self._inside: list[int] = []
        self._low = 0
        """The outermost of the objects inside of which we are that the present one leads back to; or
        _OF_THE_BLOCK, where it leads to a module."""
        self._lows: dict[int, int] = {}
        """The same of each object seen that is not shared."""
        self._open: list[_Seen] = []
        """Objects seen that may be shared: it depends on the objects that they are in."""

    def of(self, part: Any) -> Any:
        """A value that is equal for an object that is read alike. Raises Unknown."""
        if isinstance(part, _LITERALS):
            if isinstance(part, SIMPLE) and type(part).__module__ != "builtins":
                self._low = _OF_THE_BLOCK  # its text may be another one at any time
            return type(part), repr(part)
        if isinstance(part, nn.Module):
            path = self._modules.get(id(part))
            if path is None:
                raise Unknown(f"a {type(part).__name__} outside of the block")
            self._low = _OF_THE_BLOCK
            return "module", path
        if isinstance(part, (torch.Tensor, *_NAMED)):
            self._kept.append(part)
            return type(part), id(part)
        known = self._shared.values.get(id(part))
        if known is not None:
            return known
        known = self._seen.get(id(part))
        if known is not None:
            self._low = min(self._low, self._lows[id(part)])
            return known
        if id(part) in self._inside:
            depth = self._inside.index(id(part))
            self._low = min(self._low, depth)
            return "around", depth
        self._left -= 1
        if self._left < 0:
            raise Unknown("too many parts")
        return self._new(part)

    def _new(self, part: Any) -> Any:
        """The value of an object that is seen for the first time."""
        outer, first, depth = self._low, len(self._open), len(self._inside)
        self._low = depth
        look = _look_of(part)
        parts = look(part) if look is not None else ()
        self._inside.append(id(part))
        value = self._composed(part)
        self._inside.pop()
        self._seen[id(part)] = value
        self._kept.append(part)
        self._open.append(_Seen(part, value, look, parts))
        if self._low == depth:
            self._shared.keep(self._open[first:])
            del self._open[first:]
        else:
            lows = {id(one.part): self._low for one in self._open[first:]}
            self._lows |= lows
        self._low = min(outer, self._low)
        return value

    def _composed(self, part: Any) -> Any:
        if is_memory(part):
            self._low = _OF_THE_BLOCK  # nobody can look at it as fast
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
            inside = (part.func, part.args, part.keywords)
            return "partial", [self.of(inner) for inner in inside]
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
            self.of(part.__defaults__),
            self.of(part.__kwdefaults__),
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


# --- looking again ----------------------------------------------------------------------------------------


def _look_of(part: Any) -> Look | None:
    """The function that looks into an object of this kind: all from which `Values` makes its value, but for
    what these parts hold in turn. None for an object that cannot change.
    """
    if isinstance(part, (types.MethodType, property, types.BuiltinFunctionType)):
        return None
    for kinds, look in _LOOKS:
        if isinstance(part, kinds):
            return look
    return _in_object


def _own(part: Any) -> list[Any]:
    """The attributes of an object that has other parts too."""
    own = getattr(part, "__dict__", None)
    return _in_dict(own) if own else []


def _in_dict(part: Any) -> list[Any]:
    return [*part.keys(), *part.values()]


def _in_class(part: type) -> list[Any]:
    return [] if _module_of(part) in _NOT_USERS else _in_dict(vars(part))


def _in_function(part: types.FunctionType) -> list[Any]:
    cells = [_content(cell) for cell in part.__closure__ or ()]
    return [
        part.__code__,
        part.__defaults__,
        part.__kwdefaults__,
        *cells,
        *_own(part),
    ]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


_EMPTY = object()


def _in_object(part: Any) -> list[Any]:
    return [type(part), getattr(part, "__dict__", None)]


_LOOKS: tuple[tuple[Any, Look], ...] = (
    ((dict, types.MappingProxyType), lambda part: [*_in_dict(part), *_own(part)]),
    ((list, tuple, deque, set, frozenset), lambda part: [*part, *_own(part)]),
    (type, _in_class),
    (types.FunctionType, _in_function),
    (
        (staticmethod, classmethod, _lru_cache_wrapper),
        lambda part: [part.__wrapped__],
    ),
    (partial, lambda part: [part.func, part.args, part.keywords]),
    (ContextVar, lambda part: [part.get(None)]),
)
