"""Program -> DOT: stages as clusters, one edge per crossing value with shape and bytes, tied state marked."""

from __future__ import annotations

from itertools import pairwise

import graphviz

from stagecut.ir.graph import Program, Stage, Transfer, Value
from stagecut.ir.outline import modules_of
from stagecut.ir.printer import size_text, value_names
from stagecut.ir.types import value_bytes

_STYLE = {"send": "solid", "relay": "dashed", "feed": "dotted", "recompute": "dotted"}


def to_dot(program: Program) -> str:
    """The stage graph of a linked program in the DOT language."""
    names = value_names(program)
    graph = graphviz.Digraph(program.name, graph_attr={"rankdir": "LR", "fontname": "Helvetica", "compound": "true"})
    graph.attr("node", shape="box", style="rounded,filled", fillcolor="white", fontname="Helvetica", fontsize="10")
    graph.attr("edge", fontname="Helvetica", fontsize="9")
    for stage in program.stages:
        _stage(graph, program, stage)
    for value in program.inputs:
        graph.node(_input(names[value]), f"{names[value]}\n{_type(value)}", shape="ellipse", fillcolor="#eef3fb")
    for transfer in program.transfers:
        _edge(graph, transfer, names)
    _outputs(graph, program, names)
    _tied(graph, program)
    return str(graph.source)


def _stage(graph: graphviz.Digraph, program: Program, stage: Stage) -> None:
    with graph.subgraph(name=f"cluster_{stage.index}") as cluster:
        cluster.attr(label=f"stage {stage.index}", style="rounded,filled", fillcolor="#f4f4f4", color="#999999")
        modules = ", ".join(_modules(stage)) or "the model itself"
        size = sum(_bytes(entry.value) for entry in stage.state)
        cluster.node(f"stage{stage.index}", graphviz.escape(f"{modules}\n{len(stage.ops)} ops, state {size_text(size)}"))
        shared = [e for e in stage.state if len(e.stages) > 1]
        for entry in shared:
            label = graphviz.escape("\n".join(stage.state[entry]) + f"\n{entry.type}, {entry.share}")
            cluster.node(f"state{stage.index}:{entry.name}".replace(":", "_"), label, shape="cylinder", fillcolor="#fdf1dc")


def _modules(stage: Stage, most: int = 4) -> list[str]:
    """The modules a stage runs, few enough to read."""
    found = modules_of(stage, most)
    return found if len(found) <= most else [*found[: most - 1], f"{len(found) - most + 1} more"]


def _edge(graph: graphviz.Digraph, transfer: Transfer, names: dict[Value, str]) -> None:
    name = names[transfer.value]
    tail = _input(name) if transfer.source is None else f"stage{transfer.source}"
    label = f"{name}\n{_type(transfer.value)}\n{size_text(_bytes(transfer.value))}"
    graph.edge(tail, f"stage{transfer.target}", graphviz.escape(label), style=_STYLE[transfer.route or "send"])


def _outputs(graph: graphviz.Digraph, program: Program, names: dict[Value, str]) -> None:
    home = {value: stage.index for stage in program.stages for value in stage.outputs}
    for number, item in enumerate(program.outputs):
        if not isinstance(item, Value):
            continue
        graph.node(f"out{number}", f"output {number}", shape="ellipse", fillcolor="#e8f5e9")
        tail = f"stage{home[item]}" if item in home else _input(names[item])
        graph.edge(tail, f"out{number}", graphviz.escape(f"{names[item]}\n{_type(item)}"))


def _tied(graph: graphviz.Digraph, program: Program) -> None:
    for entry in program.state:
        nodes = [f"state{index}_{entry.name}" for index in entry.stages]
        for left, right in pairwise(nodes):
            label = "tied" if entry.share == "replicate" else "written"
            graph.edge(left, right, label, style="bold", dir="none", color="#c77700", constraint="false")


def _input(name: str) -> str:
    return f"input {name}"


def _type(value: Value) -> str:
    return str(value.type).removesuffix(" grad")


def _bytes(value: Value) -> int:
    return value_bytes(value.type) or 0
