"""Records what the functions and classes of a model refer to outside of it: globals, closures, defaults,
class attributes, caches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from stagecut.frontend.source import is_users_file
from stagecut.frontend.watch.attributes import SIMPLE, Containers, alike, is_memory
from stagecut.frontend.watch.generators import Generators, is_generator

_ABSENT: Any = object()
_STATE = (*SIMPLE, torch.Tensor, list, dict, set, deque, tuple)
"""Types of objects that a call may leave for the next one under a name; None is not yet anything."""


class Surroundings:
    """The objects around a model, as they were: numbers, tensors and containers of any depth."""

    def __init__(self, module: nn.Module) -> None:
        self._classes = {cls: set(vars(cls)) for cls in _classes(module)}
        functions, caches = _reached(module, [*self._classes])
        self._caches = [(cache, cache.cache_info()) for cache in caches]
        places: list[tuple[Any, Any, str]] = [*_references(functions)]
        for cls in self._classes:
            places += [(cls, _Attributes(cls), name) for name in _own(cls)]
        variables = [
            (owner, home, name, _value(home, name)) for owner, home, name in places
        ]
        self._variables = [
            variable
            for variable in variables
            if isinstance(variable[-1], _STATE) or variable[-1] is _ABSENT
        ]
        named = [(owner, name, value) for owner, _, name, value in variables]
        named += _defaults(functions)
        self._containers = [
            (owner, name, Containers([value], objects=False))
            for owner, name, value in named
            if isinstance(value, _STATE) or is_memory(value)
        ]
        self.generators = [value for _, _, value in named if is_generator(value)]

    def changed(self) -> list[tuple[Any, str]]:
        """The functions and classes, and the names in them that refer to something else or to a container
        that holds something else.
        """
        renamed = [
            (owner, name)
            for owner, home, name, old in self._variables
            if _is_other(old, _value(home, name))
        ]
        added = [(cls, name) for cls in self._classes for name in self._added(cls)]
        refilled = [
            (owner, name)
            for owner, name, containers in self._containers
            if containers.changed()
        ]
        return renamed + added + refilled

    def restore(self) -> None:
        """All is as it was; caches that were filled are empty."""
        for _, home, name, old in self._variables:
            if not _is_other(old, _value(home, name)):
                continue
            if old is _ABSENT:
                del home[name]
            else:
                home[name] = old
        for cls in self._classes:
            for name in self._added(cls):
                delattr(cls, name)
        for _, _, containers in self._containers:
            containers.restore()
        for cache, info in self._caches:
            if cache.cache_info() != info:
                cache.cache_clear()

    def _added(self, cls: type) -> list[str]:
        return [
            name
            for name, value in _own(cls).items()
            if name not in self._classes[cls] and _is_other(_ABSENT, value)
        ]


def random_state(module: nn.Module, devices: list[int]) -> Callable[[], None]:
    """A function that sets torch's generators, of the CPU and of these CUDA devices, and all others that a
    model can reach, to the state that they have now.
    """
    on_cpu = torch.random.get_rng_state()
    on_gpus = [torch.cuda.get_rng_state(device) for device in devices]
    others = Generators(Surroundings(module).generators)

    def restore() -> None:
        torch.random.set_rng_state(on_cpu)
        for device, state in zip(devices, on_gpus, strict=True):
            torch.cuda.set_rng_state(state, device)
        others.restore()

    return restore


def _is_other(old: Any, new: Any) -> bool:
    """True for another number, tensor or container. A variable that was nothing may become something that is
    none of these: a module, a logger.
    """
    if old is _ABSENT or old is None:
        return new is not None and isinstance(new, _STATE)
    return not alike(old, new)


def _value(home: Any, name: str) -> Any:
    """The value of a variable, _ABSENT for none."""
    try:
        return home[name]
    # a builtin, an attribute, or a cell that is still empty
    except (KeyError, ValueError):
        return _ABSENT


class _Cells:
    """The variables of a closure by name."""

    def __init__(self, function: FunctionType) -> None:
        self._cells = dict(
            zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        )

    def __getitem__(self, name: str) -> Any:
        return self._cells[name].cell_contents

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self._cells[name].cell_contents


class _Attributes:
    """The attributes of a class by name."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __getitem__(self, name: str) -> Any:
        return vars(self._cls)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._cls, name, value)


def _classes(module: nn.Module) -> list[type]:
    """The user's classes of all modules, with their bases."""
    classes: dict[type, None] = {}
    for owner in module.modules():
        classes |= dict.fromkeys(type(owner).__mro__)
    not_users = ("torch", "builtins", "typing", "abc")
    return [cls for cls in classes if cls.__module__.partition(".")[0] not in not_users]


def _own(cls: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(cls).items()
        if not (name.startswith("__") and name.endswith("__"))
    }


def _reached(
    module: nn.Module, classes: list[type]
) -> tuple[dict[FunctionType, FunctionType], list[Any]]:
    """The user's functions that may run with a module, those in globals and closures included, and the caches
    around such functions.

    Each function maps to itself; one that only a hook reaches maps to that hook.
    """
    todo: list[tuple[FunctionType | None, Any]] = []
    for owner in module.modules():
        hooks = (*owner._forward_pre_hooks.values(), *owner._forward_hooks.values())
        todo += [(_function(hook), _function(hook)) for hook in hooks]
    for home in (*classes, *module.modules()):
        todo += [(None, value) for value in vars(home).values()]
    reached: dict[FunctionType, FunctionType] = {}
    caches: dict[int, Any] = {}
    while todo:
        hook, value = todo.pop()
        function = _function(value)
        if function is None or function in reached:
            continue
        if not is_users_file(function.__code__.co_filename):
            continue
        if isinstance(value, _lru_cache_wrapper):
            caches[id(value)] = value
        reached[function] = hook or function
        todo += [(hook, _value(home, name)) for home, name in _variables(function)]
    return reached, [*caches.values()]


def _function(value: Any) -> FunctionType | None:
    """The function in a method, a property or a cache."""
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        return _function(value.__func__)
    if isinstance(value, property):
        return _function(value.fget)
    if isinstance(value, _lru_cache_wrapper):
        return _function(value.__wrapped__)
    return value if isinstance(value, FunctionType) else None


def _variables(function: FunctionType) -> Iterator[tuple[Any, str]]:
    """The names in the globals and the closure of a function that its code uses, with their homes."""
    cells = _Cells(function)
    yield from (
        (function.__globals__, name)
        for name in dict.fromkeys(_global_names(function.__code__))
    )
    yield from ((cells, name) for name in function.__code__.co_freevars)


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _global_names(inner)


def _references(
    functions: dict[FunctionType, FunctionType],
) -> Iterator[tuple[FunctionType, Any, str]]:
    """The functions and the variables they use, a global under the first function only."""
    seen: set[tuple[int, str]] = set()
    for function, owner in functions.items():
        for home, name in _variables(function):
            if (id(home), name) not in seen:
                seen.add((id(home), name))
                yield owner, home, name


def _defaults(
    functions: dict[FunctionType, FunctionType],
) -> Iterator[tuple[FunctionType, str, Any]]:
    """The functions and the defaults of their arguments."""
    for function, owner in functions.items():
        positional = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = function.__defaults__ or ()
        for name, value in (
            *zip(reversed(positional), reversed(defaults), strict=False),
            *(function.__kwdefaults__ or {}).items(),
        ):
            yield owner, name, value
