"""The plain Python state of a model: what modules, containers and objects hold besides parameters and buffers."""

from __future__ import annotations

import copy
import linecache
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from stagecut.frontend.lower import OWN_DIR, SYMBOLS, TORCH_DIR

Line = tuple[str, int, str]
"""File, line and function."""

_PYTHON_DIR = os.path.dirname(os.__file__) + os.sep
_SIMPLE = (int, float, complex, str, bytes, type(None))

HOOKS: tuple[str, ...] = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
HOOKS += ("_forward_hooks_always_called",)
"""Where a module keeps the hooks on its forward."""

_INTERNAL = frozenset(vars(nn.Module())) | {"forward"}
"""What every module has: no attributes of the user's."""


class Kept:
    """The modules, containers and plain objects that a model is made of, as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._held = {id(t) for t in (*module.parameters(), *module.buffers())}
        self._before: dict[int, tuple[Any, Any]] = {}
        for owner in module.modules():
            self._before[id(vars(owner))] = (vars(owner), vars(owner).copy())
            for name in _INTERNAL:  # parameters, buffers, modules, hooks
                if isinstance(content := vars(owner).get(name), (dict, set)):
                    self._before[id(content)] = (content, content.copy())
            for name, item in vars(owner).items():
                if name not in _INTERNAL:
                    self._visit(item)

    def _visit(self, item: Any) -> None:
        todo = [item]
        while todo:
            thing = content_of(todo.pop())
            if thing is None or id(thing) in self._before:
                continue
            self._before[id(thing)] = (thing, thing if isinstance(thing, tuple) else thing.copy())
            todo += thing.values() if isinstance(thing, dict) else thing

    def restore(self) -> None:
        """Every container holds what it held."""
        for thing, before in self._before.values():
            if isinstance(thing, tuple) or _same(thing, before):
                continue
            _refill(thing, before)

    def replace_tensors(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Stand-ins are where tensors were that are no state, for tracing writes real ones: id of each -> the tensor, its stand-in."""
        made: dict[int, torch.Tensor] = {}
        originals: dict[int, torch.Tensor] = {}

        def stand_in(item: Any) -> Any:
            if type(item) is tuple:
                parts = tuple(map(stand_in, item))
                return item if _same(parts, item) else parts
            if not isinstance(item, torch.Tensor) or id(item) in self._held or isinstance(item, nn.Parameter):
                return item
            if id(item) not in made:
                made[id(item)] = item.detach().clone().requires_grad_(item.requires_grad)
                originals[id(item)] = item
            return made[id(item)]

        for thing, _ in self._before.values():
            pairs = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, (list, deque)) else ()
            for key, item in list(pairs):
                new = stand_in(item)
                if new is not item:
                    thing[key] = new
        return {id(new): (originals[key], new) for key, new in made.items()}


class Surroundings:
    """What the functions of a model refer to outside of it, as it was: containers and numbers in their globals and closures."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [
            (function, home, name, home[name], _shallow(home[name]), copy.copy(home[name])) for function, home, name in _references(module)
        ]

    def changed(self) -> list[tuple[FunctionType, str]]:
        """The functions and names that refer to another number or container, or to one that holds something else."""
        return [(function, name) for function, home, name, _, before, _ in self._before if _shallow(home[name]) != before]

    def restore(self) -> None:
        """All is as it was."""
        for _, home, name, item, before, held in self._before:
            if _shallow(home[name]) != before:
                home[name] = item
                if not isinstance(item, _SIMPLE):
                    _refill(item, held)


class _Cells:
    """The variables of a closure by name."""

    def __init__(self, function: FunctionType) -> None:
        self._cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __getitem__(self, name: str) -> Any:
        return self._cells[name].cell_contents

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value


def _references(module: nn.Module) -> Iterator[tuple[FunctionType, Any, str]]:
    """The user's functions that run with a module, and the names in their globals and closures that hold numbers or containers."""
    hooks = (hook for owner in module.modules() for hook in (*owner._forward_pre_hooks.values(), *owner._forward_hooks.values()))
    classes = dict.fromkeys(cls for owner in module.modules() for cls in type(owner).__mro__)
    methods = (vars(cls).values() for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins"))
    for function in dict.fromkeys(f for f in (*hooks, *chain.from_iterable(methods)) if isinstance(f, FunctionType)):
        cells = _Cells(function)
        for home, names in ((function.__globals__, function.__code__.co_names), (cells, function.__code__.co_freevars)):
            for name in names:
                try:
                    item = home[name]
                except (KeyError, ValueError):  # a builtin, an attribute, or a cell that is still empty
                    continue
                if isinstance(item, (list, dict, set, deque)) or (isinstance(item, _SIMPLE) and item is not None):
                    yield function, home, name


def _shallow(item: Any) -> Any:
    """Equal for the same number, and for the same container while it holds the same objects."""
    if isinstance(item, _SIMPLE):
        return type(item), repr(item)
    parts = chain.from_iterable(item.items()) if isinstance(item, dict) else item
    return id(item), [repr(part) if isinstance(part, _SIMPLE) else id(part) for part in parts]


def _refill(thing: Any, held: Any) -> None:
    thing.clear()
    (thing.extend if isinstance(thing, (list, deque)) else thing.update)(held)


def content_of(thing: Any) -> Any:
    """The container in which `thing` keeps its parts, None for what has none or is not the user's."""
    if isinstance(thing, (list, dict, set, deque, tuple)):
        return thing
    foreign = isinstance(thing, (nn.Module, torch.Tensor, type, ModuleType, FunctionType, MethodType))
    if foreign or type(thing).__module__.partition(".")[0] in ("torch", "builtins"):
        return None
    return getattr(thing, "__dict__", None)


def _same(one: Any, other: Any) -> bool:
    """True when both containers hold the same objects in the same order."""
    if isinstance(one, set):
        return bool(one == other)
    pairs = (one.items(), other.items()) if isinstance(one, dict) else (enumerate(one), enumerate(other))
    return len(one) == len(other) and all(k == n and a is b for (k, a), (n, b) in zip(*pairs, strict=True))


def attributes(module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """The plain attributes of all modules."""
    for path, owner in module.named_modules():
        for name, item in vars(owner).items():
            if name not in _INTERNAL:
                yield (path, name), item


def fingerprint(item: Any, settled: bool = False, inside: tuple[int, ...] = ()) -> Any:
    """Equal for what is equal: numbers and texts by value, containers and plain objects by content, all else by identity.

    With `settled`, tensors are equal to tensors and other objects to those of their class.
    """
    if isinstance(item, _SIMPLE):
        return type(item), repr(item)
    content = content_of(item)
    if content is None or id(content) in inside:
        return (torch.Tensor if isinstance(item, SYMBOLS) else type(item)) if settled else id(item)
    below = (*inside, id(content))
    if isinstance(content, dict):
        return type(item), [(fingerprint(k, settled, below), fingerprint(v, settled, below)) for k, v in content.items()]
    parts = [fingerprint(part, settled, below) for part in content]
    return type(item), frozenset(map(repr, parts)) if isinstance(content, set) else parts


def brief(item: Any) -> str:
    """A few words for a message."""
    if isinstance(item, torch.Tensor):
        with torch._C.DisableTorchFunction():
            return f"a tensor {list(item.shape)}"
    if isinstance(item, _SIMPLE):
        return f"{item!r:.40}"
    content = content_of(item)
    return f"a {type(item).__name__}" + (f" of {len(content)}" if content is item else "")


def gpus(*trees: Any) -> list[int]:
    """The CUDA devices on which tensors of modules and trees lie."""
    tensors: list[Any] = []
    for tree in trees:
        tensors += [*tree.parameters(), *tree.buffers()] if isinstance(tree, nn.Module) else tree_leaves(tree)
    places = {t.device.index or 0 for t in tensors if isinstance(t, torch.Tensor) and t.device.type == "cuda"}
    return sorted(places)


def random_state(devices: list[int]) -> Callable[[], None]:
    """What sets torch's generators, of the CPU and of these CUDA devices, as they are now."""
    on_cpu, on_gpus = torch.random.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

    def restore() -> None:
        torch.random.set_rng_state(on_cpu)
        for place, state in zip(devices, on_gpus, strict=True):
            torch.cuda.set_rng_state(state, place)

    return restore


def generators() -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """Name of each global generator -> its state, and what sets it."""
    found: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "torch's generator": (torch.get_rng_state().tolist(), lambda state: None),  # a fork is open around the capture
        "Python's random": (random.getstate(), random.setstate),
    }
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        found["numpy.random"] = (numpy.get_state(legacy=False), numpy.set_state)
    return found


def is_users(file: str) -> bool:
    """True for a source file that is neither torch's, nor ours, nor one of Python's own library."""
    return not file.startswith((TORCH_DIR, OWN_DIR, "<")) and (not file.startswith(_PYTHON_DIR) or "-packages" in file)


def user_line(frame: FrameType | None = None) -> Line:
    """File, line and function of the innermost frame that is the user's, from `frame` or the caller on."""
    frame = frame or sys._getframe(1)
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def shown(line: Line) -> str:
    """A line for a message, with its source."""
    return f"{line[0]}:{line[1]} in {line[2]}: {linecache.getline(line[0], line[1]).strip()}"


def place_of(cls: type) -> str:
    """Where the forward of a module class stands."""
    try:
        code = cls.forward.__code__  # type: ignore[attr-defined]
        return f"{code.co_filename}:{code.co_firstlineno}, {cls.__name__}.forward"
    except AttributeError:
        return f"class {cls.__name__}"
