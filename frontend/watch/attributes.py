"""Records the plain Python state of a model: what modules, containers and objects hold besides parameters and
buffers.
"""

from __future__ import annotations

import copy
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
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

PUT_BACK = (list, dict, deque)
"""The containers in which the stages leave what forward leaves there, where it was given them. The attributes
of an object are a dict.
"""

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


class Containers:
    """Some containers with all containers in them, and with `objects` the plain objects too, as they were."""

    def __init__(self, roots: Iterable[Any], objects: bool = True) -> None:
        self._before: dict[int, tuple[Any, Any]] = {}
        todo = [*roots]
        while todo:
            part = todo.pop()
            is_container = isinstance(part, _CONTAINERS) or is_memory(part)
            container = content_of(part) if objects or is_container else None
            if container is not None and id(container) not in self._before:
                todo += _parts(self._keep(container))

    def _keep(self, container: Any) -> Any:
        contents = _contents(container)
        self._before[id(container)] = (container, contents)
        return contents

    def parts(self) -> Iterator[Any]:
        """The parts that the containers held."""
        for _, contents in self._before.values():
            yield from _parts(contents)

    def changed(self, besides: tuple[type, ...] = ()) -> bool:
        """True when a container of another class than these holds something else, or in another order."""
        return any(
            not isinstance(container, besides) and not _holds(container, contents)
            for container, contents in self._before.values()
        )

    def restore(self) -> None:
        """Every container holds what it held."""
        for container, contents in self._before.values():
            if not _holds(container, contents):
                _refill(container, contents)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Afterwards every container holds what it held."""
        try:
            yield
        finally:
            self.restore()


class ModelContainers(Containers):
    """The modules, containers and plain objects that a model is made of, as they were."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(value for _, value in attributes(module))
        self._state = {
            id(tensor) for tensor in (*module.parameters(), *module.buffers())
        }
        for owner in module.modules():
            self._keep(vars(owner))
            for name in _INTERNAL:  # parameters, buffers, modules, hooks
                container = vars(owner).get(name)
                if isinstance(container, (dict, set)):
                    self._keep(container)

    def replace_tensors(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Tensors that are no state are replaced by stand-ins, because tracing writes real ones: id of each
        stand-in -> the tensor, its stand-in.
        """
        stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for container, _ in self._before.values():
            for key, part in _places(container):
                replaced = self._replaced(part, stand_ins)
                if replaced is not part:
                    container[key] = replaced
        return {id(pair[1]): pair for pair in stand_ins.values()}

    def _replaced(
        self, part: Any, stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> Any:
        """`part` with stand-ins in place of tensors. `stand_ins` maps the id of a tensor to it and its
        stand-in.
        """
        if type(part) is tuple:
            parts = tuple(self._replaced(inner, stand_ins) for inner in part)
            return part if _holds(parts, part) else parts
        if not isinstance(part, torch.Tensor) or isinstance(part, nn.Parameter):
            return part
        if id(part) in self._state:
            return part
        if id(part) not in stand_ins:
            copied = part.detach().clone().requires_grad_(part.requires_grad)
            stand_ins[id(part)] = (part, copied)
        return stand_ins[id(part)][1]


def _places(container: Any) -> list[tuple[Any, Any]]:
    """The keys or indices of a container in which parts can be replaced, with the parts."""
    if isinstance(container, dict):
        return [*container.items()]
    return [*enumerate(container)] if isinstance(container, (list, deque)) else []


def _contents(container: Any) -> Any:
    """The parts of a container in one of Python's own, because a class of the user's may do anything in its
    methods.
    """
    if isinstance(container, dict):
        return dict(dict.items(container))
    if is_memory(container):
        return copy.copy(container)
    return set(container) if isinstance(container, set) else list(container)


def _parts(contents: Any) -> Any:
    if is_memory(contents):
        return ()
    return contents.values() if isinstance(contents, dict) else contents


def _refill(container: Any, contents: Any) -> None:
    if is_memory(container):
        container[... if hasattr(container, "shape") else slice(None)] = contents
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(contents)
    else:
        container.update(contents)


def is_memory(part: Any) -> bool:
    """True for an object that is no tensor and holds numbers in a piece of memory: an array of numpy's or of
    Python's, a bytearray.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(part, numpy.ndarray):
        return (
            not part.dtype.hasobject
            and bool(part.flags.writeable)
            and part.nbytes <= _MOST
        )
    return isinstance(part, (bytearray, array)) and len(part) <= _MOST


def content_of(part: Any) -> Any:
    """The container in which `part` keeps its parts; None for an object that has none or is not the
    user's.
    """
    if isinstance(part, _CONTAINERS) or is_memory(part):
        return part
    foreign = isinstance(
        part, (nn.Module, torch.Tensor, type, ModuleType, FunctionType, MethodType)
    )
    if foreign or type(part).__module__.partition(".")[0] in ("torch", "builtins"):
        return None
    return getattr(part, "__dict__", None)


def _holds(container: Any, contents: Any) -> bool:
    """True when a container holds these objects in this order."""
    if is_memory(container):
        return (
            container.tobytes() == contents.tobytes()
            if hasattr(container, "tobytes")
            else bool(container == contents)
        )
    if isinstance(container, set):
        return {*map(id, container)} == {*map(id, contents)}
    if isinstance(container, dict):
        return _dict_holds(container, contents)
    current = _contents(container)
    return len(current) == len(contents) and all(map(alike, current, contents))


def _dict_holds(container: dict[Any, Any], contents: dict[Any, Any]) -> bool:
    # not by its own methods, which may do anything
    if dict.__len__(container) != len(contents):
        return False
    keys, values = dict.keys(container), dict.values(container)
    if all(map(is_, keys, contents)) and all(map(is_, values, contents.values())):
        return True
    return all(map(alike, keys, contents)) and all(
        map(alike, values, contents.values())
    )


def alike(one: Any, other: Any) -> bool:
    """True for one and the same object, and for equal numbers and texts."""
    return one is other or (
        isinstance(one, SIMPLE)
        and type(one) is type(other)
        and repr(one) == repr(other)
    )


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module. `memo` maps the id of an object to the copy of it that is there already."""
    # of hooks: a module has eight of them, and one costs as much as all else that it has
    for owner in module.modules():
        for part in vars(owner).values():
            if type(part) is OrderedDict and not part and not vars(part):
                memo[id(part)] = OrderedDict()
    twin: nn.Module = copy.deepcopy(module, memo)
    return twin


def attributes(module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """The plain attributes of all modules."""
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if name not in _INTERNAL:
                yield (path, name), value


def fingerprint(part: Any, by_type: bool = False, inside: tuple[int, ...] = ()) -> Any:
    """A value that is equal for equal objects: numbers and texts by value, containers and plain objects by
    content, all else by identity.

    With `by_type`, tensors are equal to tensors and other objects to those of their class.
    """
    if isinstance(part, SIMPLE):
        return type(part), repr(part)
    content = content_of(part)
    if content is None or id(content) in inside:
        if not by_type:
            return id(part)
        return torch.Tensor if isinstance(part, SYMBOLS) else type(part)
    if is_memory(part):
        numbers = bytes(part) if isinstance(part, bytearray) else part.tobytes()
        return type(part), numbers
    below = (*inside, id(content))
    if isinstance(content, dict):
        return type(part), [
            (fingerprint(key, by_type, below), fingerprint(value, by_type, below))
            for key, value in content.items()
        ]
    parts = [fingerprint(inner, by_type, below) for inner in content]
    if isinstance(content, set):
        return type(part), frozenset(map(repr, parts))
    return type(part), parts


def brief(value: Any) -> str:
    """A few words for a message."""
    if isinstance(value, torch.Tensor):
        with torch._C.DisableTorchFunction():
            return f"a tensor {list(value.shape)}"
    if isinstance(value, SIMPLE):
        return f"{value!r:.40}"
    name = f"a {type(value).__name__}"
    if isinstance(value, _CONTAINERS):
        return f"{name} of {len(value)}"
    return name
