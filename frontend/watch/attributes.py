"""Records the plain Python state of a model: what modules, containers and objects hold besides parameters and
buffers.
"""

from __future__ import annotations

import copy
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from stagecut.frontend.marks import SYMBOLS

SIMPLE = (int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, dict, set, deque, tuple)

_MOST = 2**26
"""Arrays of more bytes are not looked at."""

RETURN_IT = "leave lists, dicts and objects that are given as they are: make new ones and return them"

HOOKS: tuple[str, ...] = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
)
HOOKS += ("_forward_hooks_always_called",)
"""The attributes in which a module keeps the hooks on its forward."""

_INTERNAL = dict.fromkeys([*vars(nn.Module()), "forward"])
"""The attributes that every module has, and so none of the user's."""


class Contents:
    """The containers in some items, of any depth, and with `objects` the plain objects too, as they were."""

    def __init__(self, items: Iterable[Any], objects: bool = True) -> None:
        self._before: dict[int, tuple[Any, Any]] = {}
        todo = [*items]
        while todo:
            item = todo.pop()
            thing = (
                content_of(item)
                if objects or isinstance(item, _CONTAINERS) or is_memory(item)
                else None
            )
            if thing is not None and id(thing) not in self._before:
                todo += _parts(self._keep(thing))

    def _keep(self, thing: Any) -> Any:
        held = _held(thing)
        self._before[id(thing)] = (thing, held)
        return held

    def parts(self) -> Iterator[Any]:
        """The parts that the containers held."""
        for _, before in self._before.values():
            yield from _parts(before)

    def changed(self) -> bool:
        """True when a container holds something else, or in another order."""
        return any(not _same(thing, before) for thing, before in self._before.values())

    def restore(self) -> None:
        """Every container holds what it held."""
        for thing, before in self._before.values():
            if not _same(thing, before):
                _refill(thing, before)


class Kept(Contents):
    """The modules, containers and plain objects that a model is made of, as they were."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(item for _, item in attributes(module))
        self._tensors = {id(t) for t in (*module.parameters(), *module.buffers())}
        for owner in module.modules():
            self._keep(vars(owner))
            for name in _INTERNAL:  # parameters, buffers, modules, hooks
                if isinstance(content := vars(owner).get(name), (dict, set)):
                    self._keep(content)

    def replace_tensors(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Tensors that are no state are replaced by stand-ins, because tracing writes real ones: id of each
        stand-in -> the tensor, its stand-in.
        """
        made: dict[int, torch.Tensor] = {}
        originals: dict[int, torch.Tensor] = {}

        def stand_in(item: Any) -> Any:
            if type(item) is tuple:
                parts = tuple(map(stand_in, item))
                return item if _same(parts, item) else parts
            if (
                not isinstance(item, torch.Tensor)
                or id(item) in self._tensors
                or isinstance(item, nn.Parameter)
            ):
                return item
            if id(item) not in made:
                made[id(item)] = (
                    item.detach().clone().requires_grad_(item.requires_grad)
                )
                originals[id(item)] = item
            return made[id(item)]

        for thing, _ in self._before.values():
            pairs = (
                thing.items()
                if isinstance(thing, dict)
                else enumerate(thing)
                if isinstance(thing, (list, deque))
                else ()
            )
            for key, item in list(pairs):
                new = stand_in(item)
                if new is not item:
                    thing[key] = new
        return {id(new): (originals[key], new) for key, new in made.items()}


def _held(thing: Any) -> Any:
    """The parts of a container in a plain container, because a class of the user's may do anything in its
    methods.
    """
    if isinstance(thing, dict):
        return dict(dict.items(thing))
    if is_memory(thing):
        return copy.copy(thing)
    return set(thing) if isinstance(thing, set) else list(thing)


def _parts(held: Any) -> Any:
    if is_memory(held):
        return ()
    return held.values() if isinstance(held, dict) else held


def _refill(thing: Any, held: Any) -> None:
    if is_memory(thing):
        thing[... if hasattr(thing, "shape") else slice(None)] = held
        return
    thing.clear()
    (thing.extend if isinstance(thing, (list, deque)) else thing.update)(held)


def is_memory(thing: Any) -> bool:
    """True for an object that is no tensor and holds numbers in a piece of memory: an array of numpy's or of
    Python's, a bytearray.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(thing, numpy.ndarray):
        return (
            not thing.dtype.hasobject
            and bool(thing.flags.writeable)
            and thing.nbytes <= _MOST
        )
    return isinstance(thing, (bytearray, array)) and len(thing) <= _MOST


def content_of(thing: Any) -> Any:
    """The container in which `thing` keeps its parts; None for an object that has none or is not the
    user's.
    """
    if isinstance(thing, _CONTAINERS) or is_memory(thing):
        return thing
    foreign = isinstance(
        thing, (nn.Module, torch.Tensor, type, ModuleType, FunctionType, MethodType)
    )
    if foreign or type(thing).__module__.partition(".")[0] in ("torch", "builtins"):
        return None
    return getattr(thing, "__dict__", None)


def _same(thing: Any, held: Any) -> bool:
    """True when a container holds these objects in this order."""
    if is_memory(thing):
        return (
            thing.tobytes() == held.tobytes()
            if hasattr(thing, "tobytes")
            else bool(thing == held)
        )
    if isinstance(thing, set):
        return {*map(id, thing)} == {*map(id, held)}
    now = _held(thing)
    if isinstance(now, dict):
        now = [part for pair in now.items() for part in pair]
        held = [part for pair in held.items() for part in pair]
    return len(now) == len(held) and all(map(alike, now, held))


def alike(one: Any, other: Any) -> bool:
    """True for one and the same object, and for equal numbers and texts."""
    return one is other or (
        isinstance(one, SIMPLE)
        and type(one) is type(other)
        and repr(one) == repr(other)
    )


def attributes(module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """The plain attributes of all modules."""
    for path, owner in module.named_modules():
        for name, item in vars(owner).items():
            if name not in _INTERNAL:
                yield (path, name), item


def fingerprint(item: Any, settled: bool = False, inside: tuple[int, ...] = ()) -> Any:
    """A value that is equal for equal items: numbers and texts by value, containers and plain objects by
    content, all else by identity.

    With `settled`, tensors are equal to tensors and other objects to those of their class.
    """
    if isinstance(item, SIMPLE):
        return type(item), repr(item)
    content = content_of(item)
    if content is None or id(content) in inside:
        return (
            (torch.Tensor if isinstance(item, SYMBOLS) else type(item))
            if settled
            else id(item)
        )
    if is_memory(item):
        return type(item), bytes(item) if isinstance(
            item, bytearray
        ) else item.tobytes()
    below = (*inside, id(content))
    if isinstance(content, dict):
        return type(item), [
            (fingerprint(k, settled, below), fingerprint(v, settled, below))
            for k, v in content.items()
        ]
    parts = [fingerprint(part, settled, below) for part in content]
    return type(item), frozenset(map(repr, parts)) if isinstance(
        content, set
    ) else parts


def brief(item: Any) -> str:
    """A few words for a message."""
    if isinstance(item, torch.Tensor):
        with torch._C.DisableTorchFunction():
            return f"a tensor {list(item.shape)}"
    if isinstance(item, SIMPLE):
        return f"{item!r:.40}"
    content = content_of(item)
    return f"a {type(item).__name__}" + (
        f" of {len(content)}" if isinstance(item, _CONTAINERS) else ""
    )
