"""The objects that forward is given, of any class: their tensors are inputs of the program, and what forward
leaves in them are outputs.

`opened_arguments` takes such an object apart, as `objects.opened` does with those that a model returns.
Tensors and whole numbers in it are leaves; all else in it belongs to the structure, and is equal in each call
that follows the trace. An `Outcome` is the result of a call together with the changes that forward made to
the objects and containers that it was given. Each change names its container by the path that leads there
from the arguments, so the changes of a trace can be made to the objects of another call.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import (
    GetAttrKey,
    SequenceKey,
    TreeSpec,
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import InputError
from stagecut.ir.run.objects import (
    CONSTANT,
    SYMBOLIC,
    Closed,
    Shape,
    has_only_attributes,
    hides_tensors,
    is_constant,
    opened,
    together,
)

Path = tuple[Any, ...]
"""Keys, indices and names of attributes that lead from the arguments (positional ones, named ones) to a part.
"""

_FIXED = (*CONSTANT, bool, float, str, type(None))
"""Types of values in an object that are equal in each call."""
_LISTS = (list, deque)


@dataclass(frozen=True)
class Apart:
    """An object that forward is given, taken apart."""

    shape: Shape
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Fixed:
    """A value in such an object that is the same in each call."""

    value: Any


@dataclass(frozen=True)
class Given:
    """Stands for a part of the arguments. As a node of a pytree, it is put together as that part, while
    `resolved` is open.
    """

    path: Path


@dataclass(frozen=True)
class Change:
    """The new parts of a container: all of a list, or those values of a dict or an object that are others
    now, by key.
    """

    path: Path
    keys: tuple[Any, ...]
    parts: tuple[Any, ...]
    removed: tuple[Any, ...] = ()
    is_list: bool = False

    @property
    def places(self) -> Sequence[Any]:
        """The keys or indices at which the parts are."""
        return range(len(self.parts)) if self.is_list else self.keys


@dataclass(frozen=True)
class Outcome:
    """The result of a call, and the changes to what forward was given."""

    result: Any
    changes: tuple[Change, ...]


_arguments: ContextVar[Any] = ContextVar("_arguments", default=None)
"""The arguments in which `Given` finds its part."""


def _given(_: Any, path: Path) -> Any:
    arguments = _arguments.get()
    if arguments is None:
        return Given(path)
    return part_at(arguments, path)


def _change(parts: Any, context: Any) -> Change:
    path, keys, removed, is_list = context
    return Change(path, keys, tuple(parts), removed, is_list)


def _change_parts(change: Change) -> tuple[list[Any], Any]:
    context = (change.path, change.keys, change.removed, change.is_list)
    return list(change.parts), context


def _numbered(flatten: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`flatten` with a number as the key of each part."""

    def with_keys(node: Any) -> Any:
        parts, context = flatten(node)
        return [(SequenceKey(place), part) for place, part in enumerate(parts)], context

    return with_keys


def _register(
    cls: type, flatten: Callable[[Any], Any], together: Callable[[Any, Any], Any]
) -> None:
    register_pytree_node(
        cls,
        flatten,
        together,
        serialized_type_name=f"stagecut.ir.run.given.{cls.__name__}",
        flatten_with_keys_fn=_numbered(flatten),
    )


def _apart_with_keys(node: Apart) -> tuple[list[tuple[Any, Any]], Any]:
    names = zip(node.shape.names, node.parts, strict=True)
    return [(GetAttrKey(name), part) for name, part in names], node.shape


register_pytree_node(
    Apart,
    lambda node: (list(node.parts), node.shape),
    lambda parts, shape: Apart(shape, tuple(parts)),
    serialized_type_name="stagecut.ir.run.given.Apart",
    flatten_with_keys_fn=_apart_with_keys,
)
# with its class: 1.0 is no True
_register(
    Fixed,
    lambda node: ([], (type(node.value).__name__, node.value)),
    lambda _, context: Fixed(context[1]),
)
_register(Given, lambda node: ([], node.path), _given)
_register(Change, _change_parts, _change)
_register(
    Outcome,
    lambda node: ([node.result, list(node.changes)], None),
    lambda parts, _: Outcome(
        parts[0],
        tuple(parts[1]),
    ),
)


# --- taken apart ------------------------------------------------------------------------------------------


def opened_arguments(tree: Any) -> Any:
    """`tree` with an `Apart` in the place of every object that torch takes for a leaf and that is nothing
    but its attributes.

    An object stays a leaf when it holds itself, and when it holds a tensor in one container with what no
    trace can take, or in what cannot be looked into.
    """
    return tree_map(_opened_argument, tree, is_leaf=_is_size)


def _is_size(leaf: Any) -> bool:
    return isinstance(leaf, torch.Size)


def _opened_argument(leaf: Any) -> Any:
    if is_constant(leaf) or not has_only_attributes(leaf):
        return leaf
    try:
        return _opened_part(leaf, ())
    except Closed:
        return leaf


def _opened_part(leaf: Any, around: tuple[Any, ...]) -> Any:
    """A leaf of an attribute, opened. `around` are the objects that it is in."""
    if isinstance(leaf, _FIXED) or is_constant(leaf):
        return Fixed(leaf)
    if not has_only_attributes(leaf):
        return leaf
    if any(leaf is owner for owner in around):
        raise Closed
    within = (*around, leaf)
    parts: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in vars(leaf).items():
        part = _opened_tree(value, within)
        if _is_input(part):
            parts[name] = part
        elif not isinstance(value, torch.device) and hides_tensors([value]):
            raise Closed
        else:
            others[name] = value
    return Apart(
        Shape(type(leaf), tuple(parts), others),
        tuple(parts.values()),
    )


def _opened_tree(value: Any, within: tuple[Any, ...]) -> Any:
    """The value of an attribute, with all objects in it opened."""
    kind = type(value)
    if kind in (torch.Tensor, int):
        return value
    if kind is list:
        return [_opened_tree(part, within) for part in value]
    if kind is dict:
        return {key: _opened_tree(part, within) for key, part in value.items()}
    if value is None or kind in (bool, float, str):
        return Fixed(value)
    return tree_map(lambda leaf: _opened_part(leaf, within), value)


def _is_input(part: Any) -> bool:
    kind = type(part)
    if kind in (torch.Tensor, int, Fixed, Apart):
        return True
    if kind in (list, dict):
        return all(
            map(
                _is_input,
                part.values() if kind is dict else part,
            )
        )
    return all(
        isinstance(
            leaf,
            (torch.Tensor, *SYMBOLIC),
        )
        or type(leaf) is int
        for leaf in tree_leaves(part)
    )


def mapped(function: Callable[[Any], Any], arguments: Any) -> Any:
    """`arguments` with `function` applied to every leaf. Objects and containers are new ones."""
    flat, spec = tree_flatten(opened_arguments(arguments), is_leaf=_is_size)
    return put_in([function(leaf) for leaf in flat], spec)


def put_in(flat: Sequence[Any], spec: Any) -> Any:
    """Arguments of that structure with these leaves, of objects and containers that are new."""
    return closed_arguments(tree_unflatten(list(flat), spec))


def closed_arguments(tree: Any) -> Any:
    """`tree` with a new object in the place of each that was taken apart."""
    return tree_map(_closed, tree, is_leaf=_is_apart)


def _is_apart(node: Any) -> bool:
    return isinstance(node, (Apart, Fixed)) or _is_size(node)


def _closed(node: Any) -> Any:
    if isinstance(node, Fixed):
        return node.value
    if not isinstance(node, Apart):
        return node
    return together([closed_arguments(part) for part in node.parts], node.shape)


def other_attributes(specs: Any, others: Any) -> Iterator[tuple[str, Any, Any]]:
    """The attributes that no trace can take and that differ between two opened arguments of one structure:
    name, value in the first and in the second.
    """
    pairs = [(specs, others)]
    while pairs:
        one, other = pairs.pop()
        if one.type is Apart:
            first, second = one.context.others, other.context.others
            for name in first.keys() | second.keys():
                if not _is_same(first.get(name), second.get(name)):
                    yield name, first.get(name), second.get(name)
        pairs += zip(children(one), children(other), strict=True)


def children(spec: Any) -> Sequence[Any]:
    """The specs of the parts of a structure: a method in later versions of torch, an attribute in earlier."""
    if callable(getattr(spec, "children", None)):
        return list(spec.children())
    return list(spec.children_specs)


def written_spec(spec: TreeSpec) -> Any:
    """The structure of a pytree in plain containers, that can be copied and pickled; None for a leaf. Torch
    warns where a leaf of its own is.
    """
    if spec.type is None:
        return None
    return spec.type, spec.context, [written_spec(child) for child in children(spec)]


def read_spec(written: Any) -> TreeSpec:
    """The structure that was written so."""
    if written is None:
        return tree_structure(0)
    node, context, parts = written
    return TreeSpec(node, context, [read_spec(part) for part in parts])


def _is_same(one: Any, other: Any) -> bool:
    if one is other or isinstance(one, torch.device):
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*one] == [*other] and all(map(_is_same, one.values(), other.values()))
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, (set, frozenset)):
        return bool(one == other)
    return not callable(one) and _is_pickled_alike(one, other)


def _is_pickled_alike(one: Any, other: Any) -> bool:
    """True for two objects that hold the same, whatever they say about their equality. False where this
    cannot be told.
    """
    try:
        return _pickled(one) == _pickled(other)
    except Exception as error:  # the user's own class
        raise_ours(error)
        return False


def _pickled(*thing: Any) -> bytes:
    return pickle.dumps(*thing)


# --- what forward leaves ----------------------------------------------------------------------------------


def part_at(arguments: Any, path: Path) -> Any:
    """The part of the arguments at a path."""
    part = arguments
    for key in path:
        part = parts_of(part)[key]
    return part


def text_of(path: Path, positional: Sequence[str] = ()) -> str:
    """`cache.layers[0].keys` for the path of a part of the argument `cache`. `positional` names the
    positional arguments.
    """
    _, first, *rest = path
    named = dict(enumerate(positional))
    text = str(named.get(first, first))
    for key in rest:
        is_name = isinstance(key, str) and key.isidentifier()
        text += f".{key}" if is_name else f"[{key!r}]"
    return text


def parts_of(part: Any) -> Any:
    """The container that holds the parts of an object or container; None for one that has none."""
    if isinstance(part, (tuple, dict, *_LISTS)):
        return None if _is_size(part) else part
    if isinstance(part, torch.Tensor) or not has_only_attributes(part):
        return None
    return vars(part)


def entries(container: Any) -> list[tuple[Any, Any]]:
    """The parts of a container with their keys or indices."""
    if isinstance(container, dict):
        return [*container.items()]
    return [*enumerate(container)]


class GivenObjects:
    """The objects and containers in the arguments of a call, as they are before it."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._paths: dict[int, Path] = {}
        self._before: list[tuple[Path, Any, list[tuple[Any, Any]]]] = []
        self._kept: list[Any] = []
        self.again: set[int] = set()
        """The ids of the parts that are given in two places."""
        self._walk((tuple(args), dict(kwargs)))

    def _walk(self, arguments: Any) -> None:
        todo: list[tuple[Path, Any]] = [((), arguments)]
        while todo:
            path, part = todo.pop()
            container = parts_of(part)
            if container is None and not isinstance(part, torch.Tensor):
                continue
            if id(part) in self._paths:
                self.again.add(id(part))
                continue
            self._paths[id(part)] = path
            self._kept.append(part)
            if container is None:
                continue
            pairs = entries(container)
            if len(path) > 1:
                self._before.append((path, part, pairs))
            todo += [((*path, key), value) for key, value in reversed(pairs)]

    def outcome(self, result: Any) -> Any:
        """The result `opened`, as an `Outcome` where forward has changed what it was given."""
        changes = [*self._changes()]
        if not changes:
            return opened(result, self._objects(changes))
        return Outcome(
            opened(result, self._objects(changes)),
            tuple(changes),
        )

    def _objects(self, changes: Sequence[Change]) -> dict[int, Given]:
        """The given parts that stand for themselves in a result: objects that torch takes for leaves, and
        containers that forward changed.
        """
        changed = {change.path for change in changes}
        return {
            id(part): Given(path)
            for path, part, _ in self._before
            if path in changed or _is_leaf(part)
        }

    def _changes(self) -> Iterator[Change]:
        parts = {id(part): Given(self._paths[id(part)]) for part in self._kept}
        for path, part, before in self._before:
            after = entries(parts_of(part))
            if isinstance(part, tuple) or _is_equal(before, after):
                continue
            if isinstance(part, _LISTS):
                values = tuple(opened(value, parts, every=True) for _, value in after)
                yield Change(path, (), values, is_list=True)
                continue
            removed, new = _difference(dict(before), dict(after))
            values = tuple(opened(value, parts, every=True) for _, value in new)
            yield Change(
                path,
                tuple(key for key, _ in new),
                values,
                removed,
            )


def _difference(
    before: dict[Any, Any], after: dict[Any, Any]
) -> tuple[tuple[Any, ...], list[tuple[Any, Any]]]:
    """The keys to remove from `before`, and the entries to set in it then, so that it is `after`, in the same
    order.
    """
    removed = tuple(key for key in before if key not in after)
    new = [
        (key, value)
        for key, value in after.items()
        if key not in before or not _is_alike(before[key], value)
    ]
    kept = [key for key in before if key in after]
    added = [key for key, _ in new if key not in before]
    if [*kept, *added] == [*after]:
        return removed, new
    # a key that was removed and set again stands at the end
    return tuple(before), [*after.items()]


def _is_leaf(part: Any) -> bool:
    return has_only_attributes(part) and any(leaf is part for leaf in tree_leaves(part))


def _is_equal(before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> bool:
    return len(before) == len(after) and all(
        key == other_key and _is_alike(value, other)
        for (key, value), (other_key, other) in zip(before, after, strict=True)
    )


def _is_alike(one: Any, other: Any) -> bool:
    """True for one and the same object, and for equal numbers and texts."""
    if one is other:
        return True
    return (
        isinstance(one, (int, float, complex, str, bytes))
        and type(one) is type(other)
        and repr(one) == repr(other)
    )


def put_together(flat: Sequence[Any], spec: Any, arguments: Any) -> Any:
    """The result of a call around its flat outputs. What forward changed is changed in `arguments`, the
    positional and the named ones.

    Raises InputError, and changes nothing, where a changed container is given in two places.
    """
    token = _arguments.set(arguments)
    try:
        outcome = tree_unflatten(list(flat), spec)
    finally:
        _arguments.reset(token)
    if not isinstance(outcome, Outcome):
        return outcome
    refuse_shared(spec, arguments)
    changed = [part_at(arguments, change.path) for change in outcome.changes]
    for part, change in zip(changed, outcome.changes, strict=True):
        _make(change, part)
    return outcome.result


def refuse_shared(spec: Any, arguments: Any) -> None:
    """Raises InputError where a container that forward changes is given in two places: the trace has two in
    its place. `spec` is the structure of the outcome.
    """
    if spec.type is not Outcome:
        return
    again = GivenObjects(*arguments).again
    for change in children(children(spec)[1]):
        path = change.context[0]
        if id(part_at(arguments, path)) in again:
            raise InputError(
                f"forward changes what is given in two places, as {text_of(path)} and elsewhere",
                hint="give each object once",
            )


def holds_given(spec: Any) -> bool:
    """True for the structure of a result that needs the arguments to be put together."""
    return spec.type in (Outcome, Given) or any(map(holds_given, children(spec)))


def _make(change: Change, part: Any) -> None:
    container = parts_of(part)
    if change.is_list:
        container.clear()
        container.extend(change.parts)
        return
    for key in change.removed:
        del container[key]
    for key, value in zip(change.keys, change.parts, strict=True):
        container[key] = value


@contextmanager
def opening(module: torch.nn.Module) -> Iterator[None]:
    """While open, `module` takes `opened_arguments`, and returns its result `opened`, as an `Outcome` where
    it changes what it is given.
    """
    calls: list[GivenObjects] = []

    def begin(_: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = closed_arguments((args, kwargs))
        calls.append(GivenObjects(args, kwargs))
        return args, kwargs

    def end(_: Any, args: Any, result: Any) -> Any:
        return calls.pop().outcome(result)

    hooks = (
        module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
        module.register_forward_hook(end),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
