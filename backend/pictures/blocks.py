"""Program -> the graph of the module calls of a stage, or of its ops, with the values that go from one to
another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from pathlib import PurePath

import graphviz

from stagecut.backend.pictures.drawing import (
    INPUT,
    OUTPUT,
    Ids,
    bare,
    bytes_of,
    canvas,
    is_tied,
    legend,
    outputs_text,
    pen,
    reduced,
    rich,
    short,
    some,
    spans,
    stages_text,
    state_lines,
    tip_text,
    total_text,
    type_text,
    value_tip,
)
from stagecut.backend.pictures.folded import Folded, ModuleCall, folded
from stagecut.ir.aliases import writes_of
from stagecut.ir.graph import Kind, Op, Program, Scope, Stage, StateEntry, Target, Value
from stagecut.ir.text.printer import Printer, fqn_text, scope_text, target_text

MOST = 6
"""Up to so many crossing values have a node each. Where there are more, those from one place to the same
others share a node.
"""

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
        self._printer, self._ids = Printer(program), Ids()
        self._names = self._printer.names
        self._node: dict[Op, str] = {}
        self._kinds: dict[str, None] = {}
        self._typed: set[Value] = set()
        self._stages = [
            shown for shown in program.stages if stage in (None, shown.index)
        ]
        self._home = {op: shown.index for shown in self._stages for op in shown.ops}
        self._writes: dict[Op, list[Value]] = {}
        for op, value in writes_of(
            program.all_ops(), [entry.value for entry in program.state]
        ):
            self._writes.setdefault(op, []).append(value)
        name, title = (
            ("program", program.name)
            if stage is None
            else (f"stage-{stage}", f"{program.name}: stage {stage}")
        )
        self.graph = canvas(name, title, title)
        self._routes = {
            (transfer.value, transfer.target): transfer.route or "send"
            for transfer in program.transfers
        }
        self._sources: dict[Value, int | None] = {}
        if stage is not None:
            self._sources = {
                transfer.value: transfer.source for transfer in program.transfers
            }
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
        node = self._ids("module", _path(block.scope))
        with graph.subgraph(name=f"cluster_{node}") as box:
            tip = self._box_tip(scope_text(block.scope), [*block.every_op()], block)
            label = rich((_title(block), "b"), *self._carried(block))
            look = _cluster(depth, len(block.copies) + 1)
            box.attr(label=label, id=node, tooltip=tip, **_classes(block), **look)
            self._parts(box, block, depth + 1)

    def _closed(self, graph: graphviz.Digraph, block: ModuleCall) -> None:
        """Draws a block as one box."""
        node, ops = self._ids("module", _path(block.scope)), [*block.every_op()]
        lines = [
            (_title(block), "b"),
            *self._carried(block),
            (self._work(ops), "s"),
            *self._marks(ops),
        ]
        look = {"penwidth": "2"} if block.copies else {}
        tip = self._box_tip(scope_text(block.scope), ops, block)
        graph.node(node, rich(*lines), id=node, tooltip=tip, **_classes(block), **look)
        self._node |= dict.fromkeys(block.ops(), node)

    def _carried(self, block: ModuleCall) -> list[tuple[str, str]]:
        """The values that each copy of a folded block hands to the next one."""
        if not block.carried:
            return []
        names = [self._names[value] for value in block.carried]
        return [(f"each hands on {some(names)}", "s")]

    def _own(self, graph: graphviz.Digraph, scope: Scope, ops: list[Op]) -> None:
        """Draws ops that are a module's own: one box for all, or one for each. Without ops, no box."""
        if not ops:
            return
        if self._each_op:
            for op in ops:
                self._op(graph, op)
            return
        node = self._ids("ops", _path(scope))
        where = scope_text(scope) or self._program.name
        lines = [(some(_counted(ops)), "n"), *self._sized(ops), *self._marks(ops)]
        graph.node(
            node,
            rich(*lines),
            id=node,
            tooltip=self._box_tip(where, ops),
            style="filled",
            color="#b4bcc4",
        )
        self._node |= dict.fromkeys(ops, node)

    def _op(self, graph: graphviz.Digraph, op: Op) -> None:
        defined = [*op.definitions()]
        node = self._ids("op", self._names[defined[0]] if defined else op.target)
        call = self._printer.op_call(op).removeprefix("aten.")
        results = ", ".join(self._names[result] for result in op.results)
        lines = [(short(f"{results} = {call}" if results else call, 60), "n")]
        if results:
            types = [short(type_text(result), 32) for result in op.results[:3]]
            lines.append((", ".join(types), "s"))
        tip = tip_text(self._printer.op_line(op))
        graph.node(
            node,
            rich(*lines, *self._marks([op])),
            id=node,
            tooltip=tip,
            style="filled",
            **self._values(defined),
        )
        self._node[op] = node

    def _work(self, ops: list[Op]) -> str:
        """The ops as text, and the bytes of the state they read."""
        text = some(_counted(ops))
        if len(ops) > 3:
            text = f"{len(ops)} ops: {text}"
        return ", ".join([text, *(size for size, _ in self._sized(ops))])

    def _sized(self, ops: list[Op]) -> list[tuple[str, str]]:
        state = [entry.value for entry in _state(ops)]
        return [(f"state {total_text(state)}", "s")] if state else []

    def _marks(self, ops: list[Op]) -> list[tuple[str, str]]:
        written = dict.fromkeys(
            value for op in ops for value in self._writes.get(op, ())
        )
        marked = dict.fromkeys(entry for entry in _state(ops) if is_tied(entry))
        for value in written:
            if isinstance(value.owner, StateEntry):
                marked[value.owner] = None
        return state_lines(marked, set(written), self._home.get(ops[0]))

    def _box_tip(
        self, where: str, ops: list[Op], block: ModuleCall | None = None
    ) -> str:
        """The tooltip of a box: the module, its source lines, its state, its ops."""
        lines = [where]
        if block and block.copies:
            scopes = [scope_text(call.scope) for call in (block, *block.copies)]
            lines.append(f"stands for {some(scopes, 1)}")
        lines += _lines(ops)
        state = [f"{fqn_text(entry.name)} : {entry.type}" for entry in _state(ops)]
        lines += state[:6]
        if len(state) > 6:
            lines.append(f"{len(state) - 6} more")
        lines += [self._printer.op_call(op) for op in ops[:12]]
        if len(ops) > 12:
            lines.append(f"{len(ops) - 12} more ops")
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
        ends: dict[Value, str] = {}
        for group in _gathered(
            list(readers), lambda value: (self._origin(value), readers[value])
        ):
            end = self._end("in", group, INPUT, self._origin(group[0]))
            ends |= dict.fromkeys(group, end)
        return ends

    def _edges(self) -> dict[tuple[str, str, str], dict[Value, None]]:
        """Tail node ('' for the outside), head node and kind -> values that go there."""
        edges: dict[tuple[str, str, str], dict[Value, None]] = {}
        for op, node in self._node.items():
            for value in op.reads:
                tail = self._tail(value)
                if tail is not None and tail != node:
                    key = (tail, node, self._kind(value, op))
                    edges.setdefault(key, {})[value] = None
        return edges

    def _tail(self, value: Value) -> str | None:
        """The node that a value comes from: '' for the outside, None for state, which comes from nowhere."""
        if isinstance(value.owner, StateEntry):
            is_received = self._stage is not None and value in self._stages[0].inputs
            return "" if is_received else None
        if value.owner is None:
            return ""
        return self._node.get(self._tree.drawn(value.owner), "")

    def _kind(self, value: Value, op: Op) -> str:
        """The kind of the edge on which a value gets to an op."""
        home = self._home.get(op)
        if home is None or (
            isinstance(value.owner, Op) and self._home.get(value.owner) == home
        ):
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
        label = self._label(values) if named and not self._each_op else ""
        look = pen(kind, bytes_of(values)) | self._values(values, f"route-{kind}")
        self.graph.edge(
            tail, head, label, id=name, tooltip=tip, labeltooltip=tip, **look
        )

    def _label(self, values: list[Value]) -> str:
        """The names of a few values, and the type of each where it is named first."""
        if len(values) > 2:
            return rich(
                (f"{len(values)} values, {total_text(values)}", "n"),
                (some([self._names[value] for value in values], 2), "s"),
                pad=2,
            )
        lines: list[tuple[str, str]] = []
        for value in values:
            lines.append((self._names[value], "n"))
            if value not in self._typed:
                lines.append((short(type_text(value), 32), "s"))
            self._typed.add(value)
        return rich(*lines, pad=2)

    def _end(
        self, kind: str, values: list[Value], look: dict[str, str], where: str
    ) -> str:
        """Draws a node for values that cross the border of the picture."""
        node = self._ids(kind, self._names[values[0]])
        name, size = f"{len(values)} values", total_text(values)
        if len(values) == 1:
            name = self._names[values[0]]
            size = f"{short(type_text(values[0]), 32)}, {size}"
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
        return "input" if home is None else f"from {stages_text([home])}"

    def _returned(self, ends: dict[Value, str]) -> None:
        """Draws the values that leave the picture: to other stages, and as outputs of the model."""
        tails = {value: self._tail(value) or ends.get(value) for value in self._goals}
        for values in _gathered(
            list(self._goals), lambda value: (self._goals[value], tails[value])
        ):
            tail = tails[values[0]]
            node = self._end("out", values, OUTPUT, self._goals[values[0]])
            if tail:
                self._edge(tail, node, "inside", values, named=False)

    def _tip(self, values: Iterable[Value]) -> str:
        lines = [value_tip(value, self._names[value]) for value in values]
        return tip_text("\n".join(lines))

    def _values(self, values: Iterable[Value], more: str = "") -> dict[str, str]:
        names = [f"value-{bare(self._names[value])}" for value in values]
        return {"class": " ".join([*names, *more.split()])} if names or more else {}


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
    texts = {
        value: [f"to {stages_text(stages)}"]
        for value, stages in targets.items()
        if stages
    }
    for value, places in numbers.items():
        texts.setdefault(value, []).append(outputs_text(program, places))
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


def _state(ops: Iterable[Op]) -> list[StateEntry]:
    """The state that ops read, each entry once."""
    owners = dict.fromkeys(value.owner for op in ops for value in op.reads)
    return [owner for owner in owners if isinstance(owner, StateEntry)]


def _counted(ops: Iterable[Op]) -> list[str]:
    """The short names of ops in order, each once."""
    return list(dict.fromkeys(_short_target(op.target) for op in ops))


def _short_target(target: Target) -> str:
    return target.name if target.kind is Kind.ATEN else target_text(target)


def _lines(ops: Iterable[Op]) -> list[str]:
    """The user's source lines of ops, a text for each file."""
    files: dict[str, list[int]] = {}
    for op in ops:
        if op.loc:
            files.setdefault(PurePath(op.loc.file).name, []).append(op.loc.line)
    return [f"{file}:{spans(lines)}" for file, lines in files.items()]


def _path(scope: Scope) -> str:
    """A scope as the name in an id: the module's path, and the number of the call where it is not the
    first.
    """
    return ".".join(
        f"{frame.name}.call{frame.call}" if frame.call else frame.name
        for frame in scope
    )


def _title(block: ModuleCall) -> str:
    if not block.copies:
        return block.name
    return f"{block.name} to {block.copies[-1].name}  x {len(block.copies) + 1}"


def _classes(block: ModuleCall) -> dict[str, str]:
    """A class for each module a block stands for."""
    calls = (block, *block.copies)
    classes = [f"module-{reduced(_path(call.scope))}" for call in calls]
    return {"class": " ".join(classes)}


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
    }
