"""The stages as torch.fx shows them: a graph of calls of stages, and the attributes that torch's own stage
class asks of each.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import fx, nn

from stagecut.backend.stages.crossing import (
    backward_is_whole,
    lives_in_buffer,
    refuse_feedback,
    written_inputs,
)
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Namer, Program, Value
from stagecut.ir.types import DTYPES, TensorType, Type, carries_grad

PREFIX = "submod_pp_"
"""Prefix of torch's name for a stage, before its number."""


def split_module(program: Program, stages: Sequence[nn.Module]) -> fx.GraphModule:
    """A module that calls the stages as torch's frontend lays them out: `submod_pp_0` and so on, on flat
    inputs.
    """
    return fx.GraphModule(
        {f"{PREFIX}{index}": stage for index, stage in enumerate(stages)},
        split_graph(program),
    )


def split_graph(program: Program) -> fx.Graph:
    """The calls of the stages. The graph takes the flat inputs and returns the flat outputs."""
    graph = fx.Graph()
    names = Namer(keyword.kwlist)
    nodes: dict[Value, fx.Node] = {}
    for value in program.inputs:
        name = names(value.hint if value.hint.isidentifier() else "input")
        nodes[value] = _typed(graph.placeholder(name), value.type)
    for stage in program.stages:
        call = graph.create_node(
            "call_module",
            f"{PREFIX}{stage.index}",
            tuple(nodes[value] for value in stage.inputs),
        )
        if len(stage.outputs) == 1:
            nodes[stage.outputs[0]] = _typed(call, stage.outputs[0].type)
            continue
        # each has its node, in this order, which torch counts on
        for place, value in enumerate(stage.outputs):
            nodes[value] = _typed(
                graph.call_function(operator.getitem, (call, place)), value.type
            )
    graph.output(
        tuple(
            nodes[leaf] if isinstance(leaf, Value) else leaf for leaf in program.outputs
        )
    )
    return graph


def stage_graph(
    names: Sequence[str], takes: Sequence[Type], gives: Sequence[Type]
) -> fx.Graph:
    """A placeholder for each input of a stage, and an output node for its outputs, with their types; nothing
    in between.
    """
    graph = fx.Graph()
    for name, value_type in zip(names, takes, strict=True):
        _typed(graph.placeholder(name), value_type)
    outputs = [
        _typed(graph.get_attr(f"output_{place}"), value_type)
        for place, value_type in enumerate(gives)
    ]
    graph.output(tuple(outputs))
    return graph


def _typed(node: fx.Node, value_type: Type) -> fx.Node:
    node.meta["val"] = _example(value_type)
    return node


def _example(value_type: Type) -> torch.Tensor | None:
    """A tensor of this type without values, when all its sizes are known; else None."""
    if not isinstance(value_type, TensorType):
        return None
    shape = [dim for dim in value_type.shape if isinstance(dim, int)]
    strides = [step for step in value_type.strides or () if isinstance(step, int)]
    if len(shape) < len(value_type.shape) or len(strides) < len(
        value_type.strides or ()
    ):
        return None
    dtype = getattr(torch, DTYPES[value_type.dtype])
    if value_type.strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def refuse_torchs_stage(program: Program) -> None:
    """Returns when torch's own stage class runs these stages right, under each of its schedules; raises
    StagecutError saying why not.
    """
    refuse_feedback(program)
    for what, where in _beyond_torch(program):
        raise StagecutError(
            f"torch's own build_stage cannot run this pipe: {what}",
            where=where,
            hint=(
                "pipe.build_stage(index, device, group), "
                "or stagecut.build_stage with the arguments you gave"
            ),
        )


def _beyond_torch(program: Program) -> Iterator[tuple[str, str]]:
    """The things that torch's class gets wrong or cannot do in these stages, and where."""
    first, last = program.stages[0], program.stages[-1]
    if first.inputs != program.inputs:
        yield "the first stage does not take the model's inputs one by one", "stage 0"
    for entry in program.state:
        if entry.kind == "param" and len(entry.stages) > 1:
            yield (
                f"it scales the gradient of '{entry.name}' once for each stage of a rank that has it",
                f"stages {entry.stages}",
            )
    if last.outputs != program.outputs:
        yield (
            "the last stage does not return the model's outputs one by one",
            f"stage {last.index}",
        )
    for previous, stage in pairwise(program.stages):
        passed = [value for value in previous.outputs if value in stage.inputs]
        if passed != stage.inputs:
            yield (
                "it reads more than the stage before it hands on, or in another order",
                f"stage {stage.index}",
            )
        for value in stage.inputs:
            if not _is_sendable(value.type):
                yield (
                    f"{value!r} is {value.type}, and torch sends tensors of known sizes that are contiguous",
                    f"stage {stage.index}",
                )
            if lives_in_buffer(value) or value in written_inputs(stage):
                yield (
                    f"{value!r} is written again while torch sends or keeps it",
                    f"stage {stage.index}",
                )
        if backward_is_whole(stage, _carrying(stage.inputs), _carrying(stage.outputs)):
            yield "its split of the backward misses weights", f"stage {stage.index}"


def _is_sendable(value_type: Type) -> bool:
    """True for a type that torch's stage class can send."""
    example = _example(value_type)
    return example is not None and example.is_contiguous() and not example.is_complex()


def _carrying(values: Sequence[Value]) -> set[Value]:
    return {value for value in values if carries_grad(value.type)}
