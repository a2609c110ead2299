"""Chooses what a stage saves for its backward, and what the backward computes again from that.

The least that can be saved is a minimum cut: of the values between what the stage is given and what its
backward reads, each at the price of its bytes. Ops that compute more than they move, and those that draw
random numbers, are never done twice; so all values beyond them have their price, whatever follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import networkx

from stagecut.ir.graph import Op, Value
from stagecut.ir.ops import facts, is_heavy
from stagecut.ir.roles import Joint
from stagecut.ir.types import value_bytes

_START, _END = "given", "backward"


def recompute_saved(joint: Joint, forward: set[Op]) -> None:
    """As few bytes as possible lie in memory from the forward to the backward of a joint block. The ops of
    its backward read copies of light ops of the `forward` where that saves bytes, and where it saves none,
    what the forward computed. Each copy stands right before the first op that reads it.
    """
    block = joint.block
    later = [op for op in block.ops if op not in forward]
    read = {value for op in later for value in op.reads}
    read.update(value for value in joint.gradients if value is not None)
    again = _computed_again(joint, forward, read)
    copies: dict[Value, Value] = {}
    ops: list[Op] = []
    for op in block.ops:
        if op not in forward:
            _copy(op.reads, again, copies, ops)
            op.substitute(copies)
        ops.append(op)
    _copy(
        [v for v in joint.gradients if v is not None],
        again,
        copies,
        ops,
    )
    block.ops = ops
    gradients = [None if g is None else copies.get(g, g) for g in joint.gradients]
    block.set_outputs([*block.outputs[: joint.results], *gradients])


def _computed_again(joint: Joint, forward: set[Op], read: set[Value]) -> set[Value]:
    """The values of the forward that the backward computes again."""
    graph: Any = networkx.DiGraph()
    graph.add_node(_START)
    graph.add_node(_END)
    given = set(joint.primals)
    for value in given:
        # a weight or an input is there anyway
        graph.add_edge(_START, (value, 0))
        graph.add_edge((value, 0), (value, 1), capacity=0)
    own: set[Value] = set()
    for op in joint.block.ops:
        if op not in forward:
            continue
        for result in op.results:
            own.add(result)
            price = value_bytes(result.type)
            assert price is not None
            graph.add_edge((result, 0), (result, 1), capacity=price)
            if not _is_light(op):
                graph.add_edge(_START, (result, 0))
            for operand in op.operands:
                graph.add_edge((operand, 1), (result, 0))
    for value in read & (own | given):
        graph.add_edge((value, 1), _END)
    _, (_, after) = networkx.minimum_cut(graph, _START, _END)
    return {value for value in own if (value, 0) in after}


def _is_light(op: Op) -> bool:
    """True for an op that may be done twice: it gives the same again, and costs little."""
    return not (is_heavy(op) or op.has_effect or op.regions or facts(op).uninitialised)


def _copy(
    values: Iterable[Value],
    again: set[Value],
    copies: dict[Value, Value],
    ops: list[Op],
) -> None:
    """`copies` has a copy of each of these values that is computed again; `ops` gains the ops that compute
    it.
    """
    pending = list(values)
    while pending:
        value = pending[-1]
        op = value.owner
        if value not in again or value in copies or not isinstance(op, Op):
            pending.pop()
            continue
        missing = [v for v in op.operands if v in again and v not in copies]
        if missing:
            pending += missing
            continue
        twin = op.copy(copies)
        copies |= zip(op.results, twin.results, strict=True)
        ops.append(twin)
