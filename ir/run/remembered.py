"""Plain attributes of a model that its trace has read. The stages compute what the model computed with
them, so a model that has others now is not the one that was cut.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from stagecut.ir.errors import StagecutError

MOST = 100
"""Containers of more parts are not remembered."""

_SIMPLE = (int, float, complex, str, bytes, type(None))
_SIMPLE_OF_TORCH = ("torch.dtype", "torch.device")
"""By name: a program from a cache is read without torch."""


class ChangedError(StagecutError):
    """The model has other attributes than when it was cut."""

    __module__ = "stagecut"


class _Absent(Enum):
    """The value of an attribute that a module does not have."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return self.value


_ABSENT = _Absent.ABSENT


@dataclass(frozen=True)
class Remembered:
    """An attribute of a module as the trace read it: the object, and a copy of it.

    otherwise: what the class has for a module without an own one. The module is not kept alive, but its
    container is, because peft merges adapters of modules that it throws away.
    """

    path: str
    name: str
    kind: str
    owner: weakref.ref[Any]
    otherwise: Any
    value: Any
    copied: Any

    def now(self) -> Any:
        """The attribute as it is now; of a module that is gone, as it was last."""
        owner = self.owner()
        if owner is None:
            return self.value
        return owner.__dict__.get(self.name, self.otherwise)


def remembered(path: str, module: Any, name: str) -> Remembered | None:
    """An attribute as it is now; None for one that is not plain, or is a tensor or a module."""
    own = vars(module)
    if any(name in own[kind] for kind in ("_parameters", "_buffers", "_modules")):
        return None
    otherwise: Any = _ABSENT
    for cls in type(module).__mro__:
        if name in vars(cls):
            otherwise = vars(cls)[name]
            break
    value = own.get(name, otherwise)
    if not _is_plain(value):
        return None
    kind, copied = type(module).__name__, copy.deepcopy(value)
    owner = weakref.ref(module)
    return Remembered(path, name, kind, owner, otherwise, value, copied)


def _is_plain(value: Any) -> bool:
    """True for numbers and texts, and for containers of these that are not large."""
    kind = type(value)
    if value is _ABSENT or isinstance(value, _SIMPLE):
        return True
    if f"{kind.__module__}.{kind.__qualname__}" in _SIMPLE_OF_TORCH:
        return True
    if kind not in (list, tuple, set, frozenset, dict) or len(value) > MOST:
        return False
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value))


def refuse_changed(attributes: Iterable[Remembered]) -> None:
    """Returns when all attributes are as they were when the trace read them; a dict may have gained keys.
    Raises ChangedError otherwise.
    """
    for each in attributes:
        now = each.now()
        if now is each.copied or _equal(now, each.copied):
            continue
        raise ChangedError(
            f"'{each.name}' of the model was {each.copied!r} when it was cut, and is {_brief(now)} now: the "
            "stages compute what the model computed then",
            where=f"module '{each.path}', a {each.kind}",
            hint="set it back, or cut the model as it is now by another pipeline(...); pipe.keep_as_cut() "
            "where it is meant",
        )


def _equal(now: Any, then: Any) -> bool:
    if type(now) is not type(then):
        return False
    if isinstance(then, dict):
        return all(key in now and _equal(now[key], then[key]) for key in then)
    return bool(now == then)


def _brief(value: Any) -> str:
    return repr(value) if _is_plain(value) else f"a {type(value).__name__}"
