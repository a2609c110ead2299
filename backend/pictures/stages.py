"""Program -> the graph of its stages: the crossing values with their routes and bytes, and the state that
stages share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
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
    bytes_of,
    canvas,
    legend,
    outputs_text,
    pen,
    plain,
    reduced,
    rich,
    some,
    spans,
    stages_text,
    state_lines,
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
    found, at = [], dict[Value, int]()
    for t in sorted(program.transfers, key=lambda t: t.target):
        route = t.route or "send"
        found.append(
            Hop(
                t.value,
                at.get(t.value, t.source) if route == "relay" else t.source,
                t.target,
                route,
            )
        )
        if route in ("send", "relay"):
            at[t.value] = t.target
    return found


class _StageGraph:
    def __init__(self, program: Program) -> None:
        self._program, self._names, self._ids = program, value_names(program), Ids()
        self.graph = canvas(
            "stages", f"{program.name}: {len(program.stages)} stages", program.name
        )
        self._homes = homes_of(program)
        self._transfers = {(t.value, t.target): t for t in program.transfers}
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
        held = [entry.value for entry in stage.state]
        written = written_in(stage.ops, held)
        lines = [
            (f"stage {stage.index}", "b"),
            *((text, "n") for text in modules_text(stage, self._homes)),
        ]
        size = (
            f"{len(stage.ops)} ops, state {total_text(held) if held else size_text(0)}"
        )
        lines += [(size, "s"), *state_lines(stage.state, written, stage.index)]
        lines += [
            (f"fed {some(names)}", "s") for names in [self._of(notes, "feed")] if names
        ]
        lines += [
            (f"computes again {some(names)}", "s")
            for names in [self._of(notes, "recompute")]
            if names
        ]
        scopes = dict.fromkeys(scope_text(op.scope) for op in stage.ops if op.scope)
        tip = "\n".join(
            [
                f"stage {stage.index}",
                *list(scopes)[:40],
                *(f"holds {fqn_text(e.name)}" for e in [*stage.state][:20]),
            ]
        )
        color = {"color": WRITTEN} if written else {}
        self.graph.node(
            f"stage-{stage.index}",
            rich(*lines),
            id=f"stage-{stage.index}",
            tooltip=plain(tip),
            fillcolor="#f3f5f7",
            **color,
        )

    def _of(self, notes: list[Hop], route: str) -> list[str]:
        return [self._names[hop.value] for hop in notes if hop.route == route]

    def _inputs(self, drawn: list[Hop]) -> dict[Value, str]:
        """Input -> the node it is drawn as. Inputs that go the same ways share a node when they are many."""
        ways: dict[Value, list[tuple[int, str]]] = {
            value: [] for value in self._program.inputs
        }
        for hop in drawn:
            if hop.tail is None and hop.value in ways:
                ways[hop.value].append((hop.head, hop.route))
        ends: dict[Value, str] = {}
        returned = {item for item in self._program.outputs if isinstance(item, Value)}
        for values in _many(self._program.inputs, lambda v: tuple(ways[v])):
            # a number that was fixed in the trace goes nowhere
            if ways[values[0]] or values[0] in returned:
                ends |= dict.fromkeys(
                    values,
                    self._end("input", values, INPUT, _input_text(self._names, values)),
                )
        return ends

    def _end(
        self, kind: str, values: list[Value], look: dict[str, str], head: str
    ) -> str:
        node = self._ids(kind, self._names[values[0]])
        lines = [
            (head, "b"),
            (type_text(values[0]) if len(values) == 1 else total_text(values), "s"),
        ]
        self.graph.node(
            node,
            rich(*lines, align="CENTER"),
            id=node,
            tooltip=self._tip(values),
            **self._classes(values),
            **look,
        )
        return node

    def _tip(self, values: Iterable[Value], more: str = "") -> str:
        return plain(
            "\n".join(
                [*(value_tip(v, self._names[v]) for v in values), *filter(None, [more])]
            )
        )

    def _classes(self, values: Iterable[Value], more: str = "") -> dict[str, str]:
        return {
            "class": " ".join(
                [*(f"value-{bare(self._names[v])}" for v in values), *more.split()]
            )
        }

    def _edges(self, tail: str, head: int, route: str, values: list[Value]) -> None:
        if len(values) > FEW:
            name = reduced(f"{tail}_{head}_{route}".replace("-", "_"))
            text = [
                (f"{len(values)} values, {total_text(values)}", "n"),
                (some([self._names[v] for v in values]), "s"),
            ]
            self._edge(tail, head, route, values, self._ids("values", name), text)
            return
        for value in values:
            name = self._names[value]
            text = (
                [(name, "n"), (f"{type_text(value)}, {total_text([value])}", "s")]
                if not tail.startswith("input")
                else []
            )
            self._edge(
                tail, head, route, [value], self._ids.edge(name, f"{head}"), text
            )

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
        for number, item in enumerate(self._program.outputs):
            if isinstance(item, Value) and (item in home or item in inputs):
                places.setdefault(item, []).append(number)
        for values in _many(list(places), lambda v: home.get(v, inputs.get(v))):
            head = outputs_text(self._program, (n for v in values for n in places[v]))
            node = self._end("output", values, OUTPUT, head)
            text = [(some([self._names[v] for v in values]), "n")]
            look = pen("send", bytes_of(values)) | self._classes(values, "route-output")
            name, tip = f"{node}-edge", self._tip(values)
            tail = home.get(values[0]) or inputs[values[0]]
            self.graph.edge(
                tail,
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
            tip, name = plain("tied: " + "\n".join(names)), f"tied-{left}-{right}"
            look = pen("tied", ()) | {
                "id": name,
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
    same: dict[tuple[str, Value], list[Hop]] = {}
    for hop in ways:
        same.setdefault((hop.route, hop.value), []).append(hop)
    for (route, _), those in same.items():
        many = route in ("feed", "recompute") and len(those) > FEW
        notes += those if many else []
        drawn += those[: route == "feed"] if many else those
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
    return [
        part
        for group in groups.values()
        for part in ([group] if len(group) > FEW else [[value] for value in group])
    ]


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
    return (
        lines
        if len(lines) <= most
        else [*lines[: most - 1], f"{len(lines) - most + 1} more"]
    )


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
    return next(
        (
            scope[:length]
            for length in range(1, len(scope) + 1)
            if len(homes[scope[:length]]) == 1
        ),
        scope,
    )


def _runs(paths: list[list[str]]) -> list[str]:
    """The paths as text; neighbours that differ only in a number are one line."""
    runs: list[tuple[list[str], list[int]]] = []
    for path in paths:
        number = [int(path[-1])] if path[-1].isdecimal() else []
        if (
            runs
            and number
            and runs[-1][1]
            and runs[-1][0][:-1] == path[:-1]
            and number[0] == runs[-1][1][-1] + 1
        ):
            runs[-1][1].append(number[0])
        else:
            runs.append((path, number))
    return [_line(path, numbers) for path, numbers in runs]


def _line(path: list[str], numbers: list[int]) -> str:
    name = (
        ".".join([*path[:-1], spans(numbers) if numbers else path[-1]])
        or "the model itself"
    )
    return f"{name}  x {len(numbers)}" if len(numbers) > 1 else name
