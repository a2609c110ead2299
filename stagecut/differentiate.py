"""A pipe -> its program with a backward for each stage."""

from __future__ import annotations

from collections.abc import Mapping

from stagecut.backend.stages.crossing import written_inputs
from stagecut.backend.stages.pure import PureStage, example_of
from stagecut.backend.stages.staged import Staged
from stagecut.frontend.capture.joint import joint_graph
from stagecut.frontend.lower.from_joint import lower_joint
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import CaptureError, RolesError
from stagecut.ir.graph import Program, Stage
from stagecut.ir.roles import Budget
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.flops import flops_of
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.differentiate import Differentiated, differentiate


def differentiated(
    pipe: Staged, recompute: bool | Budget = False
) -> tuple[Program, Bindings]:
    """The program of a pipe, `differentiated`, and the constants that it reads besides its state. With
    `recompute`, less is saved, as `split` says (passes/roles.py). Raises RolesError.
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
    differentiate(program, parts, recompute, flops_of)
    verify(program, after="differentiate")
    return program, constants


def _parts(
    pure: PureStage, sizes: Mapping[str, int], constants: Bindings
) -> Differentiated:
    """What a stage computes on inputs of the types of the program."""
    _refuse_changes(pure.block)
    state = [slot.tensor for slot in pure.slots]
    inputs = [example_of(value, sizes) for value in pure.block.inputs]
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
        pure.resident,
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
