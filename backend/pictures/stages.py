"""Program -> the graph of its stages: the crossing values with their routes and bytes, and the state that
stages share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import chain, pairwise
from typing import NamedTuple

import graphviz

from stagecut.backend.pictures.drawing import (
    INPUT,
    OUTPUT,
    TIED,
    WRITTEN,
    Ids,
    bare,
    bytes_of,
    canvas,
    legend,
    outputs_text,
    pen,
    reduced,
    rich,
    some,
    spans,
    stages_text,
    state_lines,
    tip_text,
    total_text,
    type_text,
    value_tip,
)
from stagecut.ir.aliases import written_in
from stagecut.ir.graph import Program, Scope, Stage, Value, scope_fqn
from stagecut.ir.text.printer import fqn_text, scope_text, size_text, value_names

FEW = 3
"""Up to so many values between two stages have an edge each; more share one edge. A value that more stages
than this recompute or are fed is named in them.
"""


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
        self._program, self._names, self._ids = program, value_names(program), Ids()
        self.graph = canvas(
            "stages", f"{program.name}: {len(program.stages)} stages", program.name
        )
        self._homes = homes_of(program)
        self._transfers = {
            (transfer.value, transfer.target): transfer
            for transfer in program.transfers
        }
        drawn, notes = _told_apart(hops(program))
        for stage in program.stages:
            self._stage(stage, [hop for hop in notes if hop.head == stage.index])
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
        lines += [(text, "n") for text in modules_text(stage, self._homes)]
        size = total_text(state) if state else size_text(0)
        lines.append((f"{len(stage.ops)} ops, state {size}", "s"))
        lines += state_lines(stage.state, written, stage.index)
        lines += self._note_lines(notes)
        color = {"color": WRITTEN} if written else {}
        self.graph.node(
            f"stage-{stage.index}",
            rich(*lines),
            id=f"stage-{stage.index}",
            tooltip=tip_text(_stage_tip(stage)),
            fillcolor="#f3f5f7",
            **color,
        )

    def _note_lines(self, notes: list[Hop]) -> Iterator[tuple[str, str]]:
        """The values that are named in their stage, because they have no edges."""
        for route, verb in (("feed", "fed"), ("recompute", "computes again")):
            names = [self._names[hop.value] for hop in notes if hop.route == route]
            if names:
                yield f"{verb} {some(names)}", "s"

    def _inputs(self, drawn: list[Hop]) -> dict[Value, str]:
        """Input -> the node it is drawn as. Inputs that go the same ways share a node when they are many."""
        ways: dict[Value, list[tuple[int, str]]] = {
            value: [] for value in self._program.inputs
        }
        for hop in drawn:
            if hop.tail is None and hop.value in ways:
                ways[hop.value].append((hop.head, hop.route))
        ends: dict[Value, str] = {}
        returned = set(self._program.output.operands)
        for values in _many(self._program.inputs, lambda value: tuple(ways[value])):
            # a number that was fixed in the trace goes nowhere
            if ways[values[0]] or values[0] in returned:
                head = _input_text(self._names, values)
                ends |= dict.fromkeys(values, self._end("input", values, INPUT, head))
        return ends

    def _end(
        self, kind: str, values: list[Value], look: dict[str, str], head: str
    ) -> str:
        node = self._ids(kind, self._names[values[0]])
        size = type_text(values[0]) if len(values) == 1 else total_text(values)
        self.graph.node(
            node,
            rich((head, "b"), (size, "s"), align="CENTER"),
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
            name = reduced(f"{tail}_{head}_{route}".replace("-", "_"))
            text = [
                (f"{len(values)} values, {total_text(values)}", "n"),
                (some([self._names[value] for value in values]), "s"),
            ]
            self._edge(tail, head, route, values, self._ids("values", name), text)
            return
        for value in values:
            name = self._names[value]
            text = [(name, "n"), (f"{type_text(value)}, {total_text([value])}", "s")]
            if tail.startswith("input"):
                text = []
            edge = self._ids.edge(name, f"{head}")
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
        tip = self._tip(values, f"{route} to stage {head}" + self._via(values[0], head))
        look = pen(route, bytes_of(values)) | self._classes(values, f"route-{route}")
        label = rich(*text, pad=2) if text else ""
        self.graph.edge(
            tail, f"stage-{head}", label, id=name, tooltip=tip, labeltooltip=tip, **look
        )

    def _via(self, value: Value, head: int) -> str:
        via = self._transfers[value, head].via
        return f", through {stages_text(via)}" if via else ""

    def _outputs(self, inputs: dict[Value, str]) -> None:
        home = {
            value: f"stage-{stage.index}"
            for stage in self._program.stages
            for value in stage.outputs
        }
        places: dict[Value, list[int]] = {}
        for number, output in enumerate(self._program.outputs):
            if isinstance(output, Value) and (output in home or output in inputs):
                places.setdefault(output, []).append(number)
        ends = inputs | home
        for values in _many(list(places), ends.__getitem__):
            numbers = chain.from_iterable(places[value] for value in values)
            head = outputs_text(self._program, numbers)
            node = self._end("output", values, OUTPUT, head)
            text = [(some([self._names[value] for value in values]), "n")]
            look = pen("send", bytes_of(values)) | self._classes(values, "route-output")
            name, tip = f"{node}-edge", self._tip(values)
            self.graph.edge(
                ends[values[0]],
                node,
                rich(*text, pad=2),
                id=name,
                tooltip=tip,
                labeltooltip=tip,
                **look,
            )

    def _tied(self) -> list[str]:
        """Draws the ties of state that several stages have; returns the kinds of edges that this adds."""
        pairs: dict[tuple[int, int], list[str]] = {}
        for entry in self._program.state:
            if entry.share == "replicate":
                for pair in pairwise(entry.stages):
                    pairs.setdefault(pair, []).append(fqn_text(entry.name))
        for (left, right), names in pairs.items():
            tip = tip_text("tied: " + "\n".join(names))
            look = pen("tied", ()) | {
                "id": f"tied-{left}-{right}",
                "tooltip": tip,
                "labeltooltip": tip,
                "penwidth": "1.5",
            }
            self.graph.edge(
                f"stage-{left}",
                f"stage-{right}",
                rich((some(names, 1), TIED), pad=2),
                **look,
            )
        return ["tied"] if pairs else []


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
        tail = ends[hop.value] if hop.tail is None else f"stage-{hop.tail}"
        groups.setdefault((tail, hop.head, hop.route), []).append(hop.value)
    return groups


def _many(values: list[Value], key: Callable[[Value], Hashable]) -> list[list[Value]]:
    """The values one by one; those of one key are together where they are more than FEW."""
    groups: dict[Hashable, list[Value]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    parts: list[list[Value]] = []
    for group in groups.values():
        parts += [group] if len(group) > FEW else [[value] for value in group]
    return parts


def _stage_tip(stage: Stage) -> str:
    scopes = dict.fromkeys(scope_text(op.scope) for op in stage.ops if op.scope)
    state = [f"holds {fqn_text(entry.name)}" for entry in [*stage.state][:20]]
    return "\n".join([f"stage {stage.index}", *list(scopes)[:40], *state])


def _input_text(names: dict[Value, str], values: list[Value]) -> str:
    return f"input {names[values[0]]}" if len(values) == 1 else f"{len(values)} inputs"


def modules_text(
    stage: Stage, homes: Mapping[Scope, set[int]], most: int = 5
) -> list[str]:
    """The modules that a stage runs, in a few lines. A module that it runs whole goes by its name; of one
    that it runs in part, the parts are named.
    """
    own = [op.scope for op in stage.ops if op.origin is None]
    paths = list(dict.fromkeys(_whole(scope, homes) for scope in own)) or [()]
    around = {path[:length] for path in paths for length in range(len(path))}
    lines = _runs([scope_fqn(path).split(".") for path in paths if path not in around])
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"{len(lines) - most + 1} more"]


def homes_of(program: Program) -> dict[Scope, set[int]]:
    """Every module call -> the stages it runs in, without recomputed ops."""
    homes: dict[Scope, set[int]] = {}
    for stage in program.stages:
        for scope in {op.scope for op in stage.ops if op.origin is None}:
            for length in range(1, len(scope) + 1):
                homes.setdefault(scope[:length], set()).add(stage.index)
    return homes


def _whole(scope: Scope, homes: Mapping[Scope, set[int]]) -> Scope:
    """The outermost call around an op that runs in one stage only, else the innermost one."""
    for length in range(1, len(scope)):
        if len(homes[scope[:length]]) == 1:
            return scope[:length]
    return scope


def _runs(paths: list[list[str]]) -> list[str]:
    """The paths as text; neighbours that differ only in a number are one line."""
    runs: list[tuple[list[str], list[int]]] = []
    for path in paths:
        *parents, last = path
        if not last.isdecimal():
            runs.append((path, []))
        elif runs and _continues(runs[-1], parents, int(last)):
            runs[-1][1].append(int(last))
        else:
            runs.append((path, [int(last)]))
    return [_line(path, numbers) for path, numbers in runs]


def _continues(
    run: tuple[list[str], list[int]], parents: list[str], number: int
) -> bool:
    path, numbers = run
    return path[:-1] == parents and numbers[-1:] == [number - 1]


def _line(path: list[str], numbers: list[int]) -> str:
    last = spans(numbers) if numbers else path[-1]
    name = ".".join([*path[:-1], last]) or "the model itself"
    return f"{name}  x {len(numbers)}" if len(numbers) > 1 else name
