"""Opens the result of a model as a tree in which objects of any class are containers of their attributes.

torch's pytrees know tuples, lists, dicts and classes that are registered. An object of another class is a
leaf to them, with all tensors in it: the cache that a decoder returns, or a plain dataclass. `opened` puts a
node in its place whose children are the attributes that hold tensors, numbers and text. When the tree is put
together again, an object of the class stands there: it has those attributes, and all others with the values
they had in the trace. Its `__init__` is not run. A value that never changes, such as a dtype or a member of
an enum, becomes a `Constant`: a node without children.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import (
    GetAttrKey,
    keystr,
    register_pytree_node,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
)

from stagecut.ir.errors import without_addresses

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_DATA = (torch.Tensor, *_SYMBOLIC, int, float, bool, str, type(None))
"""The types that a trace can return."""
_CLOSED = (
    *_DATA,
    type,
    FunctionType,
    MethodType,
    ModuleType,
    torch.nn.Module,
    tuple,
    list,
    dict,
    set,
    frozenset,
)
"""Objects of these types are no containers of attributes."""
_PLAIN = (bool, int, float, str)
_CONTAINERS = (list, dict, set)
_CONSTANT = (
    Enum,
    complex,
    bytes,
    range,
    torch.dtype,
    torch.layout,
    torch.memory_format,
)
"""Types that no trace can return, whose values are the same in each call that follows the trace, and on every
device.
"""


@dataclass(frozen=True)
class Shape:
    """The class of an object, the names of the attributes that a trace can return, and all others with their
    values.
    """

    kind: type
    names: tuple[str, ...]
    others: dict[str, Any] = field(compare=False)

    def __deepcopy__(self, memo: Any) -> Shape:
        return self


@dataclass(frozen=True)
class Opened:
    """An object taken apart. As a node of a pytree, it is put together as the object itself."""

    shape: Shape
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Constant:
    """A value of the trace. As a node of a pytree, it is put together as the value itself."""

    value: Any


def _together(parts: Iterable[Any], shape: Shape) -> Any:
    made = _blank(shape.kind)
    for name, value in shape.others.items():
        object.__setattr__(
            made, name, copy.copy(value) if isinstance(value, _CONTAINERS) else value
        )
    for name, part in zip(shape.names, parts, strict=True):
        object.__setattr__(made, name, part)
    return made


register_pytree_node(
    Opened,
    lambda node: (list(node.parts), node.shape),
    _together,
    serialized_type_name="stagecut.ir.run.objects.Opened",
    flatten_with_keys_fn=lambda node: (
        [
            (GetAttrKey(n), part)
            for n, part in zip(node.shape.names, node.parts, strict=True)
        ],
        node.shape,
    ),
)
register_pytree_node(
    Constant,
    lambda node: ([], node.value),
    lambda _, value: copy.copy(value),
    serialized_type_name="stagecut.ir.run.objects.Constant",
    flatten_with_keys_fn=lambda node: ([], node.value),
)


class _Closed(Exception):
    """An object is reached from its own attributes, or one without tensors holds a size that varies."""


def opened(tree: Any) -> Any:
    """`tree` with an `Opened` in the place of every object that holds tensors and that torch takes for a
    leaf, and a `Constant` in the place of every value that never changes.

    Some objects stay leaves: one that holds itself, one that has slots, one that holds another object without
    tensors but with a size that varies, and one that holds a tensor in one container with an object that no
    trace can return.
    """
    return tree_map(_opened_if_it_can_be, tree)


def _opened_if_it_can_be(leaf: Any) -> Any:
    if _is_constant(leaf):
        return Constant(leaf)
    try:
        return _open(leaf, ())
    except _Closed:
        return leaf


def _is_constant(leaf: Any) -> bool:
    if isinstance(leaf, (set, frozenset)):
        return all(
            isinstance(item, _CONSTANT) or item is None or type(item) in _PLAIN
            for item in leaf
        )
    return isinstance(leaf, _CONSTANT)


def _blank(kind: type) -> Any:
    """An object of that class without attributes. Raises TypeError for a class whose objects have more parts,
    in C.
    """
    return (
        SimpleNamespace.__new__(kind)
        if issubclass(kind, SimpleNamespace)
        else object.__new__(kind)
    )


def _has_only_attributes(leaf: Any) -> bool:
    """True when an object is its class and its `__dict__`, and nothing besides."""
    if (
        isinstance(leaf, _CLOSED)
        or not hasattr(leaf, "__dict__")
        or any(vars(cls).get("__slots__") for cls in type(leaf).__mro__)
    ):
        return False
    try:
        _blank(type(leaf))
    except TypeError:
        return False
    return True


def _open(leaf: Any, around: tuple[Any, ...], empty_too: bool = False) -> Any:
    """The object as `Opened`. An object without tensors, and a constant, stay as they are, unless
    `empty_too`.
    """
    if empty_too and _is_constant(leaf):
        return Constant(leaf)
    if not _has_only_attributes(leaf):
        return leaf
    if any(leaf is item for item in around):
        raise _Closed
    around = (*around, leaf)
    parts: dict[str, Any] = {}
    for name, value in vars(leaf).items():
        parts[name] = tree_map(lambda item: _open(item, around), value)
        if _holds(parts[name], torch.Tensor) and not _is_data(parts[name]):
            parts[name] = tree_map(
                lambda item: _open(item, around, empty_too=True), value
            )
            if not _is_data(parts[name]):
                raise _Closed
    if not empty_too and not any(_holds(part, torch.Tensor) for part in parts.values()):
        if any(_holds(part, _SYMBOLIC) for part in parts.values()):
            raise _Closed
        return leaf
    held = [name for name, part in parts.items() if _is_data(part)]
    others = {name: value for name, value in vars(leaf).items() if name not in held}
    return Opened(
        Shape(type(leaf), tuple(held), others), tuple(parts[name] for name in held)
    )


def _holds(part: Any, kinds: Any) -> bool:
    return any(isinstance(item, kinds) for item in tree_leaves(part))


def _is_data(part: Any) -> bool:
    return all(isinstance(item, _DATA) for item in tree_leaves(part))


def plain(leaves: Iterable[Any]) -> list[Any]:
    """The numbers and texts among some leaves. Those of a class derived from one of Python's become values of
    Python's class.
    """
    return [
        next(kind for kind in _PLAIN if isinstance(leaf, kind))(leaf)
        for leaf in leaves
        if isinstance(leaf, _PLAIN)
    ]


def places(tree: Any) -> str:
    """The paths of the tensors in an opened tree; '' for a flat row of tensors, or a single one."""
    paths = tree_flatten_with_path(tree)[0]
    found = " ".join(
        keystr(path) for path, leaf in paths if isinstance(leaf, torch.Tensor)
    )
    return (
        ""
        if found in ("", " ".join(f"[{place}]" for place in range(len(paths))))
        else without_addresses(found)
    )


def hides_tensors(leaf: Any) -> bool:
    """True for an object that `opened` leaves as it is although it holds tensors."""
    seen: dict[int, Any] = {}
    todo = [] if isinstance(leaf, torch.Tensor) else [leaf]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            return True
        if id(item) in seen or isinstance(
            item, (*_DATA, type, FunctionType, MethodType, ModuleType, torch.nn.Module)
        ):
            continue
        seen[id(item)] = item
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        else:
            slots = [
                name
                for cls in type(item).__mro__
                for name in vars(cls).get("__slots__", ())
            ]
            todo += [getattr(item, name, None) for name in slots] + list(
                getattr(item, "__dict__", {}).values()
            )
    return False


@contextmanager
def opening(module: torch.nn.Module) -> Iterator[None]:
    """While open, `module` returns its result `opened`."""
    hook = module.register_forward_hook(_Hook())
    try:
        yield
    finally:
        hook.remove()


class _Hook:
    def __call__(self, module: torch.nn.Module, args: Any, result: Any) -> Any:
        return opened(result)
