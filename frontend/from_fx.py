"""fx.GraphModule -> Program: any graph, from symbolic_trace or made by hand, with all six kinds of node.

The graph is run once on fake tensors, node by node. That run shows what fx does not record: types, which
operands a node writes (their version counters move), and whether it draws random numbers.
"""

from __future__ import annotations

import keyword
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from stagecut.frontend.call import ABSENT, CallSpec
from stagecut.frontend.leaf import Looking
from stagecut.frontend.lower import Lowering, Seen, state_entries, undeclared_writes, user_loc
from stagecut.frontend.types import type_of
from stagecut.ir.bindings import Bindings
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError, InputError
from stagecut.ir.graph import Op, Program, Value, leaves
from stagecut.ir.types import NONE


def lower_graph_module(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, Bindings]:
    """The traced program of `module`. Leaf modules stay whole, as ops that call the user's own module.

    Raises CaptureError for a graph fx itself could not run, or whose names are no identifiers.
    """
    _check_names(module)
    inputs = _bind(module, args, kwargs)
    program, bindings = Program(type(module).__name__), Bindings(sources=True)
    lowering = Lowering(program, bindings)
    program.state = state_entries(module, bindings, lowering.note_storage)
    recorder = _Recorder(module)
    lowerer = _GraphLowering(module, lowering, recorder.record(inputs))
    outputs = lowerer.lower()
    flat, out_spec = tree_flatten(outputs)
    program.set_outputs(flat)
    names = tuple(n.target for n in module.graph.nodes if n.op == "placeholder")
    _, in_spec = tree_flatten((tuple(inputs), {}))
    defaults = {n.target: n.args[0] for n in module.graph.nodes if n.op == "placeholder" and n.args}
    bindings.call = CallSpec(names, (), {n: defaults.get(n, ABSENT) for n in names}, in_spec, out_spec)
    program.output_names = bindings.call.output_names()
    return program, bindings


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


def _bind(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    if isinstance(module.graph._codegen, fx.graph._PyTreeCodeGen):
        return list(module.graph._codegen.process_inputs(*args, **kwargs))
    given = dict(kwargs)
    inputs = list(args)
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node in nodes[len(args) :]:
        if node.target in given:
            inputs.append(given.pop(node.target))
        elif node.args:
            inputs.append(node.args[0])
        else:
            raise InputError(f"the graph's input '{node.target}' has no example value", hint="add it to mb_args")
    if given or len(inputs) > len(nodes):
        extra = next(iter(given), f"argument {len(nodes)}")
        raise InputError(f"'{extra}' is no input of the graph", hint=f"its inputs are {', '.join(n.target for n in nodes)}")
    return inputs


class _Watch(Looking):
    """Notices ops that draw random numbers, and writes that no version counter shows."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False
        self.wrote: set[int] = set()

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """What it does is noted."""
        self.drew |= torch.Tag.nondeterministic_seeded in func.tags
        self.wrote.update(map(id, undeclared_writes(str(func), args)))


class _Recorder(fx.Interpreter):
    """Runs a graph on fake tensors and keeps what each node showed."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.seen: dict[fx.Node, Seen] = {}
        self.state: dict[str, Any] = {}

    def record(self, inputs: list[Any]) -> _Recorder:
        """This recorder, after one run on fakes of `inputs`."""
        fake = lambda t: self.mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        tensors = [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers(remove_duplicate=False)]
        memo: dict[int, Any] = {}
        self.state = {name: memo.setdefault(id(t), fake(t)) for name, t in tensors}
        with self.mode, torch.nn.utils.stateless._reparametrize_module(self.module, self.state, tie_weights=False):
            self.run(*[tree_map(fake, i) for i in inputs], enable_io_processing=False)
        return self

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        watched = [*operands, *(self.state.values() if n.op == "call_module" else ())]
        before = [t._version for t in watched]
        try:
            with _Watch() as watch:
                result = super().run_node(n)
        except Exception as error:
            raise_ours(error)
            raise CaptureError(
                f"node '{n.name}' ({n.op} {n.target}) fails on the example inputs: {type(error).__name__}: {error}",
                where=str(user_loc(n.meta.get("stack_trace") or "") or "the graph"),
                hint="the graph must run as it is on mb_args / mb_kwargs",
            ) from error
        wrote = {id(t) for t, version in zip(watched, before, strict=True) if t._version != version}
        self.seen[n] = Seen(result, tuple(wrote | watch.wrote), watch.drew)
        return result


class _GraphLowering:
    """Walks a recorded graph and appends its ops to the program."""

    def __init__(self, module: fx.GraphModule, lowering: Lowering, recorder: _Recorder) -> None:
        self._module, self._lowering, self._recorder = module, lowering, recorder
        self._program, self._bindings = lowering.program, lowering.bindings
        self._owners = self._program.name_owners()
        self._env: dict[fx.Node, Any] = {}
        self._fakes: dict[Value, int] = {e.value: id(recorder.state[e.name]) for e in self._program.state}
        for entry in self._program.state:
            lowering._storage.pop(entry.value, None)
            lowering.note_storage(entry.value, recorder.state[entry.name])

    def lower(self) -> Any:
        for node in self._module.graph.nodes:
            if node.op == "output":
                return self._lowering.tree(node.args[0], self._env)
            self._env[node] = self._node(node)
        raise CaptureError("the graph has no output node", hint="call graph.output(...) before handing it over")

    def _node(self, node: fx.Node) -> Any:
        seen = self._recorder.seen[node]
        if node.op == "placeholder":
            return self._placeholder(node, seen.value)
        if node.op == "get_attr":
            return self._attribute(node, seen.value)
        if node.op == "call_module":
            return self._leaf(node, seen)
        wrote = set(seen.writes or ())
        before = len(self._program.ops)
        tree = self._lowering.call(node, self._env, self._program.ops, (), Seen(seen.value, (), seen.random, _is_foreign(node)))
        for op in self._program.ops[before:]:
            self._set_writes(op, wrote)
        self._remember(tree, seen.value)
        return tree

    def _placeholder(self, node: fx.Node, fake: Any) -> Any:
        flat, spec = tree_flatten(fake)
        values = [self._program.add_input(type_of(leaf) if leaf is not None else NONE, node.name) for leaf in flat]
        for value, leaf in zip(values, flat, strict=True):
            self._lowering.note_storage(value, leaf)
            self._fakes[value] = id(leaf)
        from torch.utils._pytree import tree_unflatten

        return tree_unflatten(values, spec)

    def _attribute(self, node: fx.Node, fake: Any) -> Any:
        name = str(node.target)
        if name in self._owners:
            return self._owners[name].value
        if not isinstance(fake, torch.Tensor):
            return self._lowering.tree(fake, self._env)
        from stagecut.ir.graph import StateEntry

        entry = StateEntry((name,), "const", type_of(fake))
        entry.tensor = entry.storage = len(self._program.state)
        self._program.state.append(entry)
        self._owners[name] = entry
        self._bindings.tensors[name] = _real_attribute(self._module, name)
        self._lowering.note_storage(entry.value, fake)
        return entry.value

    def _leaf(self, node: fx.Node, seen: Seen) -> Any:
        path = str(node.target)
        self._bindings.modules[path] = self._module.get_submodule(path)
        state = list(dict.fromkeys(e.value for name, e in self._owners.items() if name.startswith(path + ".")))
        args = (self._lowering.tree(tuple(node.args), self._env), self._lowering.tree(dict(node.kwargs), self._env), state)
        scope = self._lowering.scope(node)
        inside = bool(scope) and ".".join(f.name for f in scope) == path
        op = Op(f"module.{path}", args, scope=scope[:-1] if inside else scope, loc=self._lowering.loc(node))
        tree = self._lowering._results(op, seen.value, node.name)
        op.effects = self._lowering._effects(op, path, Seen(seen.value, (), seen.random))
        self._set_writes(op, set(seen.writes or ()))
        self._program.ops.append(op)
        self._remember(tree, seen.value)
        return tree

    def _set_writes(self, op: Op, wrote: set[int]) -> None:
        from dataclasses import replace

        positions = tuple(i for i, v in enumerate(op.operands) if self._fakes.get(v) in wrote)
        if positions:
            op.effects = replace(op.effects, writes=tuple(dict.fromkeys(op.operands.index(op.operands[i]) for i in positions)))

    def _remember(self, tree: Any, value: Any) -> None:
        for result, leaf in zip(leaves(tree), tree_flatten(value)[0], strict=False):
            if isinstance(leaf, torch.Tensor):
                self._fakes.setdefault(result, id(leaf))


def _is_foreign(node: fx.Node) -> bool:
    """True for a function nobody has declared pure: the user's own."""
    from stagecut.ir.targets import name_of

    return node.op == "call_function" and name_of(node.target) is None  # type: ignore[arg-type]


def _real_attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
