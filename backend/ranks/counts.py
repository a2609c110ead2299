"""How many samples the batches of a call have in each micro-batch, and how outputs are joined by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagecut.ir.errors import InputError
from stagecut.ir.types import ANY, ITEM, MEAN, SUM, Batch

SAY = (
    "say how it is divided: Driver(..., args_chunk_spec=, kwargs_chunk_spec=), with torch's TensorChunkSpec; "
    "or give the micro-batches: step(arg_mbs=[...], kwarg_mbs=[...])"
)
"""What the user can do where the program does not say how an input is divided."""


@dataclass
class Samples:
    """The samples of one batch: how many there are in all, in each micro-batch, and in the example (0 where
    that is not known); whether they are divided; and one input that has them.
    """

    whole: int
    parts: list[int]
    example: int
    divided: bool
    where: str


class SampleCounts:
    """The samples of each batch of one call, by the symbol of the batch.

    any_divided: whether any input is divided, also one whose samples are not counted.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._by_symbol: dict[str, Samples] = {}
        self.any_divided = False

    def add(self, symbol: str, samples: Samples) -> None:
        """An input has these samples of a batch. Raises InputError where another one has others."""
        first = self._by_symbol.setdefault(symbol, samples)
        if first.parts != samples.parts or first.divided != samples.divided:
            raise _do_not_go_together(first, samples)

    def refuse_disagreement(self) -> None:
        """Returns when batches of their own grow by the same factor over the example. Where they do not, it
        is not known which of their samples belong together.
        """
        first: Samples | None = None
        for samples in self._by_symbol.values():
            if not samples.divided or not samples.example:
                continue
            if first is None:
                first = samples
            if first.whole * samples.example != samples.whole * first.example:
                raise _grow_differently(first, samples)

    def joined(self, mark: Batch | None, parts: list[Any]) -> torch.Tensor | None:
        """An output of the whole batch; None where it is not known how the parts make it."""
        if mark is None or mark.dim == ITEM:
            return None
        if mark.dim == SUM:
            total = torch.stack(parts).sum(0)
            return total.to(parts[0].dtype)
        if mark.dim == MEAN:
            return self._mean(parts)
        dim = mark.dim
        assert isinstance(dim, int)
        if not _differ_only_along(dim, parts):
            return None
        if mark.size == ANY:
            return torch.cat(parts, dim)
        return self._concatenated(mark, parts, dim)

    def _concatenated(
        self, mark: Batch, parts: list[torch.Tensor], dim: int
    ) -> torch.Tensor | None:
        """The parts put together block by block; None where they have other rows than expected."""
        rows = self.rows(mark)
        if rows is None:
            return None
        split_parts: list[tuple[torch.Tensor, ...]] = []
        for part, block_rows in zip(parts, rows, strict=True):
            if part.shape[dim] != sum(block_rows):
                return None
            split_parts.append(part.split(block_rows, dim))
        pieces: list[torch.Tensor] = []
        for block in zip(*split_parts, strict=True):
            pieces += block
        return torch.cat(pieces, dim)

    def _mean(self, means: list[torch.Tensor]) -> torch.Tensor | None:
        """The mean over all samples of the means over those of each micro-batch."""
        counts = [
            samples.parts for samples in self._by_symbol.values() if samples.divided
        ]
        if not counts and not self.any_divided:
            return None
        if all(map(_are_equal, counts)):
            return torch.stack(means).mean(0)
        first = counts[0]
        if any(parts != first for parts in counts):
            return None
        stacked = torch.stack(means)
        weights = torch.tensor(first, dtype=stacked.dtype, device=stacked.device)
        total = (stacked * weights).sum(0)
        return total / weights.sum()

    def rows(self, mark: Batch) -> list[list[int]] | None:
        """How many rows each block of a tensor has in each micro-batch; None where that is not known, or a
        batch is not divided.
        """
        rows: list[list[int]] = [[] for _ in range(self._count)]
        for factor, symbol in mark.terms:
            samples = self._by_symbol.get(symbol)
            if samples is None or not samples.divided:
                return None
            for chunk_rows, part in zip(rows, samples.parts, strict=True):
                chunk_rows.append(factor * part)
        return rows


def _differ_only_along(dim: int, parts: Sequence[torch.Tensor]) -> bool:
    """True for tensors that can be put together along a dim."""
    rests = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    return len(rests) == 1


def _are_equal(numbers: Sequence[int]) -> bool:
    return len(set(numbers)) == 1


def _do_not_go_together(first: Samples, other: Samples) -> InputError:
    return InputError(
        f"input '{other.where}' has a batch of {other.whole}, and input '{first.where}', which goes "
        f"with it, one of {first.whole}",
        hint=f"pass inputs of as many samples; or {SAY}",
    )


def _grow_differently(first: Samples, other: Samples) -> InputError:
    return InputError(
        f"inputs '{first.where}' and '{other.where}' have batches of {first.whole} and "
        f"{other.whole}, in the example {first.example} and {other.example}: it is not known "
        "which samples of the two go into one micro-batch",
        hint=SAY,
    )
