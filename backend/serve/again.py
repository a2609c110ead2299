"""Calls that come again: on the same objects, in which nothing was replaced, with tensors of the same form.
What was found out about the first of them holds for all of them.

A decode step on a static cache is such a call. To look into the cache each time would take the host longer
than to start the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from enum import Enum
from operator import is_
from typing import Any, Generic, TypeVar

import torch

from stagecut.ir.run.given import entries, parts_of

_STILL = (
    bool, int, float, complex, str, bytes, type(None), type, Enum, torch.dtype, torch.device, torch.Size,
)  # fmt: skip
"""Types of values that never change."""

T = TypeVar("T")


class _Moving(Exception):
    """A part of an object may change without a trace."""


class Again(Generic[T]):
    """What was found out about the last call on each object."""

    def __init__(self) -> None:
        self._calls: dict[tuple[int, ...], _Call[T]] = {}

    def found(self, kwargs: Mapping[str, Any]) -> tuple[T, list[Any]] | None:
        """What was noted for a call like this one, and its flat arguments; None for another call."""
        form = _Form(kwargs)
        call = self._calls.get(form.ids)
        return None if call is None else call.again(form)

    def note(self, kwargs: Mapping[str, Any], flat: list[Any], fact: T) -> None:
        """From now on `fact` is found for calls like this one, as long as its objects live."""
        form = _Form(kwargs)
        if not form.objects:
            return
        key = form.ids

        def forget(_: Any) -> None:
            self._calls.pop(key, None)

        try:
            alive = [weakref.ref(part, forget) for part in form.objects]
            self._calls[key] = _Call(form, flat, fact, alive)
        except (_Moving, TypeError):  # an object without weak references
            self._calls.pop(key, None)


class _Form:
    """Arguments by name: their form, the tensors among them, and the objects."""

    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.objects: list[Any] = []
        self.form = [(name, self._of(part)) for name, part in kwargs.items()]
        self.ids = tuple(map(id, self.objects))

    def _of(self, part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            self.tensors.append(part)
            return part.dtype, part.device, part.shape, part.stride()
        if isinstance(part, dict):
            return [(key, self._of(value)) for key, value in part.items()]
        if isinstance(part, (list, tuple)):
            return type(part), [self._of(value) for value in part]
        if isinstance(part, _STILL):
            return type(part), part
        self.objects.append(part)
        return id(part)


class _Call(Generic[T]):
    """A call, what is in its objects, and what was found out about it."""

    def __init__(self, form: _Form, flat: list[Any], fact: T, alive: list[Any]) -> None:
        self._form = form.form
        self._fact = fact
        self._alive = alive
        self._flat = flat
        places = {id(leaf): place for place, leaf in enumerate(flat)}
        self._places = [places.get(id(tensor)) for tensor in form.tensors]
        self._contents: list[tuple[Any, list[Any], list[Any]]] = []
        self._shapes: list[tuple[torch.Tensor, torch.Size]] = []
        known: set[int] = set()
        for part in form.objects:
            self._look_into(part, known)
        given = set(map(id, form.tensors))
        if None in self._places or len(given) < len(form.tensors) or given & known:
            raise _Moving  # one tensor stands in several places

    def _look_into(self, part: Any, known: set[int]) -> None:
        todo = [part]
        while todo:
            part = todo.pop()
            if isinstance(part, _STILL) or id(part) in known:
                continue
            known.add(id(part))
            if isinstance(part, torch.Tensor):
                self._shapes.append((part, part.shape))
                continue
            container = parts_of(part)
            if container is None:
                raise _Moving
            pairs = entries(container)
            values = [value for _, value in pairs]
            self._contents.append((container, [key for key, _ in pairs], values))
            todo += values

    def again(self, form: _Form) -> tuple[T, list[Any]] | None:
        if form.form != self._form or not self._is_unchanged():
            return None
        flat = list(self._flat)
        for place, tensor in zip(self._places, form.tensors, strict=True):
            assert place is not None
            flat[place] = tensor
        return self._fact, flat

    def _is_unchanged(self) -> bool:
        for container, keys, values in self._contents:
            parts = container
            if isinstance(container, dict):
                if list(container) != keys:
                    return False
                parts = container.values()
            if len(parts) != len(values) or not all(map(is_, parts, values)):
                return False
        return all(tensor.shape == shape for tensor, shape in self._shapes)
