"""Tells which tensors share storage, and which ones a call of an op writes. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from stagecut.ir.graph import target_of
from stagecut.ir.ops import facts_of, flag_position
from stagecut.ir.types import DTYPES


def undeclared_writes(target: str, args: Sequence[Any]) -> list[Any]:
    """The running statistics that a norm in training updates, though its schema does not say so."""
    called = target_of(target)
    places, position = facts_of(called.name).statistics, flag_position(called)
    if (
        not places
        or position is None
        or position >= len(args)
        or args[position] is False
    ):
        return []
    return [args[place] for place in places if args[place] is not None]


def written_tensors(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The tensors that a call of an op writes."""
    named = dict(
        zip((a.name for a in func._schema.arguments), args, strict=False)
    ) | dict(kwargs)
    written = [
        named.get(a.name)
        for a in func._schema.arguments
        if a.alias_info and a.alias_info.is_write
    ]
    return [
        item
        for item in tree_leaves([written, undeclared_writes(str(func), args)])
        if isinstance(item, torch.Tensor)
    ]


def written_by(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[int | None]:
    """The storages that a call of an op writes."""
    return [storage_of(tensor) for tensor in written_tensors(func, args, kwargs)]


def shared_with(
    made: Iterable[Any], given: Sequence[torch.Tensor]
) -> tuple[int | None, ...]:
    """For each tensor among `made`, the place of the first tensor of `given` whose storage it shares; None
    where it has storage of its own.
    """
    homes = {
        storage_of(tensor): place for place, tensor in reversed([*enumerate(given)])
    }
    return tuple(
        homes.get(storage_of(item)) for item in made if isinstance(item, torch.Tensor)
    )


def storage_of(value: Any) -> int | None:
    """The identity of a tensor's storage; None for an object without storage."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


SHORT: dict[torch.dtype, str] = {
    getattr(torch, full): short
    for short, full in DTYPES.items()
    if hasattr(torch, full)
}
"""torch dtype -> its short name."""
