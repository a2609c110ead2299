"""fx.GraphModule -> Program: any graph, from symbolic_trace or made by hand, with all six kinds of node.

The graph is run once on fake tensors (`fx_run`). Each node is lowered right after it has run, while its
tensors are as it left them.
"""

from __future__ import annotations

import keyword
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from stagecut.frontend.capture.whole import first_at, home_of, in_either_mode
from stagecut.frontend.lower.contexts import SWITCHES, switched
from stagecut.frontend.lower.fx_run import FakeRun, Ran, place_of_node
from stagecut.frontend.lower.lower import (
    Lowering,
    Seen,
    state_entries,
)
from stagecut.frontend.lower.types import type_of
from stagecut.ir.errors import CaptureError, InputError
from stagecut.ir.graph import (
    Context,
    Op,
    Place,
    Program,
    StateEntry,
    Value,
    leaves,
    substitute,
)
from stagecut.ir.run.bindings import Bindings, is_torchs
from stagecut.ir.run.call import ABSENT, CallSpec
from stagecut.ir.run.targets import name_of
from stagecut.ir.types import NONE


def lower_graph_module(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, Bindings]:
    """The traced program of `module`. Leaf modules stay whole, as ops that call the user's own module.

    Raises CaptureError for a graph fx itself could not run, or whose names are no identifiers.
    """
    _check_names(module)
    inputs = _bind(module, args, kwargs)
    program, bindings = Program(type(module).__name__), Bindings(sources=True)
    lowering = Lowering(program, bindings)
    program.state = state_entries(module, bindings, lowering.note_storage)
    _refuse_endless(module)
    run = FakeRun(module)
    graph = _GraphLowering(module, lowering, run.state)
    run.visit(inputs, graph.node)
    flat, out_spec = tree_flatten(graph.outputs)
    program.set_outputs(flat)
    _, in_spec = tree_flatten((tuple(inputs), {}))
    nodes = _placeholders(module)
    parameters = {node.target: node.args[0] if node.args else ABSENT for node in nodes}
    names = tuple(node.target for node in nodes)
    bindings.call = CallSpec(names, (), parameters, in_spec, out_spec)
    program.output_names = bindings.call.output_names()
    return program, bindings


def _placeholders(module: fx.GraphModule) -> list[Any]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _check_names(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        names = [node.name] if node.op != "output" else []
        if node.op in ("placeholder", "call_method"):
            names.append(str(node.target))
        names += list(node.kwargs)
        for name in names:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise CaptureError(
                    f"the graph uses the name {name!r}, which is no identifier",
                    where=f"{node.op} node",
                    hint="rename it: a name becomes Python code, and anything else in it would be executed",
                )


def _bind(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    if isinstance(module.graph._codegen, fx.graph._PyTreeCodeGen):
        return list(module.graph._codegen.process_inputs(*args, **kwargs))
    by_name = dict(kwargs)
    inputs = list(args)
    nodes = _placeholders(module)
    for node in nodes[len(args) :]:
        if node.target in by_name:
            inputs.append(by_name.pop(node.target))
        elif node.args:
            inputs.append(node.args[0])
        else:
            raise InputError(
                f"the graph's input '{node.target}' has no example value",
                hint="add it to mb_args",
            )
    if by_name or len(inputs) > len(nodes):
        extra = next(iter(by_name), f"argument {len(nodes)}")
        raise InputError(
            f"'{extra}' is no input of the graph",
            hint=f"its inputs are {', '.join(node.target for node in nodes)}",
        )
    return inputs


def _refuse_endless(module: fx.GraphModule) -> None:
    if not any(node.op == "output" for node in module.graph.nodes):
        raise CaptureError(
            "the graph has no output node",
            hint="call graph.output(...) before handing it over",
        )


class _GraphLowering:
    """Appends the op of each node that has run to the program. `outputs` is what the graph returns."""

    def __init__(
        self, module: fx.GraphModule, lowering: Lowering, state: dict[str, torch.Tensor]
    ) -> None:
        self._module, self._lowering = module, lowering
        self._program, self._bindings = lowering.program, lowering.bindings
        self._owners = self._program.name_owners()
        self._env: dict[fx.Node, Any] = {}
        self._context: tuple[Context, ...] = ()
        self._fakes: dict[Value, torch.Tensor] = {}
        """The tensor behind each value, kept alive, because freed memory passes its identity on to another
        tensor.
        """
        self._homes: dict[Value, int] = {}
        self.outputs: Any = None
        lowering.whole_paths = frozenset(
            str(node.target) for node in module.graph.nodes if node.op == "call_module"
        )
        for entry in self._program.state:
            lowering._storage.pop(entry.value, None)
            self._note(entry.value, state[entry.name])

    def node(self, node: fx.Node, ran: Ran) -> None:
        """The op of a node is in the program, and its results stand for the node."""
        if node.op == "output":
            self.outputs = self._lowering.tree(node.args[0], self._env)
        elif node.op == "placeholder":
            self._env[node] = self._placeholder(node, ran.value)
        elif node.op == "get_attr":
            self._env[node] = self._attribute(node, ran.value)
        elif node.target in SWITCHES:
            self._context = switched(
                node, self._lowering.tree(node.args[:4], self._env), self._context, ()
            )
            self._env[node] = None
        elif (place := self._field(node, ran.value)) is not None:
            self._env[node] = self._env[node.args[0]][place]  # type: ignore[index]
        else:
            self._env[node] = (
                self._leaf(node, ran)
                if node.op == "call_module"
                else self._call(node, ran)
            )
            self._replace(node, ran)

    def _field(self, node: fx.Node, value: Any) -> int | None:
        """The place of the result that a node takes by name from several results, as in `x.max(0).values`.
        None for other nodes.
        """
        source = node.args[0] if node.target is getattr else None
        container = self._env[source] if isinstance(source, fx.Node) else None
        results = container if isinstance(container, (tuple, list)) else ()
        for place, result in enumerate(results):
            fake = self._fakes.get(result) if isinstance(result, Value) else None
            if fake is not None and fake is value:
                return place
        return None

    def _call(self, node: fx.Node, ran: Ran) -> Any:
        first = len(self._program.ops)
        seen = Seen(ran.value, (), ran.random, _is_foreign(node))
        tree = self._lowering.call(
            node, self._env, self._program.ops, self._context, seen
        )
        self._remember(tree, ran.value)
        for op in self._program.ops[first:]:
            # else it takes the view that stands for a change of shape in place
            if op.target == self._lowering.target(node):
                self._set_writes(op, ran)
        return tree

    def _replace(self, node: fx.Node, ran: Ran) -> None:
        """After a node that gave a tensor another shape, or detached it, readers of the tensor read the
        node's result instead: it is the same object.
        """
        # a `detach_` has another target
        if ran.flagged and self._program.ops[-1].target == self._lowering.target(node):
            raise _changed(
                node, "requires_grad", "set it outside of the model, or use detach()"
            )
        for tensor in (*ran.reshaped, *ran.flagged):
            old = [
                value
                for value, fake in self._fakes.items()
                if fake is tensor and value is not self._env[node]
            ]
            if ran.value is not tensor or not all(
                isinstance(value.owner, Op) for value in old
            ):
                raise _changed(node, "the shape", "take a view, as in x = x.t()")
            swap = dict.fromkeys(old, self._env[node])
            self._env = {
                reader: substitute(tree, swap) for reader, tree in self._env.items()
            }

    def _placeholder(self, node: fx.Node, fake: Any) -> Any:
        flat, spec = tree_flatten(fake)
        values = [
            self._program.add_input(
                type_of(leaf) if leaf is not None else NONE, node.name
            )
            for leaf in flat
        ]
        for value, leaf in zip(values, flat, strict=True):
            self._note(value, leaf)
        return tree_unflatten(values, spec)

    def _attribute(self, node: fx.Node, fake: Any) -> Any:
        name = str(node.target)
        if name in self._owners:
            return self._owners[name].value
        if isinstance(fake, fx.GraphModule):
            raise CaptureError(
                f"the graph runs another graph, '{name}', as a part of an op",
                where=place_of_node(node),
                hint="hand over the model itself, or its ExportedProgram",
            )
        if not isinstance(fake, torch.Tensor):
            return self._lowering.tree(fake, self._env)
        state = self._program.state
        home = home_of(fake)
        storages = [entry.storage for entry in state if self._home(entry.value) == home]
        entry = StateEntry((name,), "const", type_of(fake))
        entry.tensor = len(state)
        entry.storage = storages[0] if storages else entry.tensor
        state.append(entry)
        self._owners[name] = entry
        self._bindings.tensors[name] = _real_attribute(self._module, name)
        self._note(entry.value, fake)
        return entry.value

    def _leaf(self, node: fx.Node, ran: Ran) -> Any:
        path = str(node.target)
        owner = self._bindings.modules[path] = self._module.get_submodule(path)
        state = dict.fromkeys(
            entry.value
            for name, entry in self._owners.items()
            if name.startswith(path + ".")
        )
        args = (
            self._lowering.tree(tuple(node.args), self._env),
            self._lowering.tree(dict(node.kwargs), self._env),
            list(state),
        )
        place = Place(
            self._lowering.scope(node), self._context, self._lowering.loc(node)
        )
        op = Op(f"module.{path}", args, place=place)
        tree = self._lowering._results(op, ran.value, node.name)
        op.effects = self._lowering._effects(
            op, path, Seen(ran.value, (), ran.random, not is_torchs(owner))
        )
        self._remember(tree, ran.value)
        self._set_writes(op, ran)
        self._set_views(op, ran)
        self._program.ops.append(op)
        return tree

    def _set_writes(self, op: Op, ran: Ran) -> None:
        """The op writes the operands that the node wrote: the very tensors where they are seen, else all that
        share the written memory.
        """
        operands = op.operands
        named = [value for value in operands if id(self._fakes.get(value)) in ran.named]
        unnamed = ran.wrote - {self._home(value) for value in named}
        shared = [value for value in operands if self._home(value) in unnamed]
        writes = tuple(dict.fromkeys([*named, *shared]))
        if writes:
            views = self._lowering._views(op, writes)
            op.effects = replace(op.effects, writes=writes, views=views)
        self._lowering.refuse_written_twins(op)
        if op.is_users:
            self._lowering.note_twins(op, [self._home(result) for result in op.results])

    def _set_views(self, op: Op, ran: Ran) -> None:
        """A result is also a view of the operand in whose memory it lies when the module is in the other
        mode.
        """
        if len(ran.views) != len(op.results):
            return
        homes = first_at((value, self._home(value)) for value in op.operands)
        views = op.effects.views or (None,) * len(op.results)
        views = in_either_mode(views, ran.views, homes)
        if any(value is not None for value in views):
            op.effects = replace(op.effects, views=views)

    def _home(self, value: Value) -> int | None:
        return self._homes.get(value)

    def _note(self, value: Value, fake: Any) -> None:
        self._lowering.note_storage(value, fake)
        if isinstance(fake, torch.Tensor):
            self._fakes.setdefault(value, fake)
            self._homes.setdefault(value, home_of(fake))

    def _remember(self, tree: Any, value: Any) -> None:
        for result, leaf in zip(leaves(tree), tree_leaves(value), strict=False):
            self._note(result, leaf)


def _changed(node: fx.Node, what: str, hint: str) -> CaptureError:
    return CaptureError(
        f"node '{node.name}' ({node.op} {node.target}) changes {what} of a tensor that it is given",
        where=place_of_node(node),
        hint=hint,
    )


def _is_foreign(node: fx.Node) -> bool:
    """True for the user's own functions, which nobody has declared pure."""
    return node.op == "call_function" and name_of(node.target) is None  # type: ignore[arg-type]


def _real_attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
