"""Static caches that outlive their request, so that the CUDA graphs made on them serve the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any


class Caches:
    """Caches that requests have taken, and those that they left behind, by their size. Each request has a
    thread.
    """

    def __init__(self) -> None:
        self._free: dict[Hashable, list[Any]] = {}
        self._own = threading.local()

    def take(self, size: Hashable, make: Callable[[], Any]) -> Any:
        """A cache of that size, in which nothing is, for the request of this thread alone."""
        free = self._free.get(size)
        if free:
            cache = free.pop()
            cache.reset()
        else:
            cache = make()
        self._taken().append((size, cache))
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
