"""The batch of a step: how it is divided among the micro-batches, and how their outputs become those of one
batch.

The program says where the samples are in its inputs and outputs (`TensorType.batch`). Where it does not, the
user says so, in torch's own terms, or gives the micro-batches themselves. Nothing else divides an input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from stagecut.backend.ranks.agree import leaves_by_path
from stagecut.backend.ranks.chunks import (
    Division,
    divided_by_spec,
    divisions,
    merged_by_spec,
    parts_of,
)
from stagecut.backend.ranks.counts import SAY, SampleCounts, Samples
from stagecut.backend.ranks.filled import fillings
from stagecut.backend.ranks.marks import cut, lists_of, marks_of, places_of
from stagecut.backend.ranks.wire import Sizes, boundaries, fed_inputs
from stagecut.backend.stages.crossing import refuse_shared, written_arguments
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Value
from stagecut.ir.run.call import check_inputs, unlike_example
from stagecut.ir.run.objects import hides_tensors
from stagecut.ir.run.shown import shown_value
from stagecut.ir.sizes import evaluate
from stagecut.ir.types import Batch, TensorType


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
        self._refuse_both()
        if not self.is_ready:
            return [(self.args, self.kwargs)]
        args = _ready("arg_mbs", self.arg_mbs, count)
        kwargs = _ready("kwarg_mbs", self.kwarg_mbs, count)
        _refuse_bare(args, kwargs)
        if not args:
            args = [()] * count
        if not kwargs:
            kwargs = [{}] * count
        return list(zip(args, kwargs, strict=True))

    def _refuse_both(self) -> None:
        """Returns when nothing is given both whole and in micro-batches."""
        if self.target is not None and self.target_mbs is not None:
            raise InputError("target and target_mbs are both given", hint="give one")
        if not self.is_ready:
            return
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


def _ready(name: str, chunks: Any, count: int) -> list[Any]:
    """What is given for each micro-batch, [] for nothing."""
    if chunks is None:
        return []
    is_list = isinstance(chunks, list | tuple)
    if is_list and len(chunks) == count:
        return list(chunks)
    size = "none"
    if is_list:
        size = f"{len(chunks)} of them"
    kind = type(chunks).__name__
    raise InputError(
        f"{name} is a {kind} with {size}: the step has {count} micro-batches",
        hint=f"{name}=[...], with one item for each micro-batch",
    )


def _refuse_bare(calls: Sequence[Any], by_name: Sequence[Any]) -> None:
    """Returns when each micro-batch has its arguments in a tuple or a list, and those by name in a dict."""
    for args in calls:
        if not isinstance(args, tuple | list):
            raise _bare("arg_mbs", args, "[(x,), (y,)] for a single argument")
    for kwargs in by_name:
        if not isinstance(kwargs, Mapping):
            raise _bare("kwarg_mbs", kwargs, '[{"x": x}, {"x": y}]')


def _bare(name: str, given: Any, example: str) -> InputError:
    kind = type(given).__name__
    return InputError(
        f"{name} holds a {kind}, not the arguments of a micro-batch",
        hint=f"write {example}",
    )


def _type_that_fits(value: Value, item: Any) -> TensorType | None:
    """The type of an input that is given a tensor with as many dims; None for any other, which the check of
    the inputs looks at.
    """
    kind = value.type
    if not isinstance(kind, TensorType):
        return None
    if not isinstance(item, torch.Tensor):
        return None
    if item.dim() != len(kind.shape):
        return None
    return kind


LABELS = ("target", "target_mbs", "loss_kwargs")
"""What a call of the driver is given for its loss function."""


class _Argument(NamedTuple):
    """An argument of a call, and what the user says about how it is divided."""

    key: int | str
    name: str
    value: Any
    spec: Any


def _other_sizes(size: int, traced: int) -> str:
    """What to do with a batch of `size` where a micro-batch was traced with `traced` samples."""
    hint = "pass dynamic_shapes=... to pipeline() for sizes that vary, or trace with the size you run"
    if traced and size and size % traced == 0:
        return f"n_microbatches={size // traced}, or {hint}"
    return hint


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
        self._pipe = pipe
        self._count = count
        self._device = device
        self._specs = specs
        program = pipe.program
        crossing = boundaries(program, fed_inputs(program))
        self._last_boundary = crossing[-1]
        self._marks = marks_of(program, group)
        self._places = places_of(pipe._call_spec, program.inputs)
        self._lists = lists_of(pipe._call_spec, program.inputs, self._marks)
        self._fillings = fillings(program)
        self._written = written_arguments(program)
        self._samples = SampleCounts(count)
        self._divided: list[Division] = []
        self._divided_lists: set[str] = set()
        self._cast = False
        self._ready = False
        self._labels: tuple[Any, Any] = None, None
        self.inputs: list[list[Any]] = []
        self.sizes: list[Sizes] = []
        self.notes: dict[str, None] = {}

    def of_call(self, call: Call, cast: bool = False) -> list[Sizes]:
        """Sets the inputs of every micro-batch of a call; returns the symbolic sizes of each. With `cast`,
        floats may have other dtypes than in the trace. Raises InputError where something cannot be divided,
        or nothing says how.
        """
        calls = call.calls(self._count)
        self._refuse_own_words(call, *calls[0])
        self._cast = cast
        self._ready = call.is_ready
        if call.is_ready:
            self.sizes = self.take(calls)
        else:
            args, kwargs = calls[0]
            self.sizes = self.divide(args, kwargs)
        return self.sizes

    # --- inputs -----------------------------------------------------------------------------------

    def _refuse_own_words(
        self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Returns unless the model's arguments lack one with tensors, while the call names something for the
        loss, which may be meant for it.
        """
        words = [name for name in LABELS if getattr(call, name) is not None]
        given = {*self._positional_names(len(args))[: len(args)], *kwargs}
        if not words or not given or not given <= self._places.keys():
            return
        for name, places in self._places.items():
            kinds = [self._pipe.program.inputs[place].type for place in places]
            if name in given or not any(isinstance(k, TensorType) for k in kinds):
                continue
            raise InputError(
                f"the model's argument '{name}' is missing: `{words[0]}=` is the driver's own word, and goes "
                "to the loss function",
                hint=f"driver.step(..., {name}=...)",
            )

    def unknown(self, call: Call) -> list[str]:
        """The names in a call that are those of no argument of the model."""
        spec = self._pipe._call_spec
        if spec is None:
            return []
        known = {*spec.parameters, *spec.positional, *spec.keywords}
        return [name for name in call.kwargs if name not in known]

    def divide(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Sizes]:
        """Sets the flat inputs of every micro-batch; returns the symbolic sizes of each. Raises InputError
        where an input cannot be divided, or nothing says how.
        """
        self._samples = SampleCounts(self._count)
        self._divided = []
        self._divided_lists = set()
        if self._count == 1:
            flat = self._flat(args, kwargs)
            self._refuse_several(flat)
            return self._set([flat])
        calls, settled = self._by_argument(args, kwargs)
        flats = [self._flat(*call) for call in calls]
        self._divide_tensors(flats, settled)
        self._refuse_undivided(flats[0])
        self._count_samples(flats)
        self._samples.any_divided = bool(self._divided)
        self._samples.refuse_disagreement()
        sizes = self._set(flats)
        self._check_fillings(flats, sizes)
        return sizes

    def _divide_tensors(self, flats: list[list[Any]], settled: set[int]) -> None:
        """Each micro-batch has its part of every input that the program says how to divide. Those in
        `settled` stay as they are.
        """
        for place, value in enumerate(self._pipe.program.inputs):
            if place in settled:
                continue
            tensor = flats[0][place]
            dim = self._dim(value, tensor)
            if dim is None:
                continue
            shape = tuple(tensor.shape)
            self._divided.append((shape, dim))
            pieces = cut(tensor, dim, self._marks[value], self._count)
            for flat, piece in zip(flats, pieces, strict=True):
                flat[place] = piece

    def _check_fillings(self, flats: list[list[Any]], sizes: list[Sizes]) -> None:
        """Returns when each micro-batch has as many rows as its part of a mask takes."""
        for filling in self._fillings:
            if not any(_is_divided(flats, place) for place in filling.sources):
                continue
            for flat, chunk_sizes in zip(flats, sizes, strict=True):
                filling.check(self._pipe.program, flat, chunk_sizes)

    def take(
        self, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]
    ) -> list[Sizes]:
        """The inputs of every micro-batch are those of these calls, as for torch's schedules."""
        flats = [self._flat(*call) for call in calls]
        self._samples = SampleCounts(self._count)
        self._divided = []
        self._divided_lists = set()
        self._count_samples(flats, ready=True)
        return self._set(flats)

    def _set(self, flats: list[list[Any]]) -> list[Sizes]:
        ranges = None
        spec = self._pipe._call_spec
        if spec is not None:
            ranges = spec.ranges
        inputs = self._pipe.program.inputs
        for flat in flats:
            refuse_shared(self._pipe.program, self._written, flat)
        self.inputs = [_on_device(flat, self._device) for flat in flats]
        sizes: list[Sizes] = []
        for flat in self.inputs:
            sizes.append(check_inputs(inputs, flat, ranges, cast=self._cast))
        return sizes

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        spec = self._pipe._call_spec
        if spec is None:
            return list(args)
        return spec.flatten(args, dict(kwargs))

    def _by_argument(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[tuple[list[Any], dict[str, Any]]], set[int]]:
        """The calls of the micro-batches, in which the arguments are divided that the user says how to, and
        lists of samples; and the places of these among the flat inputs.
        """
        calls: list[tuple[list[Any], dict[str, Any]]] = []
        for _ in range(self._count):
            calls.append((list(args), dict(kwargs)))
        settled: set[int] = set()
        for argument in self._arguments(args, kwargs):
            pieces = self._pieces(argument)
            if pieces is None:
                continue
            settled.update(self._places.get(argument.name, ()))
            for (own_args, own_kwargs), piece in zip(calls, pieces, strict=True):
                if isinstance(argument.key, int):
                    own_args[argument.key] = piece
                else:
                    own_kwargs[argument.key] = piece
        return calls, settled

    def _pieces(self, argument: _Argument) -> list[Any] | None:
        """The parts of an argument, where the user says how it is divided or it is a list of samples."""
        name = argument.name
        value = argument.value
        if argument.spec is not None:
            where = f"argument '{name}'"
            pieces = divided_by_spec(value, argument.spec, self._count, where)
            self._divided += divisions(value, argument.spec)
            return pieces
        if name in self._lists:
            return self._sublists(name, value)
        return None

    def _arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[_Argument]:
        names = self._positional_names(len(args))
        specs = [*(self._specs.args or ())]
        for index, value in enumerate(args):
            name = str(index)
            if index < len(names):
                name = names[index]
            spec = None
            if index < len(specs):
                spec = specs[index]
            yield _Argument(index, name, value, spec)
        specs_by_name = self._specs.kwargs or {}
        for name, value in kwargs.items():
            spec = specs_by_name.get(name)
            yield _Argument(name, name, value, spec)

    def _positional_names(self, count: int) -> Sequence[str]:
        """The names of so many positional arguments, as far as they have names."""
        spec = self._pipe._call_spec
        if spec is None:
            return []
        if count <= len(spec.positional):
            return list(spec.positional)
        return list(spec.parameters)

    def _sublists(self, name: str, items: Any) -> list[Any]:
        """The parts of a list that has an item for each sample."""
        count = self._count
        example = self._lists[name].length
        length = example
        if isinstance(items, list | tuple):
            length = len(items)
        if length == example:
            return [items] * count
        if length != example * count:
            raise InputError(
                f"list '{name}' has {length} items, and {count} micro-batches of {example}, as in the "
                f"example, take {count * example}",
                hint="pass as many, or trace with a list as long as that of one micro-batch",
            )
        self._divided.append(((length,), 0))
        self._divided_lists.add(name)
        starts = range(0, length, example)
        return [items[start : start + example] for start in starts]

    def _dim(self, value: Value, item: Any) -> int | None:
        """The dim along which an input is divided; None for one that every micro-batch gets."""
        kind = _type_that_fits(value, item)
        if kind is None:
            return None
        mark = self._marks[value]
        if mark is None or not isinstance(mark.dim, int):
            self._refuse_unknown(value, kind, item)
            return None
        if item.shape[mark.dim] == kind.shape[mark.dim]:
            return None
        self._refuse_odd(value, kind, item, mark.dim)
        return mark.dim

    def _refuse_several(self, flat: Sequence[Any]) -> None:
        """Raises InputError where the only micro-batch has more or fewer samples than that of the trace."""
        for value, item in zip(self._pipe.program.inputs, flat, strict=True):
            kind = _type_that_fits(value, item)
            if kind is None:
                continue
            mark = self._marks[value]
            if mark is not None and isinstance(mark.dim, int):
                self._refuse_odd(value, kind, item, mark.dim)

    def _refuse_odd(
        self, value: Value, kind: TensorType, item: torch.Tensor, dim: int
    ) -> None:
        """Returns when the micro-batches divide an input along a dim, and are those of the trace."""
        size = item.shape[dim]
        traced = kind.shape[dim]
        if size % self._count:
            raise InputError(
                f"input '{value.hint}' has a batch of {size}, which {self._count} micro-batches do not "
                "divide",
                hint="pass a multiple of n_microbatches, or unequal micro-batches: step(arg_mbs=[...])",
            )
        if isinstance(traced, int) and size != traced * self._count:
            raise InputError(
                f"input '{value.hint}' has shape {list(item.shape)}, and {self._count} micro-batches of "
                f"{list(kind.shape)}, as traced, have {traced * self._count} along dim {dim}",
                hint=_other_sizes(size, traced),
            )

    def _refuse_unknown(
        self, value: Value, kind: TensorType, item: torch.Tensor
    ) -> None:
        """Returns when an input that is not divided has the sizes of the trace."""
        for dim, traced in enumerate(kind.shape):
            if not isinstance(traced, int) or item.shape[dim] == traced:
                continue
            if item.shape[dim] == traced * self._count:
                raise InputError(
                    f"input '{value.hint}' has shape {list(item.shape)}, traced was {list(kind.shape)}, and "
                    f"it is not known that samples lie along dim {dim}",
                    hint=SAY,
                )

    def _refuse_undivided(self, flat: Sequence[Any]) -> None:
        """Returns when something is divided, or there is nothing to divide."""
        if self._divided:
            return
        specs = self._specs
        if specs.args is not None or specs.kwargs is not None:
            return
        tensors: dict[Value, torch.Tensor] = {}
        for value, item in zip(self._pipe.program.inputs, flat, strict=True):
            if isinstance(item, torch.Tensor) and item.dim():
                tensors[value] = item
        if not tensors:
            return
        for value, tensor in tensors.items():
            if self._marks[value] is not None:
                raise self._nothing_divided(value, tensor)
        value, tensor = next(iter(tensors.items()))
        raise InputError(
            f"it is not known along which dims the inputs are divided among {self._count} micro-batches, "
            f"such as input '{value.hint}' of shape {list(tensor.shape)}",
            hint=SAY,
        )

    def _nothing_divided(self, value: Value, tensor: torch.Tensor) -> InputError:
        what = f"input '{value.hint}' has shape {list(tensor.shape)}"
        return InputError(
            f"nothing is divided among {self._count} micro-batches: {what}, that of the example, which is "
            "one micro-batch",
            hint=f"pass a batch {self._count} times as large, or cut the model with a smaller example: "
            "mb_args and mb_kwargs have the size of one micro-batch",
        )

    # --- samples ----------------------------------------------------------------------------------

    def _count_samples(
        self, flats: Sequence[Sequence[Any]], ready: bool = False
    ) -> None:
        """Counts the samples of each batch. Raises InputError where inputs have different numbers of them."""
        self._count_lists(ready)
        for place, value in enumerate(self._pipe.program.inputs):
            mark = self._marks[value]
            if mark is None or not isinstance(value.type, TensorType):
                continue
            if not isinstance(mark.dim, int):
                continue
            if len(mark.terms) != 1:
                continue
            rows, symbol = mark.terms[0]
            parts: list[int] = []
            for flat in flats:
                self._refuse_no_tensor(value, value.type, flat[place])
                size = flat[place].shape[mark.dim]
                parts.append(size // rows)
            traced = value.type.shape[mark.dim]
            samples = Samples(
                whole=parts[0],
                parts=parts,
                example=_example(traced, self._pipe._sizes) // rows,
                divided=ready or _is_divided(flats, place),
                where=value.hint,
            )
            if samples.divided:
                samples.whole = sum(parts)
            self._samples.add(symbol, samples)

    def _refuse_no_tensor(self, value: Value, kind: TensorType, item: Any) -> None:
        """Returns when an input that the program divides is a tensor with such a dim."""
        if isinstance(item, torch.Tensor) and item.dim() == len(kind.shape):
            return
        raise unlike_example(value.hint, kind, item)

    def _count_lists(self, ready: bool) -> None:
        for name, (length, mark) in self._lists.items():
            rows, symbol = mark.terms[0]
            parts = [length // rows] * self._count
            divided = ready or name in self._divided_lists
            whole = sum(parts) if divided else parts[0]
            samples = Samples(whole, parts, parts[0], divided, name)
            self._samples.add(symbol, samples)

    # --- targets ----------------------------------------------------------------------------------

    def labels(self, call: Call) -> tuple[list[Any], list[Any]]:
        """The target and the `loss_kwargs` of every micro-batch, none of either for []. What has as many
        samples as the inputs is divided.
        """
        self._labels = call.target, call.loss_kwargs
        targets = _ready("target_mbs", call.target_mbs, self._count)
        if call.target is not None:
            targets = self._divided_target(call.target)
        if call.loss_kwargs is None:
            return targets, []
        if self._ready:
            return targets, [call.loss_kwargs] * self._count
        return targets, parts_of(call.loss_kwargs, self._part, self._count)

    def _divided_target(self, target: Any) -> list[Any]:
        spec = self._specs.target
        if spec is not None:
            return divided_by_spec(target, spec, self._count, "target")
        parts = parts_of(target, self._part, self._count)
        self._note_whole(target, parts)
        return parts

    def _part(self, leaf: Any, chunk: int) -> Any:
        """The part of what is in a target that goes to one micro-batch."""
        if isinstance(leaf, torch.Tensor) and leaf.dim() and self._count > 1:
            return self._part_of_tensor(leaf, chunk)
        if not hides_tensors(leaf):
            return leaf
        kind = type(leaf).__name__
        raise InputError(
            f"target holds a {kind}, and what is in it cannot be divided",
            hint="give the targets of the micro-batches: step(target_mbs=[...])",
        )

    def _part_of_tensor(self, tensor: torch.Tensor, chunk: int) -> torch.Tensor:
        dim = self._dim_of_target(tensor)
        if dim is not None:
            pieces = cut(tensor, dim, None, self._count)
            return pieces[chunk]
        mark = self._mark_of_output_like(tensor)
        if mark is None:
            return tensor
        assert isinstance(mark.dim, int)
        pieces = cut(tensor, mark.dim, mark, self._count)
        return pieces[chunk]

    def _dim_of_target(self, tensor: torch.Tensor) -> int | None:
        """The dim along which a target is as long as an input that is divided; None where none is."""
        shape = tuple(tensor.shape)
        for divided_shape, dim in self._divided:
            if divided_shape == shape:
                return dim
        lengths = {divided_shape[dim] for divided_shape, dim in self._divided}
        dims: list[int] = []
        for dim, size in enumerate(shape):
            if size in lengths:
                dims.append(dim)
        if len(dims) > 1:
            dims = self._narrowed(dims, shape)
        if not dims:
            return None
        return dims[0]

    def _narrowed(self, dims: list[int], shape: tuple[int, ...]) -> list[int]:
        """The one dim of these along which an input is divided. Raises InputError where that does not tell
        which it is.
        """
        input_dims = {dim for _, dim in self._divided}
        common = [dim for dim in dims if dim in input_dims]
        if len(common) == 1:
            return common
        raise InputError(
            f"target of shape {list(shape)}: dims {dims} have as many elements as a divided dim of the "
            "inputs",
            hint="say along which it is divided: Driver(..., target_chunk_spec=TensorChunkSpec(dim))",
        )

    def _mark_of_output_like(self, tensor: torch.Tensor) -> Batch | None:
        """Where the samples are in an output that has as many rows along a dim as the target."""
        for leaf in self._pipe.program.outputs:
            if not isinstance(leaf, Value):
                continue
            mark = self._marks[leaf]
            if mark is None or not isinstance(mark.dim, int):
                continue
            rows = self._samples.rows(mark)
            if rows is None or mark.dim >= tensor.dim():
                continue
            whole = sum(map(sum, rows))
            if tensor.shape[mark.dim] == whole:
                return mark
        return None

    def shown_labels(self, given: tuple[Any, Any], chunk: int) -> str:
        """What one micro-batch is given for its loss besides the output, and how it came by it."""
        texts: list[str] = []
        for name, whole, parts in zip(
            ("target", "loss_kwargs"), self._labels, given, strict=True
        ):
            if len(parts) == 0:
                continue
            before = dict(leaves_by_path(name, whole))
            for path, leaf in leaves_by_path(name, parts[chunk]):
                text = f"{path} {shown_value(leaf)}"
                texts.append(text + self._came_by(leaf, before.get(path)))
        return ", ".join(texts) or "nothing else"

    def _came_by(self, part: Any, whole: Any) -> str:
        if not isinstance(whole, torch.Tensor) or self._count == 1:
            return ""
        if part is not whole:
            return f" (a part of {shown_value(whole)})"
        return f" (whole in each micro-batch{self._why_whole()})"

    def _why_whole(self) -> str:
        lengths = sorted({shape[dim] for shape, dim in self._divided})
        if not lengths:
            return ""
        samples = " or ".join(map(str, lengths))
        return f", because no dim of it is as long as the batch, {samples}"

    def _note_whole(self, target: Any, parts: Sequence[Any]) -> None:
        """Notes a target of which each micro-batch has all."""
        before = dict(leaves_by_path("target", target))
        now = dict(leaves_by_path("target", parts[0]))
        sized = [
            path
            for path, leaf in before.items()
            if isinstance(leaf, torch.Tensor) and leaf.dim()
        ]
        if self._count == 1 or not sized:
            return
        if any(now.get(path) is not before[path] for path in sized):
            return
        self.notes[
            f"{sized[0]} {shown_value(before[sized[0]])} is whole in each of {self._count} micro-batches"
            f"{self._why_whole()}\n"
            "  otherwise: Driver(target_chunk_spec=...) says how it is divided"
        ] = None

    # --- outputs ----------------------------------------------------------------------------------

    def structured(self, packed: Sequence[torch.Tensor], chunk: int) -> Any:
        """The model's own output of one micro-batch."""
        leaves = self._leaves(packed, chunk)
        return self._unflattened(leaves)

    def joined(self, results: Mapping[int, Sequence[torch.Tensor]]) -> Any:
        """The outputs of all micro-batches as those of one batch.

        Tensors are joined along the dim of the samples, means are averaged, sums are summed. What is none of
        these is a list with the value of each micro-batch, and a note says so.
        """
        chunks: list[list[Any]] = []
        for chunk in range(self._count):
            leaves = self._leaves(results[chunk], chunk)
            chunks.append(leaves)
        if self._count == 1:
            return self._unflattened(chunks[0])
        if self._specs.output is not None:
            outputs = [self._unflattened(leaves) for leaves in chunks]
            spec = self._specs.output
            return merged_by_spec(outputs, spec)
        joined: list[Any] = []
        for index, leaf in enumerate(self._pipe.program.outputs):
            parts = [leaves[index] for leaves in chunks]
            joined.append(self._join(leaf, parts, index))
        return self._unflattened(joined)

    def _unflattened(self, leaves: Sequence[Any]) -> Any:
        """These leaves in the structure of what the model returns."""
        spec = self._pipe._call_spec
        if spec is None:
            return list(leaves)
        return spec.unflatten(leaves)

    def _leaves(self, packed: Sequence[torch.Tensor], chunk: int) -> list[Any]:
        program = self._pipe.program
        env = dict(zip(program.inputs, self.inputs[chunk], strict=True))
        for value, tensor in zip(self._last_boundary, packed, strict=True):
            env[value] = _unpacked(value, tensor)
        leaves: list[Any] = []
        for leaf in program.outputs:
            if isinstance(leaf, Value):
                leaves.append(env[leaf])
            else:
                leaves.append(leaf)
        return leaves

    def _join(self, leaf: Any, parts: list[Any], index: int) -> Any:
        first = parts[0]
        if not isinstance(leaf, Value):
            return first
        if all(part is first for part in parts):
            return first  # an input that is not divided
        joined = self._samples.joined(self._marks[leaf], parts)
        if joined is not None:
            return joined
        name = str(index)
        names = self._pipe.program.output_names
        if index < len(names):
            name = names[index]
        note = (
            f"output '{name}' is a list with the value of each micro-batch: it is not known how they "
            "make that of the batch; Driver(..., output_merge_spec=...) can say it"
        )
        self.notes[note] = None
        return parts


# --- samples ----------------------------------------------------------------------------------------------


def _is_divided(flats: Sequence[Sequence[Any]], place: int) -> bool:
    """True for an input that is not the same object in every micro-batch."""
    first = flats[0][place]
    return any(flat[place] is not first for flat in flats)


def _example(size: int | str, sizes: Sizes) -> int:
    """A size in the example; 0 where that is not known."""
    if isinstance(size, int):
        return size
    known_sizes = tuple(sorted(sizes.items()))
    return evaluate(size, known_sizes) or 0


# --- tensors ----------------------------------------------------------------------------------------------


def _unpacked(value: Value, tensor: torch.Tensor) -> Any:
    """What crossed as a tensor, as the model returns it."""
    if isinstance(value.type, TensorType):
        return tensor
    return tensor.item()


def _on_device(flat: Sequence[Any], device: torch.device) -> list[Any]:
    """The same inputs, with the tensors on a device."""
    moved: list[Any] = []
    for leaf in flat:
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.to(device)
        moved.append(leaf)
    return moved
