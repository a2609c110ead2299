"""Generators of random numbers: a trace holds what forward draws from torch's, and not what it draws from
others.

Traces with other draws show whether that matters: any bound to which a drawn number is compared lies between
the lowest and the highest draw. A model that waits for one number out of very many can escape these traces.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

LOWEST, MIDDLE, HIGHEST = 0, 0x80102204, 0x12DD9BB3
"""Words in the state of a Mersenne Twister from which it makes 32 zeros, a one and 31 zeros, and 32 ones."""

STEERS = (LOWEST, MIDDLE, HIGHEST, None)
"""The arguments of `Generators.steer`: the next draws are as low as can be, in the middle, as high as can be,
or other than before.
"""

_WORDS, _STEERED = 624, 400


class _Generator(NamedTuple):
    """A generator: its name, the functions that read and set its state, and, where it can be steered, the
    function that puts words into a state.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    put: Callable[[Any, Callable[[list[int]], list[int]]], Any] | None = None


class Generators:
    """The global generators, and those of `others`, as they were."""

    def __init__(self, others: Iterable[Any] = ()) -> None:
        generators = (*_global(), *map(_generator, others))
        self._before = [(generator, generator.read()) for generator in generators]

    def drawn(self) -> str:
        """A generator that is not as it was, '' for none."""
        for generator, state in self._before:
            if not _same(generator.read(), state):
                return generator.name
        return ""

    def can_be_steered(self) -> bool:
        """True when `steer` reaches all that are not as they were."""
        return all(
            generator.put is not None or _same(generator.read(), state)
            for generator, state in self._before
        )

    def steer(self, word: int | None) -> None:
        """The next few hundred draws of the generators that can be steered are as STEERS says; then they go
        on at random.
        """
        for generator, state in self._before:
            if generator.put is not None:
                generator.write(
                    generator.put(state, lambda words: _steered(words, word))
                )

    def restore(self) -> None:
        """All are as they were, except torch's: forks are open around what is traced and recorded."""
        for generator, state in self._before:
            generator.write(state)


def is_generator(value: Any) -> bool:
    """True for an object of Python's or numpy's that draws random numbers and remembers what comes next."""
    numpy = sys.modules.get("numpy.random")
    classes = (numpy.Generator, numpy.RandomState) if numpy else ()
    return issubclass(type(value), (random.Random, *classes)) and not isinstance(
        value, random.SystemRandom
    )


def _global() -> list[_Generator]:
    generators = [
        _Generator("torch's generator", _state, lambda _: None),
        _Generator("Python's random", random.getstate, random.setstate, _put_pythons),
    ]
    numpy = sys.modules.get("numpy.random")
    if numpy:
        generators.append(_numpys("numpy.random", numpy))
    return generators


def _same(one: Any, other: Any) -> bool:
    """True for equal states: numbers, and arrays of them, in dicts, lists and tuples."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            _same(one[name], other[name]) for name in one
        )
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == other.tobytes())
    return bool(one == other)


def _steered(words: list[int], word: int | None) -> list[int]:
    """The words of a Mersenne Twister. The words that are read next are `word`; later the others mix in, so
    that nothing repeats for ever.
    """
    if word is None:
        return [(7 * old + 1) % 2**32 for old in words]
    return words[: _WORDS - _STEERED] + [word] * _STEERED


def _put_pythons(state: Any, change: Callable[[list[int]], list[int]]) -> Any:
    version, words, _ = state
    return version, (*change(list(words[:_WORDS])), _WORDS - _STEERED), None


def _put_numpys(state: Any, change: Callable[[list[int]], list[int]]) -> Any:
    import numpy

    key = state["state"]["key"]
    words = numpy.array(change(key.tolist()), dtype=key.dtype)
    return state | {"state": {"key": words, "pos": _WORDS - _STEERED}, "has_gauss": 0}


def _numpys(name: str, generator: Any) -> _Generator:
    def read() -> Any:
        return generator.get_state(legacy=False)

    return _Generator(
        name,
        read,
        generator.set_state,
        _put_numpys if read()["bit_generator"] == "MT19937" else None,
    )


def _state() -> list[int]:
    with _disable_current_modes():  # looking on is no part of a trace
        return torch.get_rng_state().tolist()


def _generator(generator: Any) -> _Generator:
    name = f"a generator ({type(generator).__module__}.{type(generator).__name__})"
    if isinstance(generator, random.Random):
        return _Generator(
            name,
            generator.getstate,
            generator.setstate,
            _put_pythons if type(generator) is random.Random else None,
        )
    bits = getattr(generator, "bit_generator", None)  # numpy's Generator draws from one
    if bits is None:
        return _numpys(name, generator)
    return _Generator(
        name, lambda: bits.state, lambda state: setattr(bits, "state", state)
    )
