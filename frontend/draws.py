"""Generators of random numbers: a trace holds what forward draws from torch's, and not what it draws from others."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes


class _Source(NamedTuple):
    """A generator: what to call it, what reads its state, and what sets it."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


class Generators:
    """The global generators, and those of `others`, as they were."""

    def __init__(self, others: Iterable[Any] = ()) -> None:
        self._before = [(source, source.read()) for source in (*_global(), *map(_source, others))]

    def drawn(self) -> str:
        """A generator that is not as it was, '' for none."""
        return next((source.name for source, state in self._before if repr(source.read()) != repr(state)), "")

    def restore(self) -> None:
        """All are as they were, except torch's: forks are open around what is traced and recorded."""
        for source, state in self._before:
            source.write(state)


def is_generator(item: Any) -> bool:
    """True for an object of Python's or numpy's that draws random numbers and remembers what comes next."""
    numpy = sys.modules.get("numpy.random")
    kinds = (numpy.Generator, numpy.RandomState) if numpy else ()
    return issubclass(type(item), (random.Random, *kinds)) and not isinstance(item, random.SystemRandom)


def _global() -> list[_Source]:
    found = [
        _Source("torch's generator", _state, lambda _: None),
        _Source("Python's random", random.getstate, random.setstate),
    ]
    if numpy := sys.modules.get("numpy.random"):
        found.append(_Source("numpy.random", lambda: numpy.get_state(legacy=False), numpy.set_state))
    return found


def _state() -> list[int]:
    with _disable_current_modes():  # looking on is no part of a trace
        return torch.get_rng_state().tolist()


def _source(generator: Any) -> _Source:
    name = f"a generator ({type(generator).__module__}.{type(generator).__name__})"
    if isinstance(generator, random.Random):
        return _Source(name, generator.getstate, generator.setstate)
    bits = getattr(generator, "bit_generator", None)  # numpy's Generator draws from one
    if bits is None:
        return _Source(name, lambda: generator.get_state(legacy=False), generator.set_state)
    return _Source(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
