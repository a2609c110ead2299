"""Ops that read some of the memory that they write, through another view of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stagecut.ir.aliases import is_what_it_wrote, storage_root, unwritten, viewed_value
from stagecut.ir.errors import RolesError
from stagecut.ir.graph import Op, Value
from stagecut.ir.ops import facts
from stagecut.ir.types import TensorType, Type, same_layout

_END = 1 << 62


def refuse_overlap(op: Op) -> None:
    """Raises RolesError where an op may read elements that it writes. What eager reads there depends on the
    order in which a kernel goes through the elements; in a graph nothing is written, and it would read what
    was there before.
    """
    if op.regions:
        return
    for written in map(_tensor, op.effects.writes):
        for read in map(_tensor, op.operands):
            if _may_overlap(written, read):
                raise RolesError(
                    f"{op.target} reads {read!r} while it writes {written!r}, which may share elements",
                    where=op.where(),
                    hint="read a clone",
                )


def _may_overlap(one: Value, other: Value) -> bool:
    if storage_root(one) is not storage_root(other) or _is_same_view(one, other):
        return False
    return not any(
        _are_apart(part, other_part)
        for part in _views_from(one)
        for other_part in _views_from(other)
    )


def _tensor(value: Value) -> Value:
    """The first value that has the elements of this one in the same places."""
    while True:
        value = unwritten(value)
        viewed = viewed_value(value)
        if viewed is None:
            return value
        reads_around = isinstance(value.owner, Op) and facts(value.owner).reads_around
        same = same_layout(value.type, viewed.type) and not reads_around
        if not same and not is_what_it_wrote(value):
            return value
        value = viewed


def _views_from(value: Value) -> Iterator[Value]:
    """A view, the view that it was taken of, and so on to the tensor."""
    while (viewed := viewed_value(value)) is not None:
        yield value
        value = _tensor(viewed)


def _is_same_view(one: Value, other: Value) -> bool:
    """True for one value, and for two that equal ops made of the same tensor."""
    if one is other:
        return True
    first, second = one.owner, other.owner
    if not isinstance(first, Op) or not isinstance(second, Op):
        return False
    if (first.target, first.kwargs) != (second.target, second.kwargs):
        return False
    places = first.results.index(one), second.results.index(other)
    return places[0] == places[1] and _arguments(first) == _arguments(second)


def _arguments(op: Op) -> list[Any]:
    return [_tensor(arg) if isinstance(arg, Value) else arg for arg in op.args]


def _are_apart(one: Value, other: Value) -> bool:
    """True for two parts of one tensor that surely have no element in common."""
    first, second = one.owner, other.owner
    if not isinstance(first, Op) or not isinstance(second, Op):
        return False
    if first is second:
        divided = first.operands[0].type
        return one is not other and facts(first).divides and _lies_apart(divided)
    piece, other_piece = _piece(first), _piece(second)
    if piece is None or other_piece is None:
        return False
    base, dim, start, end = piece
    other_base, other_dim, other_start, other_end = other_piece
    if dim != other_dim or not _is_same_view(base, other_base):
        return False
    return bool(end <= other_start or other_end <= start)


def _piece(op: Op) -> tuple[Value, int, int, int] | None:
    """The tensor of which an op takes a piece, the dim along which it does, and the places there from start
    to end. None where that is not known.
    """
    kind = facts(op).takes
    if not kind or op.kwargs or not _lies_apart(op.operands[0].type):
        return None
    base = op.operands[0]
    assert isinstance(base.type, TensorType)
    dim, start, end = _bounds(kind, op.args[1:])
    if not all(isinstance(number, int) for number in (dim, start, end)):
        return None
    dim %= len(base.type.shape)
    size = base.type.shape[dim]
    if not isinstance(size, int) and min(start, end) < 0:
        return None
    if isinstance(size, int):
        start, end = (min(n + size if n < 0 else n, size) for n in (start, end))
    if kind == "place":
        end = start + 1
    return _tensor(base), dim, start, end


def _lies_apart(value_type: Type) -> bool:
    """True for a tensor of which surely no two elements lie in one place."""
    if not isinstance(value_type, TensorType):
        return False
    if value_type.strides is None:
        return True
    dims = [*zip(value_type.strides, value_type.shape, strict=True)]
    steps = [
        (n, size) for n, size in dims if isinstance(n, int) and isinstance(size, int)
    ]
    end = 1
    for step, size in sorted(steps):
        if size > 1 and step < end:
            return False
        end += step * (size - 1)
    return len(steps) == len(dims)


def _bounds(kind: str, args: Any) -> tuple[Any, Any, Any]:
    """The dim, the start and the end among the arguments behind the tensor."""
    dim = args[0] if args else 0
    start = args[1] if len(args) > 1 else 0
    end = args[2] if kind == "range" and len(args) > 2 else _END
    return dim, 0 if start is None else start, _END if end is None else end
