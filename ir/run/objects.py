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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import (
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
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

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_DATA = (torch.Tensor, *SYMBOLIC, int, float, bool, str, type(None))
"""The types that a trace can return."""
_WITHOUT_PARTS = (
    *_DATA,
    type,
    FunctionType,
    MethodType,
    ModuleType,
    torch.nn.Module,
)
"""Objects of these types are not looked into."""
_CLOSED = (*_WITHOUT_PARTS, tuple, list, dict, set, frozenset)
"""Objects of these types are no containers of attributes."""
_PLAIN = (bool, int, float, str)
_CONTAINERS = (list, dict, set)
CONSTANT = (
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


_NOTHING: Mapping[int, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Shape:
    """The class of an object, the names of the attributes that a trace can return, and all others with their
    values.
    """

    cls: type
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


def together(parts: Iterable[Any], shape: Shape) -> Any:
    """An object of that shape with these parts."""
    instance = _blank(shape.cls)
    for name, value in shape.others.items():
        own = copy.copy(value) if isinstance(value, _CONTAINERS) else value
        object.__setattr__(instance, name, own)
    for name, part in zip(shape.names, parts, strict=True):
        object.__setattr__(instance, name, part)
    return instance


def _with_keys(node: Opened) -> tuple[list[tuple[Any, Any]], Any]:
    names = zip(node.shape.names, node.parts, strict=True)
    return [(GetAttrKey(name), part) for name, part in names], node.shape


register_pytree_node(
    Opened,
    lambda node: (list(node.parts), node.shape),
    together,
    serialized_type_name="stagecut.ir.run.objects.Opened",
    flatten_with_keys_fn=_with_keys,
)
register_pytree_node(
    Constant,
    lambda node: ([], node.value),
    lambda _, value: copy.copy(value),
    serialized_type_name="stagecut.ir.run.objects.Constant",
    flatten_with_keys_fn=lambda node: ([], node.value),
)


class Closed(Exception):
    """An object is reached from its own attributes, or one without tensors holds a size that varies."""


@dataclass(frozen=True)
class _How:
    """How a tree is opened. given: id of a part -> what stands in its place. every: objects without tensors
    are opened too. devices: a device is a constant.
    """

    given: Mapping[int, Any]
    every: bool
    devices: bool

    def is_constant(self, leaf: Any) -> bool:
        """True for a value that is put together as it is."""
        return is_constant(leaf) or (self.devices and isinstance(leaf, torch.device))

    def is_given(self, part: Any) -> bool:
        """True for a part that something else stands for."""
        return id(part) in self.given

    def each(self, tree: Any, open_leaf: Callable[[Any], Any]) -> Any:
        """`tree` with what stands for the parts that are given, and with every other leaf opened."""
        if not self.given:
            return tree_map(open_leaf, tree)
        return tree_map(
            lambda leaf: (
                self.given[id(leaf)] if self.is_given(leaf) else open_leaf(leaf)
            ),
            tree,
            is_leaf=self.is_given,
        )


def opened(tree: Any, given: Mapping[int, Any] = _NOTHING, every: bool = False) -> Any:
    """`tree` with an `Opened` in the place of every object that holds tensors and that torch takes for a
    leaf, and a `Constant` in the place of every value that never changes. With `every`, objects without
    tensors are opened as well, and devices are constants. `given` says what stands for some parts, by their
    ids.

    Some objects stay leaves: one that holds itself, one that has slots, one that holds another object without
    tensors but with a size that varies, and one that holds a tensor in one container with an object that no
    trace can return.
    """
    how = _How(given, every, devices=every)
    return how.each(tree, lambda leaf: _opened_if_it_can_be(leaf, how))


def _opened_if_it_can_be(leaf: Any, how: _How) -> Any:
    if how.is_constant(leaf):
        return Constant(leaf)
    try:
        return _open(leaf, (), how)
    except Closed:
        return leaf


def is_constant(leaf: Any) -> bool:
    if isinstance(leaf, (set, frozenset)):
        return all(
            isinstance(member, CONSTANT) or member is None or type(member) in _PLAIN
            for member in leaf
        )
    return isinstance(leaf, CONSTANT)


def _blank(cls: type) -> Any:
    """An object of that class without attributes. Raises TypeError for a class whose objects have more parts,
    in C.
    """
    if issubclass(cls, SimpleNamespace):
        return SimpleNamespace.__new__(cls)
    return object.__new__(cls)


def has_only_attributes(leaf: Any) -> bool:
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


def _open(leaf: Any, around: tuple[Any, ...], how: _How) -> Any:
    """The object as `Opened`. Unless all are opened, an object without tensors, and a constant, stay as they
    are. `around` are the objects that it is an attribute of.
    """
    if how.every and how.is_constant(leaf):
        return Constant(leaf)
    if not has_only_attributes(leaf):
        return leaf
    if any(leaf is owner for owner in around):
        raise Closed
    parts = {
        name: _opened_attribute(value, (*around, leaf), how)
        for name, value in vars(leaf).items()
    }
    row = [*parts.values()]
    if not how.every and not _holds(row, torch.Tensor):
        if _holds(row, SYMBOLIC):
            raise Closed
        return leaf
    data = {name: part for name, part in parts.items() if _is_data(part)}
    others = {name: value for name, value in vars(leaf).items() if name not in data}
    return Opened(Shape(type(leaf), tuple(data), others), tuple(data.values()))


def _opened_attribute(value: Any, around: tuple[Any, ...], how: _How) -> Any:
    """The value of an attribute, opened. If a tensor is in it, all of it is opened, or Closed is raised."""
    part = how.each(
        value,
        lambda leaf: _open(leaf, around, how),
    )
    if _is_data(part) or not _holds(part, torch.Tensor):
        return part
    every = replace(how, every=True)
    part = every.each(
        value,
        lambda leaf: _open(leaf, around, every),
    )
    if not _is_data(part):
        raise Closed
    return part


def _holds(part: Any, types: Any) -> bool:
    return any(isinstance(leaf, types) for leaf in tree_leaves(part))


def _is_data(part: Any) -> bool:
    return all(isinstance(leaf, _DATA) for leaf in tree_leaves(part))


def numbers_and_texts(leaves: Iterable[Any]) -> list[Any]:
    """The numbers and texts among some leaves. Those of a class derived from one of Python's become values of
    Python's class.
    """
    return [_plain(leaf) for leaf in leaves if isinstance(leaf, _PLAIN)]


def _plain(leaf: Any) -> Any:
    cls = next(cls for cls in _PLAIN if isinstance(leaf, cls))
    return cls(leaf)


def tensor_paths(tree: Any) -> str:
    """The paths of the tensors in an opened tree; '' for a flat row of tensors, or a single one."""
    leaves = tree_flatten_with_path(tree)[0]
    paths = [keystr(path) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    is_row = paths in ([""], [f"[{place}]" for place in range(len(leaves))])
    return "" if is_row else without_addresses(" ".join(paths))


def hides_tensors(leaf: Any) -> bool:
    """True for an object that `opened` leaves as it is although it holds tensors."""
    visited: dict[int, Any] = {}
    todo = [] if isinstance(leaf, torch.Tensor) else [leaf]
    while todo:
        part = todo.pop()
        if isinstance(part, torch.Tensor):
            return True
        if id(part) in visited or isinstance(part, _WITHOUT_PARTS):
            continue
        visited[id(part)] = part
        todo += _parts(part)
    return False


def _parts(thing: Any) -> Iterable[Any]:
    """The members of a container, the attributes of another object."""
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, (list, tuple, set, frozenset)):
        return thing
    slots = [
        name for cls in type(thing).__mro__ for name in vars(cls).get("__slots__", ())
    ]
    attributes = getattr(thing, "__dict__", {})
    return [*(getattr(thing, name, None) for name in slots), *attributes.values()]
