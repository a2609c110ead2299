"""Splits the joint block of a stage into its roles, by what each gradient needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stagecut.ir.errors import RolesError
from stagecut.ir.graph import Block, Op, StateEntry, Value
from stagecut.ir.ops import facts
from stagecut.ir.roles import Budget, Joint, Roles
from stagecut.ir.types import same_layout
from stagecut.passes.recompute_saved import Flops, recompute_saved, unknown


def split(
    joint: Joint, recompute: bool | Budget = False, flops: Flops = unknown
) -> Roles:
    """The roles of a stage. Every op is in one of them, in program order: what the results need is in the
    forward, and of the rest, what the gradients of inputs need is in the backward for inputs.

    The ops of the joint block are those of the roles afterwards; what nothing needs is gone. With
    `recompute`, the backward computes light ops again where less is saved then; within a budget, as few as
    fit it, and heavy ones where these do not suffice. Raises RolesError, and BudgetError.
    """
    block = joint.block
    outputs = block.outputs
    rest = set(block.ops)
    forward = _needed(_values(outputs[: joint.results]), rest)
    forward |= _effects(joint, rest - forward)
    backward = _needed(_values(joint.gradients), rest - forward)
    _refuse_draws(backward)
    _drop(block, rest - forward - backward)
    if recompute:
        backward_input = _needed(_of_inputs(joint), backward)
        recompute_saved(joint, forward, backward_input, recompute, flops)
    rest = set(block.ops) - forward
    of_weights = [joint.gradients[place] for place in sorted(joint.weights)]
    backward_input = _needed(_of_inputs(joint), rest)
    backward_weight = rest - backward_input
    role_ops = [
        [op for op in block.ops if op in ops]
        for ops in (forward, backward_input, backward_weight)
    ]
    weight_block = _block("backward_weight", joint, role_ops[2], _values(of_weights))
    input_results = _of_inputs(joint)
    input_block = _block(
        "backward_input",
        joint,
        role_ops[1],
        _with_saved(input_results, role_ops[1], weight_block.inputs),
    )
    read_later = [*input_block.inputs, *weight_block.inputs]
    results = list(outputs[: joint.results])
    forward_block = _block(
        "forward", joint, role_ops[0], _with_saved(results, role_ops[0], read_later)
    )
    return Roles(joint, forward_block, input_block, weight_block)


def skip_views(block: Block) -> None:
    """Who reads a view of a view that is the tensor at the beginning again reads that tensor, as where
    a weight is transposed twice. No tensor of a joint block is written.
    """
    for op in block.ops:
        if facts(op).rearranges:
            same = _same_before(op)
            if same is not None:
                op.results[0].replace_uses(same)


def _same_before(op: Op) -> Value | None:
    """The tensor that the result of a view is, where views before it began with it."""
    (result,) = op.results
    value = op.operands[0]
    while not same_layout(value.type, result.type):
        if not isinstance(value.owner, Op) or not facts(value.owner).rearranges:
            return None
        value = value.owner.operands[0]
    return value


def _of_inputs(joint: Joint) -> list[Value]:
    """The gradients of the inputs."""
    return _values(
        gradient
        for place, gradient in enumerate(joint.gradients)
        if place not in joint.weights
    )


def _values(outputs: Iterable[Value | None]) -> list[Value]:
    """The values among some outputs, each once."""
    return list(dict.fromkeys(value for value in outputs if value is not None))


def _needed(values: Sequence[Value], among: set[Op]) -> set[Op]:
    """The ops that compute these values, as far as they are in `among`."""
    needed: set[Op] = set()
    pending = list(values)
    while pending:
        op = pending.pop().owner
        if isinstance(op, Op) and op in among and op not in needed:
            needed.add(op)
            pending += op.reads
    return needed


def _drop(block: Block, dead: set[Op]) -> None:
    """The block has no dead op any more."""
    for op in reversed(block.ops):
        if op in dead:
            op.drop()
    block.ops = [op for op in block.ops if op not in dead]


def _effects(joint: Joint, rest: set[Op]) -> set[Op]:
    """Those of the rest that must run though nothing reads them, with the ops that they need: those that read
    no tangent. A draw of which nobody reads the result moves the generator on.
    """
    late = set(joint.cotangents)
    effects: set[Op] = set()
    for op in joint.block.ops:
        if any(value in late for value in op.reads):
            late.update(op.results)
        elif op in rest and op.has_effect and not _is_read(op):
            effects |= _needed(op.reads, rest) | {op}
    return effects


def _is_read(op: Op) -> bool:
    return any(result.uses for result in op.results)


def _refuse_draws(backward: set[Op]) -> None:
    """Raises RolesError where the backward draws: what a checkpoint computes again would draw other
    numbers than its forward.
    """
    for op in backward:
        if op.effects.random:
            raise RolesError(
                "the backward computes random numbers again",
                where=op.where(),
                hint="checkpoint(..., preserve_rng_state=...) needs autograd",
            )


def _with_saved(
    results: list[Value], ops: Sequence[Op], readers: Iterable[Value]
) -> list[Value]:
    """The results of a role, and after them the values of its ops that later roles read."""
    own = set(ops)
    saved = [value for value in readers if value.owner in own]
    return list(dict.fromkeys([*results, *saved]))


def _block(
    name: str, joint: Joint, ops: Sequence[Op], outputs: Sequence[Value]
) -> Block:
    """A role. Its inputs are the values that it reads or returns and does not define: in the order of the
    joint block's inputs, then of their definition.
    """
    own = set(ops)
    read: dict[Value, None] = {}
    for op in ops:
        read |= dict.fromkeys(op.reads)
    read |= dict.fromkeys(outputs)
    outside = {value for value in read if value.owner not in own}
    given = [value for value in joint.block.inputs if value in outside]
    defined = [
        value for op in joint.block.ops for value in op.results if value in outside
    ]
    state = [value for value in outside if isinstance(value.owner, StateEntry)]
    constants = {value for value in state if value not in joint.block.inputs}
    inputs = [value for value in (*given, *defined) if value not in constants]
    return Block(name, inputs, ops, list(outputs))
