"""A joint graph of AOT autograd -> a joint block."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from stagecut.frontend.lower.lower import Lowering
from stagecut.frontend.lower.types import type_of
from stagecut.frontend.marks import SAME
from stagecut.ir.graph import Program, StateEntry, Value
from stagecut.ir.roles import Joint
from stagecut.ir.run.bindings import Bindings


def lower_joint(
    graph: fx.GraphModule,
    names: Sequence[str],
    tangents: tuple[int, ...],
    weights: Collection[int],
    resident: Collection[int] = (),
) -> tuple[Joint, Bindings]:
    """The joint block of a graph whose primals have these names. `weights` are the places of the primals that
    are weights, `resident` of those that lie in memory whatever is saved.

    The constants of the graph are state of the block, and the bindings beside it have their tensors.
    """
    program = Program("joint")
    bindings = Bindings()
    lowering = Lowering(program, bindings)
    # a graph is that of one mode
    lowering.fixed = {"": ""}
    env: dict[fx.Node, Value] = {}
    nodes: list[fx.Node] = []
    placeholders = graph.graph.find_nodes(op="placeholder")
    hints = [*names, *(f"tangent_{place}" for place in tangents)]
    for node, hint in zip(placeholders, hints, strict=True):
        env[node] = program.add_input(
            type_of(node.meta["val"]),
            hint,
        )
        lowering.note_storage(env[node], node.meta["val"])
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            env[node] = _constant(
                graph,
                str(node.target),
                program,
                bindings,
            )
            continue
        # a tensor of a graph without writes is as good as its alias
        if node.target is torch.ops.aten.detach.default:
            node.meta[SAME] = True
        nodes.append(node)
    outputs = list(lowering.run(nodes, env, program.ops, ()))
    for op in program.ops:
        for result in op.results:
            result.hint = op.target.name
    if not tangents:
        outputs += [None] * len(names)
    program.set_outputs(outputs)
    results = len(outputs) - len(names)
    primals, cotangents = program.inputs[: len(names)], program.inputs[len(names) :]
    joint = Joint(
        program,
        primals,
        cotangents,
        tangents,
        results,
        frozenset(weights),
        frozenset(resident),
    )
    return joint, bindings


def _constant(
    graph: fx.GraphModule, name: str, program: Program, bindings: Bindings
) -> Value:
    """A tensor that the graph holds, as a constant of the program."""
    tensor = getattr(graph, name)
    for entry in program.state:
        if entry.name == name:
            return entry.value
    entry = StateEntry((name,), "const", type_of(tensor))
    entry.tensor = entry.storage = len(program.state)
    program.state.append(entry)
    bindings.tensors[name] = tensor
    return entry.value
