"""Gives each stage of a linked program its backward. `stagecut.passes.roles` splits what a stage computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stagecut.ir.graph import (
    Block,
    Effects,
    Op,
    Program,
    Stage,
    StateEntry,
    Transfer,
    Value,
)
from stagecut.ir.roles import Budget, Joint, Roles
from stagecut.ir.types import TensorType, contiguous_strides, same_layout
from stagecut.passes.liveness import Liveness
from stagecut.passes.place_lanes import PlaceLanes
from stagecut.passes.recompute_saved import Flops, unknown
from stagecut.passes.roles import skip_views, split
from stagecut.passes.route import Route


@dataclass(frozen=True)
class Differentiated:
    """What a stage and its backward compute. The primals are its state, by these names, and then its inputs;
    the results are its outputs, and then what it writes into the state of these names.
    """

    joint: Joint
    state: Sequence[str]
    written: Sequence[str]


def differentiate(
    program: Program,
    stages: Sequence[Differentiated],
    recompute: bool | Budget = False,
    flops: Flops = unknown,
) -> None:
    """A linked program is `differentiated`. The ops of its stages are those of the joint blocks. With
    `recompute`, less is saved, as `split` says.
    """
    relayed = [t.value.hint for t in program.transfers if t.source is None and t.via]
    for stage, parts in zip(program.stages, stages, strict=True):
        _take_forward(program, stage, parts)
    joints = _connected(program, [parts.joint for parts in stages])
    roles = [split(joint, recompute, flops) for joint in joints]
    for stage, of_stage, parts in zip(
        program.stages,
        roles,
        stages,
        strict=True,
    ):
        stage.ops = [*of_stage.forward.ops, *_writes(program, parts, of_stage)]
        # the outputs of the stage are those that liveness finds
        of_stage.forward.output.drop()
        of_stage.joint.block.output.drop()
    program.transfers = []
    program.phase = "partitioned"
    Liveness().run(program)
    Route(tuple(relayed)).run(program)
    PlaceLanes().run(program)
    for stage, of_stage in zip(program.stages, roles, strict=True):
        _take_backward(program, stage, of_stage)
    program.raise_phase("differentiated")


def _take_forward(program: Program, stage: Stage, parts: Differentiated) -> None:
    """The joint block reads the state and the inputs of the program, and who reads the outputs of the stage
    reads those of the block. The ops of the stage are gone.
    """
    joint = parts.joint
    skip_views(joint.block)
    owners = program.name_owners()
    own: list[Value] = [owners[name].value for name in parts.state]
    for primal, value in zip(
        joint.primals,
        [*own, *stage.inputs],
        strict=True,
    ):
        primal.replace_uses(value)
    joint.block.inputs = [*own, *stage.inputs]
    _hold_constants(program, stage, joint.block)
    outputs = list(stage.outputs)
    stage.set_outputs([])
    results = joint.block.outputs[: len(outputs)]
    for old, new in zip(outputs, results, strict=True):
        assert isinstance(old.type, TensorType)
        new.hint = old.hint
        new.type = replace(
            new.type,
            grad=old.type.grad,
            batch=old.type.batch,
        )
        _stand_in(program, stage, old, new)
    for op in reversed(stage.ops):
        op.drop()
    stage.ops = []
    stage.inputs = []


def _stand_in(program: Program, home: Stage, old: Value, new: Value) -> None:
    """All that comes after a stage reads `new` in the place of `old`."""
    later = program.stages[home.index + 1 :]
    users = {op for stage in later for op in (*stage.ops, stage.output)}
    users.add(program.output)
    old.replace_uses(new, lambda op: op in users)
    for stage in later:
        stage.inputs = [new if value is old else value for value in stage.inputs]


def _hold_constants(program: Program, stage: Stage, block: Block) -> None:
    """The constants that a block reads are state of the stage."""
    read: dict[StateEntry, None] = {}
    for op in block.ops:
        for value in op.operands:
            if isinstance(value.owner, StateEntry) and value.owner not in stage.state:
                read[value.owner] = None
    for entry in read:
        entry.stages = (stage.index,)
        entry.tensor = entry.storage = -1 - len(program.state)
        program.state.append(entry)
        stage.state[entry] = entry.names


def _connected(program: Program, joints: Sequence[Joint]) -> list[Joint]:
    """The joint blocks read the gradients that the blocks of later stages compute, and those of what the
    model returns, which the program lists.
    """
    arriving: dict[Value, list[Value]] = {}
    results = [
        joint.block.outputs[place] for joint in joints for place in joint.tangents
    ]
    for value in dict.fromkeys(program.output.operands):
        if value in results:
            assert isinstance(value.type, TensorType)
            gradient_type = replace(value.type, grad=False, batch=None)
            cotangent = Value(gradient_type, f"{value.hint}.grad")
            cotangent.gradient_of = value
            program.cotangents.append(cotangent)
            arriving[value] = [cotangent]
    connected = []
    for joint in reversed(joints):
        received: list[Value] = []
        sums: list[Op] = []
        for place, tangent in zip(joint.tangents, joint.cotangents, strict=True):
            result = joint.block.outputs[place]
            parts = arriving.get(result, [])
            received += parts
            total = _sum(result, parts, sums)
            tangent.replace_uses(_laid_out(total, tangent, sums))
        joint.block.ops[:0] = sums
        _name_gradients(joint)
        primals = joint.block.inputs
        joint.block.inputs = [*primals, *received]
        for primal, gradient in zip(primals, joint.gradients, strict=True):
            if gradient is not None and not isinstance(primal.owner, StateEntry):
                arriving.setdefault(primal, []).append(gradient)
        connected.append(replace(joint, primals=primals, cotangents=received))
    return connected[::-1]


def _sum(result: Value, parts: Sequence[Value], ops: list[Op]) -> Value:
    """The sum of the gradients of a result; `ops` gains the ops that compute it."""
    if not parts:
        return _computed(ops, "aten.zeros_like.default", (result,), result)
    total = parts[0]
    for part in parts[1:]:
        total = _computed(ops, "aten.add.Tensor", (total, part), result)
    return total


def _laid_out(gradient: Value, tangent: Value, ops: list[Op]) -> Value:
    """The gradient with its elements where the joint block has them; `ops` gains the ops that lay them
    out.
    """
    wanted = tangent.type
    if same_layout(gradient.type, wanted):
        return gradient
    assert isinstance(wanted, TensorType)
    sizes = tuple(size for size in wanted.shape if isinstance(size, int))
    strides = wanted.strides or contiguous_strides(sizes)
    args = (gradient, list(sizes), list(strides))
    empty = _computed(ops, "aten.new_empty_strided.default", args, tangent)
    return _computed(ops, "aten.copy.default", (empty, gradient), tangent)


def _computed(ops: list[Op], target: str, args: tuple[Any, ...], like: Value) -> Value:
    """The result of a new op, of the type of `like`. `ops` gains the op."""
    op = Op(target, args)
    ops.append(op)
    assert isinstance(like.type, TensorType)
    result_type = replace(like.type, grad=False, batch=None)
    return op.add_result(result_type, op.target.name)


def _name_gradients(joint: Joint) -> None:
    """Each gradient is the result of an op of its own, and knows what it is the gradient of."""
    block = joint.block
    own = set(block.ops)
    gradients: list[Value | None] = []
    for primal, gradient in zip(block.inputs, joint.gradients, strict=True):
        if gradient is None:
            gradients.append(None)
            continue
        if gradient.owner not in own or gradient.gradient_of is not None:
            viewed = gradient
            gradient = _computed(block.ops, "aten.alias.default", (viewed,), viewed)
            block.ops[-1].effects = Effects(views=(viewed,))
        gradient.hint = f"{primal.hint}.grad"
        gradient.gradient_of = primal
        gradients.append(gradient)
    block.set_outputs([*block.outputs[: joint.results], *gradients])


def _writes(program: Program, parts: Differentiated, roles: Roles) -> list[Op]:
    """The ops that write the new contents of the state at the end of a forward."""
    owners = program.name_owners()
    block = roles.joint.block
    contents = block.outputs[roles.joint.results - len(parts.written) :]
    ops = []
    for name, new in zip(parts.written, contents, strict=False):
        value = owners[name].value
        op = Op(
            "aten.copy_.default",
            (value, new),
            effects=Effects(writes=(value,), views=(value,)),
        )
        op.add_result(value.type, "copy_")
        op.add_version(value, value.hint)
        ops.append(op)
    return ops


def _take_backward(program: Program, stage: Stage, roles: Roles) -> None:
    """The stage has the blocks of its backward, and the gradients that it computes go back."""
    inputs, weights = roles.backward_input, roles.backward_weight
    stage.backward = [inputs, weights]
    # some ops compute both: a norm the gradients of its input and of its weight
    own = set(weights.ops)
    weights.set_outputs([value for value in weights.outputs if value.owner in own])
    available = [*stage.inputs, *(v for op in stage.ops for v in op.definitions())]
    read: set[Value] = set()
    for block in stage.backward:
        needed = {value for op in (*block.ops, block.output) for value in op.reads}
        block.inputs = [
            value
            for value in block.inputs
            if value in needed and not isinstance(value.owner, StateEntry)
        ]
        read.update(block.inputs)
    stage.saved = [value for value in available if value in read]
    homes = {value: home.index for home in program.stages for value in home.outputs}
    for gradient in inputs.outputs:
        whose = gradient.gradient_of
        if whose in homes and whose not in stage.outputs:
            target = homes[whose]
            route = "send" if target == stage.index - 1 else "relay"
            transfer = Transfer(gradient, stage.index, target, route)
            program.backward_transfers.append(transfer)
