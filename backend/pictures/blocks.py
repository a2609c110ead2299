"""Program -> the graph of the module calls of a stage, or of its ops, with the values that go from one to
another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import groupby
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
    plain,
    reduced,
    rich,
    short,
    some,
    spans,
    stages_text,
    state_lines,
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
        self._blocks = [s for s in program.stages if stage in (None, s.index)]
        self._home = {op: s.index for s in self._blocks for op in s.ops}
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
            (t.value, t.target): t.route or "send" for t in program.transfers
        }
        self._sources = (
            {t.value: t.source for t in program.transfers} if stage is not None else {}
        )
        self._goals = _goals(program, self._blocks[0] if stage is not None else None)
        self._tree = self._draw()
        self._ends()
        legend(self.graph, name, [*self._kinds])

    # --- blocks and ops

    def _draw(self) -> Folded:
        """Draws all blocks; returns those folded in any of them."""
        if self._stage is not None or not self._blocks:
            tree = folded(self._blocks[0].ops if self._blocks else self._program.ops)
            self._items(self.graph, tree.root, 0)
            return tree
        whole = Folded(ModuleCall(()))
        for stage in self._blocks:
            tree, title = folded(stage.ops), f"stage {stage.index}"
            whole.stands |= tree.stands
            with self.graph.subgraph(name=f"cluster_stage-{stage.index}") as box:
                box.attr(
                    label=rich((title, "b")),
                    id=f"stage-{stage.index}",
                    tooltip=title,
                    **_cluster(0, 1),
                )
                self._items(box, tree.root, 0)
        return whole

    def _items(self, graph: graphviz.Digraph, block: ModuleCall, depth: int) -> None:
        """Draws the contents of a block: blocks, and each op or each run of ops between them."""
        for is_block, items in groupby(
            block.items, lambda item: isinstance(item, ModuleCall)
        ):
            if is_block:
                for inner in items:
                    self._block(graph, inner, depth)  # type: ignore[arg-type]
            else:
                self._own(graph, block.scope, list(items))  # type: ignore[arg-type]

    def _block(self, graph: graphviz.Digraph, block: ModuleCall, depth: int) -> None:
        closed = self._depth is not None and depth >= self._depth
        if closed or (
            not self._each_op and all(isinstance(item, Op) for item in block.items)
        ):
            self._closed(graph, block)
            return
        node = self._ids("module", _path(block.scope))
        with graph.subgraph(name=f"cluster_{node}") as box:
            tip = plain(
                self._about(scope_text(block.scope), [*block.every_op()], block)
            )
            label = rich((_title(block), "b"), *self._carried(block))
            look = _cluster(depth, len(block.copies) + 1)
            box.attr(label=label, id=node, tooltip=tip, **_classes(block), **look)
            self._items(box, block, depth + 1)

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
        tip = plain(self._about(scope_text(block.scope), ops, block))
        graph.node(node, rich(*lines), id=node, tooltip=tip, **_classes(block), **look)
        self._node |= dict.fromkeys(block.ops(), node)

    def _carried(self, block: ModuleCall) -> list[tuple[str, str]]:
        """The values that each copy of a folded block hands to the next one."""
        return (
            [(f"each hands on {some([self._names[v] for v in block.carried])}", "s")]
            if block.carried
            else []
        )

    def _own(self, graph: graphviz.Digraph, scope: Scope, ops: list[Op]) -> None:
        """Draws ops that are a module's own: one box for all, or one for each."""
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
            tooltip=plain(self._about(where, ops)),
            style="filled",
            color="#b4bcc4",
        )
        self._node |= dict.fromkeys(ops, node)

    def _op(self, graph: graphviz.Digraph, op: Op) -> None:
        defined = [*op.definitions()]
        node = self._ids("op", self._names[defined[0]] if defined else op.target)
        call = self._printer.op_call(op).removeprefix("aten.")
        results = ", ".join(self._names[v] for v in op.results)
        lines = [(short(f"{results} = {call}" if results else call, 60), "n")]
        lines += (
            [(", ".join(short(type_text(v), 32) for v in op.results[:3]), "s")]
            if results
            else []
        )
        tip = plain(self._printer.op_line(op))
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
        what = (
            some(_counted(ops))
            if len(ops) <= 3
            else f"{len(ops)} ops: {some(_counted(ops))}"
        )
        return "\n".join([what, *(text for text, _ in self._sized(ops))]).replace(
            "\n", ", "
        )

    def _sized(self, ops: list[Op]) -> list[tuple[str, str]]:
        held = [entry.value for entry in _state(ops)]
        return [(f"state {total_text(held)}", "s")] if held else []

    def _marks(self, ops: list[Op]) -> list[tuple[str, str]]:
        written = dict.fromkeys(
            value for op in ops for value in self._writes.get(op, ())
        )
        marked = dict.fromkeys(
            [
                *(e for e in _state(ops) if is_tied(e)),
                *(v.owner for v in written if isinstance(v.owner, StateEntry)),
            ]
        )
        return state_lines(marked, set(written), self._home.get(ops[0]))

    def _about(self, where: str, ops: list[Op], block: ModuleCall | None = None) -> str:
        """The tooltip of a box: the module, its source lines, its state, its ops."""
        copies = (
            [
                f"stands for {some([scope_text(b.scope) for b in (block, *block.copies)], 1)}"
            ]
            if block and block.copies
            else []
        )
        state = [f"{fqn_text(e.name)} : {e.type}" for e in _state(ops)]
        shown = [self._printer.op_call(op) for op in ops[:12]]
        rest = [f"{len(ops) - 12} more ops"] if len(ops) > 12 else []
        return "\n".join(
            [
                where,
                *copies,
                *_lines(ops),
                *state[:6],
                *([f"{len(state) - 6} more"] if len(state) > 6 else []),
                *shown,
                *rest,
            ]
        )

    # --- edges

    def _ends(self) -> None:
        """Draws the values that come from outside and that go there, and all edges."""
        edges = self._edges()
        ends = self._given(edges)
        whole: dict[tuple[str, str, str], list[Value]] = {}
        for (tail, head, kind), values in edges.items():
            for value in values:
                whole.setdefault((tail or ends[value], head, kind), []).append(value)
        for (tail, head, kind), those in whole.items():
            self._edge(tail, head, kind, those, named=not tail.startswith("in-"))
        self._returned(ends)

    def _given(
        self, edges: dict[tuple[str, str, str], dict[Value, None]]
    ) -> dict[Value, str]:
        """Value from outside -> the node it is drawn as."""
        given = (
            self._blocks[0].inputs
            if self._stage is not None
            else [v for v in self._program.inputs if v.uses]
        )
        readers: dict[Value, tuple[str, ...]] = dict.fromkeys(given, ())
        for (tail, head, _), values in edges.items():
            for v in values if not tail else ():
                readers[v] = (*readers.get(v, ()), head)
        ends: dict[Value, str] = {}
        for those in _gathered(list(readers), lambda v: (self._origin(v), readers[v])):
            ends |= dict.fromkeys(
                those, self._end("in", those, INPUT, self._origin(those[0]))
            )
        return ends

    def _edges(self) -> dict[tuple[str, str, str], dict[Value, None]]:
        """Tail node ('' for the outside), head node and kind -> values that go there."""
        edges: dict[tuple[str, str, str], dict[Value, None]] = {}
        for op, node in self._node.items():
            for value in op.reads:
                tail = self._tail(value)
                if tail is not None and tail != node:
                    edges.setdefault((tail, node, self._kind(value, op)), {})[value] = (
                        None
                    )
        return edges

    def _tail(self, value: Value) -> str | None:
        """The node that a value comes from: '' for the outside, None for state, which comes from nowhere."""
        if isinstance(value.owner, StateEntry):
            return (
                ""
                if self._stage is not None and value in self._blocks[0].inputs
                else None
            )
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
        name = (
            self._ids.edge(self._names[values[0]], head)
            if len(values) == 1
            else self._ids("values", f"{tail}_{head}".replace("-", "_"))
        )
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
                (some([self._names[v] for v in values], 2), "s"),
                pad=2,
            )
        lines = []
        for v in values:
            lines += [
                (self._names[v], "n"),
                *([] if v in self._typed else [(short(type_text(v), 32), "s")]),
            ]
            self._typed.add(v)
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
        for values in _gathered(
            list(self._goals), lambda v: (self._goals[v], self._tail(v) or ends.get(v))
        ):
            tail = self._tail(values[0]) or ends.get(values[0])
            node = self._end("out", values, OUTPUT, self._goals[values[0]])
            if tail:
                self._edge(tail, node, "inside", values, named=False)

    def _tip(self, values: Iterable[Value]) -> str:
        return plain("\n".join(value_tip(v, self._names[v]) for v in values))

    def _values(self, values: Iterable[Value], more: str = "") -> dict[str, str]:
        names = [f"value-{bare(self._names[v])}" for v in values]
        return {"class": " ".join([*names, *more.split()])} if names or more else {}


def _goals(program: Program, stage: Stage | None) -> dict[Value, str]:
    """Value -> its destination as text, for values that leave the picture of a stage, or of the whole
    program.
    """
    stages: dict[Value, list[int]] = {v: [] for v in stage.outputs} if stage else {}
    for t in program.transfers if stage else ():
        if t.value in stages and t.route != "recompute":
            stages[t.value].append(t.target)
    numbers: dict[Value, list[int]] = {}
    for number, item in enumerate(program.outputs):
        if isinstance(item, Value) and (stage is None or item in stages):
            numbers.setdefault(item, []).append(number)
    texts = {
        v: [f"to {stages_text(targets)}"] for v, targets in stages.items() if targets
    }
    for v, places in numbers.items():
        texts.setdefault(v, []).append(outputs_text(program, places))
    return {v: ", ".join(lines) for v, lines in texts.items()}


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
    return list(
        dict.fromkeys(
            v.owner for op in ops for v in op.reads if isinstance(v.owner, StateEntry)
        )
    )


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
    return (
        f"{block.name} to {block.copies[-1].name}  x {len(block.copies) + 1}"
        if block.copies
        else block.name
    )


def _classes(block: ModuleCall) -> dict[str, str]:
    """A class for each module a block stands for."""
    return {
        "class": " ".join(
            f"module-{reduced(_path(one.scope))}" for one in (block, *block.copies)
        )
    }


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
