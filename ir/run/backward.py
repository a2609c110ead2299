"""The reference interpreter for the backward of a program that is `differentiated`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Block, Program, Stage, Value
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import Environment, Machine


def run_roles(
    program: Program,
    inputs: Sequence[Any],
    tensors: Mapping[str, torch.Tensor],
    cotangents: Sequence[torch.Tensor],
) -> tuple[list[Any], dict[Value, torch.Tensor]]:
    """The outputs of `program`, and the gradient of each input and state value that has one. `cotangents` are
    those of the program; `tensors` gives each state name its tensor. Neither changes.

    A stage sees nothing but what it lists, and its backward nothing but what it saved and what arrives.
    """
    machine = Machine(Bindings())
    state = {entry.value: tensors[entry.name].clone() for entry in program.state}
    values: Environment = dict(zip(program.inputs, inputs, strict=True))
    saved: dict[Stage, Environment] = {}
    with torch.no_grad():
        for stage in program.stages:
            local = {entry.value: state[entry.value] for entry in stage.state}
            local |= _given(stage, stage.inputs, values)
            results = machine.call(stage, local)
            saved[stage] = {value: local[value].clone() for value in stage.saved}
            values |= zip(stage.outputs, results, strict=True)
        outputs = [machine.lookup(leaf, values) for leaf in program.outputs]
        arriving: Environment = dict(zip(program.cotangents, cotangents, strict=True))
        gradients: dict[Value, torch.Tensor] = {}
        for stage, block in program.backward_blocks():
            local = {entry.value: state[entry.value] for entry in stage.state}
            local |= _given(block, block.inputs, saved[stage] | arriving)
            results = machine.call(block, local)
            for value, tensor in zip(block.outputs, results, strict=True):
                whose = value.gradient_of
                if whose in state or whose in program.inputs:
                    _add(gradients, whose, tensor)
                else:
                    arriving[value] = tensor
    return outputs, gradients


def _given(block: Block, values: Sequence[Value], known: Environment) -> Environment:
    for value in values:
        if value not in known:
            raise StagecutError(f"{block.name or 'a stage'} waits for {value!r}")
    return {value: known[value] for value in values}


def _add(
    gradients: dict[Value, torch.Tensor], value: Value | None, tensor: torch.Tensor
) -> None:
    assert value is not None
    before = gradients.get(value)
    gradients[value] = tensor if before is None else before + tensor
