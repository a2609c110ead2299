"""Translation validation: the staged program is still the traced one.

A splitter only drops, moves, copies and renames. So the trace is recorded before the passes run, and
afterwards every op is traced back: operand by operand to the same definitions, write by write in the same
order, name by name to the same state. Shares no code with the passes. Linear in the size of the program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from stagecut.ir.errors import VerifyError
from stagecut.ir.graph import Op, Program, StateEntry, Value, transform
from stagecut.ir.ops import facts
from stagecut.ir.types import TensorType, Type

Key = tuple[str, int, int]
"""The origin of a value: ('input', position, 0), ('state', tensor, 0) or ('op', position, result)."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    position: int
    target: str
    args: Any
    kwargs: Any
    types: tuple[Type, ...]
    writes: tuple[Key, ...]
    views: tuple[Key | None, ...]
    marks: tuple[Any, ...]
    needed: bool


def _marks(op: Op) -> tuple[Any, ...]:
    """The parts of an op that name no values, besides its target."""
    return op.context, op.effects.random, op.effects.effect, op.form, op.scope


def _writes(op: Op, keys: dict[Value, Key]) -> tuple[Key, ...]:
    """The written tensors, each once: two names of one tensor have one key."""
    written: dict[Key, None] = {}
    for value in op.effects.writes:
        if value in keys:
            written[keys[value]] = None
    return tuple(written)


def _views(op: Op, keys: dict[Value, Key]) -> tuple[Key | None, ...]:
    views: list[Key | None] = []
    for value in op.effects.views:
        if value is None:
            views.append(None)
        else:
            views.append(keys.get(value))
    return tuple(views)


class Trace:
    """A record of a traced program, made before any pass touches it."""

    def __init__(self, program: Program) -> None:
        self.inputs = list(program.inputs)
        self.keys: dict[Value, Key] = {}
        for position, value in enumerate(self.inputs):
            self.keys[value] = ("input", position, 0)
        self.keys |= _state_keys(program)
        self.names = _model_names(program)
        self.storage: dict[Key, Key] = {}
        self._place_state(program)
        ops = list(program.all_ops())
        for position, op in enumerate(ops):
            result_keys = _result_keys(op, position, self.keys)
            self.keys.update(result_keys)
            self._place_results(op)
        needed = _needed(ops, program.output)
        self.ops: dict[Op, _Recorded] = {}
        self.written: set[Key] = set()
        for position, op in enumerate(ops):
            recorded = self._record(op, position, op in needed)
            self.ops[op] = recorded
            for key in recorded.writes:
                home = self.storage.get(key, key)
                self.written.add(home)
        self.outputs = [self._leaf(leaf) for leaf in program.outputs]

    def _place_state(self, program: Program) -> None:
        homes: dict[int, Key] = {}
        for entry in program.state:
            key = self.keys[entry.value]
            home = homes.setdefault(entry.storage, key)
            self.storage.setdefault(key, home)

    def _place_results(self, op: Op) -> None:
        for result, viewed in zip(op.results, op.effects.views, strict=False):
            if viewed is None:
                continue
            key = self.keys[result]
            base = self.keys[viewed]
            self.storage[key] = self.storage.get(base, base)

    def _record(self, op: Op, position: int, needed: bool) -> _Recorded:
        args = transform(op.args, self._leaf)
        kwargs = transform(op.kwargs, self._leaf)
        return _Recorded(
            position,
            op.target,
            args,
            kwargs,
            _result_types(op),
            _writes(op, self.keys),
            _views(op, self.keys),
            _marks(op),
            needed,
        )

    def _leaf(self, leaf: Any) -> Any:
        if type(leaf) is not Value:
            return leaf
        return self.keys[leaf]


def _state_keys(program: Program) -> dict[Value, Key]:
    keys: dict[Value, Key] = {}
    for entry in program.state:
        keys[entry.value] = ("state", entry.tensor, 0)
    return keys


def _model_names(program: Program) -> dict[str, int]:
    """Name of the model's state -> the tensor that it names. The tracer's constants are not the model's."""
    names: dict[str, int] = {}
    for entry in program.state:
        if entry.kind != "const":
            names |= dict.fromkeys(entry.names, entry.tensor)
    return names


def _without_grad(value_type: Type) -> Type:
    if isinstance(value_type, TensorType) and value_type.grad:
        return replace(value_type, grad=False)
    return value_type


def _result_types(op: Op) -> tuple[Type, ...]:
    return tuple(_without_grad(result.type) for result in op.results)


def _result_keys(
    op: Op, position: int, keys: dict[Value, Key]
) -> Iterator[tuple[Value, Key]]:
    """The key of each result: an in-place op returns the very tensor it wrote."""
    for index, result in enumerate(op.results):
        viewed = op.effects.viewed_by(index)
        key: Key = ("op", position, index)
        if viewed is not None and viewed in op.effects.writes:
            key = keys.get(viewed, key)
        yield result, key


def _needed(ops: list[Op], output: Op) -> set[Op]:
    """Ops that must run: those with an effect, and all that the output or a needed op reads."""
    needed: set[Op] = set()
    read = set(output.operands)
    for op in reversed(ops):
        if _acts(op) or not read.isdisjoint(op.results):
            needed.add(op)
            read.update(op.operands)
    return needed


def _acts(op: Op) -> bool:
    """True for an op that must run even when nothing reads its results."""
    effects = op.effects
    if facts(op).guard or op.is_split:
        return False
    return bool(effects.writes) or effects.random or effects.effect


def validate(trace: Trace, program: Program) -> None:
    """Raises VerifyError, with every difference found, unless `program` computes what `trace` recorded."""
    violations = list(_Comparison(trace, program).differences())
    if violations:
        raise VerifyError(
            violations, after="the last one (the stages differ from the trace)"
        )


class _Comparison:
    def __init__(self, trace: Trace, program: Program) -> None:
        self._trace = trace
        self._program = program
        self._keys: dict[Value, Key] = {}
        self._latest: dict[Key, set[Value]] = {}
        self._stale: dict[Key, Op] = {}
        self._members: dict[Key, list[Key]] = {}
        for key, home in trace.storage.items():
            members = self._members.setdefault(home, [])
            members.append(key)

    def differences(self) -> Iterator[str]:
        if self._program.inputs != self._trace.inputs:
            yield "the user inputs are not those of the trace, or in another order"
        self._keys = _state_keys(self._program)
        for value, key in self._trace.keys.items():
            kind, _, _ = key
            if kind == "input":
                self._keys.setdefault(value, key)
        runs: Counter[Op] = Counter()
        last = -1
        for stage in self._program.stages:
            for op in stage.ops:
                origin = op.origin or op
                recorded = self._trace.ops.get(origin)
                if recorded is None:
                    yield f"stage {stage.index} runs an op that the trace does not have: {op.where()}"
                    continue
                runs[origin] += 1
                yield from self._compare(op, recorded)
                if _may_stand_anywhere(op):
                    continue
                if recorded.position < last:
                    yield f"out of order: {op.where()} runs behind an op it stood in front of"
                last = recorded.position
        yield from self._coverage(runs)
        yield from self._results()
        yield from self._state()

    def _compare(self, op: Op, recorded: _Recorded) -> Iterator[str]:
        result_keys = _result_keys(op, recorded.position, self._keys)
        self._keys.update(result_keys)
        is_same = op.target == recorded.target
        if not is_same or _result_types(op) != recorded.types:
            yield f"another op or another result type than traced: {op.where()}"
        if not self._has_recorded_effects(op, recorded):
            yield f"another context, scope or effect than traced: {op.where()}"
        operands = (op.args, op.kwargs)
        recorded_operands = (recorded.args, recorded.kwargs)
        if not _are_recorded(operands, recorded_operands, self._keys):
            yield f"other operands than traced: {op.where()}"
        for value in op.reads:
            if self._is_outdated(value):
                yield f"{value!r} is read after a newer version was written: {op.where()}"
            writer = self._writer_beside(value)
            if writer is not None:
                yield (
                    f"{value!r} shares storage with what {writer.where()} wrote, but is read as "
                    f"if unwritten: {op.where()}"
                )
        if op.origin is not None:
            self._take_anew(op)
            yield from self._copies(op)
        self._write(op, recorded)

    def _has_recorded_effects(self, op: Op, recorded: _Recorded) -> bool:
        if _writes(op, self._keys) != recorded.writes:
            return False
        if _views(op, self._keys) != recorded.views:
            return False
        return _marks(op) == recorded.marks

    def _is_outdated(self, value: Value) -> bool:
        """True for a value that an op wrote, and that has a newer version."""
        key = self._keys.get(value)
        if key is None or key not in self._latest:
            return False
        return value not in self._latest[key]

    def _writer_beside(self, value: Value) -> Op | None:
        """The op that wrote what shares storage with a value, which has no newer version."""
        key = self._keys.get(value)
        if key is None:
            return None
        return self._stale.get(key)

    def _take_anew(self, op: Op) -> None:
        """A view of the newest version is the newest version of that view."""
        for result, viewed in zip(op.results, op.effects.views, strict=False):
            if viewed is None:
                continue
            key = self._keys[result]
            if self._stale.pop(key, None) is not None:
                self._latest[key] = {result}
            elif key in self._latest:
                self._latest[key].add(result)

    def _copies(self, op: Op) -> Iterator[str]:
        """A copy of an op makes tensors of its own, so no op may write them."""
        for index, result in enumerate(op.results):
            if op.effects.viewed_by(index) is not None:
                continue
            key = self._keys[result]
            if self._home(key) in self._trace.written:
                yield f"{result!r} is made anew, although what shares its storage is written: {op.where()}"

    def _home(self, key: Key) -> Key:
        """The tensor that has the storage of another."""
        return self._trace.storage.get(key, key)

    def _write(self, op: Op, recorded: _Recorded) -> None:
        newest: dict[Key, set[Value]] = {}
        for key in recorded.writes:
            newest[key] = set()
        for result in op.results:
            key = self._keys[result]
            if key in newest:
                newest[key].add(result)
        for old, new in op.versions.items():
            if old not in self._keys:
                continue
            key = self._keys[old]
            self._keys[new] = key
            versions = newest.setdefault(key, set())
            versions.add(new)
        self._latest |= newest
        for key in recorded.writes:
            for member in self._sharing(key) - newest.keys():
                kind, position, _ = member
                if kind != "op" or position < recorded.position:
                    self._stale[member] = op

    def _sharing(self, key: Key) -> set[Key]:
        """All tensors in the storage of one."""
        home = self._home(key)
        members = self._members.get(home, ())
        return {key, home, *members}

    def _coverage(self, runs: Counter[Op]) -> Iterator[str]:
        for op, recorded in self._trace.ops.items():
            if recorded.needed and not runs[op]:
                yield f"lost: {op.where()}"
            if runs[op] > 1 and op.has_effect:
                yield f"runs {runs[op]} times although it has an effect: {op.where()}"

    def _results(self) -> Iterator[str]:
        returned: list[Any] = []
        for leaf in self._program.outputs:
            if type(leaf) is Value:
                leaf = self._keys.get(leaf)
            returned.append(leaf)
        if not _same_literals(returned, self._trace.outputs):
            yield "the program returns other values than traced, or in another order"
        for value in self._program.output.operands:
            if self._is_outdated(value):
                yield f"{value!r} is returned after a newer version was written"
            writer = self._writer_beside(value)
            if writer is not None:
                yield (
                    f"{value!r} shares storage with what {writer.where()} wrote, but is returned "
                    "as if unwritten"
                )

    def _state(self) -> Iterator[str]:
        names = _model_names(self._program)
        traced = self._trace.names
        if names != traced:
            differing = sorted(names.keys() ^ traced.keys())
            yield f"state names differ from the model's: {differing or 'ties differ'}"
        state = self._program.state
        for stage in self._program.stages:
            for entry in stage.state:
                if not isinstance(entry, StateEntry) or entry not in state:
                    yield f"stage {stage.index} holds state the program does not have"


def _may_stand_anywhere(op: Op) -> bool:
    """True for a copy or an op without operands, as long as it has no effect."""
    if op.has_effect:
        return False
    return op.origin is not None or not op.operands


def _are_recorded(tree: Any, recorded: Any, keys: dict[Value, Key]) -> bool:
    """True for operands that are the recorded ones: the same values by origin, the same literals."""
    if type(tree) is Value:
        if type(recorded) is not tuple:
            return False
        return keys.get(tree) == recorded
    if isinstance(tree, (tuple, list)):
        if type(tree) is not type(recorded):
            return False
        if len(tree) != len(recorded):
            return False
        pairs = zip(tree, recorded, strict=True)
        return all(_are_recorded(part, other, keys) for part, other in pairs)
    if isinstance(tree, dict):
        if not isinstance(recorded, dict):
            return False
        if tree.keys() != recorded.keys():
            return False
        return all(_are_recorded(tree[key], recorded[key], keys) for key in tree)
    if isinstance(tree, slice):
        if not isinstance(recorded, slice):
            return False
        bounds = (tree.start, tree.stop, tree.step)
        recorded_bounds = (recorded.start, recorded.stop, recorded.step)
        return _are_recorded(bounds, recorded_bounds, keys)
    return _same_literal(tree, recorded)


def _same_literals(left: list[Any], right: list[Any]) -> bool:
    """True for equal literals, where 1 is not True and nan is nan."""
    if len(left) != len(right):
        return False
    return all(map(_same_literal, left, right))


def _same_literal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    return one == other or repr(one) == repr(other)
