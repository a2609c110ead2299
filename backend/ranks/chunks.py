"""How the user says that a batch is divided and joined: torch's chunk specs, and what they do to a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch.distributed.pipelining.microbatch import (
    TensorChunkSpec,
    _Replicate,
    _split_block_mask,
    merge_chunks,
)
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves, tree_map

from stagecut.ir.errors import InputError
from stagecut.ir.run.objects import opened

Division = tuple[tuple[int, ...], int]
"""The shape of a tensor that is divided, and the dim along which it is."""


def merged_by_spec(outputs: list[Any], spec: Any) -> Any:
    """The outputs of the micro-batches put together as torch's specs say."""
    try:
        return merge_chunks(outputs, spec)
    except (AssertionError, ValueError, RuntimeError, IndexError, TypeError) as error:
        raise InputError(
            f"output_merge_spec does not fit what the model returns: {error}",
            hint="TensorChunkSpec(dim) or a reducer, such as sum_reducer, for each tensor that it returns",
        ) from error


def divided_by_spec(value: Any, spec: Any, count: int, where: str) -> list[Any]:
    """The parts of a value as torch's specs say. Raises InputError for a spec that does not fit."""
    if spec is None or _is_replicate(spec):
        return [value] * count
    if isinstance(spec, TensorChunkSpec):
        return _divided_along(value, spec.split_dim, count, where)
    if _fits_mapping(value, spec):
        return _divided_mapping(value, spec, count, where)
    if _fits_sequence(value, spec):
        return _divided_sequence(value, spec, count, where)
    value_class = type(value).__name__
    spec_class = type(spec).__name__
    raise InputError(
        f"{where} is a {value_class}, and its chunk spec a {spec_class} that does not fit",
        hint="TensorChunkSpec(dim) or _Replicate(), of torch.distributed.pipelining.microbatch, for each "
        "tensor",
    )


def _is_replicate(spec: Any) -> bool:
    return spec is _Replicate or isinstance(spec, _Replicate)


def _fits_mapping(value: Any, spec: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if not isinstance(spec, Mapping):
        return False
    return spec.keys() <= value.keys()


def _fits_sequence(value: Any, spec: Any) -> bool:
    if not isinstance(value, list | tuple):
        return False
    if not isinstance(spec, list | tuple):
        return False
    return len(value) == len(spec)


def _divided_mapping(
    value: dict[Any, Any], spec: Mapping[Any, Any], count: int, where: str
) -> list[Any]:
    chunks: list[dict[Any, Any]] = [{} for _ in range(count)]
    for key, inner in value.items():
        inner_spec = spec.get(key)
        inside = f"{where}[{key!r}]"
        parts = divided_by_spec(inner, inner_spec, count, inside)
        for chunk, part in zip(chunks, parts, strict=True):
            chunk[key] = part
    return chunks


def _divided_sequence(
    value: Sequence[Any], spec: Sequence[Any], count: int, where: str
) -> list[Any]:
    chunks: list[list[Any]] = [[] for _ in range(count)]
    for index, inner in enumerate(value):
        inside = f"{where}[{index}]"
        parts = divided_by_spec(inner, spec[index], count, inside)
        for chunk, part in zip(chunks, parts, strict=True):
            chunk.append(part)
    return [_like(value, chunk) for chunk in chunks]


def _like(sequence: Any, items: list[Any]) -> Any:
    """A sequence of the same class with these items."""
    kind = type(sequence)
    if hasattr(sequence, "_fields"):
        return kind(*items)
    return kind(items)


def _divided_along(value: Any, dim: int, count: int, where: str) -> list[Any]:
    """The parts of everything in a value along one dim."""
    if isinstance(value, BlockMask):
        return list(_split_block_mask(value, count))

    def part(leaf: Any, chunk: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        _refuse_indivisible(leaf, dim, count, where)
        pieces = leaf.tensor_split(count, dim)
        return pieces[chunk]

    return parts_of(value, part, count)


def _refuse_indivisible(tensor: torch.Tensor, dim: int, count: int, where: str) -> None:
    """Returns when a tensor has a part along a dim for each micro-batch."""
    has_dim = -tensor.dim() <= dim < tensor.dim()
    if has_dim and tensor.shape[dim] >= count:
        return
    raise InputError(
        f"{where} of shape {list(tensor.shape)} cannot be divided along dim {dim} among {count} "
        "micro-batches"
    )


def divisions(value: Any, spec: Any) -> Iterator[Division]:
    """The tensors that a spec divides."""
    if isinstance(spec, TensorChunkSpec):
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.dim():
                shape = tuple(leaf.shape)
                yield shape, spec.split_dim % leaf.dim()
    elif isinstance(spec, Mapping):
        for key, inner_spec in spec.items():
            yield from divisions(value[key], inner_spec)
    elif isinstance(spec, list | tuple):
        for inner, inner_spec in zip(value, spec, strict=True):
            yield from divisions(inner, inner_spec)


def parts_of(tree: Any, part: Callable[..., Any], count: int) -> list[Any]:
    """`tree` for each micro-batch, with `part(leaf, chunk=number)` in the place of each leaf."""
    parts: list[Any] = []
    for chunk in range(count):
        part_of_leaf = partial(part, chunk=chunk)
        parts.append(_mapped(tree, part_of_leaf))
    return parts


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """`tree` with `function` of each leaf in its place, also in dataclasses, and in objects of any class that
    hold tensors in their attributes.
    """
    return tree_map(lambda leaf: _inside(leaf, function), opened(tree))


def _inside(leaf: Any, function: Callable[[Any], Any]) -> Any:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return function(leaf)
    twin = copy(leaf)
    for field in dataclasses.fields(leaf):
        value = getattr(leaf, field.name)
        inner = _mapped(value, function)
        object.__setattr__(twin, field.name, inner)
    return twin
