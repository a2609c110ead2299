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
    arguments = func._schema.arguments
    by_name = dict(zip((argument.name for argument in arguments), args, strict=False))
    by_name |= kwargs
    written = [
        by_name.get(argument.name)
        for argument in arguments
        if argument.alias_info and argument.alias_info.is_write
    ]
    leaves = tree_leaves([written, undeclared_writes(str(func), args)])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def written_by(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[int | None]:
    """The storages that a call of an op writes."""
    return [storage_of(tensor) for tensor in written_tensors(func, args, kwargs)]


def shared_with(
    results: Iterable[Any], operands: Sequence[torch.Tensor]
) -> tuple[int | None, ...]:
    """For each tensor among `results`, the place of the first of `operands` whose storage it shares; None
    where it has storage of its own.
    """
    places = {
        storage_of(tensor): place for place, tensor in reversed([*enumerate(operands)])
    }
    return tuple(
        places.get(storage_of(result))
        for result in results
        if isinstance(result, torch.Tensor)
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
