"""The batch of a step: how it is divided among the micro-batches, and how their outputs become those of one
batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from stagecut.backend.ranks.wire import boundaries, fed_inputs
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Value
from stagecut.ir.run.call import check_inputs
from stagecut.ir.run.objects import opened
from stagecut.ir.types import TensorType


class Batch:
    """The micro-batches of a step: the flat inputs of each, the targets of each."""

    def __init__(self, pipe: Staged, count: int, device: torch.device) -> None:
        self._pipe, self._count, self._device = pipe, count, device
        self._last_boundary = boundaries(pipe.program, fed_inputs(pipe.program))[-1]
        self.inputs: list[list[Any]] = []
        self.targets: list[Any] = []

    def divide(self, args: Any, kwargs: Any) -> dict[str, int]:
        """Sets the flat inputs of every micro-batch; returns the symbolic sizes of one."""
        spec = self._pipe._call_spec
        flat = spec.flatten(args, kwargs) if spec is not None else list(args)
        inputs, count = self._pipe.program.inputs, self._count
        batch = _batch_symbol(inputs)
        parts = [
            _chunks(v, item, count, batch) for v, item in zip(inputs, flat, strict=True)
        ]
        self.inputs = [
            [_to(part[i], self._device) for part in parts] for i in range(count)
        ]
        # all chunks have the same sizes
        return check_inputs(
            inputs, self.inputs[0], spec.ranges if spec is not None else None
        )

    def divide_target(self, target: Any) -> None:
        """Sets the target of every micro-batch."""
        self.targets = _split_target(target, self._count)

    def structured(self, packed: Sequence[torch.Tensor], chunk: int) -> Any:
        """The model's own output of one micro-batch."""
        program = self._pipe.program
        made = dict(zip(self._last_boundary, packed, strict=True))
        given = {
            v: item
            for v, item in zip(program.inputs, self.inputs[chunk], strict=True)
            if v not in made
        }
        flat = [
            leaf
            if not isinstance(leaf, Value)
            else given[leaf]
            if leaf in given
            else made[leaf]
            if isinstance(leaf.type, TensorType)
            else made[leaf].item()
            for leaf in program.outputs
        ]
        spec = self._pipe._call_spec
        return spec.unflatten(flat) if spec is not None else flat

    def joined(self, results: Mapping[int, Sequence[torch.Tensor]]) -> Any:
        """The outputs of all micro-batches as those of one batch: tensors are joined along dim 0; a number
        becomes the mean.
        """
        outputs = [self.structured(results[i], i) for i in range(self._count)]
        return tree_map(_join, *map(opened, outputs))


def _batch_symbol(inputs: Sequence[Value]) -> str | None:
    """The symbolic size of the batch: that of the first input whose first dim varies."""
    for value in inputs:
        if (
            isinstance(value.type, TensorType)
            and value.type.shape
            and isinstance(value.type.shape[0], str)
        ):
            return value.type.shape[0]
    return None


def _chunks(value: Value, item: Any, count: int, batch: str | None) -> list[Any]:
    """One input of the whole batch, split for the micro-batches. An input without a batch dimension is the
    same for all.
    """
    kind = value.type
    if (
        count == 1
        or not isinstance(item, torch.Tensor)
        or not isinstance(kind, TensorType)
        or item.dim() != len(kind.shape)
    ):
        return [item] * count
    dim = next(
        (d for d, want in enumerate(kind.shape) if want == batch and batch is not None),
        None,
    )
    if dim is None:
        dim = next(
            (
                d
                for d, want in enumerate(kind.shape)
                if isinstance(want, int) and item.shape[d] == count * want != want
            ),
            None,
        )
    if dim is None:
        return [item] * count
    if item.shape[dim] % count:
        raise InputError(
            f"input '{value.hint}' has a batch of {item.shape[dim]}, which {count} micro-batches do not "
            "divide",
            hint="pass a multiple of n_microbatches",
        )
    return list(item.chunk(count, dim))


def _split_target(target: Any, count: int) -> list[Any]:
    if target is None:
        return []

    def part(item: Any, index: int) -> Any:
        return (
            item.tensor_split(count)[index]
            if isinstance(item, torch.Tensor) and item.dim()
            else item
        )

    return [tree_map(lambda item, i=i: part(item, i), target) for i in range(count)]


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item


def _join(*items: Any) -> Any:
    if not isinstance(items[0], torch.Tensor):
        return items[0]
    if items[0].dim():
        return torch.cat(items)
    return torch.stack(items).mean() if items[0].is_floating_point() else items[0]
