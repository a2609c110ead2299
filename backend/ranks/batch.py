"""The batch of a step: how it is divided among the micro-batches, and how their outputs become those of one
batch.

The program says where the samples are in its inputs and outputs (`TensorType.batch`). Where it does not, the
user says so, in torch's own terms, or gives the micro-batches themselves. Nothing else divides an input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.microbatch import (
    TensorChunkSpec,
    _Replicate,
    _split_block_mask,
    merge_chunks,
)
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves, tree_map

from stagecut.backend.ranks.filled import fillings
from stagecut.backend.ranks.wire import Sizes, boundaries, fed_inputs
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Value
from stagecut.ir.run.call import CallSpec, check_inputs
from stagecut.ir.run.objects import hides_tensors, opened
from stagecut.ir.sizes import evaluate
from stagecut.ir.types import ANY, ITEM, MEAN, SUM, Batch, TensorType, Type

_SAY = (
    "say how it is divided: Driver(..., args_chunk_spec=, kwargs_chunk_spec=), with torch's TensorChunkSpec; "
    "or give the micro-batches: step(arg_mbs=[...], kwarg_mbs=[...])"
)


@dataclass(frozen=True)
class ChunkSpecs:
    """What the user says about how inputs, targets and outputs are divided, as for torch's schedules. A spec
    for a container holds for all that is in it; None leaves it to the program.
    """

    args: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] | None = None
    target: Any = None
    output: Any = None


@dataclass(frozen=True)
class Call:
    """What a call of the driver is given: the model's arguments for a whole batch or for each micro-batch,
    and what its loss function takes besides the outputs.
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    arg_mbs: Any = None
    kwarg_mbs: Any = None
    target: Any = None
    target_mbs: Any = None
    loss_kwargs: Mapping[str, Any] | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What goes to the model."""
        return self.args, self.kwargs, self.arg_mbs, self.kwarg_mbs

    @property
    def labels(self) -> tuple[Any, ...]:
        """What goes to the loss function."""
        return self.target, self.target_mbs, self.loss_kwargs

    @property
    def is_ready(self) -> bool:
        """True when the inputs of each micro-batch are given."""
        return self.arg_mbs is not None or self.kwarg_mbs is not None

    def calls(self, count: int) -> list[tuple[Sequence[Any], Mapping[str, Any]]]:
        """The arguments of the whole batch, or those of each of `count` ready micro-batches. Raises
        InputError where both are given, or other than so many.
        """
        if self.target is not None and self.target_mbs is not None:
            raise InputError("target and target_mbs are both given", hint="give one")
        if not self.is_ready:
            return [(self.args, self.kwargs)]
        if self.args or self.kwargs:
            raise InputError(
                "arguments of the model are given beside arg_mbs and kwarg_mbs",
                hint="put all of them into the micro-batches",
            )
        if self.target is not None:
            raise InputError(
                "a whole target is given with micro-batches of the inputs",
                hint="target_mbs=[...], with the target of each micro-batch",
            )
        args = _ready("arg_mbs", self.arg_mbs, count) or [()] * count
        kwargs = _ready("kwarg_mbs", self.kwarg_mbs, count) or [{}] * count
        for item in args:
            if not isinstance(item, tuple | list):
                raise InputError(
                    f"arg_mbs holds a {type(item).__name__}, not the arguments of a micro-batch",
                    hint="write [(x,), (y,)] for a single argument",
                )
        return list(zip(args, kwargs, strict=True))


@dataclass
class _Samples:
    """The samples of one batch: how many there are in all, in each micro-batch, and in the example (0 where
    that is not known); whether they are divided; and one input that has them.
    """

    whole: int
    parts: list[int]
    example: int
    divided: bool
    where: str


class MicroBatches:
    """The micro-batches of a call: the flat inputs of each, the symbolic sizes of each, the samples in each.

    Every rank of the group makes one. Where the programs of some ranks know less, because their model is on
    meta, those ranks take the knowledge of the others.
    """

    def __init__(
        self,
        pipe: Staged,
        count: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        specs: ChunkSpecs,
    ) -> None:
        self._pipe, self._count, self._device, self._specs = pipe, count, device, specs
        program = pipe.program
        self._last_boundary = boundaries(program, fed_inputs(program))[-1]
        values = [
            *program.inputs,
            *(leaf for leaf in program.outputs if isinstance(leaf, Value)),
        ]
        known = _known([value.type for value in values], group)
        self._marks = dict(zip(values, known, strict=True))
        self._places, self._lists = _arguments(
            pipe._call_spec, program.inputs, self._marks
        )
        self._fillings = fillings(program)
        self._samples: dict[str, _Samples] = {}
        self._divided: list[tuple[tuple[int, ...], int]] = []
        self._cast = self._ready = False
        self.inputs: list[list[Any]] = []
        self.sizes: list[Sizes] = []
        self.notes: dict[str, None] = {}

    def of_call(self, call: Call, cast: bool = False) -> list[Sizes]:
        """Sets the inputs of every micro-batch of a call; returns the symbolic sizes of each. With `cast`,
        floats may have other dtypes than in the trace. Raises InputError where something cannot be divided,
        or nothing says how.
        """
        calls = call.calls(self._count)
        self._cast, self._ready = cast, call.is_ready
        self.sizes = self.take(calls) if call.is_ready else self.divide(*calls[0])
        return self.sizes

    # --- inputs -----------------------------------------------------------------------------------

    def divide(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Sizes]:
        """Sets the flat inputs of every micro-batch; returns the symbolic sizes of each. Raises InputError
        where an input cannot be divided, or nothing says how.
        """
        count = self._count
        self._samples, self._divided = {}, []
        if count == 1:
            return self._set([self._flat(args, kwargs)])
        calls, settled = self._by_argument(args, kwargs)
        flats = [self._flat(*call) for call in calls]
        inputs = self._pipe.program.inputs
        for place, value in enumerate(inputs):
            item = flats[0][place]
            dim = None if place in settled else self._dim(value, item)
            if dim is None:
                continue
            self._divided.append((tuple(item.shape), dim))
            pieces = _cut(item, dim, self._marks[value], count)
            for flat, piece in zip(flats, pieces, strict=True):
                flat[place] = piece
        self._refuse_undivided(flats[0], settled)
        self._count_samples(flats)
        self._refuse_disagreement()
        sizes = self._set(flats)
        for filling in self._fillings:
            if any(flats[0][place] is not flats[1][place] for place in filling.sources):
                for flat, mine in zip(flats, sizes, strict=True):
                    filling.check(self._pipe.program, flat, mine)
        return sizes

    def take(
        self, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]
    ) -> list[Sizes]:
        """The inputs of every micro-batch are those of these calls, as for torch's schedules."""
        flats = [self._flat(*call) for call in calls]
        self._samples, self._divided = {}, []
        self._count_samples(flats, ready=True)
        return self._set(flats)

    def _set(self, flats: list[list[Any]]) -> list[Sizes]:
        spec = self._pipe._call_spec
        ranges = spec.ranges if spec is not None else None
        self.inputs = [[_to(item, self._device) for item in flat] for flat in flats]
        return [
            check_inputs(self._pipe.program.inputs, flat, ranges, cast=self._cast)
            for flat in self.inputs
        ]

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        spec = self._pipe._call_spec
        return spec.flatten(args, dict(kwargs)) if spec is not None else list(args)

    def _by_argument(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[tuple[list[Any], dict[str, Any]]], set[int]]:
        """The calls of the micro-batches, in which the arguments are divided that the user says how to, and
        lists of samples; and the places of these among the flat inputs.
        """
        calls: list[tuple[list[Any], dict[str, Any]]]
        calls = [(list(args), dict(kwargs)) for _ in range(self._count)]
        settled: set[int] = set()
        for key, name, item, spec in self._arguments(args, kwargs):
            mine = self._places.get(name, range(0))
            if spec is not None:
                pieces = _by_spec(item, spec, self._count, f"argument '{name}'")
                self._divided += _divided_by(item, spec)
            elif name in self._lists:
                pieces = self._sublists(name, item)
            else:
                continue
            settled |= {*mine}
            for call, piece in zip(calls, pieces, strict=True):
                call[isinstance(key, str)][key] = piece  # type: ignore[index]
        return calls, settled

    def _arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[int | str, str, Any, Any]]:
        """The key, the name, the value and the user's spec of each argument of a call."""
        spec = self._pipe._call_spec
        names = list(spec.parameters) if spec is not None else []
        if spec is not None and len(args) <= len(spec.positional):
            names = list(spec.positional)
        said = [*(self._specs.args or ()), *[None] * len(args)]
        for place, item in enumerate(args):
            name = names[place] if place < len(names) else str(place)
            yield place, name, item, said[place]
        by_name = self._specs.kwargs or {}
        for name, item in kwargs.items():
            yield name, name, item, by_name.get(name)

    def _sublists(self, name: str, items: Any) -> list[Any]:
        """The parts of a list that has an item for each sample."""
        count, example = self._count, self._lists[name][0]
        length = len(items) if isinstance(items, list | tuple) else example
        if length == example:
            return [items] * count
        if length != example * count:
            raise InputError(
                f"list '{name}' has {length} items, and {count} micro-batches of {example}, as in the "
                f"example, take {count * example}",
                hint="pass as many, or trace with a list as long as that of one micro-batch",
            )
        self._divided.append(((length,), 0))
        return [items[i * example : (i + 1) * example] for i in range(count)]

    def _dim(self, value: Value, item: Any) -> int | None:
        """The dim along which an input is divided; None for one that every micro-batch gets."""
        mark, kind = self._marks[value], value.type
        if not isinstance(item, torch.Tensor) or not isinstance(kind, TensorType):
            return None
        if item.dim() != len(kind.shape):
            return None  # the check of the inputs refuses it
        if mark is None or not isinstance(mark.dim, int):
            self._refuse_unknown(value, kind, item)
            return None
        size, traced = item.shape[mark.dim], kind.shape[mark.dim]
        if size == traced:
            return None
        if size % self._count:
            raise InputError(
                f"input '{value.hint}' has a batch of {size}, which {self._count} micro-batches do not "
                "divide",
                hint="pass a multiple of n_microbatches, or unequal micro-batches: step(arg_mbs=[...])",
            )
        if isinstance(traced, int) and size != traced * self._count:
            raise InputError(
                f"input '{value.hint}' has shape {list(item.shape)}, and {self._count} micro-batches of "
                f"{list(kind.shape)}, as traced, have {traced * self._count} along dim {mark.dim}",
                hint="pass dynamic_shapes=... to pipeline() for sizes that vary, or trace with the size you "
                "run",
            )
        return mark.dim

    def _refuse_unknown(
        self, value: Value, kind: TensorType, item: torch.Tensor
    ) -> None:
        """Returns when an input that is not divided has the sizes of the trace."""
        for dim, (size, traced) in enumerate(zip(item.shape, kind.shape, strict=True)):
            if isinstance(traced, int) and size == traced * self._count != traced:
                raise InputError(
                    f"input '{value.hint}' has shape {list(item.shape)}, traced was {list(kind.shape)}, and "
                    f"it is not known that samples lie along dim {dim}",
                    hint=_SAY,
                )

    def _refuse_undivided(self, flat: Sequence[Any], settled: set[int]) -> None:
        """Returns when something is divided, or there is nothing to divide."""
        inputs = self._pipe.program.inputs
        tensors = [
            (value, item)
            for value, item in zip(inputs, flat, strict=True)
            if isinstance(item, torch.Tensor) and item.dim()
        ]
        said = self._specs.args is not None or self._specs.kwargs is not None
        if self._divided or said or not tensors:
            return
        value, item = next(
            ((v, t) for v, t in tensors if self._marks[v] is not None), tensors[0]
        )
        mark = self._marks[value]
        if mark is None:
            raise InputError(
                f"it is not known along which dims the inputs are divided among {self._count} micro-batches, "
                f"such as input '{value.hint}' of shape {list(item.shape)}",
                hint=_SAY,
            )
        what = f"input '{value.hint}' has shape {list(item.shape)}"
        raise InputError(
            f"nothing is divided among {self._count} micro-batches: {what}, that of the example, which is "
            "one micro-batch",
            hint=f"pass a batch {self._count} times as large, or cut the model with a smaller example: "
            "mb_args and mb_kwargs have the size of one micro-batch",
        )

    def _count_samples(
        self, flats: Sequence[Sequence[Any]], ready: bool = False
    ) -> None:
        """Counts the samples of each batch. Raises InputError where inputs have different numbers of them."""
        for name, (length, listed) in self._lists.items():
            rows, symbol = listed.terms[0]
            parts = [length // rows] * self._count
            divided = ready or ((length * self._count,), 0) in self._divided
            self._samples[symbol] = _Samples(sum(parts), parts, 0, divided, name)
        for place, value in enumerate(self._pipe.program.inputs):
            mark, kind = self._marks[value], value.type
            if mark is None or not isinstance(kind, TensorType):
                continue
            if not isinstance(mark.dim, int) or len(mark.terms) != 1:
                continue
            rows, symbol = mark.terms[0]
            sizes = [flat[place].shape[mark.dim] for flat in flats]
            parts = [size // rows for size in sizes]
            divided = ready or any(
                flats[0][place] is not flat[place] for flat in flats[1:]
            )
            example = _example(kind.shape[mark.dim], self._pipe._sizes) // rows
            whole = sum(parts) if divided else parts[0]
            mine = _Samples(whole, parts, example, divided, value.hint)
            first = self._samples.setdefault(symbol, mine)
            if first.parts != parts or first.divided != divided:
                raise InputError(
                    f"input '{value.hint}' has a batch of {whole}, and input '{first.where}', which goes "
                    f"with it, one of {first.whole}",
                    hint=f"pass inputs of as many samples; or {_SAY}",
                )

    def _refuse_disagreement(self) -> None:
        """Returns when batches of their own grow by the same factor over the example. Where they do not, it
        is not known which of their samples belong together.
        """
        grown = [s for s in self._samples.values() if s.divided and s.example]
        for other in grown[1:]:
            first = grown[0]
            if first.whole * other.example != other.whole * first.example:
                raise InputError(
                    f"inputs '{first.where}' and '{other.where}' have batches of {first.whole} and "
                    f"{other.whole}, in the example {first.example} and {other.example}: it is not known "
                    "which samples of the two go into one micro-batch",
                    hint=_SAY,
                )

    # --- targets ----------------------------------------------------------------------------------

    def labels(self, call: Call) -> tuple[list[Any], list[Any]]:
        """The target and the `loss_kwargs` of every micro-batch, none of either for []. What has as many
        samples as the inputs is divided.
        """
        targets = _ready("target_mbs", call.target_mbs, self._count)
        if call.target is not None:
            targets = self._divided_target(call.target)
        if call.loss_kwargs is None:
            return targets, []
        if self._ready:
            return targets, [call.loss_kwargs] * self._count
        return targets, self._parts(call.loss_kwargs)

    def _divided_target(self, target: Any) -> list[Any]:
        if self._specs.target is not None:
            return _by_spec(target, self._specs.target, self._count, "target")
        return self._parts(target)

    def _parts(self, tree: Any) -> list[Any]:
        return [
            _mapped(tree, lambda item, i=i: self._part(item, i))
            for i in range(self._count)
        ]

    def _part(self, item: Any, index: int) -> Any:
        if isinstance(item, torch.Tensor) and item.dim() and self._count > 1:
            if (place := self._place(item)) is not None:
                return _cut(item, *place, self._count)[index]
        elif hides_tensors(item):
            raise InputError(
                f"target holds a {type(item).__name__}, and what is in it cannot be divided",
                hint="give the targets of the micro-batches: step(target_mbs=[...])",
            )
        return item

    def _place(self, item: torch.Tensor) -> tuple[int, Batch | None] | None:
        """Along which dim, and in which blocks, a target is divided."""
        shape = tuple(item.shape)
        for place, dim in self._divided:  # like an input
            if place == shape:
                return dim, None
        dims = [
            dim
            for dim, size in enumerate(shape)
            if any(size == place[d] for place, d in self._divided)
        ]
        if not dims:
            return self._like_an_output(shape)
        at = [dim for dim in dims if any(dim == d for _, d in self._divided)]
        if len(at or dims) > 1:
            raise InputError(
                f"target of shape {list(shape)}: dims {dims} have as many elements as a divided dim of the "
                "inputs",
                hint="say along which it is divided: Driver(..., target_chunk_spec=TensorChunkSpec(dim))",
            )
        return (at or dims)[0], None

    def _like_an_output(self, shape: tuple[int, ...]) -> tuple[int, Batch] | None:
        for leaf in self._pipe.program.outputs:
            mark = self._marks.get(leaf) if isinstance(leaf, Value) else None
            if mark is None or not isinstance(mark.dim, int) or mark.dim >= len(shape):
                continue
            rows = self._rows(mark)
            if rows is not None and shape[mark.dim] == sum(map(sum, rows)):
                return mark.dim, mark
        return None

    # --- outputs ----------------------------------------------------------------------------------

    def structured(self, packed: Sequence[torch.Tensor], chunk: int) -> Any:
        """The model's own output of one micro-batch."""
        return self._together(self._leaves(packed, chunk))

    def joined(self, results: Mapping[int, Sequence[torch.Tensor]]) -> Any:
        """The outputs of all micro-batches as those of one batch.

        Tensors are joined along the dim of the samples, means are averaged, sums are summed. What is none of
        these is a list with the value of each micro-batch, and a note says so.
        """
        rows = [self._leaves(results[i], i) for i in range(self._count)]
        if self._count == 1:
            return self._together(rows[0])
        if self._specs.output is not None:
            return _merged([self._together(row) for row in rows], self._specs.output)
        outputs = self._pipe.program.outputs
        parts = zip(*rows, strict=True)
        return self._together(
            [
                self._join(leaf, list(items), place)
                for place, (leaf, items) in enumerate(zip(outputs, parts, strict=True))
            ]
        )

    def _together(self, flat: Sequence[Any]) -> Any:
        spec = self._pipe._call_spec
        return spec.unflatten(flat) if spec is not None else list(flat)

    def _leaves(self, packed: Sequence[torch.Tensor], chunk: int) -> list[Any]:
        program = self._pipe.program
        crossed = dict(zip(self._last_boundary, packed, strict=True))
        own = dict(zip(program.inputs, self.inputs[chunk], strict=True))
        return [self._leaf(leaf, crossed, own) for leaf in program.outputs]

    def _leaf(
        self, leaf: Any, crossed: Mapping[Value, Any], own: Mapping[Value, Any]
    ) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        if leaf not in crossed:
            return own[leaf]
        item = crossed[leaf]
        return item if isinstance(leaf.type, TensorType) else item.item()

    def _join(self, leaf: Any, items: list[Any], place: int) -> Any:
        if not isinstance(leaf, Value) or all(item is items[0] for item in items):
            return items[0]  # a constant, or an input that is not divided
        joined = self._joined_by(self._marks[leaf], items)
        if joined is None:
            names = self._pipe.program.output_names
            name = names[place] if place < len(names) else str(place)
            self.notes[
                f"output '{name}' is a list with the value of each micro-batch: it is not known how they "
                "make that of the batch; Driver(..., output_merge_spec=...) can say it"
            ] = None
            return items
        return joined

    def _joined_by(self, mark: Batch | None, items: list[Any]) -> torch.Tensor | None:
        if mark is None or mark.dim == ITEM:
            return None
        if mark.dim == SUM:
            return torch.stack(items).sum(0).to(items[0].dtype)
        if mark.dim == MEAN:
            return self._mean(items)
        rows = self._rows(mark)
        dim = mark.dim
        assert isinstance(dim, int)
        if mark.size == ANY:
            return torch.cat(items, dim)
        if rows is None or [t.shape[dim] for t in items] != [
            sum(part) for part in rows
        ]:
            return None
        blocks = [item.split(part, dim) for item, part in zip(items, rows, strict=True)]
        return torch.cat([b for block in zip(*blocks, strict=True) for b in block], dim)

    def _mean(self, items: list[torch.Tensor]) -> torch.Tensor | None:
        """The mean over all samples of the means over those of each micro-batch."""
        counts = [s.parts for s in self._samples.values() if s.divided]
        if all(len(set(parts)) == 1 for parts in counts) and (counts or self._divided):
            return torch.stack(items).mean(0)
        if not counts or any(parts != counts[0] for parts in counts):
            return None
        weights = torch.tensor(counts[0], dtype=items[0].dtype, device=items[0].device)
        return (torch.stack(items) * weights).sum(0) / weights.sum()

    def _rows(self, mark: Batch) -> list[list[int]] | None:
        """How many rows each block of a tensor has in each micro-batch; None where that is not known, or a
        batch is not divided.
        """
        counts = [(rows, self._samples.get(symbol)) for rows, symbol in mark.terms]
        if any(samples is None or not samples.divided for _, samples in counts):
            return None
        return [
            [rows * samples.parts[i] for rows, samples in counts if samples is not None]
            for i in range(self._count)
        ]


def _known(
    types: Sequence[Type], group: dist.ProcessGroup | None
) -> list[Batch | None]:
    """Where the samples are in some values, as the first rank has it whose program tells it."""
    mine = [kind.batch if isinstance(kind, TensorType) else None for kind in types]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    return max(found, key=lambda marks: len(marks) - marks.count(None))


def _arguments(
    spec: CallSpec | None,
    inputs: Sequence[Value],
    marks: Mapping[Value, Batch | None],
) -> tuple[dict[str, range], dict[str, tuple[int, Batch]]]:
    """Name of an argument -> the places of what is in it among the flat inputs; for a list that has an item
    for each sample, how many items the example has, and how they go with the samples.
    """
    if spec is None:
        return {str(i): range(i, i + 1) for i in range(len(inputs))}, {}
    positional, named = spec.in_spec.unflatten(range(spec.in_spec.num_leaves))
    places: dict[str, range] = {}
    lists: dict[str, tuple[int, Batch]] = {}
    for name, item in (*zip(spec.positional, positional, strict=True), *named.items()):
        leaves = tree_leaves(item)
        places[name] = range(leaves[0], leaves[-1] + 1) if leaves else range(0)
        mark = marks[inputs[leaves[0]]] if leaves else None
        if mark is not None and mark.dim == ITEM and isinstance(item, list | tuple):
            lists[name] = len(item), mark
    return places, lists


def _example(size: int | str, sizes: Sizes) -> int:
    """A size in the example; 0 where that is not known."""
    if isinstance(size, int):
        return size
    return evaluate(size, tuple(sorted(sizes.items()))) or 0


def _ready(name: str, items: Any, count: int) -> list[Any]:
    if items is None:
        return []
    if not isinstance(items, list | tuple) or len(items) != count:
        size = f"{len(items)} of them" if isinstance(items, list | tuple) else "none"
        raise InputError(
            f"{name} is a {type(items).__name__} with {size}: the step has {count} micro-batches",
            hint=f"{name}=[...], with one item for each micro-batch",
        )
    return list(items)


def _cut(
    item: torch.Tensor, dim: int, mark: Batch | None, count: int
) -> list[torch.Tensor]:
    """A tensor in equal parts, one for each micro-batch; of each block of `mark` an equal part."""
    terms = mark.terms if mark is not None and mark.size != ANY else ((1, ""),)
    if len(terms) == 1:
        return list(item.tensor_split(count, dim))
    total = sum(rows for rows, _ in terms)
    sizes = [item.shape[dim] * rows // total for rows, _ in terms]
    blocks = [block.tensor_split(count, dim) for block in item.split(sizes, dim)]
    return [torch.cat(parts, dim) for parts in zip(*blocks, strict=True)]


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item


# --- torch's specs ----------------------------------------------------------------------------------------


def _merged(outputs: list[Any], spec: Any) -> Any:
    """The outputs of the micro-batches put together as torch's specs say."""
    try:
        return merge_chunks(outputs, spec)
    except (AssertionError, ValueError, RuntimeError, IndexError, TypeError) as error:
        raise InputError(
            f"output_merge_spec does not fit what the model returns: {error}",
            hint="TensorChunkSpec(dim) or a reducer, such as sum_reducer, for each tensor that it returns",
        ) from error


def _is_replicate(spec: Any) -> bool:
    return spec is _Replicate or isinstance(spec, _Replicate)


def _by_spec(item: Any, spec: Any, count: int, where: str) -> list[Any]:
    """The parts of a value as torch's specs say. Raises InputError for a spec that does not fit."""
    if _is_replicate(spec) or spec is None:
        return [item] * count
    if isinstance(spec, TensorChunkSpec):
        return _all_by(item, spec, count, where)
    if (
        isinstance(item, dict)
        and isinstance(spec, Mapping)
        and spec.keys() <= item.keys()
    ):
        parts = {
            key: _by_spec(value, spec.get(key), count, f"{where}[{key!r}]")
            for key, value in item.items()
        }
        return [{key: part[i] for key, part in parts.items()} for i in range(count)]
    fits = isinstance(item, list | tuple) and isinstance(spec, list | tuple)
    if fits and len(item) == len(spec):
        pieces = [
            _by_spec(value, one, count, f"{where}[{place}]")
            for place, (value, one) in enumerate(zip(item, spec, strict=True))
        ]
        return [_like(item, [piece[i] for piece in pieces]) for i in range(count)]
    raise InputError(
        f"{where} is a {type(item).__name__}, and its chunk spec a {type(spec).__name__} that does not fit",
        hint="TensorChunkSpec(dim) or _Replicate(), of torch.distributed.pipelining.microbatch, for each "
        "tensor",
    )


def _like(item: Any, parts: list[Any]) -> Any:
    return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)


def _all_by(item: Any, spec: TensorChunkSpec, count: int, where: str) -> list[Any]:
    """The parts of everything in a value along one dim."""
    if isinstance(item, BlockMask):
        return list(_split_block_mask(item, count))

    def part(leaf: Any, index: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        dim = spec.split_dim
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] < count:
            raise InputError(
                f"{where} of shape {list(leaf.shape)} cannot be divided along dim {dim} among {count} "
                "micro-batches"
            )
        return leaf.tensor_split(count, dim)[index]

    return [_mapped(item, lambda leaf, i=i: part(leaf, i)) for i in range(count)]


def _divided_by(item: Any, spec: Any) -> Iterator[tuple[tuple[int, ...], int]]:
    """The shapes of the tensors that a spec divides, and the dims along which it does."""
    if isinstance(spec, TensorChunkSpec):
        for leaf in tree_leaves(item):
            if isinstance(leaf, torch.Tensor) and leaf.dim():
                yield tuple(leaf.shape), spec.split_dim % leaf.dim()
    elif isinstance(spec, Mapping):
        for key, one in spec.items():
            yield from _divided_by(item[key], one)
    elif isinstance(spec, list | tuple):
        for value, one in zip(item, spec, strict=True):
            yield from _divided_by(value, one)


def _mapped(tree: Any, function: Any) -> Any:
    """`tree` with `function` of each leaf in its place, also in dataclasses, and in objects of any class that
    hold tensors in their attributes.
    """
    return tree_map(lambda leaf: _inside(leaf, function), opened(tree))


def _inside(leaf: Any, function: Any) -> Any:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return function(leaf)
    twin = copy(leaf)
    for part in dataclasses.fields(leaf):
        inner = _mapped(getattr(leaf, part.name), function)
        object.__setattr__(twin, part.name, inner)
    return twin
