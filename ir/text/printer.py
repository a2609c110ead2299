"""program -> text. The one printer there is; `stagecut.ir.text.parser` reads its output back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

from stagecut.ir.graph import (
    CALL,
    LINKED,
    SPLIT,
    Block,
    Context,
    Function,
    Kind,
    Lane,
    Mode,
    Namer,
    Op,
    Program,
    RegionRef,
    ResultForm,
    Scope,
    Stage,
    StateEntry,
    Target,
    Token,
    Transfer,
    Value,
    function_of,
    functions_of,
    nested_ops,
)
from stagecut.ir.keywords import near_names
from stagecut.ir.text.groups import Span, StateGroup, spans, state_groups
from stagecut.ir.types import value_bytes

PART = "part"
"""A word in the first line of text that is a part of a program."""

_PLAIN_FQN = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")

_ON_DEVICE = re.compile(r'(?<=[]}])@\w+(:\d+)?|device\("\w+(:\d+)?"\)')
_BATCH = re.compile(r" batch\((\d+|item|mean|sum)(: [b\d*+ any]+)?\)")


@near_names
def text(program: Program) -> str:
    """The whole program as text; `parse` gives the same program back."""
    lines = Printer(program).program()
    return "\n".join(lines) + "\n"


def excerpt(program: Program, keep: Callable[[Op], bool]) -> str:
    """The ops that `keep` chooses, as `text` prints them, with the inputs, state and transfers that they
    touch.

    Comments count the ops that are left out. The first line says that it is a part: `parse` refuses it.
    """
    lines = Printer(program).excerpt(keep)
    return "\n".join(lines) + "\n"


def fqn_text(name: str) -> str:
    """A state name as it is printed: bare where it is plain, quoted where it is not."""
    return f"@{_quoted(name)}"


def _quoted(name: str) -> str:
    if _PLAIN_FQN.match(name):
        return name
    return json.dumps(name)


def _span_text(span: Span) -> str:
    """The paths of modules in a row: `@layers.0-7`."""
    path = fqn_text(span.groups[0].path)
    return f"{path}-{span.last}" if span.last else path


def fingerprint(program: Program) -> str:
    """A digest of the program that is the same wherever it was traced: on another device, from files in
    another folder, from a model on meta, which shows less of where the batch is.
    """
    anywhere = _ON_DEVICE.sub("", text(program))
    alike = _BATCH.sub("", anywhere)
    lines = [line for line in alike.splitlines() if not line.startswith("  file ")]
    joined = "\n".join(lines)
    digest = hashlib.sha256(joined.encode())
    return digest.hexdigest()


def value_names(program: Program) -> dict[Value, str]:
    """The printed name of every value of the program, state entries included."""
    return Printer(program).names


def size_text(nbytes: int | None) -> str:
    """Bytes as a short text, in powers of two: `512 B`, `32 KiB`."""
    if nbytes is None:
        return "dynamic"
    if nbytes >> 80:
        return "beyond 2^80 B"  # no float may hold it
    size = float(nbytes)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    unit = units[0]
    if size >= 10 or size == int(size):
        return f"{size:.0f} {unit}"
    return f"{size:.1f} {unit}"


def file_names(ops: Iterable[Op]) -> dict[str, str]:
    """Source file of the ops -> a short name that is unique in the program."""
    namer = Namer()
    names: dict[str, str] = {}
    for op in ops:
        if not op.loc or op.loc.file in names:
            continue
        base = os.path.basename(op.loc.file)
        names[op.loc.file] = namer(base, "file")
    return names


def shape(function: Function) -> str:
    """A function as text in which values have numbers for names: equal where two functions do the same to
    their inputs and their state.
    """
    printer = Printer(Program(""))
    printer.name_function(function, numbers=True)
    return "\n".join(printer.function(function))


class Printer:
    """The names of a program's values, and its ops as text."""

    def __init__(self, program: Program) -> None:
        self._program = program
        backward = (op for _, block in program.backward_blocks() for op in block.ops)
        all_ops = nested_ops(chain(program.all_ops(), backward))
        self._files = file_names(all_ops)
        self.names: dict[Value, str] = {}
        for entry in program.state:
            self.names[entry.value] = fqn_text(entry.name)
        namer = Namer()
        for value in program.inputs:
            self._name(value, namer)
        for op in program.all_ops():
            self._name_op(op, namer)
        for value in program.cotangents:
            self._name(value, namer)
        for _, block in program.backward_blocks():
            for op in block.ops:
                self._name_op(op, namer)
        self._functions = functions_of(program.all_ops())
        for function in self._functions:
            self.name_function(function)
        self._groups: dict[StateEntry, StateGroup] = {}
        if self._functions:
            self._groups = state_groups(program.state, program.all_ops())

    def name_function(self, function: Function, numbers: bool = False) -> None:
        """The values of a function have names of their own: their hints, or just numbers, after a dot, since
        none of them is one value of the program.
        """
        free = Namer()

        def namer(hint: str) -> str:
            return "." + free("" if numbers else hint)

        for entry in function.state:
            self.names[entry.value] = fqn_text(entry.name)
        for value in function.inputs:
            self._name(value, namer)
        for op in function.ops:
            self._name_op(op, namer)

    def _name(self, value: Value, namer: Callable[[str], str]) -> None:
        self.names[value] = "%" + namer(value.hint)

    def _name_op(self, op: Op, namer: Callable[[str], str]) -> None:
        for region in () if op.target == CALL else op.regions:
            for value in region.inputs:
                self._name(value, namer)
            for inner in region.ops:
                self._name_op(inner, namer)
        for value in op.definitions():
            self._name(value, namer)

    def program(self) -> Iterator[str]:
        program = self._program
        head = self._program_head()
        if program.stages:
            head += f" stages={len(program.stages)}"
        yield from self._block(head, program, "", self._head(), self._tail())

    def _program_head(self) -> str:
        program = self._program
        return f"program {fqn_text(program.name)} phase={program.phase}"

    def _head(self) -> Iterator[str]:
        """The lines of the program before its ops."""
        for path, short in self._files.items():
            yield f"file {short} {json.dumps(path)}"
        for function in self._functions:
            yield from self.function(function)
        for value in self._program.inputs:
            yield f"input {self._typed(value)}"
        yield from self._state(self._program.state, self._groups)
        for lane in self._program.lanes:
            yield self._lane(lane)

    def _tail(self) -> Iterator[str]:
        """The lines of the program after its ops."""
        for stage in self._program.stages:
            yield from self._stage(stage)
        for transfer in self._program.transfers:
            yield self._transfer(transfer)
        for value in self._program.cotangents:
            yield f"cotangent {self._typed(value)}{self._gradients([value])}"
        for stage, block in self._program.backward_blocks():
            yield from self._backward(stage, block)
        for transfer in self._program.backward_transfers:
            yield self._transfer(transfer)
        outputs = tuple(self._program.outputs)
        yield f"output {self._tree(outputs)}"

    def _typed(self, value: Value) -> str:
        return f"{self.names[value]} : {value.type}"

    def _block(
        self,
        head: str,
        block: Block,
        indent: str,
        first: Iterable[str] = (),
        last: Iterable[str] = (),
    ) -> Iterator[str]:
        """A block: its head, and in braces the lines of `first`, its ops, and the lines of `last`."""
        inner = indent + "  "
        yield f"{indent}{head} {{"
        for line in first:
            yield inner + line
        for op in block.ops:
            yield from self._op(op, inner)
        for line in last:
            yield inner + line
        yield indent + "}"

    def excerpt(self, keep: Callable[[Op], bool]) -> Iterator[str]:
        program = self._program
        kept = {op for op in program.all_ops() if keep(op)}
        touched: set[Value] = set()
        for op in kept:
            touched.update(op.reads, op.definitions())
        yield f"{self._program_head()} {PART} {{"
        for line in self._touched_head(touched):
            yield f"  {line}"
        if program.phase == "traced":
            yield from self._kept_ops(program.ops, kept, "  ")
        for stage in program.stages:
            if kept.intersection(stage.ops):
                yield f"  {self._stage_head(stage)} {{"
                yield from self._kept_ops(stage.ops, kept, "    ")
                yield "  }"
        for transfer in program.transfers:
            if transfer.value in touched or transfer.recomputed in touched:
                yield f"  {self._transfer(transfer)}"
        yield "}"

    def _touched_head(self, touched: set[Value]) -> Iterator[str]:
        """The lines of the inputs and the state that the kept ops touch."""
        for value in self._program.inputs:
            if value in touched:
                yield f"input {self._typed(value)}"
        state = [entry for entry in self._program.state if entry.value in touched]
        yield from self._state(state, {})

    def _kept_ops(self, ops: list[Op], kept: set[Op], indent: str) -> Iterator[str]:
        """The kept ops, and a comment for each run of others."""
        for shown, run in groupby(ops, kept.__contains__):
            ops_of_run = list(run)
            if not shown:
                ops_text = "1 op" if len(ops_of_run) == 1 else f"{len(ops_of_run)} ops"
                yield f"{indent}# {ops_text} left out"
                continue
            for op in ops_of_run:
                yield from self._op(op, indent)

    def function(self, function: Function) -> Iterator[str]:
        """A function: its inputs, the state that it reads below the module of a call, its ops."""
        inputs = ", ".join(map(self._typed, function.inputs))
        groups = state_groups(function.state, function.ops)
        state = self._state(function.state, groups)
        last = [f"yield {self._tree(function.outputs)}"]
        head = f"function {function.name} ({inputs})"
        yield from self._block(head, function, "", state, last)

    def _state(
        self, entries: list[StateEntry], groups: dict[StateEntry, StateGroup]
    ) -> Iterator[str]:
        tensors = Counter(entry.tensor for entry in entries)
        storages = Counter(entry.storage for entry in entries)
        for entry in spans(entries, groups):
            if isinstance(entry, Span):
                group = entry.groups[0]
                line = f"states {_span_text(entry)} of {group.function.name}"
                yield line + _stages(group.stages)
                continue
            line = f"state {fqn_text(entry.name)} : {entry.kind} {entry.type}"
            others = entry.names[1:]
            if others:
                line += f" names({_fqn_list(others)})"
            line += _transient(entry)
            if tensors[entry.tensor] > 1:
                line += f" tensor({entry.tensor})"
            if storages[entry.storage] > 1:
                line += f" storage({entry.storage})"
            line += _stages(entry.stages)
            if entry.share:
                line += f" share={entry.share}"
            yield line

    def _stage(self, stage: Stage) -> Iterator[str]:
        names = [*self._held(stage)]
        first = [f"holds {', '.join(names)}"] if names else []
        head = self._stage_head(stage)
        last: list[str] = []
        if stage.saved:
            sizes = [value_bytes(value.type) for value in stage.saved]
            known = [size for size in sizes if size is not None]
            nbytes = sum(known) if len(known) == len(sizes) else None
            names_saved = self._names_of(stage.saved)
            last.append(f"saves {names_saved}  # {size_text(nbytes)}")
        yield from self._block(head, stage, "", first, last)

    def _held(self, stage: Stage) -> Iterator[str]:
        """The names that the stage holds, with paths for those of groups."""
        for entry in spans([*stage.state], self._groups):
            if isinstance(entry, Span):
                yield _span_text(entry)
            else:
                yield from map(fqn_text, stage.state[entry])

    def _backward(self, stage: Stage, block: Block) -> Iterator[str]:
        """A block of the backward of a stage."""
        inputs = self._names_of(block.inputs)
        outputs = self._names_of(block.outputs)
        head = f"{block.name} {stage.index} ({inputs}) -> ({outputs})"
        yield from self._block(head, block, "")

    def _stage_head(self, stage: Stage) -> str:
        head = f"stage {stage.index}"
        if self._program.phase in LINKED or stage.inputs or stage.outputs:
            inputs = self._names_of(stage.inputs)
            outputs = self._names_of(stage.outputs)
            head += f" ({inputs}) -> ({outputs})"
        return head

    def _names_of(self, values: Iterable[Value]) -> str:
        return ", ".join(self.names[value] for value in values)

    def _transfer(self, transfer: Transfer) -> str:
        source: int | str = "input"
        if transfer.source is not None:
            source = transfer.source
        line = f"transfer {self.names[transfer.value]} : {source} -> {transfer.target}"
        if transfer.route:
            line += f" {transfer.route}"
        if transfer.recomputed is not None:
            line += f"({self.names[transfer.recomputed]})"
        if transfer.via:
            stages = ", ".join(map(str, transfer.via))
            line += f"({stages})"
        nbytes = value_bytes(transfer.value.type)
        return f"{line}  # {size_text(nbytes)}"

    def _lane(self, lane: Lane) -> str:
        line = f"lane {self.names[lane.given]}"
        if lane.left is not None:
            line += f" -> output {lane.left}"
        line += _stages(lane.stages)
        nbytes = value_bytes(lane.given.type)
        return f"{line}  # {size_text(nbytes)}"

    def _op(self, op: Op, indent: str) -> Iterator[str]:
        line = indent + self.op_line(op)
        if not op.regions or op.target == CALL:
            yield line
            return
        yield line + " {"
        for region in op.regions:
            inputs = ", ".join(map(self._typed, region.inputs))
            head = f"region {region.name} ({inputs})"
            outputs = self._tree(region.outputs)
            last = [f"yield {outputs}"]
            yield from self._block(head, region, indent + "  ", last=last)
        yield indent + "}"

    def op_call(self, op: Op) -> str:
        """The op's target applied to its operands."""
        if op.target == SPLIT:
            return "split"
        function = function_of(op)
        if function is not None:
            return f"call {function.name}({self._names_of(op.args[0])})"
        args = [self._tree(operand) for operand in op.args]
        for key, operand in op.kwargs.items():
            args.append(f"{key}={self._tree(operand)}")
        target = target_text(op.target)
        return f"{target}({', '.join(args)})"

    def op_line(self, op: Op) -> str:
        """The op on one line, without its regions."""
        line = self.op_call(op)
        if op.results:
            names = self._names_of(op.results)
            types = ", ".join(str(result.type) for result in op.results)
            line = f"{names} = {line} : {types}{self._gradients(op.results)}"
        if op.form is not None:
            line += f" form({self._form(op.form)})"
        line += self._effects(op)
        if op.context:
            contexts = ", ".join(map(self._context, op.context))
            line += f" with {contexts}"
        if op.scope:
            line += f" in {scope_text(op.scope)}"
        if op.loc:
            file = self._files.get(op.loc.file, op.loc.file)
            line += f" at {file}:{op.loc.line}"
        return line

    def _gradients(self, values: Sequence[Value]) -> str:
        """The clause that says what some values are the gradients of."""
        if all(value.gradient_of is None for value in values):
            return ""
        names = [
            "-" if value.gradient_of is None else self._tree(value.gradient_of)
            for value in values
        ]
        return f" gradient({', '.join(names)})"

    def _form(self, form: ResultForm) -> str:
        if form.rest is None:
            return self._tree(form.tree)
        if not form.rest:
            return self._tree("tensors")
        return self._tree(("tensors", *form.rest))

    def _effects(self, op: Op) -> str:
        effects = op.effects
        line = self._views(op)
        if effects.writes:
            line += f" writes({self._versions(op, effects.writes)})"
        renewed = [value for value in op.versions if value not in effects.writes]
        if renewed:
            line += f" renews({self._versions(op, renewed)})"
        if effects.random:
            line += " random"
        if effects.effect:
            line += " effect"
        return line

    def _views(self, op: Op) -> str:
        viewed: list[str] = []
        for value in op.effects.views:
            if value is None:
                viewed.append("-")
            else:
                viewed.append(self._tree(value))
        if not viewed:
            return ""
        first = viewed[0]
        if first != "-" and viewed == [first] * len(op.results):
            return f" view({first})"
        return f" views({', '.join(viewed)})"

    def _versions(self, op: Op, values: Iterable[Value]) -> str:
        return ", ".join(self._version(op, value) for value in values)

    def _version(self, op: Op, old: Value) -> str:
        new = op.versions.get(old)
        if new is None:
            return self._tree(old)
        version = f"{self._tree(old)} -> {self._tree(new)}"
        if new.type == old.type:
            return version
        return f"{version} : {new.type}"

    def _context(self, context: Context) -> str:
        if not context.args:
            return context.kind
        args = ", ".join(map(self._tree, context.args))
        return f"{context.kind}({args})"

    def _tree(self, tree: Any) -> str:
        return tree_text(tree, self._leaf)

    def _leaf(self, leaf: Any) -> str:
        if isinstance(leaf, Value):
            return self.names.get(leaf, f"%<undefined {leaf.hint}>")
        return literal_text(leaf)


def tree_text(tree: Any, leaf: Callable[[Any], str] | None = None) -> str:
    """Nested literals as text, with `leaf` for what is no container."""
    leaf = leaf or literal_text
    if isinstance(tree, tuple):
        inner = _parts_text(tree, leaf)
        if len(tree) == 1:
            inner += ","
        return f"({inner})"
    if isinstance(tree, list):
        return f"[{_parts_text(tree, leaf)}]"
    if isinstance(tree, dict):
        pairs: list[str] = []
        for key, part in tree.items():
            pairs.append(f"{literal_text(key)}: {tree_text(part, leaf)}")
        inner = ", ".join(pairs)
        return f"{{{inner}}}"
    if isinstance(tree, slice):
        bounds = (tree.start, tree.stop, tree.step)
        return f"slice({_parts_text(bounds, leaf)})"
    return leaf(tree)


def _parts_text(parts: Iterable[Any], leaf: Callable[[Any], str]) -> str:
    return ", ".join(tree_text(part, leaf) for part in parts)


def _fqn_list(names: Iterable[str]) -> str:
    return ", ".join(map(fqn_text, names))


def _stages(stages: tuple[int, ...]) -> str:
    """The clause that lists stages, '' for none."""
    return f" stages({', '.join(map(str, stages))})" if stages else ""


def _transient(entry: StateEntry) -> str:
    """The clause for the names that stay out of the state_dict; without names when all of them do."""
    if not entry.transient:
        return ""
    if len(entry.transient) >= len(entry.names):
        return " nonpersistent"
    names = [name for name in entry.names if name in entry.transient]
    if not names:
        return " nonpersistent"
    return f" nonpersistent({_fqn_list(names)})"


def literal_text(literal: Any) -> str:
    """One literal as text."""
    if isinstance(literal, str):
        return json.dumps(literal)
    if isinstance(literal, Token):
        return literal.text
    if isinstance(literal, Mode):
        return _mode_text(literal)
    if isinstance(literal, RegionRef):
        return f"<{literal.index}>"
    if isinstance(literal, complex):
        real = literal_text(literal.real)
        imaginary = literal_text(literal.imag)
        return f"complex({real}, {imaginary})"
    if isinstance(literal, float) and not math.isfinite(literal):
        return repr(float(literal))
    if literal is ...:
        return "..."
    return repr(literal)


def _mode_text(mode: Mode) -> str:
    parts = [str(mode.captured)]
    if not mode.is_flag or mode.others:
        parts.append(literal_text(mode.training))
        parts.append(literal_text(mode.evaluating))
    parts += map(literal_text, mode.others)
    return f"mode({', '.join(parts)})"


def target_text(target: Target) -> str:
    """A target as it is printed: dotted, with quotes around parts that are no plain words."""
    if target.kind is Kind.MODULE and not _PLAIN_FQN.match(target.name):
        return f"module.{json.dumps(target.name)}"
    return str(target)


def scope_text(scope: Scope) -> str:
    """A scope as printed: calls separated by `/`, a second call of a module marked `~1`."""
    parts = []
    for frame in scope:
        part = _quoted(frame.name)
        if frame.call:
            part += f"~{frame.call}"
        parts.append(part)
    return "/".join(parts)


def line_of(program: Program, op: Op) -> str:
    """One op of the program as it is printed, for messages."""
    return Printer(program).op_line(op)


def line_printer(program: Program) -> Callable[[Op], str]:
    """A function that gives any op of the program as it is printed. The names are made once for all ops."""
    return Printer(program).op_line
