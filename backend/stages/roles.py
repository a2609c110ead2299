"""A role of a stage -> a function of tensors. Roles with the same code share one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stagecut.backend.progress import first_call
from stagecut.backend.stages.emit import emit
from stagecut.backend.stages.modules import Stage
from stagecut.ir.graph import Block, Program, StateEntry, nested_ops, target_of
from stagecut.ir.graph import Stage as IrStage
from stagecut.ir.ops import facts
from stagecut.ir.run.bindings import Bindings

Function = Callable[..., Any]


class RoleCode:
    """Emits roles. Each distinct code is one function, compiled once where `compiled` says so."""

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self._functions: dict[tuple[str, torch.device], Function] = {}

    def function(self, block: Block, bindings: Bindings) -> Function:
        """A function from the inputs of the block to its outputs: the output itself where it is one."""
        stage = _emitted(block, bindings)
        if stage._constants:
            return self._ready(stage)
        key = stage.code, stage._here.device
        if key not in self._functions:
            self._functions[key] = self._ready(stage)
        return self._functions[key]

    def _ready(self, stage: Stage) -> Function:
        function: Function = stage.forward
        if not self.compiled:
            return function
        # random numbers are those of the eager run
        compiled = torch.compile(
            function, fullgraph=True, dynamic=False, options={"fallback_random": True}
        )
        return first_call(compiled, "compiling a stage for its forward and backward")


def _emitted(block: Block, bindings: Bindings) -> Stage:
    """The role as the only stage of a program. Names tell nothing of where it stands in the model, so that
    equal blocks have equal code.
    """
    role = block.copy()
    for place, value in enumerate(role.inputs):
        value.hint = f"x{place}"
    for op in role.ops:
        # some kernels lay out their results in another way than torch's trace says; a role writes nothing
        if facts(op).needs_layout and op.target.overload == "default":
            op.target = target_of("aten.reshape.default")
    program = Program(block.name)
    program.phase = "linked"
    program.inputs = role.inputs
    program.set_outputs(list(role.outputs))
    program.state = _constants(role)
    stage = IrStage(0, role.ops)
    stage.inputs = role.inputs
    stage.set_outputs(list(role.outputs))
    stage.state = {entry: entry.names for entry in program.state}
    program.stages = [stage]
    return emit(program, bindings)[0]


def _constants(block: Block) -> list[StateEntry]:
    """The state that a block reads."""
    entries: dict[StateEntry, None] = {}
    for op in (*nested_ops(block.ops), block.output):
        entries |= {
            value.owner: None
            for value in op.operands
            if isinstance(value.owner, StateEntry)
        }
    return list(entries)
