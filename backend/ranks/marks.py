"""Where the samples of a batch are in a model's inputs, arguments and outputs, as its program says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from stagecut.backend.ranks.agree import everywhere
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Program, Value
from stagecut.ir.run.call import CallSpec
from stagecut.ir.run.shown import shown_type
from stagecut.ir.types import ITEM, Batch, TensorType

Marks = Mapping[Value, Batch | None]
"""Where the samples are in each input and output; None where no rank knows."""


class SampleList(NamedTuple):
    """A list that has an item for each sample: how many the example has, and how they go with the samples."""

    length: int
    mark: Batch


def marks_of(
    program: Program, group: dist.ProcessGroup | None
) -> dict[Value, Batch | None]:
    """Where the samples are in the inputs and outputs, as the first rank has it whose program tells it."""
    values = [*program.inputs]
    for leaf in program.outputs:
        if isinstance(leaf, Value):
            values.append(leaf)
    own_marks = [_mark(value) for value in values]
    marks = max(everywhere(own_marks, group), key=_number_known)
    return dict(zip(values, marks, strict=True))


def _mark(value: Value) -> Batch | None:
    if not isinstance(value.type, TensorType):
        return None
    return value.type.batch


def _number_known(marks: list[Batch | None]) -> int:
    return len(marks) - marks.count(None)


def places_of(spec: CallSpec | None, inputs: Sequence[Value]) -> dict[str, range]:
    """Name of an argument -> the places of what is in it among the flat inputs."""
    places: dict[str, range] = {}
    if spec is None:
        for place in range(len(inputs)):
            places[str(place)] = range(place, place + 1)
        return places
    for name, tree in _trees(spec):
        leaves = tree_leaves(tree)
        places[name] = range(0)
        if leaves:
            first = leaves[0]
            last = leaves[-1]
            places[name] = range(first, last + 1)
    return places


def lists_of(
    spec: CallSpec | None, inputs: Sequence[Value], marks: Marks
) -> dict[str, SampleList]:
    """Name of an argument -> the list of samples that it is in the example."""
    lists: dict[str, SampleList] = {}
    if spec is None:
        return lists
    for name, tree in _trees(spec):
        leaves = tree_leaves(tree)
        if not leaves:
            continue
        if not isinstance(tree, list | tuple):
            continue
        first = inputs[leaves[0]]
        mark = marks[first]
        if mark is not None and mark.dim == ITEM:
            lists[name] = SampleList(len(tree), mark)
    return lists


def _trees(spec: CallSpec) -> Iterator[tuple[str, Any]]:
    """Each argument, with the places among the flat inputs as its leaves."""
    places = range(spec.in_spec.num_leaves)
    positional, by_name = spec.in_spec.unflatten(places)
    yield from zip(spec.positional, positional, strict=True)
    yield from by_name.items()


def cut(
    tensor: torch.Tensor, dim: int, mark: Batch | None, count: int
) -> list[torch.Tensor]:
    """A tensor in equal parts, one for each micro-batch; of each block of `mark` an equal part. Raises
    InputError for a sparse one.
    """
    if tensor.layout not in (torch.strided, torch.jagged):
        raise InputError(
            f"a tensor of layout {tensor.layout} is not divided among micro-batches",
            where=shown_type(tensor),
            hint="give it dense: tensor.to_dense()",
        )
    if mark is None or len(mark.terms) == 1:
        return list(tensor.tensor_split(count, dim))
    rows = [factor for factor, _ in mark.terms]
    total = sum(rows)
    size = tensor.shape[dim]
    block_sizes = [size * factor // total for factor in rows]
    chunks: list[list[torch.Tensor]] = [[] for _ in range(count)]
    for block in tensor.split(block_sizes, dim):
        parts = block.tensor_split(count, dim)
        for chunk, part in zip(chunks, parts, strict=True):
            chunk.append(part)
    return [torch.cat(chunk, dim) for chunk in chunks]
