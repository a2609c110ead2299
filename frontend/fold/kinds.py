"""The kinds of calls of repeated blocks: which calls do the same, as far as it is known.

A call is looked at until two calls with equal keys, whose code read equal values, did the same. From then on
a call with that key whose code would read these values is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from stagecut.frontend.fold.calls import Call
from stagecut.frontend.fold.reads import Reads
from stagecut.frontend.fold.results import Odd
from stagecut.frontend.fold.values import Shared, Unknown
from stagecut.frontend.watch.attributes import Containers
from stagecut.frontend.watch.generators import Generators

FEWEST = 3
"""So many modules must be alike to be looked at: the first two calls are looked at in any case."""

MOST_KINDS = 16
"""Calls with one key whose code read so many other things are run without another look."""


class Done(Protocol):
    """What a call did."""

    def equals(self, other: Any) -> bool:
        """True for a call that did the same."""


D = TypeVar("D", bound=Done)


@dataclass
class Found(Generic[D]):
    """A call that may be like others, and the kind that it fits."""

    call: Call
    key: dict[str, Any]
    kind: Kind[D] | None

    @property
    def known(self) -> D | None:
        """What the call would do; None where that is not known yet."""
        if self.kind is None or not self.kind.is_confirmed:
            return None
        return self.kind.done


class Kinds(Generic[D]):
    """The kinds of calls so far. `saw` is told of each call that is looked at, and what its code has read."""

    def __init__(
        self, module: nn.Module, saw: Callable[[Call, Reads], None] | None = None
    ) -> None:
        self._saw = saw
        self._repeated = _repeated(module)
        self._kinds: list[Kind[D]] = []
        self._shared = Shared()
        self._recording = False
        self.odd: list[str] = []
        """Calls that stand for no other one, and why."""

    def may_be_known(self, owner: nn.Module) -> bool:
        """False for a call of a module that is not repeated, or inside a call that is looked at."""
        return id(owner) in self._repeated and not self._recording

    def find(self, call: Call) -> Found[D] | None:
        """The call with its key and kind; None for a call that stands for no other one."""
        key = call.key()
        alike = [kind for kind in self._kinds if kind.key == key]
        if key is None or any(kind.is_odd for kind in alike) or len(alike) > MOST_KINDS:
            return None
        fitting = (kind for kind in alike if kind.fits(call))
        return Found(call, key, next(fitting, None))

    def record(
        self,
        found: Found[D],
        run: Callable[[], Any],
        noting: AbstractContextManager[Any],
        done: Callable[[Any], D],
    ) -> Any:
        """The result of a call that runs. The kinds gain one, or the kind is confirmed or corrected. `done`
        tells from the result what the call did; it raises Odd for a call that stands for no other one.
        """
        reads = Reads()
        generators = Generators()
        containers = Containers(found.call.arguments)
        self._recording = True
        try:
            with noting, reads.noting(found.call.block):
                result = run()
        finally:
            self._recording = False
            if self._saw is not None:
                self._saw(found.call, reads)
        with torch._C.DisableTorchFunction():
            try:
                _refuse(found, reads, generators, containers)
                self._learn(found, reads, done(result))
            except (Odd, Unknown) as error:
                self.odd.append(f"{found.call.path}: {error}")
                if found.kind is not None:
                    self._kinds.remove(found.kind)
                self._kinds.append(Kind(found.key, Reads(), None, None, self._shared))
        return result

    def _learn(self, found: Found[D], reads: Reads, done: D) -> None:
        values = reads.values(found.call.block, self._shared)
        if found.kind is None:
            self._kinds.append(Kind(found.key, reads, values, done, self._shared))
        else:
            found.kind.learn(reads, found.call, done)


def _refuse(
    found: Found[Any], reads: Reads, generators: Generators, containers: Containers
) -> None:
    """Raises Odd for a call after which something outside of it is not as it was."""
    if reads.odd:
        raise Odd(reads.odd)
    if containers.changed():
        raise Odd("it changes a container it is given")
    if generators.drawn():
        raise Odd("it draws from a generator")
    if not found.call.is_as_before(found.key):
        raise Odd("it leaves something changed")


class Kind(Generic[D]):
    """Calls that do the same, as far as that is known; with nothing done, calls that are each run."""

    def __init__(
        self,
        key: dict[str, Any],
        reads: Reads,
        values: Any,
        done: D | None,
        shared: Shared,
    ) -> None:
        self._shared = shared
        self.key = key
        self.reads = reads
        self.values = values
        self._done = done
        self.is_odd = done is None
        self.is_confirmed = False

    @property
    def done(self) -> D:
        assert self._done is not None
        return self._done

    def fits(self, call: Call) -> bool:
        """True when the code would read the same in this call."""
        try:
            return bool(self.reads.values(call.block, self._shared) == self.values)
        except Unknown:
            return False

    def learn(self, reads: Reads, call: Call, done: D) -> None:
        """The kind is confirmed where another call of it has read no more, has changed nothing that it read,
        and has done the same; else it is that of the later call.
        """
        is_equal = self.fits(call) and self.done.equals(done)
        self.is_confirmed = is_equal and self.reads.includes(reads)
        self.reads.add(reads)
        self.values = self.reads.values(call.block, self._shared)
        self._done = done


def has_global_hooks() -> bool:
    """True when hooks see the calls of all modules."""
    hooks: Any = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
    )


def _repeated(module: nn.Module) -> set[int]:
    """The ids of the modules that have parts, and that FEWEST modules or more are like at first sight."""
    forms: dict[int, int] = {}
    numbers: dict[Any, int] = {}

    def form(owner: nn.Module) -> int:
        parts = [
            (name, form(part))
            for name, part in owner._modules.items()
            if part is not None
        ]
        number = numbers.setdefault((type(owner), (*parts,)), len(numbers))
        forms[id(owner)] = number
        return number

    form(module)
    alike = Counter(forms.values())
    repeated = [
        owner for owner in module.modules() if alike[forms[id(owner)]] >= FEWEST
    ]
    return {id(owner) for owner in repeated if owner._modules}
