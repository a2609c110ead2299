"""Which dims of an example's inputs go together, and whether they are those of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from stagecut.frontend.capture.samples import (
    NO_LONGER,
    PARTS,
    Axes,
    Example,
    Longer,
    Runs,
)
from stagecut.ir.graph import Program, nested_ops
from stagecut.ir.types import ITEM, TensorType

OTHER_DATA = 10
"""How often an output whose size depends on data is looked at again on random numbers."""

MOST_STARTS = 256
"""How many rows of other batches are looked for in front of those of a batch."""

DEEPEST = 3
"""The samples are looked for along so many dims of an input, the first ones."""

NEVER, MIXED, UNKNOWN, SEPARATE = -1, 0, 1, 2
"""An op computes along the dim, such as attention; the rows of a sample depend on other samples; nobody can
tell; they do not.
"""


@dataclass(eq=False)
class Together:
    """Axes that go together, and what their runs have shown.

    whole, other: the outputs on three times the samples, and on the first sample in the place of all; None
    where nothing was run, or nothing has values. symbol: the name of the batch in the marks. varies: the
    symbol of the size, where it was declared to vary.
    """

    axes: Axes
    state: int = UNKNOWN
    whole: list[Any] | None = None
    other: list[Any] | None = None
    symbol: str = "b"
    varies: str = ""

    @property
    def leads(self) -> bool:
        """True when the samples lie along the first dim of every input."""
        return all(dim in (0, ITEM) for dim in self.axes.values())


class Search:
    """Finds the axes of an example that go together."""

    def __init__(self, example: Example, runs: Runs, program: Program) -> None:
        self.example, self.runs, self.program = example, runs, program
        self.base = runs(example.longer({})) if runs.real else None
        self._outputs = len(program.outputs)
        if self.base is not None and len(self.base) != self._outputs:
            self.base = None
        self._free = {
            key: [
                dim
                for dim, size in enumerate(value.type.shape)
                if isinstance(size, int) and size > 0
            ]
            for key, value in enumerate(program.inputs)
            if isinstance(value.type, TensorType)
        }
        self._written = _written_buffers(program)
        self._tried: dict[tuple[tuple[int, int | str], ...], Together | None] = {}

    @property
    def values(self) -> bool:
        """True when runs have values."""
        return self.base is not None

    def chosen(self, varying: Sequence[Together]) -> list[Together]:
        """The classes of axes along which the batch of a call may be divided, no input in two of them."""
        if self.runs.real and not self.values:
            return [c for c in varying if c.state == UNKNOWN and c.leads]
        candidates = [self._shown(c) for c in varying]
        candidates += self._static(candidates)
        ranked = sorted(candidates, key=lambda c: (-c.state, not c.leads, -len(c.axes)))
        chosen: list[Together] = []
        for one in ranked:
            rivals = [c for c in candidates if c is not one and self._meet(c, one)]
            taken = any(c in chosen for c in rivals)
            if not taken and _may_be_chosen(one, rivals):
                chosen.append(one)
        return sorted(chosen, key=lambda c: min(map(self._first_input, c.axes)))

    def _meet(self, one: Together, other: Together) -> bool:
        """True for two classes with axes of the same input."""
        return not self._inputs(one).isdisjoint(self._inputs(other))

    def _inputs(self, one: Together) -> set[int]:
        lists = [self.example.lists[key] for key in one.axes if key < 0]
        return {*one.axes, *(i for items in lists for i in items)}

    def _first_input(self, key: int) -> int:
        return key if key >= 0 else self.example.lists[key].start

    def _shown(self, one: Together) -> Together:
        """A class of sizes that vary, and what a run shows of it."""
        found = self.attempt(one.axes) if self.values else None
        if found is None:
            return one
        state = found.state if found.state == SEPARATE else min(one.state, found.state)
        return replace(found, state=state, varies=one.varies)

    def _static(self, varying: Sequence[Together]) -> list[Together]:
        """The classes of dims whose sizes are fixed in the trace."""
        settled = {key for c in varying if c.leads and c.state for key in c.axes}
        left = {*self._free, *self.example.lists} - settled
        found: dict[Together, None] = {}
        for axes in self._proposals(left):
            for one in self._minimal(axes):
                found[one] = None
                likely = one.leads or len(one.axes) > 1
                if one.state == SEPARATE or (one.state == UNKNOWN and likely):
                    for key in one.axes:
                        left -= {key, *self.example.lists.get(key, ())}
        return list(found)

    def _proposals(self, left: set[int]) -> Iterator[Axes]:
        """Axes that may go together, the most likely ones first. Only inputs in `left`, which shrinks, are
        proposed.
        """
        for depth in range(DEEPEST):
            yield self._at(left, depth)
            for size in self._sizes_at(left, depth):
                yield {
                    key: dim
                    for key, dim in self._at(left, depth).items()
                    if self.example.size(key, dim) == size
                }
            for key in sorted(left):
                yield self._at({key} & left, depth)
            if depth == 0:
                yield from self._lists(left)
            if not self.values and not self._only_mixed():
                break
        yield from self._mixtures(left)

    def _only_mixed(self) -> bool:
        """True when all that goes together so far is no batch."""
        found = [one.state for one in self._tried.values() if one is not None]
        return bool(found) and max(found) == NEVER

    def _lists(self, left: set[int]) -> Iterator[Axes]:
        """Lists that have an item for each sample, alone and with the other inputs."""
        lists: Axes = {key: ITEM for key in self.example.lists if key in left}
        inside = {i for key in lists for i in self.example.lists[key]}
        for key in lists:
            yield {key: ITEM}
        yield lists
        yield lists | self._at(left - inside - lists.keys(), 0)

    def _mixtures(self, left: set[int]) -> Iterator[Axes]:
        """Axes of one size, another dim in each input."""
        for seed in sorted(key for key in left if key >= 0):
            for dim in self._free.get(seed, ())[:DEEPEST]:
                size = self.example.size(seed, dim)
                others: list[list[tuple[int, int | str] | None]]
                others = [
                    [
                        (key, d)
                        for d in self._free[key]
                        if self.example.size(key, d) == size
                    ]
                    for key in sorted(left)
                    if key >= 0 and key != seed
                ]
                choices = [[None, *dims] for dims in others if dims]
                for choice in product(*choices):
                    if seed in left:
                        yield {seed: dim, **dict(filter(None, choice))}

    def _at(self, keys: set[int], depth: int) -> Axes:
        return {
            key: depth for key in sorted(keys) if key >= 0 and depth in self._free[key]
        }

    def _sizes_at(self, keys: set[int], depth: int) -> list[int]:
        axes = self._at(keys, depth)
        sizes = dict.fromkeys(self.example.size(key, dim) for key, dim in axes.items())
        return list(sizes) if len(sizes) > 1 else []

    def _minimal(self, axes: Axes) -> list[Together]:
        """The classes that axes consist of; nothing for axes that do not go together."""
        together = self.attempt(axes)
        if together is None:
            return []
        parts: list[Together] = []
        rest = dict(axes)
        while len(rest) > 1:
            part = self._part(rest)
            if part is None:
                break
            parts.append(part)
            rest = {key: dim for key, dim in rest.items() if key not in part.axes}
        if not rest:
            return parts
        last = self.attempt(rest)
        return [*parts, last] if last is not None else [together]

    def _part(self, axes: Axes) -> Together | None:
        """The smallest class with the first of some axes; None where it is all of them."""
        (first, dim), *others = axes.items()
        if (alone := self.attempt({first: dim})) is not None:
            return alone
        if not self.values or len(others) < 2:
            return None
        pairs = (self.attempt({first: dim, key: d}) for key, d in others)
        return next(filter(None, pairs), None)

    def on_other_data(self, one: Together) -> Iterator[tuple[Any, Any, Any]]:
        """The outputs on the example, on its first sample alone, and on three times the samples; then the
        same with random numbers in the place of all floats, those of the model too.
        """
        for seed in range(OTHER_DATA + 1 if self.values else 0):
            self.runs.shake(seed)
            some = self.example.shaken() if seed else self.example
            calls = some.longer({}), some.first(one.axes), some.longer(one.axes)
            base, other, whole = map(self.runs, calls)
            if {len(base or ()), len(other or ()), len(whole or ())} == {self._outputs}:
                yield base, other, whole
        self.runs.shake(0)

    def attempt(self, axes: Axes) -> Together | None:
        """What a run along these axes shows; None where the model does not run."""
        key = tuple(sorted(axes.items()))
        if key not in self._tried:
            self._tried[key] = self._attempt(dict(axes)) if axes else None
        return self._tried[key]

    def _on_more(self, axes: Axes) -> list[Any] | None:
        """The outputs on more samples. A model that keeps something for each sample in buffers that it
        writes, such as keys and values, has longer ones then.
        """
        parts = self.runs.parts
        sizes = {self.example.size(key, dim) for key, dim in axes.items()}
        for longer in (NO_LONGER, *self._kept_along(sizes)):
            whole = self.runs(self.example.longer(axes, parts), longer)
            if whole is not None:
                return whole
        return None

    def _kept_along(self, sizes: set[int]) -> Iterator[Longer]:
        """The written buffers that have one of these sizes along a dim, the first dims first."""
        for dim in range(DEEPEST):
            longer = {
                name: dim
                for name, shape in self._written.items()
                if dim < len(shape) and shape[dim] in sizes
            }
            if longer:
                yield longer

    def _attempt(self, axes: Axes) -> Together | None:
        whole = self._on_more(axes)
        if whole is None or len(whole) != self._outputs:
            return None
        if self.base is None:
            return Together(axes, NEVER if self.runs.mixed else UNKNOWN, whole)
        other = self.runs(self.example.first(axes))
        if other is None or len(other) != len(whole):
            return None
        found = Together(axes, UNKNOWN, whole, other)
        return replace(found, state=_state(self.base, found))


def _written_buffers(program: Program) -> dict[str, tuple[Any, ...]]:
    """The shape of each buffer that an op of the program writes."""
    written = {v for op in nested_ops(program.all_ops()) for v in op.effects.writes}
    return {
        entry.name: entry.type.shape
        for entry in program.state
        if entry.value in written and isinstance(entry.type, TensorType)
    }


def _may_be_chosen(one: Together, rivals: Sequence[Together]) -> bool:
    """True for a class along which a batch may be divided. Its rivals have other dims of the same inputs.

    A class that does not lead stands back behind a leading one that has further inputs. Where no size varies,
    a call shows by its sizes whether it is divided along the right dim.
    """
    leading = [rival for rival in rivals if rival.leads and not one.leads]
    if any(not rival.axes.keys() <= one.axes.keys() for rival in leading):
        return False
    if not one.varies or one.state == SEPARATE:
        return True
    if one.state == UNKNOWN:
        return one.leads or (
            bool(rivals) and all(rival.state <= MIXED for rival in rivals)
        )
    return one.state == MIXED and one.leads and not rivals


# --- what the values tell ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Where the rows of a class are in an output: the dim, the first row, how many there are in the example,
    and in how many blocks.
    """

    dim: int
    start: int
    rows: int
    blocks: int


def _state(base: Sequence[Any], one: Together) -> int:
    """Whether the rows of a sample depend on other samples."""
    assert one.whole is not None
    assert one.other is not None
    told = False
    for before, other, whole in zip(base, one.other, one.whole, strict=True):
        if not isinstance(before, torch.Tensor) or not before.dim():
            continue
        if not _comparable(before, other, whole):
            return MIXED
        if whole.shape == before.shape and other.shape == before.shape:
            if not (_near(whole, before) and _near(other, before)):
                return MIXED
            continue
        ordered = rows_of(before, other, whole) is not None
        if not ordered and not _same_rows(before, other, whole):
            return MIXED
        told |= other.shape != before.shape or not _near(other, before)
    return SEPARATE if told else UNKNOWN


def _comparable(before: Any, other: Any, whole: Any) -> bool:
    return (
        isinstance(other, torch.Tensor)
        and isinstance(whole, torch.Tensor)
        and before.dim() == other.dim() == whole.dim()
    )


def rows_of(
    before: torch.Tensor, other: torch.Tensor, whole: torch.Tensor
) -> Rows | None:
    """Where the rows of the samples are, when the whole consists of the rows of the example and those of the
    others; None when it consists of something else, or of these in an order that is not known.
    """
    dim = _grown(before, whole)
    if dim is None or _grown(before, other) not in (None, dim):
        return None
    size = before.shape[dim]
    if other.shape != before.shape:  # data decide how many rows there are
        joined = torch.cat([before, *[other] * (PARTS - 1)], dim)
        return Rows(dim, 0, size, 1) if _near(joined, whole) else None
    rows, odd = divmod(whole.shape[dim] - size, PARTS - 1)
    if odd or not 0 < rows <= size:
        return None
    for blocks in (n for n in range(1, rows + 1) if rows % n == 0):
        for start in range(min(size - rows, MOST_STARTS) + 1):
            found = Rows(dim, start, rows, blocks)
            if _near(_joined([before, *[other] * (PARTS - 1)], found), whole):
                return found
    return None


def _joined(parts: Sequence[torch.Tensor], at: Rows) -> torch.Tensor:
    """Tensors put together: the rows in question of all of them, block by block, between the other rows of
    the first.
    """
    end = at.start + at.rows
    first = parts[0]
    blocks = [
        part.narrow(at.dim, at.start, at.rows).unflatten(at.dim, (at.blocks, -1))
        for part in parts
    ]
    return torch.cat(
        [
            first.narrow(at.dim, 0, at.start),
            torch.cat(blocks, at.dim + 1).flatten(at.dim, at.dim + 1),
            first.narrow(at.dim, end, first.shape[at.dim] - end),
        ],
        at.dim,
    )


def _same_rows(before: torch.Tensor, other: torch.Tensor, whole: torch.Tensor) -> bool:
    """True when the whole has the rows of the example and those of the others, in any order."""
    dim = _grown(before, whole)
    if dim is None or other.shape != before.shape or before.is_complex():
        return False
    rows, odd = divmod(whole.shape[dim] - before.shape[dim], PARTS - 1)
    if odd or rows != before.shape[dim]:
        return False
    there = torch.cat([before, *[other] * (PARTS - 1)], dim)
    return _near(_marks(there, dim), _marks(whole, dim))


def _marks(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A number for each row, in order of size."""
    rows = tensor.detach().movedim(dim, 0).flatten(1).double()
    weights = torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return (rows * weights).sum(1).sort().values


def _grown(before: torch.Tensor, whole: torch.Tensor) -> int | None:
    """The one dim along which two tensors have different sizes; None for another number of such dims."""
    dims = [
        dim
        for dim, (one, more) in enumerate(zip(before.shape, whole.shape, strict=True))
        if one != more
    ]
    return dims[0] if len(dims) == 1 else None


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True for tensors that differ by no more than another order of the same sums makes them."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.numel():
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.detach().to(wide), other.detach().to(wide)
    scale = one.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return torch.allclose(one, other, rtol=1e-2, atol=1e-3 * scale, equal_nan=True)
