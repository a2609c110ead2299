"""program -> text. The one printer there is; `stagecut.ir.text.parser` reads its output back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from stagecut.ir.graph import (
    SPLIT,
    Context,
    Kind,
    Mode,
    Namer,
    Op,
    Program,
    Region,
    RegionRef,
    Scope,
    Stage,
    StateEntry,
    Target,
    Token,
    Transfer,
    Value,
)
from stagecut.ir.types import OBJECT, value_bytes

_PLAIN_FQN = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")

_ON_DEVICE = re.compile(r'(?<=[]}])@\w+(:\d+)?|device\("\w+(:\d+)?"\)')
_BATCH = re.compile(r" batch\((\d+|item|mean|sum)(: [b\d*+ any]+)?\)")


def text(program: Program) -> str:
    """The whole program as text; `parse` gives the same program back."""
    return "\n".join(Printer(program).program()) + "\n"


def excerpt(program: Program, keep: Callable[[Op], bool]) -> str:
    """The ops that `keep` chooses, as `text` prints them, with the inputs, state and transfers that they
    touch.

    Comments count the ops that are left out. The excerpt cannot be read back.
    """
    return "\n".join(Printer(program).excerpt(keep)) + "\n"


def fqn_text(name: str) -> str:
    """A state name as it is printed: bare where it is plain, quoted where it is not."""
    return f"@{name}" if _PLAIN_FQN.match(name) else "@" + json.dumps(name)


def fingerprint(program: Program) -> str:
    """A digest of the program that is the same wherever it was traced: on another device, from files in
    another folder, from a model on meta, which shows less of where the batch is.
    """
    alike = _BATCH.sub("", _ON_DEVICE.sub("", text(program)))
    lines = [line for line in alike.splitlines() if not line.startswith("  file ")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def value_names(program: Program) -> dict[Value, str]:
    """The printed name of every value of the program, state entries included."""
    return Printer(program).names


def size_text(nbytes: int | None) -> str:
    """Bytes as a short text, in powers of two: `512 B`, `32 KiB`."""
    if nbytes is None:
        return "dynamic"
    if nbytes >> 80:
        return "beyond 2^80 B"  # no float may hold it
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    unit = units[0]
    return (
        f"{size:.0f} {unit}"
        if size >= 10 or size == int(size)
        else f"{size:.1f} {unit}"
    )


def file_names(ops: Iterable[Op]) -> dict[str, str]:
    """Source file of the ops -> a short name that is unique in the program."""
    namer = Namer()
    names: dict[str, str] = {}
    for op in ops:
        if op.loc and op.loc.file not in names:
            names[op.loc.file] = namer(os.path.basename(op.loc.file), "file")
    return names


def nested_ops(ops: Iterable[Op]) -> Iterator[Op]:
    """The ops, each followed by the ops of its regions."""
    for op in ops:
        yield op
        for region in op.regions:
            yield from nested_ops(region.ops)


class Printer:
    """The names of a program's values, and its ops as text."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._files = file_names(nested_ops(program.all_ops()))
        self.names: dict[Value, str] = {
            e.value: fqn_text(e.name) for e in program.state
        }
        namer = Namer()
        for value in program.inputs:
            self._name(value, namer)
        for op in program.all_ops():
            self._name_op(op, namer)

    def _name(self, value: Value, namer: Namer) -> None:
        self.names[value] = "%" + namer(value.hint)

    def _name_op(self, op: Op, namer: Namer) -> None:
        for region in op.regions:
            for param in region.params:
                self._name(param, namer)
            for inner in region.ops:
                self._name_op(inner, namer)
        for value in op.definitions():
            self._name(value, namer)

    def program(self) -> Iterator[str]:
        p = self._program
        stages = f" stages={len(p.stages)}" if p.stages else ""
        yield f"program {fqn_text(p.name)} phase={p.phase}{stages} {{"
        for path, short in self._files.items():
            yield f"  file {short} {json.dumps(path)}"
        for value in p.inputs:
            yield f"  input {self.names[value]} : {value.type}"
        yield from self._state(p.state)
        if p.phase == "traced":
            for op in p.ops:
                yield from self._op(op, "  ")
        for stage in p.stages:
            yield from self._stage(stage)
        for transfer in p.transfers:
            yield self._transfer(transfer)
        yield f"  output {self._tree(tuple(p.outputs))}"
        yield "}"

    def excerpt(self, keep: Callable[[Op], bool]) -> Iterator[str]:
        p = self._program
        kept = {op for op in p.all_ops() if keep(op)}
        touched = {v for op in kept for v in (*op.reads, *op.definitions())}
        yield f"program {fqn_text(p.name)} phase={p.phase} {{"
        yield from (
            f"  input {self.names[v]} : {v.type}" for v in p.inputs if v in touched
        )
        yield from self._state([e for e in p.state if e.value in touched])
        if p.phase == "traced":
            yield from self._some(p.ops, kept, "  ")
        for stage in p.stages:
            if kept.intersection(stage.ops):
                yield f"  stage {stage.index} {self._bare(stage.inputs)} -> {self._bare(stage.outputs)} {{"
                yield from self._some(stage.ops, kept, "    ")
                yield "  }"
        yield from (
            self._transfer(t)
            for t in p.transfers
            if t.value in touched or t.made in touched
        )
        yield "}"

    def _some(self, ops: list[Op], kept: set[Op], indent: str) -> Iterator[str]:
        """The kept ops, and a comment for each run of others."""
        for shown, run in groupby(ops, kept.__contains__):
            if shown:
                yield from (line for op in run for line in self._op(op, indent))
            else:
                yield f"{indent}# {sum(1 for _ in run)} ops left out"

    def _state(self, entries: list[StateEntry]) -> Iterator[str]:
        tensors = Counter(e.tensor for e in entries)
        storages = Counter(e.storage for e in entries)
        for e in entries:
            line = f"  state {fqn_text(e.name)} : {e.kind} {e.type}"
            if len(e.names) > 1:
                line += f" names({', '.join(map(fqn_text, e.names[1:]))})"
            if e.transient:
                some = (
                    [n for n in e.names if n in e.transient]
                    if len(e.transient) < len(e.names)
                    else []
                )
                line += " nonpersistent" + (
                    f"({', '.join(map(fqn_text, some))})" if some else ""
                )
            if tensors[e.tensor] > 1:
                line += f" tensor({e.tensor})"
            if storages[e.storage] > 1:
                line += f" storage({e.storage})"
            if e.stages:
                line += f" stages({', '.join(map(str, e.stages))})"
            if e.share:
                line += f" share={e.share}"
            yield line

    def _stage(self, stage: Stage) -> Iterator[str]:
        head = f"  stage {stage.index}"
        if self._program.phase == "linked" or stage.inputs or stage.outputs:
            head += f" {self._bare(stage.inputs)} -> {self._bare(stage.outputs)}"
        yield head + " {"
        held = [name for names in stage.state.values() for name in names]
        if held:
            yield "    holds " + ", ".join(map(fqn_text, held))
        for op in stage.ops:
            yield from self._op(op, "    ")
        yield "  }"

    def _bare(self, values: list[Value]) -> str:
        return "(" + ", ".join(self.names[v] for v in values) + ")"

    def _transfer(self, t: Transfer) -> str:
        line = f"  transfer {self.names[t.value]} : {'input' if t.source is None else t.source} -> {t.target}"
        if t.route:
            line += f" {t.route}"
        if t.made is not None:
            line += f"({self.names[t.made]})"
        if t.via:
            line += "(" + ", ".join(map(str, t.via)) + ")"
        return f"{line}  # {size_text(value_bytes(t.value.type))}"

    def _op(self, op: Op, indent: str) -> Iterator[str]:
        line = indent + self.op_line(op)
        if not op.regions:
            yield line
            return
        yield line + " {"
        for region in op.regions:
            yield from self._region(region, indent + "  ")
        yield indent + "}"

    def _region(self, region: Region, indent: str) -> Iterator[str]:
        params = ", ".join(f"{self.names[p]} : {p.type}" for p in region.params)
        yield f"{indent}region {region.name} ({params}) {{"
        for op in region.ops:
            yield from self._op(op, indent + "  ")
        yield f"{indent}  yield {self._tree(region.output.args[0])}"
        yield indent + "}"

    def op_call(self, op: Op) -> str:
        """The op's target applied to its operands."""
        args = [self._tree(a) for a in op.args] + [
            f"{k}={self._tree(a)}" for k, a in op.kwargs.items()
        ]
        return (
            f"{target_text(op.target)}({', '.join(args)})"
            if op.target != SPLIT
            else "split"
        )

    def op_line(self, op: Op) -> str:
        """The op on one line, without its regions."""
        line = self.op_call(op)
        if op.results:
            names = ", ".join(self.names[r] for r in op.results)
            line = f"{names} = {line} : {', '.join(str(r.type) for r in op.results)}"
        if op.form is not None:
            line += f" form({self._tree(op.form)})"
        line += self._effects(op)
        if op.context:
            line += " with " + ", ".join(map(self._context, op.context))
        if op.scope:
            line += f" in {scope_text(op.scope)}"
        if op.loc:
            line += f" at {self._files.get(op.loc.file, op.loc.file)}:{op.loc.line}"
        return line

    def _effects(self, op: Op) -> str:
        e, line = op.effects, ""
        viewed = ["-" if v is None else self._tree(_operand(op, v)) for v in e.views]
        if (
            len(set(viewed)) == 1
            and viewed[0] != "-"
            and len(viewed) == len(op.results)
        ):
            line += f" view({viewed[0]})"
        elif viewed:
            line += f" views({', '.join(viewed)})"
        written = dict.fromkeys(_operand(op, i) for i in e.writes)
        if written:
            line += f" writes({', '.join(self._version(op, v) for v in written)})"
        others = [v for v in op.versions if v not in written]
        if others:
            line += f" renews({', '.join(self._version(op, v) for v in others)})"
        return line + (" random" if e.random else "") + (" effect" if e.effect else "")

    def _version(self, op: Op, old: Value) -> str:
        new = op.versions.get(old)
        if new is None:
            return self._tree(old)
        kind = f" : {new.type}" if new.type != old.type else ""
        return f"{self._tree(old)} -> {self._tree(new)}{kind}"

    def _context(self, context: Context) -> str:
        return context.kind + (
            f"({', '.join(map(self._tree, context.args))})" if context.args else ""
        )

    def _tree(self, tree: Any) -> str:
        if isinstance(tree, Value):
            return self.names.get(tree, f"%<undefined {tree.hint}>")
        if isinstance(tree, tuple):
            inner = ", ".join(map(self._tree, tree))
            return f"({inner},)" if len(tree) == 1 else f"({inner})"
        if isinstance(tree, list):
            return f"[{', '.join(map(self._tree, tree))}]"
        if isinstance(tree, dict):
            return (
                "{"
                + ", ".join(f"{literal(k)}: {self._tree(v)}" for k, v in tree.items())
                + "}"
            )
        if isinstance(tree, slice):
            return f"slice({self._tree(tree.start)}, {self._tree(tree.stop)}, {self._tree(tree.step)})"
        return literal(tree)


def _operand(op: Op, index: int) -> Value:
    """The operand at `index`, or a value that prints as undefined: messages show broken ops too."""
    return (
        op.operands[index]
        if 0 <= index < len(op.operands)
        else Value(OBJECT, f"operand {index}")
    )


def literal(item: Any) -> str:
    """One literal as text."""
    if isinstance(item, str):
        return json.dumps(item)
    if isinstance(item, Token):
        return item.text
    if isinstance(item, Mode):
        return _mode(item)
    if isinstance(item, RegionRef):
        return f"<{item.index}>"
    if isinstance(item, complex):
        return f"complex({literal(item.real)}, {literal(item.imag)})"
    if isinstance(item, float) and not math.isfinite(item):
        return "nan" if math.isnan(item) else ("inf" if item > 0 else "-inf")
    return "..." if item is ... else repr(item)


def _mode(item: Mode) -> str:
    parts = (
        []
        if item.is_flag and not item.others
        else [literal(item.training), literal(item.evaluating)]
    )
    return (
        f"mode({', '.join([str(item.captured), *parts, *map(literal, item.others)])})"
    )


def target_text(target: Target) -> str:
    """A target as it is printed: dotted, with quotes around parts that are no plain words."""
    if target.kind is Kind.MODULE and not _PLAIN_FQN.match(target.name):
        return f"module.{json.dumps(target.name)}"
    return str(target)


def scope_text(scope: Scope) -> str:
    """A scope as printed: calls separated by `/`, a second call of a module marked `~1`."""
    parts = []
    for frame in scope:
        name = frame.name if _PLAIN_FQN.match(frame.name) else json.dumps(frame.name)
        parts.append(name + (f"~{frame.call}" if frame.call else ""))
    return "/".join(parts)


def line_of(program: Program, op: Op) -> str:
    """One op of the program as it is printed, for messages."""
    return Printer(program).op_line(op)


def line_printer(program: Program) -> Callable[[Op], str]:
    """A function that gives any op of the program as it is printed. The names are made once for all ops."""
    return Printer(program).op_line
