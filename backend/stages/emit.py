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
from types import EllipsisType, NoneType
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
    CALL,
    Block,
    Context,
    Kind,
    Loc,
    Mode,
    Namer,
    Op,
    Program,
    RegionRef,
    Scope,
    StateEntry,
    Token,
    Value,
    closest_name,
    leaves,
    literals,
    nested_ops,
    scope_fqn,
)
from stagecut.ir.graph import Stage as IrStage
from stagecut.ir.outline import Positions, positions
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.targets import DEVICE, check_op, constant
from stagecut.ir.types import Dim, TensorType

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
    if any(op.target == CALL for op in program.all_ops()):
        raise EmitError(
            "stages are made of the long form of a program, this one calls functions",
            hint="unfold(program) gives it",
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
        self._lines: dict[Loc, str] = {}
        self.unseen = _unseen(program, bindings)
        self.promises = Promises(program, bindings)

    def stage(self, block: IrStage) -> Stage:
        root = Stage(self.program.name, "", self.code, self.home)
        root.index = block.index
        names = Namer(self.reserved)
        parameters = {
            value: names(_local_name(value.hint) or "x") for value in block.inputs
        }
        root.input_names = tuple(parameters.values())
        root.input_types = tuple(value.type for value in block.inputs)
        root.output_types = tuple(value.type for value in block.outputs)
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
        if op.loc is None:
            return ""
        if op.loc not in self._lines:
            file, line = op.loc
            source = ""
            if self.bindings.sources:
                source = linecache.getline(file, line).strip()
            text = f"# {os.path.basename(file)}:{line}: {source}"
            self._lines[op.loc] = printable(text.rstrip(": "))
        return self._lines[op.loc]


class _Tree:
    """The module tree of one stage, grown on demand."""

    def __init__(self, root: Stage, emitter: _Emitter) -> None:
        self._nodes: dict[str, nn.Module] = {"": root}
        self._emitter = emitter

    def node(self, path: str) -> nn.Module:
        """The module at `path`, made with all modules above it when it is not there yet. Nothing is put into
        a user's own module.
        """
        module = self._nodes.get(path)
        if module is not None:
            return module
        above, _, name = path.rpartition(".")
        parent = self.node(above)
        if not isinstance(parent, StageModule):
            return parent
        bindings = self._emitter.bindings
        _refuse_taken(parent, path, (parent._parameters, parent._buffers))
        module = bindings.modules.get(path)
        if module is None:
            title = bindings.facts_of(path).kind
            code, device = self._emitter.code, self._emitter.home
            module = StageModule(title, path, code, device)
        self._nodes[path] = parent._modules[name] = module
        return module

    def hold(self, block: IrStage) -> None:
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
    owner: StageModule, full: str, places: Iterable[Mapping[str, Any]]
) -> None:
    """Raises EmitError for a name that no module or tensor of an nn.Module can have, and for one that is in
    one of `places` too.
    """
    name = full.rpartition(".")[2]
    if not name or name in _TAKEN or any(name in place for place in places):
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
    in_stages = {
        scope_fqn(scope[:depth]) for scope in scopes for depth in range(len(scope) + 1)
    }
    in_stages |= {name.rpartition(".")[0] for name in program.name_owners()}
    whole = tuple(f"{path}." for path in bindings.modules)
    return {
        path: place
        for path, place in branches.items()
        if path not in in_stages or f"{path}.".startswith(whole)
    }


def _emitted_modules(root: Stage) -> dict[str, StageModule]:
    """Path -> each module of a stage that is not the user's own."""
    return {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, StageModule)
    }


def _set_training(root: Stage, bindings: Bindings, unseen: Mapping[str, str]) -> None:
    modules = _emitted_modules(root)
    for path, module in modules.items():
        module._facts = bindings.facts_of(path)
        module.training = module._facts.training
    for path, place in unseen.items():
        while path not in modules:
            path = path.rpartition(".")[0]
        if not modules[path]._facts.branch:
            modules[path]._facts = replace(modules[path]._facts, branch=place)


def _tie_flags(root: Stage, block: IrStage) -> None:
    """Modules of a stage whose flags decide something together know each other: they are switched together or
    not at all.
    """
    modules = _emitted_modules(root)
    for op in nested_ops(block.ops):
        path = scope_fqn(op.scope)
        for tied in _tied_modules(op):
            if tied in modules and path in modules and tied != path:
                where = op.where()
                modules[path]._together = {tied: where, **modules[path]._together}
                modules[tied]._together = {path: where, **modules[tied]._together}


def _tied_modules(op: Op) -> Iterator[str]:
    """The paths of the other modules by whose flags the modes among an op's operands are decided."""
    for literal in literals((op.args, op.kwargs)):
        if isinstance(literal, Mode):
            yield from literal.others


def _main_device(program: Program) -> str:
    """The device the model was traced on: that of its state, else of its inputs."""
    for value in [*(entry.value for entry in program.state), *program.inputs]:
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
        block: IrStage,
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
        parameters = ", ".join(["self", *self._parameters.values()])
        lines = [f"def forward({parameters}):"]
        for statement in self.body(list(self._group(ops)), outputs, 1):
            lines.append("    " * statement.indent + statement.text)
        return "\n".join(lines) + "\n"

    def body(
        self, runs: list[list[Op]], outputs: list[Value], indent: int
    ) -> list[_Statement]:
        """The statements that run `runs` and return `outputs`."""
        self._write_runs(runs, self._entered, indent)
        returned = [self._value(value, self._path) for value in outputs]
        self._free(set(returned))
        if returned:
            self._out.append(_Statement(indent, "return " + ", ".join(returned)))
        if all(statement.text.startswith("#") for statement in self._out):
            self._out.append(_Statement(indent, "pass"))
        return self._out

    def _free(self, keep: set[str]) -> None:
        """Each local is deleted after its last use, so that activations do not outlive their readers."""
        used_later = set(keep)
        for statement in reversed(self._out):
            dead = statement.names - used_later
            if dead:
                statement.text += ";  del " + ", ".join(sorted(dead))
                used_later |= dead

    # --- grouping: module calls, then contexts ----------------------------------------------------

    def _group(self, ops: list[Op]) -> Iterator[list[Op]]:
        """Runs of ops: ops of this module one by one, ops of one call of a submodule together."""
        run: list[Op] = []
        for op in ops:
            if run and self._frames(run[0]) != self._frames(op):
                yield run
                run = []
            run.append(op)
            if not self._frames(op):
                yield run
                run = []
        if run:
            yield run

    def _frames(self, op: Op) -> Scope:
        """The call of a submodule of this module that an op lies in; () for an op of this module's own."""
        return op.scope[self._depth : self._depth + 1]

    def _write_runs(self, runs: list[list[Op]], entered: int, indent: int) -> None:
        index = 0
        while index < len(runs):
            context = _common_context(runs[index])
            if len(context) <= entered:
                self._run(runs[index], entered, indent)
                index += 1
                continue
            entering = context[entered : entered + 1]
            stop = index
            while (
                stop < len(runs)
                and _common_context(runs[stop])[entered : entered + 1] == entering
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
            self._write_runs(runs, entered, indent)
        else:
            self._out.append(_Statement(indent, f"with {self._context(context)}:"))
            self._write_runs(runs, entered, indent + 1)

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
        arguments = [
            value
            for value in where.live_ins(ops)
            if self._state(value, path, path) is None
        ]
        parameters = {value: f"x{place}" for place, value in enumerate(arguments)}
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
        passed = [self._value(value, path) for value in arguments]
        if number:
            passed.append(f"_call={number}")
        callee = _attributes("self", frame.name.split("."))
        wish = frame.name.rpartition(".")[2]
        bound = [self._define(value, wish) for value in outputs]
        self._assign(bound, f"{callee}({', '.join(passed)})", arguments, indent)

    def _assign(
        self, bound: list[str], call: str, arguments: list[Value], indent: int
    ) -> None:
        """A call of a function of ours, whose results are bound to these locals."""
        text = f"{', '.join(bound)} = {call}" if bound else call
        names = {*self._locals_of(arguments), *bound}
        self._out.append(_Statement(indent, text, names))
        self._last_comment = ""

    def _checkpoint(
        self, context: Context, runs: list[list[Op]], entered: int, indent: int
    ) -> None:
        """A function of its own that torch.utils.checkpoint runs, and runs again for the backward."""
        ops, where = [op for run in runs for op in run], self._emitter.where
        inside = set(ops)
        live_ins, live_outs = where.live_ins(ops), where.live_outs(ops)
        roots = {value: unwritten(value) for value in [*live_ins, *live_outs]}
        arguments = [
            value
            for value in live_ins
            if self._state(roots[value], self._path, self._path) is None
        ]
        outputs = [value for value in live_outs if roots[value].owner in inside]
        parameters = {value: f"x{place}" for place, value in enumerate(arguments)}
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
        written = written_in(ops, arguments)
        as_arguments = [value for value in arguments if value not in written]
        as_defaults = [value for value in arguments if value in written]
        name = self._names("checkpointed")
        header = [parameters[value] for value in as_arguments]
        for value in as_defaults:
            header.append(f"{parameters[value]}={self._value(value, self._path)}")
        self._out.append(_Statement(indent, f"def {name}({', '.join(header)}):"))
        self._out += _without_names(inner.body(runs, outputs, indent + 1))
        passed = [name, *(self._value(value, self._path) for value in as_arguments)]
        passed.append("use_reentrant=False")
        if not context.args[1]:
            passed.append("preserve_rng_state=False")
        call = f"torch.utils.checkpoint.checkpoint({', '.join(passed)})"
        results = [self._define(value, value.hint) for value in outputs]
        self._local |= {
            value: self._local[root]
            for value, root in roots.items()
            if root in self._local and value not in self._local
        }
        self._assign(results, call, arguments, indent)

    # --- one op ---------------------------------------------------------------------------------

    def _op(self, op: Op, indent: int) -> None:
        comment = self._emitter.comment(op)
        if comment and comment != self._last_comment:
            self._out.append(_Statement(indent, comment))
            self._last_comment = comment
        regions = [self._region(region, indent) for region in op.regions]
        call = self._spell(op, regions)
        for old, new in op.versions.items():
            if old in self._local:
                self._local[new] = self._local[old]
        target, unpack = self._targets(op)
        lines = [f"{target} = {call}" if target else call, *unpack]
        self._out += [_Statement(indent, line) for line in lines]
        # the locals may go after the last of these lines
        self._out[-1].names.update(self._locals_of([*op.operands, *op.results]))

    def _spell(self, op: Op, regions: list[str]) -> str:
        check_op(op)
        kind, name = op.target.kind, op.target.name
        if kind is Kind.MODULE:
            args, kwargs, _ = op.args
            watched = self._watched(self._leaf(name, op), f"module {name!r}", op)
            called = f"{watched}({self._arguments(op, args, kwargs, regions)})"
            return self._tensors_of(called, f"{name!r}, {self._sizes(op)}", op)
        if kind is Kind.METHOD:
            receiver = self._tree_text(op.args[0], op, regions)
            return f"{receiver}.{name}({self._arguments(op, op.args[1:], op.kwargs, regions)})"
        if kind is Kind.EXTERN:
            if op.target not in self._emitter.bindings.functions:
                raise EmitError(
                    f"function '{op.target}' is not bound",
                    where=op.where(),
                    hint="IR text alone cannot hold user functions",
                )
            watched = self._watched(f"extern_{name}", f"function {name!r}", op)
            called = f"{watched}({self._arguments(op, op.args, op.kwargs, regions)})"
            return self._tensors_of(called, f"{name!r}, None", op)
        if op.target == BY_MODE:
            flag, _, _, operands = op.args
            training, evaluating = regions
            chosen = f"({training} if {self._literal_code(flag, op)} else {evaluating})"
            return f"{chosen}({self._arguments(op, operands, {}, regions)})"
        if is_iteration(op):
            return self._tree_text(op.args[0], op, regions)
        return f"{callee(op)}({self._arguments(op, op.args, op.kwargs, regions)})"

    def _watched(self, function: str, what: str, op: Op) -> str:
        """The expression that is called for the user's own code. The call is watched if in another call the
        code might do something that other stages would not see.
        """
        promise = self._emitter.promises.of(op)
        if not promise.unwritten and not promise.apart:
            return function
        unwritten = [
            f"{name!r}: {self._value(value, self._path)}"
            for name, value in promise.unwritten.items()
        ]
        apart = [
            f"{name!r}: ({self._value(value, self._path)}, {places})"
            for name, (value, places) in promise.apart.items()
        ]
        return f"reads_only({function}, {what!r}, {{{', '.join(unwritten)}}}, {{{', '.join(apart)}}})"

    def _tensors_of(self, called: str, about: str, op: Op) -> str:
        if op.returned is None:
            return called
        if not op.returned:
            return f"tensors_of({called}, {about})"
        returned = ", ".join(self._literal_code(part, op) for part in op.returned)
        return f"tensors_of({called}, {about}, ({returned},))"

    def _sizes(self, op: Op) -> str:
        """The sizes that the results of a module kept whole must have; varying sizes are read from its
        arguments.
        """
        varying: dict[Dim, str] = {}
        for value in leaves(op.args[:2]):
            if isinstance(value.type, TensorType):
                name = self._value(value, self._path)
                varying |= {
                    size: f"{name}.shape[{place}]"
                    for place, size in enumerate(value.type.shape)
                    if isinstance(size, str)
                }
        rows: list[str] = []
        for result in op.results:
            shape = getattr(result.type, "shape", ())
            sizes = [
                size if isinstance(size, int) else varying.get(size) for size in shape
            ]
            rows.append(f"[{', '.join(map(str, sizes))}]")
        return f"[{', '.join(rows)}]"

    def _arguments(
        self, op: Op, args: Any, kwargs: dict[str, Any], regions: list[str]
    ) -> str:
        parts = [self._tree_text(operand, op, regions) for operand in args]
        for key, operand in kwargs.items():
            if not key.isidentifier() or keyword.iskeyword(key):
                raise EmitError(f"{key!r} is no keyword argument", where=op.where())
            parts.append(f"{key}={self._tree_text(operand, op, regions)}")
        return ", ".join(parts)

    def _leaf(self, path: str, op: Op) -> str:
        self._tree.node(path)
        if self._path and not path.startswith(self._path + "."):
            raise EmitError(
                f"leaf module '{path}' is called from another module", where=op.where()
            )
        return _attributes("self", _below(path, self._path).split("."))

    def _targets(self, op: Op) -> tuple[str, list[str]]:
        """The target that the call is assigned to, and lines that take the result apart where a pattern
        cannot.
        """
        if not any(result.uses for result in op.results):
            return "", []
        wish = _wish(op)
        names = [
            self._define(result, wish) if result.uses else "_" for result in op.results
        ]
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
        inner._local = {value: self._names("x") for value in region.inputs}
        parameters = list(inner._local.values())
        inner._write_runs([[op] for op in region.ops], 0, indent + 1)
        result = inner._tree_text(region.outputs, region.output, [])
        self._out.append(_Statement(indent, f"def {name}({', '.join(parameters)}):"))
        self._out += _without_names(inner._out)
        self._out.append(_Statement(indent + 1, f"return {result}"))
        return name

    # --- values and literals ----------------------------------------------------------------------

    def _define(self, value: Value, wish: str) -> str:
        name = self._names(_local_name(wish))
        self._local[value] = name
        return name

    def _locals_of(self, values: list[Value]) -> list[str]:
        names = (self._local[value] for value in values if value in self._local)
        return [name for name in names if name.isidentifier()]

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
            names = tuple(name for name in names if name.startswith(path + "."))
        if not names:
            return None
        parts = _below(closest_name(names, reader), path).split(".")
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
            inner = self._arguments(op, tree, {}, regions)
            return f"({inner},)" if len(tree) == 1 else f"({inner})"
        if isinstance(tree, list):
            return f"[{self._arguments(op, tree, {}, regions)}]"
        if isinstance(tree, dict):
            pairs = (
                f"{self._literal_code(key, op)}: {self._tree_text(part, op, regions)}"
                for key, part in tree.items()
            )
            return f"{{{', '.join(pairs)}}}"
        if isinstance(tree, slice):
            bounds = (tree.start, tree.stop, tree.step)
            return f"slice({self._arguments(op, bounds, {}, regions)})"
        if isinstance(tree, RegionRef):
            return regions[tree.index]
        return self._literal_code(tree, op)

    def _literal_code(self, literal: Any, op: Op) -> str:
        """A literal as Python writes it."""
        if isinstance(literal, Mode):
            return self._mode(literal, op)
        if isinstance(literal, Token):
            return self._token(literal, op)
        if isinstance(literal, complex) and not cmath.isfinite(literal):
            return f"complex({literal.real!r}, {literal.imag!r})"
        if isinstance(literal, (NoneType, EllipsisType, int, float, complex, str)):
            return repr(literal)
        raise EmitError(
            f"a literal of type {type(literal).__name__} cannot be written",
            where=op.where(),
        )

    def _mode(self, mode: Mode, op: Op) -> str:
        """A literal that follows the flag of the module its op is in; inside a region this module may lie
        deeper than the function.
        """
        path = scope_fqn(op.scope)
        below = "" if path == self._path else _below(path, self._path)
        owner = "self"
        if below:
            self._tree.node(path)
            owner = _attributes(owner, below.split("."))
        flag = f"{owner}.training"
        if mode.is_flag:
            return flag
        training = self._literal_code(mode.training, op)
        evaluating = self._literal_code(mode.evaluating, op)
        return f"({training} if {flag} else {evaluating})"

    def _token(self, token: Token, op: Op) -> str:
        device = DEVICE.fullmatch(token.text)
        if device and device[1] == self._emitter.device:
            return "self._here.device"
        if device:
            return f'torch.device("{device[1]}")'
        try:
            constant(token)
        except EmitError as error:
            raise EmitError(error.what, where=op.where(), hint=error.hint) from None
        return token.text

    def _context(self, context: Context) -> str:
        if context.kind in ("no_grad", "enable_grad", "inference_mode"):
            return f"torch.{context.kind}()"
        if context.kind == "autocast":
            op = Op("autocast")
            device, *rest = (self._literal_code(part, op) for part in context.args)
            return f"torch.autocast({device}, {', '.join(rest)})"
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


def _without_names(statements: Iterable[_Statement]) -> list[_Statement]:
    """The statements of an inner function, whose locals are not those of the function around it."""
    return [_Statement(statement.indent, statement.text) for statement in statements]


def _below(path: str, above: str) -> str:
    """A path as the module at `above` sees it, which is the root or a module around it."""
    return path[len(above) + 1 :] if above else path


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
    inner = ", ".join(_pattern(part, names) for part in form)
    return f"({inner},)" if len(form) == 1 else f"({inner})"
