"""A pipe -> its program with a backward for each stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stagecut.backend.stages.crossing import written_inputs
from stagecut.backend.stages.pure import PureStage
from stagecut.backend.stages.staged import Staged
from stagecut.frontend.capture.joint import joint_graph
from stagecut.frontend.lower.from_joint import lower_joint
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import CaptureError, RolesError
from stagecut.ir.graph import Program, Stage, Value
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.sizes import evaluate
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.ir.types import DTYPES, TensorType
from stagecut.passes.differentiate import Differentiated, differentiate


def differentiated(pipe: Staged, recompute: bool = False) -> tuple[Program, Bindings]:
    """The program of a pipe, `differentiated`, and the constants that it reads besides its state. With
    `recompute`, as little as possible is saved. Raises RolesError.
    """
    program = parse(text(pipe.program))
    constants = Bindings()
    parts = []
    for stage, block in zip(
        pipe.stages,
        pipe.program.stages,
        strict=True,
    ):
        try:
            pure = PureStage(stage, block)
            parts.append(_parts(pure, pipe._sizes, constants))
        except (RolesError, CaptureError) as error:
            raise RolesError(
                f"stage {block.index} has no backward in the program: {error.what}",
                where=error.where,
            ) from error
    differentiate(program, parts, recompute)
    verify(program, after="differentiate")
    return program, constants


def _parts(
    pure: PureStage, sizes: Mapping[str, int], constants: Bindings
) -> Differentiated:
    """What a stage computes on inputs of the types of the program."""
    _refuse_changes(pure.block)
    state = [slot.tensor for slot in pure.slots]
    inputs = [_example(value, sizes) for value in pure.block.inputs]
    arguments = [
        tensor.detach().requires_grad_(tensor.requires_grad)
        for tensor in (*state, *inputs)
    ]
    names = [slot.name for slot in pure.slots]
    hints = [*names, *(value.hint for value in pure.block.inputs)]
    graph, tangents = joint_graph(pure, arguments)
    joint, own = lower_joint(
        graph,
        hints,
        tangents,
        range(len(names)),
    )
    assert isinstance(joint.block, Program)
    for entry in joint.block.state:
        name = f"{entry.name}_{pure.block.index}"
        constants.tensors[name] = own.tensors[entry.name]
        entry.names = (name,)
    written = [slot.name for slot in pure.slots if slot.written]
    return Differentiated(joint, names, written)


def _refuse_changes(block: Stage) -> None:
    """Raises RolesError where a stage writes an input of the model: the caller would not see it."""
    written = written_inputs(block)
    for value in block.inputs:
        if value.owner is None and value in written:
            raise RolesError(f"forward writes {value!r}, which is the caller's")


def _example(value: Value, sizes: Mapping[str, int]) -> torch.Tensor:
    """A tensor of the type of a value; what is in it does not matter."""
    tensor_type = value.type
    assert isinstance(tensor_type, TensorType)
    numbers = tuple(sorted(sizes.items()))
    shape = [_number(dim, numbers) for dim in tensor_type.shape]
    dtype = getattr(torch, DTYPES[tensor_type.dtype])
    options = {"dtype": dtype, "device": tensor_type.device}
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
