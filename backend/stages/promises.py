"""Promises of the user's own code that other stages rely on: what, by the trace, it does not write or return.

A module kept whole was seen to run once. In another call it may take another branch: it may write an
argument, or return a part of it. A reader of that memory in the same stage sees this, as in the model.
Another stage has a copy and does not see it, so the stage has to notice.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stagecut.ir.aliases import Aliases
from stagecut.ir.graph import Op, Program, StateEntry, Value
from stagecut.ir.ops import module_path, state_of
from stagecut.ir.run.bindings import Bindings, is_torchs
from stagecut.ir.types import TensorType


@dataclass(frozen=True)
class Promise:
    """The arguments that a call must not write, and those of which it must not return a part, by name.

    Each of the latter stands with the places, among the returned tensors, of those that must share no memory
    with it.
    """

    unwritten: dict[str, Value] = field(default_factory=dict)
    apart: dict[str, tuple[Value, list[int]]] = field(default_factory=dict)


NOTHING = Promise()


class Promises:
    """Limits on what the calls of the user's code in a program may do."""

    def __init__(self, program: Program, bindings: Bindings) -> None:
        self._program, self._bindings = program, bindings

    def of(self, op: Op) -> Promise:
        """The promise of `op`, a call of the user's code. Torch's own modules promise nothing: they do in
        each call what they did in the trace.
        """
        if len(self._program.stages) < 2:
            return NOTHING
        path = module_path(op)
        owner = self._bindings.functions.get(op.target)
        if path:
            owner = self._bindings.modules.get(path)
        if path and owner is not None and is_torchs(owner):
            return NOTHING
        arguments = {
            name: value
            for name, value in _arguments(op, owner)
            if isinstance(value.type, TensorType)
        }
        root = self._memory.root
        # a write shows in all views of it
        written = set(map(root, op.effects.writes))
        unwritten = {
            name: value
            for name, value in arguments.items()
            if root(value) not in written and self._memory.is_shared(value)
        }
        apart: dict[str, tuple[Value, list[int]]] = {}
        for name, value in arguments.items():
            places = self._apart(op, value)
            if places:
                apart[name] = (value, places)
        return Promise(unwritten, apart)

    def _apart(self, op: Op, value: Value) -> list[int]:
        """The places of the returned tensors that are no parts of `value` in the trace, and must be none in a
        call.
        """
        views = op.effects.views or (None,) * len(op.results)
        tensors = [
            (result, viewed)
            for result, viewed in zip(op.results, views, strict=True)
            if isinstance(result.type, TensorType)
        ]
        return [
            place
            for place, (result, viewed) in enumerate(tensors)
            if viewed is not value and self._memory.must_not_meet(value, result)
        ]

    @cached_property
    def _memory(self) -> _Memory:
        return _Memory(self._program)


def _arguments(op: Op, owner: Any) -> Iterator[tuple[str, Value]]:
    """The values given to the user's code with their names: from its signature, else by place. The values
    that a module holds come last.
    """
    args, kwargs, state = op.args if module_path(op) else (op.args, op.kwargs, ())
    names = _parameters(owner)
    for place, operand in enumerate(args):
        name = f"'{names[place]}'" if place < len(names) else f"{place}"
        yield from _leaves(operand, f"argument {name}")
    for name, operand in kwargs.items():
        yield from _leaves(operand, f"argument '{name}'")
    for value in state:
        entry = value.owner
        name = f"'{entry.name}'" if isinstance(entry, StateEntry) else "state"
        yield from _leaves(value, f"its own {name}")


def _parameters(owner: Any) -> list[str]:
    """The names of the parameters of the user's code in order, as far as it names them."""
    try:
        signature = inspect.signature(getattr(owner, "forward", owner))
    except (TypeError, ValueError):
        return []
    return [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Value]]:
    if isinstance(tree, Value):
        yield name, tree
    elif isinstance(tree, (tuple, list)):
        for place, part in enumerate(tree):
            yield from _leaves(part, f"{name}[{place}]")
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from _leaves(part, f"{name}[{key!r}]")


class _Memory:
    """The values that share memory, the stages that have that memory, and whether it is written."""

    def __init__(self, program: Program) -> None:
        self._aliases = Aliases(program.all_ops(), program.state)
        self._stages: dict[Value, set[int]] = {}
        self._written: set[Value] = set()
        for entry in program.state:
            self._stages.setdefault(self.root(entry.value), set()).update(entry.stages)
        for stage in program.stages:
            for op in stage.ops:
                self._add(op, stage.index)
            last = stage is program.stages[-1]
            for value in (*stage.inputs, *stage.outputs):
                self._use(value, stage.index)
            for value in () if last else stage.outputs:
                self._use(value, stage.index + 1)

    def root(self, value: Value) -> Value:
        """The first value in the memory of `value`. A recomputed value counts as the value that it is a copy
        of.
        """
        root = self._aliases.root(value)
        origin = root.owner.origin if isinstance(root.owner, Op) else None
        return (
            root if origin is None else self._aliases.root(origin.results[root.index])
        )

    def is_shared(self, value: Value) -> bool:
        """True where more than one stage has that memory, or a copy of it."""
        return len(self._stages.get(self.root(value), ())) > 1

    def must_not_meet(self, value: Value, other: Value) -> bool:
        """True where another stage would see that the two values share memory: they do not in the trace, one
        of them is written, and one is in another stage too.
        """
        roots = {self.root(value), self.root(other)}
        return (
            len(roots) > 1
            and bool(roots & self._written)
            and (self.is_shared(value) or self.is_shared(other))
        )

    def _use(self, value: Value, stage: int) -> None:
        self._stages.setdefault(self.root(value), set()).add(stage)

    def _add(self, op: Op, stage: int) -> None:
        own = set(state_of(op))  # only known that it may be written
        self._written.update(
            self.root(value) for value in op.effects.writes if value not in own
        )
        for value in (*op.operands, *op.results):
            self._use(value, stage)
