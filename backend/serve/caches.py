"""Static caches that outlive their request, so that the CUDA graphs made on them serve the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from stagecut.ir.run.given import entries, parts_of


class Caches:
    """Caches that requests have taken, and those that they left behind, by their size. Each request has a
    thread.

    A prefill runs on a new cache, as in the unsplit model: on one that was used before, attention takes
    another path and rounds in another way. What the prefill has left goes over to a cache of an earlier
    request, whose tensors are where the graphs expect them.
    """

    def __init__(self) -> None:
        self._free: dict[Hashable, list[Any]] = {}
        self._own = threading.local()

    def take(self, size: Hashable, make: Callable[[], Any]) -> Any:
        """A new cache of that size, for the request of this thread alone."""
        cache = make()
        self._taken().append((size, cache))
        return cache

    def used_before(self, cache: Any) -> Any:
        """A cache of an earlier request that holds what `cache` holds; `cache` itself where there is none."""
        taken = self._taken()
        for place, (size, own) in enumerate(taken):
            free = self._free.get(size)
            if own is cache and free and takes_over(free[-1], cache):
                kept = free.pop()
                taken[place] = size, kept
                return kept
        return cache

    def finish(self, result: Any) -> None:
        """The request of this thread is over. Its caches are free, but for one that its result holds."""
        parts = result.values() if isinstance(result, Mapping) else ()
        returned = set(map(id, parts))
        for size, cache in self._taken():
            if id(cache) not in returned:
                self._free.setdefault(size, []).append(cache)
        self.forget()

    def forget(self) -> None:
        """The caches that this thread has taken are not used again."""
        self._taken().clear()

    def _taken(self) -> list[tuple[Hashable, Any]]:
        taken: list[tuple[Hashable, Any]] = self._own.__dict__.setdefault("taken", [])
        return taken


def takes_over(kept: Any, other: Any) -> bool:
    """`kept` holds what `other` holds, in tensors of its own. False where they are not of one structure;
    nothing was changed then.
    """
    changes = _Changes()
    todo = [(kept, other)]
    seen: set[int] = set()
    while todo:
        own, another = todo.pop()
        if id(own) in seen:
            continue
        seen.add(id(own))
        inner = changes.between(own, another)
        if inner is None:
            return False
        todo += inner
    changes.make()
    return True


class _Changes:
    """What is to be written into objects so that they hold what others hold."""

    def __init__(self) -> None:
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._values: list[tuple[Any, Any, Any]] = []

    def between(self, own: Any, other: Any) -> list[tuple[Any, Any]] | None:
        """The containers in two containers, of which the changes are still to be found; None where the two
        are not of one structure.
        """
        container = parts_of(own)
        parts = parts_of(other)
        if type(own) is not type(other) or container is None or parts is None:
            return None
        mine = dict(entries(container))
        theirs = dict(entries(parts))
        if mine.keys() != theirs.keys():
            return None
        inner: list[tuple[Any, Any]] = []
        for key, part in theirs.items():
            if mine[key] is part:
                continue
            if isinstance(part, torch.Tensor):
                if not _are_alike(mine[key], part):
                    return None
                self._tensors.append((mine[key], part))
            elif parts_of(part) is not None:
                inner.append((mine[key], part))
            elif isinstance(container, tuple):
                return None
            else:
                self._values.append((container, key, part))
        return inner

    def make(self) -> None:
        """The objects hold it."""
        for tensor, source in self._tensors:
            tensor.copy_(source)
        for container, key, value in self._values:
            container[key] = value


def _are_alike(one: Any, other: torch.Tensor) -> bool:
    if not isinstance(one, torch.Tensor):
        return False
    return (one.shape, one.stride(), one.dtype, one.device) == (
        other.shape,
        other.stride(),
        other.dtype,
        other.device,
    )
