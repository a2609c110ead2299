"""Program -> the graph of the module calls of a stage, or of its ops, with the values that go from one to
another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import graphviz

from stagecut.backend.pictures.drawing import (
    INK,
    INPUT,
    OUTPUT,
    Ids,
    bare,
    beside_line,
    bytes_of,
    canvas,
    is_tied,
    legend,
    more_text,
    outputs_text,
    pen,
    rich,
    short,
    some,
    stages_text,
    state_lines,
    tip_text,
    total_text,
    type_text,
    value_tip,
)
from stagecut.backend.pictures.folded import Folded, ModuleCall, folded
from stagecut.backend.pictures.texts import (
    module_classes,
    ops_text,
    path_text,
    source_lines,
    state_of,
    title_text,
)
from stagecut.ir.aliases import writes_of
from stagecut.ir.graph import (
    Op,
    Program,
    Scope,
    Stage,
    StateEntry,
    Value,
)
from stagecut.ir.text.printer import Printer, fqn_text, scope_text

MOST = 6
"""Up to so many crossing values have a node each. Where there are more, those from one place to the same
others share a node.
"""

FEW = 3
"""So many values that a box makes are named in it."""

_TINTS = ("#f3f5f7", "#fbfcfd")


def block_graph(
    program: Program, stage: int | None, depth: int | None, *, each_op: bool
) -> graphviz.Digraph:
    """The picture of the module calls of a stage, or of all stages; with `each_op`, of every op."""
    return _BlockGraph(program, stage, depth, each_op).graph


class _BlockGraph:
    def __init__(
        self, program: Program, stage: int | None, depth: int | None, each_op: bool
    ) -> None:
        self._program = program
        self._stage = stage
        self._each_op = each_op
        self._depth = depth
        self._printer = Printer(program)
        self._ids = Ids()
        self._names = self._printer.names
        self._node: dict[Op, str] = {}
        self._kinds: dict[str, None] = {}
        self._typed: set[Value] = set()
        self._made: dict[str, list[Value]] = {}
        self._stages = [
            shown for shown in program.stages if stage in (None, shown.index)
        ]
        self._home = {op: shown.index for shown in self._stages for op in shown.ops}
        self._writes: dict[Op, list[Value]] = {}
        state = [entry.value for entry in program.state]
        for op, value in writes_of(program.all_ops(), state):
            self._writes.setdefault(op, []).append(value)
        name = "program"
        title = program.name
        if stage is not None:
            name = f"stage-{stage}"
            title += f": stage {stage}"
        self.graph = canvas(name, title, title)
        self._routes: dict[tuple[Value, int], str] = {}
        self._sources: dict[Value, int | None] = {}
        for transfer in program.transfers:
            way = (transfer.value, transfer.target)
            self._routes[way] = transfer.route or "send"
            if stage is not None:
                self._sources[transfer.value] = transfer.source
        self._goals = _goals(program, self._stages[0] if stage is not None else None)
        self._tree = self._draw()
        self._ends()
        legend(self.graph, name, [*self._kinds])

    # --- blocks and ops

    def _draw(self) -> Folded:
        """Draws all blocks; returns those folded in any of them."""
        if self._stage is not None or not self._stages:
            tree = folded(self._stages[0].ops if self._stages else self._program.ops)
            self._parts(self.graph, tree.root, 0)
            return tree
        whole = Folded(ModuleCall(()))
        for stage in self._stages:
            tree, title = folded(stage.ops), f"stage {stage.index}"
            whole.stands |= tree.stands
            with self.graph.subgraph(name=f"cluster_stage-{stage.index}") as box:
                box.attr(
                    label=rich((title, "b")),
                    id=f"stage-{stage.index}",
                    tooltip=title,
                    **_cluster(0, 1),
                )
                self._parts(box, tree.root, 0)
        return whole

    def _parts(self, graph: graphviz.Digraph, block: ModuleCall, depth: int) -> None:
        """Draws the contents of a block: blocks, and each op or each run of ops between them."""
        own: list[Op] = []
        for part in block.parts:
            if isinstance(part, Op):
                own.append(part)
                continue
            self._own(graph, block.scope, own)
            own = []
            self._block(graph, part, depth)
        self._own(graph, block.scope, own)

    def _block(self, graph: graphviz.Digraph, block: ModuleCall, depth: int) -> None:
        closed = self._depth is not None and depth >= self._depth
        innermost = all(isinstance(part, Op) for part in block.parts)
        if closed or (innermost and not self._each_op):
            self._closed(graph, block)
            return
        node = self._ids("module", path_text(block.scope))
        with graph.subgraph(name=f"cluster_{node}") as box:
            tip = self._box_tip(scope_text(block.scope), [*block.every_op()], block)
            label = rich((title_text(block), "b"), *self._carried(block))
            look = _cluster(depth, len(block.copies) + 1)
            box.attr(label=label, id=node, tooltip=tip, **module_classes(block), **look)
            self._parts(box, block, depth + 1)

    def _closed(self, graph: graphviz.Digraph, block: ModuleCall) -> None:
        """Draws a block as one box."""
        node = self._ids("module", path_text(block.scope))
        ops = [*block.every_op()]
        lines = [(title_text(block), "b")]
        lines += self._carried(block)
        lines.append((self._work(ops), "s"))
        lines += self._results(node, [*block.ops()])
        lines += self._marks(ops)
        look: dict[str, str] = {}
        if block.copies:
            look["penwidth"] = "2"
        tip = self._box_tip(scope_text(block.scope), ops, block)
        graph.node(
            node, rich(*lines), id=node, tooltip=tip, **module_classes(block), **look
        )
        self._node |= dict.fromkeys(block.ops(), node)

    def _carried(self, block: ModuleCall) -> list[tuple[str, str]]:
        """The values that each copy of a folded block hands to the next one."""
        if not block.carried:
            return []
        names = [self._names[value] for value in block.carried]
        return [(f"each hands on {some(names, 'value')}", "s")]

    def _own(self, graph: graphviz.Digraph, scope: Scope, ops: list[Op]) -> None:
        """Draws ops that are a module's own: one box for all, or one for each. Without ops, no box."""
        if not ops:
            return
        if self._each_op:
            for op in ops:
                self._op(graph, op)
            return
        node = self._ids("ops", path_text(scope))
        where = scope_text(scope) or self._program.name
        lines = [(ops_text(ops), "n")]
        lines += self._sized(ops)
        lines += self._results(node, ops)
        lines += self._marks(ops)
        tip = self._box_tip(where, ops)
        graph.node(
            node,
            rich(*lines),
            id=node,
            tooltip=tip,
            style="filled",
            color="#b4bcc4",
        )
        self._node |= dict.fromkeys(ops, node)

    def _op(self, graph: graphviz.Digraph, op: Op) -> None:
        defined = [*op.definitions()]
        name = self._names[defined[0]] if defined else op.target
        node = self._ids("op", name)
        lines = self._op_lines(op)
        lines += self._marks([op])
        tip = tip_text(self._printer.op_line(op))
        graph.node(
            node,
            rich(*lines),
            id=node,
            tooltip=tip,
            style="filled",
            **self._values(defined),
        )
        self._node[op] = node

    def _op_lines(self, op: Op) -> list[tuple[str, str]]:
        """An op as text, and the types of its first results."""
        call = self._printer.op_call(op).removeprefix("aten.")
        if not op.results:
            return [(short(call, 60), "n")]
        names: list[str] = []
        types: list[str] = []
        for result in op.results:
            names.append(self._names[result])
            types.append(short(type_text(result), 32))
        results = ", ".join(names)
        line = short(f"{results} = {call}", 60)
        return [
            (line, "n"),
            (", ".join(types[:FEW]), "s"),
        ]

    def _work(self, ops: list[Op]) -> str:
        """The ops as text, and the bytes of the state they read."""
        text = ops_text(ops)
        for size, _ in self._sized(ops):
            text += f", {size}"
        return text

    def _results(self, node: str, ops: list[Op]) -> list[tuple[str, str]]:
        """A line for each value that a box makes for others. It stands in the box, since the texts of edges
        do not keep inside of the frames around.
        """
        own = set(ops)
        made: list[Value] = []
        for op in ops:
            for value in op.definitions():
                if not own.issuperset(value.uses):
                    made.append(value)
        named = made[:FEW]
        self._made[node] = named
        self._typed.update(named)
        lines: list[tuple[str, str]] = []
        for value in named:
            name = self._names[value]
            size = short(type_text(value), 32)
            lines.append((f"{name} : {size}", INK))
        rest = len(made) - len(named)
        if rest:
            lines.append((more_text(rest, "value"), "s"))
        return lines

    def _sized(self, ops: list[Op]) -> list[tuple[str, str]]:
        state = [entry.value for entry in state_of(ops)]
        if not state:
            return []
        return [(f"state {total_text(state)}", "s")]

    def _marks(self, ops: list[Op]) -> list[tuple[str, str]]:
        marked: dict[StateEntry, None] = {}
        for entry in state_of(ops):
            if is_tied(entry):
                marked[entry] = None
        written: set[Value] = set()
        for op in ops:
            for value in self._writes.get(op, ()):
                written.add(value)
                if isinstance(value.owner, StateEntry):
                    marked[value.owner] = None
        return state_lines(marked, written, self._home.get(ops[0]))

    def _box_tip(
        self, where: str, ops: list[Op], block: ModuleCall | None = None
    ) -> str:
        """The tooltip of a box: the module, its source lines, its state, its ops."""
        lines = [where]
        if block and block.copies:
            scopes = [scope_text(call.scope) for call in (block, *block.copies)]
            lines.append(f"stands for {some(scopes, 'module', 1)}")
        lines += source_lines(ops)
        state = state_of(ops)
        for entry in state[:6]:
            lines.append(f"{fqn_text(entry.name)} : {entry.type}")
        if len(state) > 6:
            lines.append(more_text(len(state) - 6, "tensor"))
        for op in ops[:12]:
            lines.append(self._printer.op_call(op))
        if len(ops) > 12:
            lines.append(more_text(len(ops) - 12, "op"))
        return tip_text("\n".join(lines))

    # --- edges

    def _ends(self) -> None:
        """Draws the values that come from outside and that go there, and all edges."""
        edges = self._edges()
        ends = self._received(edges)
        complete: dict[tuple[str, str, str], list[Value]] = {}
        for (tail, head, kind), values in edges.items():
            for value in values:
                key = (tail or ends[value], head, kind)
                complete.setdefault(key, []).append(value)
        for (tail, head, kind), group in complete.items():
            self._edge(tail, head, kind, group, named=not tail.startswith("in-"))
        self._returned(ends)

    def _received(
        self, edges: dict[tuple[str, str, str], dict[Value, None]]
    ) -> dict[Value, str]:
        """Value from outside -> the node it is drawn as."""
        inputs = [value for value in self._program.inputs if value.uses]
        if self._stage is not None:
            inputs = self._stages[0].inputs
        readers: dict[Value, tuple[str, ...]] = dict.fromkeys(inputs, ())
        for (tail, head, _), values in edges.items():
            if tail:
                continue
            for value in values:
                readers[value] = (*readers.get(value, ()), head)

        def way(value: Value) -> Hashable:
            return self._origin(value), readers[value]

        ends: dict[Value, str] = {}
        for group in _gathered(list(readers), way):
            origin = self._origin(group[0])
            end = self._end("in", group, INPUT, origin)
            ends |= dict.fromkeys(group, end)
        return ends

    def _edges(self) -> dict[tuple[str, str, str], dict[Value, None]]:
        """Tail node ('' for the outside), head node and kind -> values that go there."""
        edges: dict[tuple[str, str, str], dict[Value, None]] = {}
        for op, node in self._node.items():
            for value in op.reads:
                tail = self._tail(value)
                if tail is None or tail == node:
                    continue
                kind = self._kind(value, op)
                values = edges.setdefault((tail, node, kind), {})
                values[value] = None
        return edges

    def _tail(self, value: Value) -> str | None:
        """The node that a value comes from: '' for the outside, None for state, which comes from nowhere."""
        owner = value.owner
        if owner is None:
            return ""
        if isinstance(owner, Op):
            drawn = self._tree.drawn(owner)
            return self._node.get(drawn, "")
        if self._stage is not None and value in self._stages[0].inputs:
            return ""
        return None

    def _kind(self, value: Value, op: Op) -> str:
        """The kind of the edge on which a value gets to an op."""
        home = self._home.get(op)
        if home is None:
            return "inside"
        owner = value.owner
        if isinstance(owner, Op) and self._home.get(owner) == home:
            return "inside"
        return self._routes.get((value, home), "feed")

    def _edge(
        self, tail: str, head: str, kind: str, values: list[Value], named: bool = True
    ) -> None:
        if kind != "inside":
            self._kinds[kind] = None
        if len(values) == 1:
            name = self._ids.edge(self._names[values[0]], head)
        else:
            name = self._ids("values", f"{tail}_{head}".replace("-", "_"))
        tip = self._tip(values)
        label = ""
        if named and not self._each_op and self._made[tail] != values:
            label = self._label(values)
        look = pen(kind, bytes_of(values))
        look |= self._values(values, f"route-{kind}")
        self.graph.edge(
            tail, head, label, id=name, tooltip=tip, labeltooltip=tip, **look
        )

    def _label(self, values: list[Value]) -> str:
        """The names of a few values, and the type of each where it is named first. An edge from a box that
        makes no other value needs none.
        """
        if len(values) > 2:
            names = [self._names[value] for value in values]
            return beside_line(
                (f"{len(values)} values, {total_text(values)}", "n"),
                (some(names, "value", 2), "s"),
            )
        lines: list[tuple[str, str]] = []
        for value in values:
            lines.append((self._names[value], "n"))
            if value not in self._typed:
                lines.append((short(type_text(value), 32), "s"))
            self._typed.add(value)
        return beside_line(*lines)

    def _end(
        self, kind: str, values: list[Value], look: dict[str, str], where: str
    ) -> str:
        """Draws a node for values that cross the border of the picture."""
        first = values[0]
        name = self._names[first]
        node = self._ids(kind, name)
        size = total_text(values)
        if len(values) > 1:
            name = f"{len(values)} values"
        else:
            size = f"{short(type_text(first), 32)}, {size}"
        label = rich((name, "b"), (where, "s"), (size, "s"), align="CENTER")
        self.graph.node(
            node,
            label,
            id=node,
            tooltip=self._tip(values),
            **self._values(values),
            **look,
        )
        return node

    def _origin(self, value: Value) -> str:
        home = self._sources.get(value)
        if home is None:
            return "input"
        return f"from {stages_text([home])}"

    def _returned(self, ends: dict[Value, str]) -> None:
        """Draws the values that leave the picture: to other stages, and as outputs of the model."""
        goals = self._goals
        tails = {value: self._tail(value) or ends.get(value) for value in goals}
        for values in _gathered(
            list(goals), lambda value: (goals[value], tails[value])
        ):
            first = values[0]
            tail = tails[first]
            node = self._end("out", values, OUTPUT, goals[first])
            if tail:
                self._edge(tail, node, "inside", values, named=False)

    def _tip(self, values: Iterable[Value]) -> str:
        lines = [value_tip(value, self._names[value]) for value in values]
        return tip_text("\n".join(lines))

    def _values(self, values: Iterable[Value], more: str = "") -> dict[str, str]:
        classes = [f"value-{bare(self._names[value])}" for value in values]
        if more:
            classes.append(more)
        if not classes:
            return {}
        return {"class": " ".join(classes)}


def _goals(program: Program, stage: Stage | None) -> dict[Value, str]:
    """Value -> its destination as text, for values that leave the picture of a stage, or of the whole
    program.
    """
    targets: dict[Value, list[int]] = {}
    if stage is not None:
        targets = {value: [] for value in stage.outputs}
    for transfer in program.transfers:
        if transfer.value in targets and transfer.route != "recompute":
            targets[transfer.value].append(transfer.target)
    numbers: dict[Value, list[int]] = {}
    for number, output in enumerate(program.outputs):
        if isinstance(output, Value) and (stage is None or output in targets):
            numbers.setdefault(output, []).append(number)
    texts: dict[Value, list[str]] = {}
    for value, stages in targets.items():
        if stages:
            texts[value] = [f"to {stages_text(stages)}"]
    for value, places in numbers.items():
        text = outputs_text(program, places)
        texts.setdefault(value, []).append(text)
    return {value: ", ".join(lines) for value, lines in texts.items()}


def _gathered(
    values: list[Value], key: Callable[[Value], Hashable]
) -> list[list[Value]]:
    """The values one by one; where they are more than MOST, those of one key together."""
    if len(values) <= MOST:
        return [[value] for value in values]
    groups: dict[Hashable, list[Value]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return list(groups.values())


ROOM = "16"
"""Points between the frame of a module and what is in it: an edge that passes other boxes bends so far."""


def _cluster(depth: int, count: int) -> dict[str, str]:
    """The look of an open module, with a stronger border where it stands for several."""
    strong = count > 1
    return {
        "style": "rounded,filled",
        "fillcolor": _TINTS[depth % 2],
        "color": "#7d8790" if strong else "#c3cad1",
        "penwidth": "2" if strong else "1",
        "labeljust": "l",
        "fontsize": "11",
        "margin": ROOM,
    }
