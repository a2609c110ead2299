"""Split policies: a function that says where to cut, in either of two forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from stagecut.frontend.markers import is_marker
from stagecut.frontend.source import failing_line
from stagecut.ir.errors import SplitError
from stagecut.ir.graph import BY_MODE, Op, Program

Cuts = Callable[[Program], Sequence[int]]
"""A policy in our own form: the positions of ops in front of which to cut, split markers not counted."""


def takes_graph(policy: Any) -> bool:
    """True for a policy that edits the traced GraphModule."""
    if policy is None or hasattr(policy, "plan"):
        return False
    first = next(iter(inspect.signature(policy).parameters.values()), None)
    return first is None or (first.name != "program" and not _is_program(first))


def _is_program(parameter: inspect.Parameter) -> bool:
    """True for a parameter that is said to be a Program, by the class or in text."""
    said = parameter.annotation
    return said is Program or str(said).rpartition(".")[2] == "Program"


def as_cuts(policy: Callable[..., Any], exported: ExportedProgram | None) -> Cuts:
    """`policy` in our own form.

    A policy whose first parameter is named `program`, or said to be a Program, is in that form already. Any
    other takes the traced GraphModule and returns it with split calls added, as for
    torch.distributed.pipelining.
    """
    if not takes_graph(policy):
        return policy
    if exported is None:
        raise SplitError(
            "a policy that edits the traced GraphModule needs a model to trace",
            hint="put the split calls into the graph itself",
        )
    graph = exported.module(check_guards=False)
    try:
        edited = policy(graph)
    except AttributeError as error:
        if error.obj is not graph:
            raise
        raise SplitError(
            f"the split policy was given a GraphModule, which has no attribute '{error.name}'",
            where=failing_line(error),
            hint=_EITHER_FORM,
        ) from error
    if not isinstance(edited, fx.GraphModule):
        raise SplitError(
            f"the split policy returned {type(edited).__name__}, not a GraphModule",
            where=_place_of(policy),
            hint=_EITHER_FORM,
        )
    followers = _nodes_behind_splits(edited)
    return lambda program: _positions(followers, program)


_EITHER_FORM = (
    "def policy(program), with that name, is given the Program, and returns positions in program.ops; one "
    "whose argument has another name is given the GraphModule, and returns it with pipe_split calls added"
)


def _place_of(policy: Any) -> str:
    code = getattr(policy, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def _nodes_behind_splits(edited: fx.GraphModule) -> list[list[str]]:
    """For each split call, the names of all nodes after it."""
    names = [node.name for node in edited.graph.nodes]
    splits = [
        number
        for number, node in enumerate(edited.graph.nodes)
        if node.op == "call_function" and is_marker(node.target)
    ]
    return [names[number + 1 :] for number in splits]


def _positions(followers: list[list[str]], program: Program) -> list[int]:
    """For each split, the position of the first op after it that is still in the program. Ops are found by
    name, because a value's hint is its node's name.
    """
    ops = [op for op in program.ops if not op.is_split]
    index: dict[str, int] = {}
    for position, op in reversed([*enumerate(ops)]):
        index |= dict.fromkeys([value.hint for value in op.results], position)
    for position, op in enumerate(ops):
        index |= _inside(op, position)
    cuts: list[int] = []
    for names in followers:
        positions = [index[name] for name in names if name in index]
        if positions and positions[0] == INSIDE:
            raise SplitError(
                "the split policy cuts where the model goes another way in each mode",
                hint="cut in front of it or behind it",
            )
        if positions:
            cuts.append(min(place for place in positions if place != INSIDE))
    return cuts


INSIDE = -1
"""The position of an op that lies inside an op of the program."""


def _inside(op: Op, position: int) -> dict[str, int]:
    """Names of results inside an op that differs by mode -> INSIDE; the results of its first op have the
    position of the op itself.
    """
    if op.target != BY_MODE:
        return {}
    run = op.regions[0 if op.args[0].captured else 1].ops
    return {
        value.hint: INSIDE if inner is not run[0] else position
        for inner in run
        for value in inner.results
    }
