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
    Axis,
    Example,
    Longer,
    Runs,
)
from stagecut.ir.graph import Program, Value, nested_ops
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
        self.example = example
        self.runs = runs
        self.program = program
        self._outputs = len(program.outputs)
        self.base = self._on_example()
        self._free = _fixed_dims(program)
        self._written = _written_buffers(program)
        self._tried: dict[tuple[Axis, ...], Together | None] = {}

    def _on_example(self) -> list[Any] | None:
        """The outputs of a real run on the example; None where there is none."""
        if not self.runs.real:
            return None
        call = self.example.longer({})
        outputs = self.runs(call)
        if outputs is None or len(outputs) != self._outputs:
            return None
        return outputs

    @property
    def values(self) -> bool:
        """True when runs have values."""
        return self.base is not None

    def chosen(self, varying: Sequence[Together]) -> list[Together]:
        """The classes of axes along which the batch of a call may be divided, no input in two of them."""
        if self.runs.real and not self.values:
            return unrefuted(varying)
        candidates = [self._shown(declared) for declared in varying]
        candidates += self._static(candidates)
        chosen: list[Together] = []
        for candidate in sorted(candidates, key=_rank):
            rivals = self._rivals(candidate, candidates)
            if any(rival in chosen for rival in rivals):
                continue
            if _may_be_chosen(candidate, rivals):
                chosen.append(candidate)
        return sorted(chosen, key=self._first_input)

    def _rivals(
        self, candidate: Together, candidates: Sequence[Together]
    ) -> list[Together]:
        """The other classes with axes of the same inputs."""
        inputs = self._inputs(candidate)
        rivals: list[Together] = []
        for other in candidates:
            if other is candidate:
                continue
            if not inputs.isdisjoint(self._inputs(other)):
                rivals.append(other)
        return rivals

    def _inputs(self, together: Together) -> set[int]:
        """The inputs that the axes are of, and the lists that these are in."""
        inputs = set(together.axes)
        for key in together.axes:
            inputs.update(self.example.lists.get(key, ()))
        return inputs

    def _first_input(self, together: Together) -> int:
        firsts: list[int] = []
        for key in together.axes:
            if key in self.example.lists:
                key = self.example.lists[key].start
            firsts.append(key)
        return min(firsts)

    def _shown(self, declared: Together) -> Together:
        """A class of sizes that vary, and what a run shows of it."""
        if not self.values:
            return declared
        shown = self.attempt(declared.axes)
        if shown is None:
            return declared
        state = shown.state
        if state != SEPARATE:
            state = min(declared.state, state)
        return replace(shown, state=state, varies=declared.varies)

    def _static(self, varying: Sequence[Together]) -> list[Together]:
        """The classes of dims whose sizes are fixed in the trace."""
        left = {*self._free, *self.example.lists}
        for declared in varying:
            if declared.leads and declared.state:
                left.difference_update(declared.axes)
        classes: dict[Together, None] = {}
        for axes in self._proposals(left):
            for together in self._minimal(axes):
                classes[together] = None
                if _is_likely(together):
                    left -= self._inputs(together)
        return list(classes)

    def _proposals(self, left: set[int]) -> Iterator[Axes]:
        """Axes that may go together, the most likely ones first. Only inputs in `left`, which shrinks, are
        proposed.
        """
        for depth in range(DEEPEST):
            yield self._at(left, depth)
            for size in self._sizes_at(left, depth):
                yield self._of_size(left, depth, size)
            for key in sorted(left):
                yield self._at({key} & left, depth)
            if depth == 0:
                yield from self._lists(left)
            if not self.values and not self._only_mixed():
                break
        yield from self._mixtures(left)

    def _only_mixed(self) -> bool:
        """True when all that goes together so far is no batch."""
        states: set[int] = set()
        for together in self._tried.values():
            if together is not None:
                states.add(together.state)
        return states == {NEVER}

    def _lists(self, left: set[int]) -> Iterator[Axes]:
        """Lists that have an item for each sample, alone and with the other inputs."""
        lists: Axes = {}
        inside: set[int] = set()
        for key, items in self.example.lists.items():
            if key in left:
                lists[key] = ITEM
                inside.update(items)
        for key in lists:
            yield {key: ITEM}
        yield lists
        others = left - inside
        yield lists | self._at(others, 0)

    def _mixtures(self, left: set[int]) -> Iterator[Axes]:
        """Axes of one size, another dim in each input."""
        for seed in self._tensors(left):
            for dim in self._free.get(seed, ())[:DEEPEST]:
                choices = self._partners(seed, dim, left)
                for choice in product(*choices):
                    if seed not in left:
                        continue
                    partners = filter(None, choice)
                    yield {seed: dim, **dict(partners)}

    def _partners(self, seed: int, dim: int, left: set[int]) -> list[list[Axis | None]]:
        """For each other input with dims of the size of this one: these dims, or none of them."""
        size = self.example.size(seed, dim)
        choices: list[list[Axis | None]] = []
        for key in self._tensors(left):
            if key == seed:
                continue
            alike: list[Axis] = []
            for other in self._free[key]:
                if self.example.size(key, other) == size:
                    alike.append((key, other))
            if alike:
                choices.append([None, *alike])
        return choices

    def _tensors(self, keys: set[int]) -> list[int]:
        """Those of some inputs that are no lists, in order."""
        return sorted(key for key in keys if key >= 0)

    def _at(self, keys: set[int], depth: int) -> Axes:
        """The dims number `depth` of some inputs."""
        axes: Axes = {}
        for key in self._tensors(keys):
            if depth in self._free[key]:
                axes[key] = depth
        return axes

    def _of_size(self, keys: set[int], depth: int, size: int) -> Axes:
        axes = self._at(keys, depth)
        for key in list(axes):
            if self.example.size(key, depth) != size:
                del axes[key]
        return axes

    def _sizes_at(self, keys: set[int], depth: int) -> list[int]:
        """The sizes of the dims number `depth`, when there are several."""
        axes = self._at(keys, depth)
        sizes = dict.fromkeys(self.example.size(*axis) for axis in axes.items())
        if len(sizes) == 1:
            return []
        return list(sizes)

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
            for key in part.axes:
                del rest[key]
        if not rest:
            return parts
        last = self.attempt(rest)
        if last is None:
            return [together]
        return [*parts, last]

    def _part(self, axes: Axes) -> Together | None:
        """The smallest class with the first of some axes; None where it is all of them."""
        first, *others = axes.items()
        alone = self.attempt(dict([first]))
        if alone is not None:
            return alone
        if not self.values or len(others) < 2:
            return None
        for other in others:
            pair = self.attempt(dict([first, other]))
            if pair is not None:
                return pair
        return None

    def on_other_data(self, together: Together) -> Iterator[tuple[Any, Any, Any]]:
        """The outputs on the example, on its first sample alone, and on three times the samples; then the
        same with random numbers in the place of all floats, those of the model too.
        """
        if self.values:
            for seed in range(OTHER_DATA + 1):
                self.runs.shake(seed)
                yield from self._three_runs(together.axes, seed)
        self.runs.shake(0)

    def _three_runs(self, axes: Axes, seed: int) -> Iterator[tuple[Any, Any, Any]]:
        """The outputs of the three calls, where the model runs on all of them."""
        example = self.example
        if seed:
            example = example.shaken()
        base = self.runs(example.longer({}))
        other = self.runs(example.first(axes))
        whole = self.runs(example.longer(axes))
        for outputs in (base, other, whole):
            if outputs is None or len(outputs) != self._outputs:
                return
        yield base, other, whole

    def attempt(self, axes: Axes) -> Together | None:
        """What a run along these axes shows; None where the model does not run."""
        key = tuple(sorted(axes.items()))
        if not axes:
            return None
        if key not in self._tried:
            self._tried[key] = self._attempt(dict(axes))
        return self._tried[key]

    def _on_more(self, axes: Axes) -> list[Any] | None:
        """The outputs on more samples. A model that keeps something for each sample in buffers that it
        writes, such as keys and values, has longer ones then.
        """
        parts = self.runs.parts
        sizes = {self.example.size(*axis) for axis in axes.items()}
        for longer in (NO_LONGER, *self._kept_along(sizes)):
            call = self.example.longer(axes, parts)
            whole = self.runs(call, longer)
            if whole is not None:
                return whole
        return None

    def _kept_along(self, sizes: set[int]) -> Iterator[Longer]:
        """The written buffers that have one of these sizes along a dim, the first dims first."""
        for dim in range(DEEPEST):
            longer: dict[str, int] = {}
            for name, shape in self._written.items():
                if dim < len(shape) and shape[dim] in sizes:
                    longer[name] = dim
            if longer:
                yield longer

    def _attempt(self, axes: Axes) -> Together | None:
        whole = self._on_more(axes)
        if whole is None:
            return None
        if len(whole) != self._outputs:
            return None
        if self.base is None:
            state = NEVER if self.runs.mixed else UNKNOWN
            return Together(axes, state, whole)
        call = self.example.first(axes)
        other = self.runs(call)
        if other is None or len(other) != len(whole):
            return None
        state = _state(self.base, other, whole)
        return Together(axes, state, whole, other)


def unrefuted(varying: Sequence[Together]) -> list[Together]:
    """The classes of sizes that were declared to vary, as far as they may be batches."""
    classes: list[Together] = []
    for declared in varying:
        if declared.state == UNKNOWN and declared.leads:
            classes.append(declared)
    return classes


def _fixed_dims(program: Program) -> dict[int, list[int]]:
    """The dims of each input whose sizes are fixed in the trace."""
    fixed: dict[int, list[int]] = {}
    for key, value in enumerate(program.inputs):
        if not isinstance(value.type, TensorType):
            continue
        fixed[key] = []
        for dim, size in enumerate(value.type.shape):
            if isinstance(size, int) and size > 0:
                fixed[key].append(dim)
    return fixed


def _written_buffers(program: Program) -> dict[str, tuple[Any, ...]]:
    """The shape of each buffer that an op of the program writes."""
    written: set[Value] = set()
    for op in nested_ops(program.all_ops()):
        written.update(op.effects.writes)
    shapes: dict[str, tuple[Any, ...]] = {}
    for entry in program.state:
        if entry.value in written and isinstance(entry.type, TensorType):
            shapes[entry.name] = entry.type.shape
    return shapes


def _rank(together: Together) -> tuple[int, bool, int]:
    """Sorts the most likely classes to the front."""
    return -together.state, not together.leads, -len(together.axes)


def _is_likely(together: Together) -> bool:
    """True for a class whose inputs need not be looked at further."""
    if together.state == UNKNOWN:
        return together.leads or len(together.axes) > 1
    return together.state == SEPARATE


def _may_be_chosen(candidate: Together, rivals: Sequence[Together]) -> bool:
    """True for a class along which a batch may be divided. Its rivals have other dims of the same inputs.

    A class that does not lead stands back behind a leading one that has further inputs. Where no size varies,
    a call shows by its sizes whether it is divided along the right dim.
    """
    for rival in rivals:
        if _stands_before(rival, candidate):
            return False
    if not candidate.varies or candidate.state == SEPARATE:
        return True
    if candidate.state == MIXED:
        return candidate.leads and not rivals
    if candidate.state != UNKNOWN:
        return False
    if candidate.leads:
        return True
    return bool(rivals) and all(rival.state <= MIXED for rival in rivals)


def _stands_before(rival: Together, candidate: Together) -> bool:
    """True for a leading class that has inputs that the candidate, which does not lead, has not."""
    if candidate.leads or not rival.leads:
        return False
    return not rival.axes.keys() <= candidate.axes.keys()


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


def _state(base: Sequence[Any], other: Sequence[Any], whole: Sequence[Any]) -> int:
    """Whether the rows of a sample depend on other samples."""
    state = UNKNOWN
    for outputs in zip(base, other, whole, strict=True):
        before = outputs[0]
        if not isinstance(before, torch.Tensor):
            continue
        if not before.dim():
            continue
        shown = _state_of_output(*outputs)
        if shown == MIXED:
            return MIXED
        state = max(state, shown)
    return state


def _state_of_output(before: torch.Tensor, other: Any, whole: Any) -> int:
    """What one output shows of that: on the example, on its first sample, and on more samples."""
    if not _is_comparable(before, other):
        return MIXED
    if not _is_comparable(before, whole):
        return MIXED
    is_same = other.shape == before.shape and _near(other, before)
    if whole.shape == before.shape == other.shape:
        if is_same and _near(whole, before):
            return UNKNOWN
        return MIXED
    is_ordered = rows_of(before, other, whole) is not None
    if not is_ordered and not same_rows(before, other, whole):
        return MIXED
    if is_same:
        return UNKNOWN
    return SEPARATE


def _is_comparable(before: torch.Tensor, output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.dim() == before.dim()


def rows_of(
    before: torch.Tensor, other: torch.Tensor, whole: torch.Tensor
) -> Rows | None:
    """Where the rows of the samples are, when the whole consists of the rows of the example and those of the
    others; None when it consists of something else, or of these in an order that is not known.
    """
    dim = _grown(before, whole)
    if dim is None:
        return None
    if _grown(before, other) not in (None, dim):
        return None
    others = [other] * (PARTS - 1)
    parts = [before, *others]
    if other.shape == before.shape:
        return _interleaved_rows(parts, whole, dim)
    # data decide how many rows there are
    joined = torch.cat(parts, dim)
    if not _near(joined, whole):
        return None
    return Rows(dim, 0, before.shape[dim], 1)


def _interleaved_rows(
    parts: Sequence[torch.Tensor], whole: torch.Tensor, dim: int
) -> Rows | None:
    """The rows of each part that the whole has, in whatever blocks and behind whatever rows of others."""
    size = parts[0].shape[dim]
    further = whole.shape[dim] - size
    rows, odd = divmod(further, len(parts) - 1)
    if odd or not 0 < rows <= size:
        return None
    most = min(size - rows, MOST_STARTS)
    for blocks in range(1, rows + 1):
        if rows % blocks:
            continue
        for start in range(most + 1):
            place = Rows(dim, start, rows, blocks)
            joined = _joined(parts, place)
            if _near(joined, whole):
                return place
    return None


def _joined(parts: Sequence[torch.Tensor], place: Rows) -> torch.Tensor:
    """Tensors put together: the rows in question of all of them, block by block, between the other rows of
    the first.
    """
    dim = place.dim
    blocks: list[torch.Tensor] = []
    for part in parts:
        rows = part.narrow(dim, place.start, place.rows)
        blocks.append(rows.unflatten(dim, (place.blocks, -1)))
    joined = torch.cat(blocks, dim + 1)
    middle = joined.flatten(dim, dim + 1)
    first = parts[0]
    front = first.narrow(dim, 0, place.start)
    end = place.start + place.rows
    left = first.shape[dim] - end
    back = first.narrow(dim, end, left)
    return torch.cat([front, middle, back], dim)


def same_rows(before: torch.Tensor, other: torch.Tensor, whole: torch.Tensor) -> bool:
    """True when the whole has the rows of the example and those of the others, in any order."""
    dim = _grown(before, whole)
    if dim is None or before.is_complex():
        return False
    if other.shape != before.shape:
        return False
    size = before.shape[dim]
    if whole.shape[dim] != size * PARTS:
        return False
    others = [other] * (PARTS - 1)
    joined = torch.cat([before, *others], dim)
    joined_marks = _row_marks(joined, dim)
    whole_marks = _row_marks(whole, dim)
    return _near(joined_marks, whole_marks)


def _row_marks(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A number for each row, in order of size."""
    first = tensor.detach().movedim(dim, 0)
    rows = first.reshape(len(first), -1).double()
    weights = torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
    marks = (rows * weights).sum(1)
    return marks.sort().values


def _grown(before: torch.Tensor, whole: torch.Tensor) -> int | None:
    """The one dim along which two tensors have different sizes; None for another number of such dims."""
    dims: list[int] = []
    sizes = zip(before.shape, whole.shape, strict=True)
    for dim, (size, other_size) in enumerate(sizes):
        if size != other_size:
            dims.append(dim)
    if len(dims) != 1:
        return None
    return dims[0]


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True for tensors that differ by no more than another order of the same sums makes them."""
    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype:
        return False
    if not one.numel():
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    wide = torch.complex128 if one.is_complex() else torch.float64
    one = one.detach().to(wide)
    other = other.detach().to(wide)
    sizes = one.abs().nan_to_num(0.0, 0.0, 0.0)
    scale = sizes.max().item()
    return torch.allclose(one, other, rtol=1e-2, atol=1e-3 * scale, equal_nan=True)
