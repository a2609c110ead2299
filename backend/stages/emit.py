"""Program -> nn.Module stages, with the model's own module tree and names inside.

A stage is written as nested functions, one for each module call. A run of ops in one call of a module becomes
that module's forward: its live-ins are the parameters, its live-outs the results. Code is text first, and two
calls with the same text share one function.
"""

from __future__ import annotations

import cmath
import keyword
import linecache
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from stagecut.backend.stages.modules import OURS, Code, Stage, StageModule, printable
from stagecut.backend.stages.promises import Promises
from stagecut.backend.stages.spell import callee, is_iteration
from stagecut.ir.aliases import unwritten, written_in
from stagecut.ir.errors import EmitError
from stagecut.ir.graph import (
    BY_MODE,
    Block,
    Context,
    Kind,
    Mode,
    Namer,
    Op,
    Program,
    RegionRef,
    StateEntry,
    Token,
    Value,
    closest_name,
    leaves,
    literals,
    nested_ops,
    scope_fqn,
)
from stagecut.ir.graph import Stage as StageBlock
from stagecut.ir.outline import Positions, positions
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.targets import DEVICE, check_op, constant
from stagecut.ir.types import TensorType

_OWN_WORDS = (
    "_ self torch aten operator math builtins getattr slice complex inf nan forward _call tensors_of "
    "reads_only __debug__"
)
_RESERVED = frozenset([*keyword.kwlist, *_OWN_WORDS.split()])
_BAD = re.compile(r"\W+", re.ASCII)
_TAKEN = frozenset(vars(nn.Module()))
"""Attributes that every nn.Module has: a module or tensor of such a name would replace one."""


def emit(
    program: Program, bindings: Bindings, only: Collection[int] | None = None
) -> list[Stage]:
    """The stages of a linked program, or those of these numbers, as modules that hold the tensors of
    `bindings`.

    Raises EmitError when the program is not linked, names an unknown op, or lacks a tensor.
    """
    if program.phase != "linked":
        raise EmitError(
            f"only a linked program can be emitted, this one is {program.phase}",
            hint="run all passes first",
        )
    emitter = _Emitter(program, bindings)
    return [
        emitter.stage(block)
        for block in program.stages
        if only is None or block.index in only
    ]


class _Emitter:
    def __init__(self, program: Program, bindings: Bindings) -> None:
        self.program = program
        self.bindings = bindings
        self.where: Positions = positions(program)
        self.code = Code(bindings.functions, program.name)
        self.device = _main_device(program)
        self.home = torch.device(
            self.device if bindings.device is None else bindings.device
        )
        self.reserved = _RESERVED | {
            name.replace(".", "_") for name in bindings.functions
        }
        self._lines: dict[Any, str] = {}
        self.unseen = _unseen(program, bindings)
        self.promises = Promises(program, bindings)

    def stage(self, block: StageBlock) -> Stage:
        root = Stage(self.program.name, "", self.code, self.home)
        root.index = block.index
        names = Namer(self.reserved)
        parameters = {v: names(_local_name(v.hint) or "x") for v in block.inputs}
        root.input_names = tuple(parameters.values())
        root.input_types, root.output_types = (
            tuple(v.type for v in values) for values in (block.inputs, block.outputs)
        )
        tree = _Tree(root, self)
        tree.hold(block)
        # extra state that no stage reads is stored too, in the first stage
        for path in self.bindings.extras if block.index == 0 else ():
            tree.node(path)
        writer = _Function(self, tree, block, "", 0, 0, parameters)
        root.add_call(writer.write(block.ops, block.outputs))
        _set_training(root, self.bindings, self.unseen)
        _tie_flags(root, block)
        return root

    def comment(self, op: Op) -> str:
        """The user's source line of an op."""
        if op.loc not in self._lines and op.loc is not None:
            source = (
                linecache.getline(op.loc.file, op.loc.line).strip()
                if self.bindings.sources
                else ""
            )
            self._lines[op.loc] = printable(
                f"# {os.path.basename(op.loc.file)}:{op.loc.line}: {source}".rstrip(
                    ": "
                )
            )
        return self._lines.get(op.loc, "")


class _Tree:
    """The module tree of one stage, grown on demand."""

    def __init__(self, root: Stage, emitter: _Emitter) -> None:
        self._nodes: dict[str, nn.Module] = {"": root}
        self._emitter = emitter

    def node(self, path: str) -> nn.Module:
        """The module at `path`, made with all modules above it when it is not there yet. Nothing is put into
        a user's own module.
        """
        found = self._nodes.get(path)
        if found is not None:
            return found
        above, _, name = path.rpartition(".")
        parent = self.node(above)
        if not isinstance(parent, StageModule):
            return parent
        bindings = self._emitter.bindings
        _refuse_taken(parent, path, (parent._parameters, parent._buffers))
        found = bindings.modules.get(path)
        if found is None:
            found = StageModule(
                bindings.facts_of(path).kind,
                path,
                self._emitter.code,
                self._emitter.home,
            )
        self._nodes[path] = parent._modules[name] = found
        return found

    def hold(self, block: StageBlock) -> None:
        """Every state name of the stage is registered where the model has it."""
        for entry, names in block.state.items():
            for name in names:
                above = name.rpartition(".")[0]
                owner = self.node(above)
                if not isinstance(owner, StageModule):
                    continue  # a leaf module of the user's holds its own
                tensor = self._emitter.bindings.tensors.get(name)
                if tensor is None:
                    raise EmitError(
                        f"no tensor is bound to '{name}'", where=f"stage {block.index}"
                    )
                _register(owner, name, tensor, entry)


def _register(
    owner: StageModule, full: str, tensor: torch.Tensor, entry: StateEntry
) -> None:
    name = full.rpartition(".")[2]
    if entry.kind == "const":
        owner._constants[name] = tensor
        return
    _refuse_taken(owner, full, (owner._modules,))
    if entry.kind == "param":
        owner._parameters[name] = tensor  # type: ignore[assignment]
    else:
        owner._buffers[name] = tensor
        if full in entry.transient:
            owner._non_persistent_buffers_set.add(name)


def _refuse_taken(
    owner: StageModule, full: str, others: Iterable[Mapping[str, Any]]
) -> None:
    """Raises EmitError for a name that no module or tensor of an nn.Module can have, and for one that is in
    `others` too.
    """
    name = full.rpartition(".")[2]
    if not name or name in _TAKEN or any(name in other for other in others):
        raise EmitError(
            f"'{printable(full)}' is no name that a model can have",
            hint="it is taken by nn.Module, or names two things",
        )


def _unseen(program: Program, bindings: Bindings) -> dict[str, str]:
    """Path -> place of the branches of modules that are in no stage, or that are the user's own there. The
    nearest module above such a module has to hold the branch for it.
    """
    branches = bindings.branches
    if not branches:
        return {}
    scopes = {op.scope for op in program.all_ops()}
    seen = {
        scope_fqn(scope[:depth]) for scope in scopes for depth in range(len(scope) + 1)
    }
    seen |= {name.rpartition(".")[0] for entry in program.state for name in entry.names}
    whole = tuple(f"{path}." for path in bindings.modules)
    return {
        path: place
        for path, place in branches.items()
        if path not in seen or f"{path}.".startswith(whole)
    }


def _set_training(root: Stage, bindings: Bindings, unseen: Mapping[str, str]) -> None:
    modules = {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, StageModule)
    }
    for path, module in modules.items():
        module._facts = bindings.facts_of(path)
        module.training = module._facts.training
    for path, place in unseen.items():
        while path not in modules:
            path = path.rpartition(".")[0]
        if not modules[path]._facts.branch:
            modules[path]._facts = replace(modules[path]._facts, branch=place)


def _tie_flags(root: Stage, block: StageBlock) -> None:
    """Modules of a stage whose flags decide something together know each other: they are switched together or
    not at all.
    """
    modules = {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, StageModule)
    }
    for op in nested_ops(block.ops):
        path = scope_fqn(op.scope)
        tied = [
            other
            for item in literals((op.args, op.kwargs))
            if isinstance(item, Mode)
            for other in item.others
        ]
        for other in tied:
            if other in modules and path in modules and other != path:
                modules[path]._together = {other: op.where(), **modules[path]._together}
                modules[other]._together = {
                    path: op.where(),
                    **modules[other]._together,
                }


def _main_device(program: Program) -> str:
    """The device the model was traced on: that of its state, else of its inputs."""
    for value in [*(e.value for e in program.state), *program.inputs]:
        if isinstance(value.type, TensorType):
            return value.type.device
    return "cpu"


@dataclass(slots=True)
class _Statement:
    """Lines of generated code, and the local variables they read or bind."""

    indent: int
    text: str
    names: set[str] = field(default_factory=set)


class _Function:
    """Writes one function: the ops of one call of the module at `path`."""

    def __init__(
        self,
        emitter: _Emitter,
        tree: _Tree,
        block: StageBlock,
        path: str,
        depth: int,
        entered: int,
        parameters: dict[Value, str],
    ) -> None:
        self._emitter, self._tree, self._block = emitter, tree, block
        self._path, self._depth, self._entered = path, depth, entered
        self._parameters = parameters
        self._names = Namer({*emitter.reserved, *parameters.values()})
        self._local: dict[Value, str] = dict(parameters)
        self._out: list[_Statement] = []
        self._last_comment = ""

    def write(self, ops: list[Op], outputs: list[Value]) -> str:
        """The text of the function that runs `ops` and returns `outputs`."""
        lines = [
            "    " * s.indent + s.text
            for s in self.body(list(self._group(ops)), outputs, 1)
        ]
        return (
            "\n".join(
                [
                    f"def forward({', '.join(['self', *self._parameters.values()])}):",
                    *lines,
                ]
            )
            + "\n"
        )

    def body(
        self, runs: list[list[Op]], outputs: list[Value], indent: int
    ) -> list[_Statement]:
        """The statements that run `runs` and return `outputs`."""
        self._items(runs, self._entered, indent)
        returned = [self._value(v, self._path) for v in outputs]
        self._free(set(returned))
        if returned:
            self._out.append(_Statement(indent, "return " + ", ".join(returned)))
        if all(s.text.startswith("#") for s in self._out):
            self._out.append(_Statement(indent, "pass"))
        return self._out

    def _free(self, keep: set[str]) -> None:
        """Each local is deleted after its last use, so that activations do not outlive their readers."""
        seen = set(keep)
        for statement in reversed(self._out):
            dead = statement.names - seen
            if dead:
                statement.text += ";  del " + ", ".join(sorted(dead))
                seen |= dead

    # --- grouping: module calls, then contexts ----------------------------------------------------

    def _group(self, ops: list[Op]) -> Iterator[list[Op]]:
        """Runs of ops: ops of this module one by one, ops of one call of a submodule together."""
        run: list[Op] = []
        for op in ops:
            inside = len(op.scope) > self._depth
            if run and not (
                inside
                and len(run[0].scope) > self._depth
                and run[0].scope[self._depth] == op.scope[self._depth]
            ):
                yield run
                run = []
            run.append(op)
            if not inside:
                yield run
                run = []
        if run:
            yield run

    def _items(self, runs: list[list[Op]], entered: int, indent: int) -> None:
        index = 0
        while index < len(runs):
            context = _common_context(runs[index])
            if len(context) <= entered:
                self._run(runs[index], entered, indent)
                index += 1
                continue
            stop = index
            while (
                stop < len(runs)
                and _common_context(runs[stop])[entered : entered + 1]
                == context[entered : entered + 1]
            ):
                stop += 1
            self._enter(context[entered], runs[index:stop], entered + 1, indent)
            index = stop

    def _enter(
        self, context: Context, runs: list[list[Op]], entered: int, indent: int
    ) -> None:
        if context.kind == "checkpoint":
            self._checkpoint(context, runs, entered, indent)
        elif context.kind == "transform":  # its first and its last op say so themselves
            self._items(runs, entered, indent)
        else:
            self._out.append(_Statement(indent, f"with {self._context(context)}:"))
            self._items(runs, entered, indent + 1)

    def _run(self, ops: list[Op], entered: int, indent: int) -> None:
        if len(ops[0].scope) > self._depth:
            self._call(ops, entered, indent)
        else:
            self._op(ops[0], indent)

    def _call(self, ops: list[Op], entered: int, indent: int) -> None:
        frame = ops[0].scope[self._depth]
        path = f"{self._path}.{frame.name}" if self._path else frame.name
        module = self._tree.node(path)
        if not isinstance(module, StageModule):
            raise EmitError(
                f"module '{path}' is kept whole, yet ops of its inside are in the program",
                where=ops[0].where(),
            )
        where = self._emitter.where
        inner = [v for v in where.live_ins(ops) if self._state(v, path, path) is None]
        parameters = {v: f"x{i}" for i, v in enumerate(inner)}
        outputs = where.live_outs(ops)
        writer = _Function(
            self._emitter,
            self._tree,
            self._block,
            path,
            self._depth + 1,
            entered,
            parameters,
        )
        number = module.add_call(writer.write(ops, outputs))
        passed = [self._value(v, path) for v in inner]
        passed += [f"_call={number}"] if number else []
        spelled = f"{_attributes('self', frame.name.split('.'))}({', '.join(passed)})"
        bound = [self._define(v, frame.name.rpartition(".")[2]) for v in outputs]
        names = {*self._locals_of(inner), *bound}
        self._out.append(
            _Statement(
                indent, f"{', '.join(bound)} = {spelled}" if bound else spelled, names
            )
        )
        self._last_comment = ""

    def _checkpoint(
        self, context: Context, runs: list[list[Op]], entered: int, indent: int
    ) -> None:
        """A function of its own that torch.utils.checkpoint runs, and runs again for the backward."""
        ops, where = [op for run in runs for op in run], self._emitter.where
        inside = set(ops)
        roots = {v: unwritten(v) for v in [*where.live_ins(ops), *where.live_outs(ops)]}
        given = [
            v
            for v in where.live_ins(ops)
            if self._state(roots[v], self._path, self._path) is None
        ]
        outputs = [v for v in where.live_outs(ops) if roots[v].owner in inside]
        parameters = {v: f"x{i}" for i, v in enumerate(given)}
        inner = _Function(
            self._emitter,
            self._tree,
            self._block,
            self._path,
            self._depth,
            entered,
            parameters,
        )
        # as an argument, torch would refuse to compute with it again
        written = written_in(ops, given)
        name = self._names("checkpointed")
        bound = [parameters[v] for v in given if v not in written]
        bound += [
            f"{parameters[v]}={self._value(v, self._path)}"
            for v in given
            if v in written
        ]
        self._out.append(_Statement(indent, f"def {name}({', '.join(bound)}):"))
        self._out += [
            _Statement(s.indent, s.text) for s in inner.body(runs, outputs, indent + 1)
        ]
        passed = [
            name,
            *(self._value(v, self._path) for v in given if v not in written),
            "use_reentrant=False",
        ]
        passed += [] if context.args[1] else ["preserve_rng_state=False"]
        call = f"torch.utils.checkpoint.checkpoint({', '.join(passed)})"
        results = [self._define(v, v.hint) for v in outputs]
        self._local |= {
            v: self._local[root]
            for v, root in roots.items()
            if root in self._local and v not in self._local
        }
        self._out.append(
            _Statement(
                indent,
                f"{', '.join(results)} = {call}" if results else call,
                {*self._locals_of(given), *results},
            )
        )
        self._last_comment = ""

    # --- one op ---------------------------------------------------------------------------------

    def _op(self, op: Op, indent: int) -> None:
        comment = self._emitter.comment(op)
        if comment and comment != self._last_comment:
            self._out.append(_Statement(indent, comment))
            self._last_comment = comment
        regions = [self._region(r, indent) for r in op.regions]
        call = self._spell(op, regions)
        for old, new in op.versions.items():
            if old in self._local:
                self._local[new] = self._local[old]
        target, unpack = self._targets(op)
        names = self._locals_of([*op.operands, *op.results])
        self._out.append(
            _Statement(
                indent,
                f"{target} = {call}" if target else call,
                set() if unpack else set(names),
            )
        )
        for number, line in enumerate(unpack):
            self._out.append(
                _Statement(
                    indent, line, set(names) if number == len(unpack) - 1 else set()
                )
            )

    def _spell(self, op: Op, regions: list[str]) -> str:
        check_op(op)
        kind, rest = op.target.kind, op.target.name
        if kind is Kind.MODULE:
            args, kwargs, _ = op.args
            watched = self._watched(self._leaf(rest, op), f"module {rest!r}", op)
            called = f"{watched}({self._arguments(op, args, kwargs, regions)})"
            return self._tensors_of(called, f"{rest!r}, {self._sizes(op)}", op)
        if kind is Kind.METHOD:
            receiver = self._tree_text(op.args[0], op, regions)
            return f"{receiver}.{rest}({self._arguments(op, op.args[1:], op.kwargs, regions)})"
        if kind is Kind.EXTERN:
            if op.target not in self._emitter.bindings.functions:
                raise EmitError(
                    f"function '{op.target}' is not bound",
                    where=op.where(),
                    hint="IR text alone cannot hold user functions",
                )
            watched = self._watched(f"extern_{rest}", f"function {rest!r}", op)
            called = f"{watched}({self._arguments(op, op.args, op.kwargs, regions)})"
            return self._tensors_of(called, f"{rest!r}, None", op)
        if op.target == BY_MODE:
            flag, _, _, operands = op.args
            given = ", ".join(self._tree_text(item, op, regions) for item in operands)
            return f"({regions[0]} if {self._literal(flag, op)} else {regions[1]})({given})"
        if is_iteration(op):
            return self._tree_text(op.args[0], op, regions)
        return f"{callee(op)}({self._arguments(op, op.args, op.kwargs, regions)})"

    def _watched(self, function: str, what: str, op: Op) -> str:
        """The expression that is called for the user's own code. The call is watched if in another call the
        code might do something that other stages would not see.
        """
        watch = self._emitter.promises.of(op)
        if not watch.unwritten and not watch.apart:
            return function
        given = [
            f"{name!r}: {self._value(value, self._path)}"
            for name, value in watch.unwritten.items()
        ]
        apart = [
            f"{name!r}: ({self._value(value, self._path)}, {places})"
            for name, (value, places) in watch.apart.items()
        ]
        return f"reads_only({function}, {what!r}, {{{', '.join(given)}}}, {{{', '.join(apart)}}})"

    def _tensors_of(self, called: str, about: str, op: Op) -> str:
        if op.returned is None:
            return called
        returned = (
            f", ({', '.join(self._literal(item, op) for item in op.returned)},)"
            if op.returned
            else ""
        )
        return f"tensors_of({called}, {about}{returned})"

    def _sizes(self, op: Op) -> str:
        """The sizes that the results of a module kept whole must have; varying sizes are read from its
        arguments.
        """
        known: dict[str, str] = {}
        for value in leaves(op.args[:2]):
            if isinstance(value.type, TensorType):
                name = self._value(value, self._path)
                known |= {
                    dim: f"{name}.shape[{place}]"
                    for place, dim in enumerate(value.type.shape)
                    if isinstance(dim, str)
                }
        rows = [getattr(result.type, "shape", ()) for result in op.results]
        spelled = [
            [
                known.get(dim, "None") if isinstance(dim, str) else str(dim)
                for dim in row
            ]
            for row in rows
        ]
        return "[" + ", ".join(f"[{', '.join(row)}]" for row in spelled) + "]"

    def _arguments(
        self, op: Op, args: Any, kwargs: dict[str, Any], regions: list[str]
    ) -> str:
        parts = [self._tree_text(a, op, regions) for a in args]
        for key, item in kwargs.items():
            if not key.isidentifier() or keyword.iskeyword(key):
                raise EmitError(f"{key!r} is no keyword argument", where=op.where())
            parts.append(f"{key}={self._tree_text(item, op, regions)}")
        return ", ".join(parts)

    def _leaf(self, path: str, op: Op) -> str:
        self._tree.node(path)
        if self._path and not path.startswith(self._path + "."):
            raise EmitError(
                f"leaf module '{path}' is called from another module", where=op.where()
            )
        return _attributes(
            "self", path[len(self._path) + 1 if self._path else 0 :].split(".")
        )

    def _targets(self, op: Op) -> tuple[str, list[str]]:
        """The target that the call is assigned to, and lines that take the result apart where a pattern
        cannot.
        """
        used = {v for v in op.results if v.uses}
        if not used:
            return "", []
        wish = _wish(op)
        names = [self._define(v, wish) if v in used else "_" for v in op.results]
        if op.returned is not None:
            return f"({', '.join(names)},)", []
        if op.form is None:
            return ", ".join(names), []
        paths = list(op.form.paths())
        if all(type(key) is int for _, path in paths for key in path):
            return _pattern(op.form.tree, names), []
        whole = self._names(f"{wish}_result")
        lines = [
            f"{name} = {whole}{''.join(f'[{key!r}]' for key in path)}"
            for name, (_, path) in zip(names, paths, strict=True)
            if name != "_"
        ]
        lines[-1] += f";  del {whole}"
        return whole, lines

    def _region(self, region: Block, indent: int) -> str:
        name = self._names(region.name)
        inner = _Function(
            self._emitter, self._tree, self._block, self._path, 10**6, 0, {}
        )
        inner._names = self._names
        inner._local = {p: self._names("x") for p in region.inputs}
        parameters = list(inner._local.values())
        inner._items([[op] for op in region.ops], 0, indent + 1)
        result = inner._tree_text(region.outputs, region.output, [])
        self._out.append(_Statement(indent, f"def {name}({', '.join(parameters)}):"))
        self._out += [_Statement(s.indent, s.text) for s in inner._out]
        self._out.append(_Statement(indent + 1, f"return {result}"))
        return name

    # --- values and literals ----------------------------------------------------------------------

    def _define(self, value: Value, wish: str) -> str:
        name = self._names(_local_name(wish))
        self._local[value] = name
        return name

    def _locals_of(self, values: list[Value]) -> list[str]:
        return [
            self._local[v]
            for v in values
            if v in self._local and self._local[v].isidentifier()
        ]

    def _value(self, value: Value, reader: str) -> str:
        """The expression for a value in this function, read on behalf of the module at `reader`."""
        name = self._local.get(value)
        if name is not None:
            return name
        state = self._state(value, self._path, reader)
        # a version is the tensor that was written in place
        if state is None and value.version_of is not None:
            return self._value(value.version_of, reader)
        if state is None:
            raise EmitError(
                f"{value!r} is not available in module '{self._path}' of stage {self._block.index}"
            )
        return state

    def _state(self, value: Value, path: str, reader: str) -> str | None:
        """The expression for state inside the module at `path`, None when it lies outside of it."""
        entry = value.owner
        if not isinstance(entry, StateEntry) or entry not in self._block.state:
            return None
        names = self._block.state[entry]
        if path:
            names = tuple(n for n in names if n.startswith(path + "."))
        if not names:
            return None
        name = closest_name(names, reader)
        parts = name[len(path) + 1 if path else 0 :].split(".")
        owner = _attributes("self", parts[:-1])
        if entry.kind == "const":
            return f"{owner}._constants[{parts[-1]!r}]"
        if _is_ours(parts[-1]):
            return f"{owner}.{'_parameters' if entry.kind == 'param' else '_buffers'}[{parts[-1]!r}]"
        return _attributes(owner, parts[-1:])

    def _tree_text(self, tree: Any, op: Op, regions: list[str]) -> str:
        if isinstance(tree, Value):
            return self._value(tree, scope_fqn(op.scope))
        if isinstance(tree, tuple):
            inner = ", ".join(self._tree_text(t, op, regions) for t in tree)
            return f"({inner},)" if len(tree) == 1 else f"({inner})"
        if isinstance(tree, list):
            return f"[{', '.join(self._tree_text(t, op, regions) for t in tree)}]"
        if isinstance(tree, dict):
            return (
                "{"
                + ", ".join(
                    f"{self._literal(k, op)}: {self._tree_text(v, op, regions)}"
                    for k, v in tree.items()
                )
                + "}"
            )
        if isinstance(tree, slice):
            bounds = (tree.start, tree.stop, tree.step)
            return f"slice({', '.join(self._tree_text(bound, op, regions) for bound in bounds)})"
        if isinstance(tree, RegionRef):
            return regions[tree.index]
        return self._literal(tree, op)

    def _literal(self, item: Any, op: Op) -> str:
        if isinstance(item, Mode):
            return self._mode(item, op)
        if isinstance(item, Token):
            return self._token(item, op)
        if isinstance(item, complex) and not cmath.isfinite(item):
            return f"complex({item.real!r}, {item.imag!r})"
        if (
            item is None
            or item is ...
            or isinstance(item, (bool, int, float, complex, str))
        ):
            return repr(item)
        raise EmitError(
            f"a literal of type {type(item).__name__} cannot be written",
            where=op.where(),
        )

    def _mode(self, item: Mode, op: Op) -> str:
        """A literal that follows the flag of the module its op is in; inside a region this module may lie
        deeper than the function.
        """
        path = scope_fqn(op.scope)
        below = (
            path[len(self._path) + 1 if self._path else 0 :]
            if path != self._path
            else ""
        )
        if below:
            self._tree.node(path)
        flag = (
            f"{_attributes('self', below.split('.'))}.training"
            if below
            else "self.training"
        )
        if item.is_flag:
            return flag
        return f"({self._literal(item.training, op)} if {flag} else {self._literal(item.evaluating, op)})"

    def _token(self, token: Token, op: Op) -> str:
        device = DEVICE.fullmatch(token.text)
        if device:
            return (
                "self._here.device"
                if device[1] == self._emitter.device
                else f'torch.device("{device[1]}")'
            )
        try:
            constant(token)
        except EmitError as error:
            raise EmitError(error.what, where=op.where(), hint=error.hint) from None
        return token.text

    def _context(self, context: Context) -> str:
        if context.kind in ("no_grad", "enable_grad", "inference_mode"):
            return f"torch.{context.kind}()"
        if context.kind == "autocast":
            device, *rest = context.args
            arguments = ", ".join(self._literal(a, Op("autocast")) for a in rest)
            return (
                f"torch.autocast({self._literal(device, Op('autocast'))}, {arguments})"
            )
        raise EmitError(
            f"unknown context '{context.kind}'",
            hint="no_grad, enable_grad, inference_mode and autocast are known",
        )


def _common_context(run: list[Op]) -> tuple[Context, ...]:
    common = run[0].context
    for op in run:
        while op.context[: len(common)] != common:
            common = common[:-1]
    return common


def _is_ours(name: str) -> bool:
    return name in OURS or name.startswith("__") or hasattr(Stage, name)


def _attributes(owner: str, parts: list[str]) -> str:
    """`owner.a.b`, through getattr where a part is no identifier, and through the registry where it hides one
    of ours.
    """
    for part in parts:
        if _is_ours(part):
            owner = f"{owner}._modules[{part!r}]"
        elif part.isidentifier() and part.isascii() and not keyword.iskeyword(part):
            owner = f"{owner}.{part}"
        else:
            owner = f"getattr({owner}, {part!r})"
    return owner


def _local_name(wish: str) -> str:
    """The wish as an identifier."""
    name = _BAD.sub("_", wish)
    return f"m{name}" if name[:1].isdigit() else name


def _wish(op: Op) -> str:
    """The wished name of an op's results: `aten.add.Tensor` -> `add`."""
    return op.target.name.rpartition(".")[2] or str(op.target)


def _pattern(form: Any, names: list[str]) -> str:
    if isinstance(form, int):
        return names[form]
    inner = ", ".join(_pattern(f, names) for f in form)
    return f"({inner},)" if len(form) == 1 else f"({inner})"
