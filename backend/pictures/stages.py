"""Program -> the graph of its stages: the crossing values with their routes and bytes, and the state that
stages share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import graphviz

from stagecut.backend.pictures.drawing import (
    INPUT,
    OUTPUT,
    TIED,
    WRITTEN,
    Ids,
    bare,
    beside_line,
    bytes_of,
    canvas,
    count_of,
    legend,
    more_text,
    outputs_text,
    pen,
    reduced,
    rich,
    some,
    stages_text,
    state_lines,
    tip_text,
    total_text,
    type_text,
    value_tip,
)
from stagecut.backend.pictures.texts import source_lines
from stagecut.ir.aliases import written_in
from stagecut.ir.graph import Op, Program, Scope, Stage, Transfer, Value, scope_fqn
from stagecut.ir.ops import module_path
from stagecut.ir.text.printer import fqn_text, scope_text, size_text, value_names

FEW = 3
"""Up to so many values between two stages have an edge each; more share one edge. A value that more stages
than this recompute or are fed is named in them.
"""


MOST_LAYERS = 8
"""Up to so many modules, and ranges of them, are named for a stage."""


VERBS = {
    "feed": "fed",
    "recompute": "computes again",
}
"""Route of a value that is named in its stage -> how the stage gets it."""


class Hop(NamedTuple):
    """A value on one piece of its way: from a stage, or None for the outside, to the next stage that reads
    it.
    """

    value: Value
    tail: int | None
    head: int
    route: str


def stage_graph(program: Program) -> graphviz.Digraph:
    """The stage graph of a linked program."""
    return _StageGraph(program).graph


def hops(program: Program) -> list[Hop]:
    """The ways of all crossing values. A value that several stages read goes from reader to reader when it is
    relayed.
    """
    ways: list[Hop] = []
    last_readers: dict[Value, int] = {}
    for transfer in sorted(program.transfers, key=lambda transfer: transfer.target):
        value, tail, head = transfer.value, transfer.source, transfer.target
        route = transfer.route or "send"
        if route == "relay":
            tail = last_readers.get(value, tail)
        ways.append(Hop(value, tail, head, route))
        if route in ("send", "relay"):
            last_readers[value] = head
    return ways


class _StageGraph:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._names = value_names(program)
        self._ids = Ids()
        title = f"{program.name}: {len(program.stages)} stages"
        self.graph = canvas("stages", title, program.name)
        self._homes = homes_of(program)
        self._transfers: dict[tuple[Value, int], Transfer] = {}
        for transfer in program.transfers:
            self._transfers[transfer.value, transfer.target] = transfer
        drawn, notes = _told_apart(hops(program))
        for stage in program.stages:
            named = [hop for hop in notes if hop.head == stage.index]
            self._stage(stage, named)
        ends = self._inputs(drawn)
        kinds = dict.fromkeys(hop.route for hop in drawn)
        for (tail, head, route), values in _grouped(drawn, ends).items():
            self._edges(tail, head, route, values)
        self._outputs(ends)
        legend(self.graph, "stages", [*kinds, *self._tied()])

    def _stage(self, stage: Stage, notes: list[Hop]) -> None:
        state = [entry.value for entry in stage.state]
        written = written_in(stage.ops, state)
        lines = [(f"stage {stage.index}", "b")]
        for text in modules_text(self._program, stage, self._homes):
            lines.append((text, "n"))
        size = size_text(0)
        if state:
            size = total_text(state)
        lines.append((f"{count_of(len(stage.ops), 'op')}, state {size}", "s"))
        lines += state_lines(stage.state, written, stage.index)
        lines += self._note_lines(notes)
        look = {"fillcolor": "#f3f5f7"}
        if written:
            look["color"] = WRITTEN
        node = f"stage-{stage.index}"
        self.graph.node(
            node,
            rich(*lines),
            id=node,
            tooltip=tip_text(_stage_tip(stage)),
            **look,
        )

    def _note_lines(self, notes: list[Hop]) -> Iterator[tuple[str, str]]:
        """The values that are named in their stage, because they have no edges."""
        for route, verb in VERBS.items():
            names: list[str] = []
            for hop in notes:
                if hop.route == route:
                    names.append(self._names[hop.value])
            if names:
                yield f"{verb} {some(names, 'value')}", "s"

    def _inputs(self, drawn: list[Hop]) -> dict[Value, str]:
        """Input -> the node it is drawn as. Inputs that go the same ways share a node when they are many."""
        inputs = self._program.inputs
        ways: dict[Value, list[tuple[int, str]]] = {value: [] for value in inputs}
        for hop in drawn:
            if hop.tail is None and hop.value in ways:
                ways[hop.value].append((hop.head, hop.route))
        ends: dict[Value, str] = {}
        returned = set(self._program.output.operands)
        for values in _many(inputs, lambda value: tuple(ways[value])):
            first = values[0]
            # a number that was fixed in the trace goes nowhere
            if not ways[first] and first not in returned:
                continue
            head = _input_text(self._names, values)
            node = self._end("input", values, INPUT, head)
            ends |= dict.fromkeys(values, node)
        return ends

    def _end(
        self, kind: str, values: list[Value], look: dict[str, str], head: str
    ) -> str:
        first = values[0]
        node = self._ids(kind, self._names[first])
        size = type_text(first)
        if len(values) > 1:
            size = total_text(values)
        label = rich((head, "b"), (size, "s"), align="CENTER")
        self.graph.node(
            node,
            label,
            id=node,
            tooltip=self._tip(values),
            **self._classes(values),
            **look,
        )
        return node

    def _tip(self, values: Iterable[Value], more: str = "") -> str:
        lines = [value_tip(value, self._names[value]) for value in values]
        if more:
            lines.append(more)
        return tip_text("\n".join(lines))

    def _classes(self, values: Iterable[Value], more: str = "") -> dict[str, str]:
        classes = [f"value-{bare(self._names[value])}" for value in values]
        return {"class": " ".join([*classes, *more.split()])}

    def _edges(self, tail: str, head: int, route: str, values: list[Value]) -> None:
        if len(values) > FEW:
            ends = f"{tail}_{head}_{route}".replace("-", "_")
            edge = self._ids("values", reduced(ends))
            names = [self._names[value] for value in values]
            text = [
                (f"{len(values)} values, {total_text(values)}", "n"),
                (some(names, "value"), "s"),
                *_makers(values),
            ]
            self._edge(tail, head, route, values, edge, text)
            return
        for value in values:
            name = self._names[value]
            edge = self._ids.edge(name, str(head))
            text = []
            if not tail.startswith("input"):
                size = total_text([value])
                text.append((name, "n"))
                text.append((f"{type_text(value)}, {size}", "s"))
            if route == "send":
                text += _makers([value])
            self._edge(tail, head, route, [value], edge, text)

    def _edge(
        self,
        tail: str,
        head: int,
        route: str,
        values: list[Value],
        name: str,
        text: list[tuple[str, str]],
    ) -> None:
        way = f"{route} to stage {head}" + self._via(values[0], head)
        tip = self._tip(values, way)
        look = pen(route, bytes_of(values))
        look |= self._classes(values, f"route-{route}")
        label = ""
        if text:
            label = beside_line(*text)
        self.graph.edge(
            tail,
            f"stage-{head}",
            label,
            id=name,
            tooltip=tip,
            labeltooltip=tip,
            **look,
        )

    def _via(self, value: Value, head: int) -> str:
        transfer = self._transfers[value, head]
        if not transfer.via:
            return ""
        return f", through {stages_text(transfer.via)}"

    def _outputs(self, inputs: dict[Value, str]) -> None:
        ends = dict(inputs)
        for stage in self._program.stages:
            node = f"stage-{stage.index}"
            ends |= dict.fromkeys(stage.outputs, node)
        places: dict[Value, list[int]] = {}
        for number, output in enumerate(self._program.outputs):
            if isinstance(output, Value) and output in ends:
                places.setdefault(output, []).append(number)
        for values in _many(list(places), ends.__getitem__):
            numbers: list[int] = []
            for value in values:
                numbers += places[value]
            head = outputs_text(self._program, numbers)
            node = self._end("output", values, OUTPUT, head)
            self._output_edge(ends[values[0]], node, values)

    def _output_edge(self, tail: str, node: str, values: list[Value]) -> None:
        names = [self._names[value] for value in values]
        label = beside_line((some(names, "value"), "n"))
        tip = self._tip(values)
        look = pen("send", bytes_of(values))
        look |= self._classes(values, "route-output")
        self.graph.edge(
            tail,
            node,
            label,
            id=f"{node}-edge",
            tooltip=tip,
            labeltooltip=tip,
            **look,
        )

    def _tied(self) -> list[str]:
        """Draws the ties of state that several stages have; returns the kinds of edges that this adds."""
        pairs: dict[tuple[int, int], list[str]] = {}
        for entry in self._program.state:
            if entry.share != "replicate":
                continue
            name = fqn_text(entry.name)
            for pair in pairwise(entry.stages):
                pairs.setdefault(pair, []).append(name)
        for (left, right), names in pairs.items():
            tip = tip_text("tied: " + "\n".join(names))
            label = beside_line((some(names, "tensor", 1), TIED))
            look = pen("tied", ())
            look |= {
                "id": f"tied-{left}-{right}",
                "tooltip": tip,
                "labeltooltip": tip,
                "penwidth": "1.5",
            }
            self.graph.edge(
                f"stage-{left}",
                f"stage-{right}",
                label,
                **look,
            )
        if not pairs:
            return []
        return ["tied"]


def _makers(values: Iterable[Value]) -> Iterator[tuple[str, str]]:
    """A line with the modules that make the values, where there are any."""
    makers = dict.fromkeys(filter(None, map(maker_of, values)))
    if makers:
        yield f"from {some([*makers], 'module', 2)}", "s"


def _told_apart(ways: list[Hop]) -> tuple[list[Hop], list[Hop]]:
    """The hops to draw, and the hops that are only named in their stage: edges say nothing where many stages
    are fed or recompute a value.
    """
    drawn: list[Hop] = []
    notes: list[Hop] = []
    groups: dict[tuple[str, Value], list[Hop]] = {}
    for hop in ways:
        groups.setdefault((hop.route, hop.value), []).append(hop)
    for (route, _), group in groups.items():
        if route not in ("feed", "recompute") or len(group) <= FEW:
            drawn += group
            continue
        notes += group
        if route == "feed":
            drawn.append(group[0])
    return drawn, notes


def _grouped(
    drawn: list[Hop], ends: dict[Value, str]
) -> dict[tuple[str, int, str], list[Value]]:
    """Tail node, head stage and route -> the values that go there."""
    groups: dict[tuple[str, int, str], list[Value]] = {}
    for hop in drawn:
        tail = f"stage-{hop.tail}"
        if hop.tail is None:
            tail = ends[hop.value]
        key = (tail, hop.head, hop.route)
        groups.setdefault(key, []).append(hop.value)
    return groups


def _many(values: list[Value], key: Callable[[Value], Hashable]) -> list[list[Value]]:
    """The values one by one; those of one key are together where they are more than FEW."""
    groups: dict[Hashable, list[Value]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    parts: list[list[Value]] = []
    for group in groups.values():
        if len(group) > FEW:
            parts.append(group)
            continue
        for value in group:
            parts.append([value])
    return parts


def _stage_tip(stage: Stage) -> str:
    scopes: dict[str, None] = {}
    for op in stage.ops:
        if op.scope:
            scopes[scope_text(op.scope)] = None
    lines = [f"stage {stage.index}"]
    lines += list(scopes)[:40]
    for entry in list(stage.state)[:20]:
        lines.append(f"holds {fqn_text(entry.name)}")
    return "\n".join(lines)


def _input_text(names: dict[Value, str], values: list[Value]) -> str:
    if len(values) > 1:
        return f"{len(values)} inputs"
    return f"input {names[values[0]]}"


def maker_of(value: Value) -> str:
    """The module that makes a value, whose name alone says little. Nothing for inputs and for what the model
    makes itself.
    """
    op = value.owner
    return scope_fqn(op.scope) if isinstance(op, Op) else ""


def modules_text(
    program: Program, stage: Stage, homes: Mapping[Scope, set[int]]
) -> list[str]:
    """The modules that a stage runs, in a few lines."""
    return [run.text for run in layer_runs(program, stage, homes)]


class LayerRun(NamedTuple):
    """Modules that run one after the other as one text: `layers.0-9`. modules: how many they are. paths: the
    first and the last of them, nothing where they are only counted.
    """

    text: str
    modules: int
    paths: tuple[str, ...] = ()


def layer_runs(
    program: Program, stage: Stage, homes: Mapping[Scope, set[int]]
) -> list[LayerRun]:
    """The modules that a stage runs, few enough to read: `embed`, `layers.0-9`, `part of layers.10`. Where
    there are many, some in front of the last one are only counted: `4 more modules`. Where no op belongs to a
    module of the model, its forward, with the lines: `forward of GPT (gpt.py:25)`.
    """
    labels = _labels(stage, homes)
    if not labels:
        return [LayerRun(_forward_text(program, stage), 1)]
    runs = runs_of(labels)
    if len(runs) <= MOST_LAYERS:
        return runs
    shown = runs[: MOST_LAYERS - 2]
    hidden = runs[len(shown) : -1]
    count = sum(run.modules for run in hidden)
    return [*shown, LayerRun(more_text(count, "module"), count), runs[-1]]


def _forward_text(program: Program, stage: Stage) -> str:
    """The name of ops that belong to the model and to none of its modules."""
    text = f"forward of {program.name}"
    lines = some(source_lines(stage.ops), "file", 1)
    return f"{text} ({lines})" if lines else text


def _labels(stage: Stage, homes: Mapping[Scope, set[int]]) -> list[str]:
    """The modules that a stage runs, in the order of their first ops: `embed`, `layers.0`, `part of
    layers.10`. What is inside a module that is there in part has no label of its own.
    """
    outermost = {*calls_of(stage, homes)} - {()}
    labels: dict[str, None] = {}
    for op in stage.ops:
        kept_whole = module_path(op)
        if kept_whole:
            labels[kept_whole] = None
            continue
        call = _whole(op.scope, homes)
        if op.origin is None and call in outermost:
            labels[_layer_text(call, len(homes[call]) == 1)] = None
    around = {label for label in labels if label.startswith(PART)}
    return [*dict.fromkeys(_outer(label, around) for label in labels)]


PART = "part of "
"""Stands in front of a module that a stage runs in part."""


def _outer(label: str, parts: Collection[str]) -> str:
    """The outermost part that the module of a label lies in, else the label itself."""
    *parents, _ = label.removeprefix(PART).split(".")
    for length in range(1, len(parents) + 1):
        part = PART + ".".join(parents[:length])
        if part in parts:
            return part
    return label


def _layer_text(call: Scope, is_whole: bool) -> str:
    """The innermost module of a list of modules that a call is in: `part of layers.4` for `layers.4.mlp`, and
    for `layers.4` that is not whole; the call itself where there is none.
    """
    for length in range(len(call), 0, -1):
        if call[length - 1].name.rpartition(".")[2].isdecimal():
            layer = scope_fqn(call[:length])
            is_whole = is_whole and length == len(call)
            return layer if is_whole else PART + layer
    layer = scope_fqn(call)
    return layer if is_whole else PART + layer


def calls_of(stage: Stage, homes: Mapping[Scope, set[int]]) -> list[Scope]:
    """The module calls that a stage runs whole, outermost ones only, and the parts of those that it does not
    run whole; [()] for the model itself.
    """
    whole: dict[Scope, None] = {}
    around: set[Scope] = set()
    for op in stage.ops:
        if op.origin is None:
            path = _whole(op.scope, homes)
            whole[path] = None
            around.update(path[:length] for length in range(len(path)))
    return [path for path in whole if path not in around] or [()]


def homes_of(program: Program) -> dict[Scope, set[int]]:
    """Every module call -> the stages it runs in, without recomputed ops."""
    homes: dict[Scope, set[int]] = {}
    for stage in program.stages:
        scopes = {op.scope for op in stage.ops if op.origin is None}
        for scope in scopes:
            for length in range(1, len(scope) + 1):
                call = scope[:length]
                homes.setdefault(call, set()).add(stage.index)
    return homes


def _whole(scope: Scope, homes: Mapping[Scope, set[int]]) -> Scope:
    """The outermost call around an op that runs in one stage only, else the innermost one."""
    for length in range(1, len(scope)):
        call = scope[:length]
        if len(homes[call]) == 1:
            return call
    return scope


def runs_of(labels: Iterable[str]) -> list[LayerRun]:
    """The labels, in which modules that differ only in a number, and follow each other by it, are one:
    `layers.0-9`.
    """
    runs: list[list[str]] = []
    for label in labels:
        if runs and _follows(runs[-1][-1], label):
            runs[-1].append(label)
        else:
            runs.append([label])
    return [_run(run) for run in runs]


def _follows(before: str, after: str) -> bool:
    """True for `layers.3` and `layers.4`; parts of modules stand alone."""
    parents, _, number = before.rpartition(".")
    others, _, following = after.rpartition(".")
    if before.startswith(PART) or parents != others:
        return False
    if not number.isdecimal() or not following.isdecimal():
        return False
    return int(following) == int(number) + 1


def _run(labels: list[str]) -> LayerRun:
    first, last = (labels[end].removeprefix(PART) for end in (0, -1))
    text = labels[0]
    if len(labels) > 1:
        text += "-" + last.rpartition(".")[2]
    return LayerRun(text, len(labels), (first, last))
