"""fold/values: what code reads is compared by content, and looked at again where it may have changed."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import nn

from stagecut.frontend.fold.values import Shared, Unknown, Values


class Plain:
    """Attributes, and nothing else."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Listed(list[Any]):
    """A list with attributes."""


def _function() -> tuple[Any, Callable[[], Any]]:
    """A function, and a way to change what is around it."""
    number = 1

    def change() -> None:
        nonlocal number
        number = 2

    return lambda: number, change


def _class() -> type:
    return type("Kind", (), {"number": 1, "__module__": __name__})


def _listed() -> Listed:
    rows = Listed([1])
    rows.name = "a"  # type: ignore[attr-defined]
    return rows


def _cached() -> Any:
    return functools.lru_cache(_function()[0])


def _swap(function: Any) -> None:
    function.__code__ = (lambda: 3).__code__


VARIABLE = ContextVar("VARIABLE", default=1)

CHANGED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "dict": (lambda: {"a": 1}, lambda part: part.update(a=2)),
    "key": (lambda: {"a": 1}, lambda part: part.update(b=part.pop("a"))),
    "list": (lambda: [1], lambda part: part.append(2)),
    "True for 1": (lambda: [1], lambda part: part.__setitem__(0, True)),
    "queue": (lambda: deque([1]), lambda part: part.append(2)),
    "set": (lambda: {1}, lambda part: part.add(2)),
    "list in a tuple": (lambda: ([1],), lambda part: part[0].append(2)),
    "attribute of a list": (_listed, lambda part: setattr(part, "name", "b")),
    "first attribute of a list": (lambda: Listed([1]), lambda part: setattr(part, "name", "b")),
    "object": (lambda: Plain(a=1), lambda part: setattr(part, "a", 2)),
    "object in an object": (lambda: Plain(a=Plain(b=[1])), lambda part: part.a.b.append(2)),
    "class of an object": (Plain, lambda part: setattr(part, "__class__", _class())),
    "attributes of an object": (lambda: Plain(a=1), lambda part: setattr(part, "__dict__", {"a": 2})),
    "class": (_class, lambda part: setattr(part, "number", 2)),
    "method of a class": (_class, lambda part: setattr(part, "method", lambda self: 1)),
    "closure": (lambda: (*_function(),), lambda part: part[1]()),
    "default": (lambda: lambda x=1: x, lambda part: setattr(part, "__defaults__", (2,))),
    "named default": (lambda: lambda *, x=1: x, lambda part: part.__kwdefaults__.update(x=2)),
    "attribute of a function": (lambda: lambda: 1, lambda part: setattr(part, "a", 1)),
    "code": (lambda: lambda: 1, _swap),
    "method": (lambda: types.MethodType(lambda self: 1, Plain(a=1)), lambda part: setattr(part.__self__, "a", 2)),
    "partial": (lambda: functools.partial(max, key=[1]), lambda part: part.keywords.update(key=2)),
    "function that is kept": (_cached, lambda part: setattr(part, "__wrapped__", _function()[0])),
    "static method": (lambda: staticmethod(lambda x=[1]: x), lambda part: part.__wrapped__.__defaults__[0].append(2)),
    "variable": (lambda: VARIABLE, lambda part: part.set(part.get() + 1)),
    "bytes": (lambda: bytearray(b"a"), lambda part: part.append(1)),
    "ring": (lambda: _ring(), lambda part: part.other.numbers.append(2)),
}


def _ring() -> Plain:
    one, other = Plain(), Plain(numbers=[1])
    one.other, other.other = other, one
    return one


def of(part: Any, shared: Shared, block: nn.Module | None = None) -> Any:
    """The value of an object for a call of a block."""
    return Values({id(block): ""} if block is not None else {}, shared).of(part)


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("around", [False, True])
def test_a_change_is_seen(kind: str, around: bool) -> None:
    """The value is the one that a look at everything gives, before a change and after it."""
    make, change = CHANGED[kind]
    part = make()
    whole: Any = Plain(first=[part], second={"part": part}) if around else part
    shared = Shared()
    before = of(whole, shared)
    assert of(whole, shared) == before == of(whole, Shared())
    change(part)
    after = of(whole, shared)
    assert after != before
    assert after == of(whole, Shared())


@pytest.mark.parametrize("kind", [kind for kind in CHANGED if kind != "bytes"])
def test_a_value_is_found_once(kind: str) -> None:
    shared = Shared()
    part = CHANGED[kind][0]()
    assert of(part, shared) is of(part, shared)


def test_an_object_with_a_module_belongs_to_its_block() -> None:
    """Also where it is reached from an object that the module's holder holds, and the other way round."""
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    inner = Plain()
    outer = Plain(inner=inner, module=one)
    inner.outer = outer
    for part in (outer, inner):
        shared = Shared()
        of(part, shared, one)
        assert not {id(outer), id(inner)} & shared.values.keys()
        for asked in (outer, inner):
            with pytest.raises(Unknown):
                of(asked, shared, other)


def test_a_text_of_a_class_of_its_own_is_looked_at_each_time() -> None:
    class Named(str):
        text = "a"

        def __repr__(self) -> str:
            return self.text

    name = Named("x")
    shared = Shared()
    before = of([name], shared)
    name.text = "b"
    assert of([name], shared) != before


def test_what_a_value_names_stays() -> None:
    """No other object gets the id of one that is in a value."""
    shared = Shared()
    holder = Plain(tensor=torch.ones(1))
    before = of(holder, shared)
    for _ in range(20):
        holder.tensor = torch.ones(1)
        assert of(holder, shared) != before
