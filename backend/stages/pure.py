"""A stage as a function of tensors, as AOT autograd takes it: its state comes in, and the state that it
writes goes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from stagecut.backend.stages.crossing import written_inputs
from stagecut.backend.stages.modules import Stage, StageModule, find
from stagecut.backend.stages.overlaps import refuse_overlap
from stagecut.backend.stages.run import results_of
from stagecut.ir.aliases import storage_root
from stagecut.ir.errors import RolesError
from stagecut.ir.graph import Stage as IrStage
from stagecut.ir.graph import StateEntry, Value, nested_ops
from stagecut.ir.run.storage import storage_of
from stagecut.ir.sizes import evaluate
from stagecut.ir.types import DTYPES, TensorType


@dataclass(eq=False)
class Slot:
    """One tensor of a stage, and every place where its modules hold it."""

    name: str
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    written: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now."""
        table, key = self.places[0]
        tensor: torch.Tensor = table[key]
        return tensor

    def put(self, tensor: torch.Tensor) -> None:
        """The modules hold this tensor."""
        for table, key in self.places:
            table[key] = tensor


class PureStage:
    """`pure(*state, *inputs)` computes what the stage computes for these inputs, with this state in the place
    of its own.

    It returns the outputs, the inputs at the places `handed_on`, and the new contents of each written slot.
    No result shares memory with an argument or with another result. Raises RolesError for a stage that no
    graph can stand for.
    """

    def __init__(self, stage: Stage, block: IrStage) -> None:
        _refuse_what_no_graph_shows(block)
        self.stage = stage
        self.block = block
        self.slots = _slots(stage)
        self.handed_on: tuple[int, ...] = ()
        self._written_inputs = written_inputs(block)
        _mark_written(self.slots, stage, block)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(self.slots)
        state = [
            tensor.clone() if slot.written else tensor
            for slot, tensor in zip(self.slots, tensors, strict=False)
        ]
        inputs = [
            tensor.clone() if value in self._written_inputs else tensor
            for value, tensor in zip(
                self.block.inputs,
                tensors[count:],
                strict=True,
            )
        ]
        with self._holding(state):
            outputs = results_of(self.stage(*inputs), self.block)
            written = [slot.tensor.detach() for slot in self.slots if slot.written]
        own = tensors[count:]
        outputs = (*outputs, *(own[place] for place in self.handed_on))
        return *_apart(
            outputs,
            (*tensors, *written),
        ), *written

    @property
    def resident(self) -> list[int]:
        """The places of the arguments that lie in memory whatever a backward needs: state that the stage does
        not write, and inputs of the model.
        """
        state = [place for place, slot in enumerate(self.slots) if not slot.written]
        inputs = [
            len(self.slots) + place
            for place, value in enumerate(self.block.inputs)
            if value.owner is None
        ]
        return state + inputs

    @contextmanager
    def _holding(self, state: Sequence[torch.Tensor]) -> Iterator[None]:
        """Inside, the modules of the stage hold these tensors."""
        before = [slot.tensor for slot in self.slots]
        try:
            for slot, tensor in zip(self.slots, state, strict=True):
                slot.put(tensor)
            yield
        finally:
            for slot, tensor in zip(self.slots, before, strict=True):
                slot.put(tensor)


def _apart(
    outputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The outputs; a clone of each that shares memory with another tensor."""
    taken = {storage_of(tensor) for tensor in others}
    for output in outputs:
        storage = storage_of(output)
        yield output.clone() if output._is_view() or storage in taken else output
        taken.add(storage)


def _refuse_what_no_graph_shows(block: IrStage) -> None:
    """Raises RolesError where a stage runs code of the user's that no trace shows, or computes again
    what it ran; and where it hands on or takes what is no tensor.
    """
    for op in nested_ops(block.ops):
        if op.is_users:
            raise RolesError(
                f"{op.target} runs as a whole, and no graph shows what it does",
                where=op.where(),
            )
        refuse_overlap(op)
        if any(context.kind == "checkpoint" for context in op.context):
            raise RolesError(
                "a checkpoint computes again what a graph would keep", where=op.where()
            )
    for value in (*block.inputs, *block.outputs):
        if not isinstance(value.type, TensorType):
            raise RolesError(
                f"{value!r}, which crosses, is a {value.type} and no tensor"
            )


def _slots(stage: Stage) -> list[Slot]:
    """The distinct tensors of a stage: parameters, buffers, constants."""
    slots: dict[int, Slot] = {}
    for path, module in stage.named_modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        if isinstance(module, StageModule):
            tables.append(module._constants)
        for table in tables:
            for key, tensor in table.items():
                if tensor is not None:
                    name = f"{path}.{key}" if path else key
                    slot = slots.setdefault(id(tensor), Slot(name))
                    slot.places.append((table, key))
    return list(slots.values())


def _mark_written(slots: Sequence[Slot], stage: Stage, block: IrStage) -> None:
    """The slots that the stage writes say so. Raises RolesError for a parameter that is written, and
    for a buffer that shares its memory with another tensor of the stage.
    """
    by_tensor = {id(slot.tensor): slot for slot in slots}
    storages = [storage_of(slot.tensor) for slot in slots]
    for entry in _written_entries(block):
        tensor = find(stage, block.state[entry][0])
        if entry.kind == "param":
            raise RolesError(f"forward writes the parameter '{entry.name}'")
        if storages.count(storage_of(tensor)) > 1:
            raise RolesError(
                f"forward writes '{entry.name}', which shares its memory with other state"
            )
        by_tensor[id(tensor)].written = True


def _written_entries(block: IrStage) -> list[StateEntry]:
    """The state that a stage writes in any mode."""
    entries: dict[StateEntry, None] = {}
    for op in nested_ops(block.ops):
        for value in op.effects.writes:
            owner = storage_root(value).owner
            if isinstance(owner, StateEntry) and owner in block.state:
                entries[owner] = None
    return list(entries)


def example_of(
    value: Value,
    sizes: Mapping[str, int],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A tensor of the type of a value, or of another dtype, there or on another device; what is in it does
    not matter. Raises RolesError where nobody knows how large it is.
    """
    tensor_type = value.type
    assert isinstance(tensor_type, TensorType)
    numbers = tuple(sorted(sizes.items()))
    shape = [_number(dim, numbers) for dim in tensor_type.shape]
    options: Any = {
        "dtype": dtype or getattr(torch, DTYPES[tensor_type.dtype]),
        "device": device or tensor_type.device,
    }
    if tensor_type.strides is None:
        tensor = torch.zeros(shape, **options)
    else:
        strides = [_number(step, numbers) for step in tensor_type.strides]
        tensor = torch.empty_strided(shape, strides, **options)
    return tensor.requires_grad_(tensor_type.grad)


def _number(dim: int | str, sizes: tuple[tuple[str, int], ...]) -> int:
    number = dim if isinstance(dim, int) else evaluate(dim, sizes)
    if number is None:
        raise RolesError(f"the size {dim} varies, and no example says how large it is")
    return number
