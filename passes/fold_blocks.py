"""Equal calls of modules become calls of one function, and back.

A folded program says the same in fewer lines: it is for people, the verifier and the interpreter. Passes and
stages take the long form, which `unfold` gives back.

Runs of ops in one call of a module are compared as text, with numbers for names: what they read is the
function's inputs, what others read of them its outputs. The outermost modules are tried first, then those in
the modules that are left, then those in the functions. So each op is printed once for each module around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from stagecut.ir.aliases import Aliases
from stagecut.ir.counted import Count, base_of, next_version, values_of
from stagecut.ir.graph import (
    CALL,
    KINDS,
    Block,
    Context,
    Effects,
    Frame,
    Function,
    Namer,
    Op,
    Place,
    Program,
    StateEntry,
    Value,
    function_of,
    scope_fqn,
)
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import shape, text, value_names

LEAST_CALLS = 3
"""So many equal calls are worth a function."""
LEAST_OPS = 4
"""So many ops are."""


def fold_blocks(program: Program) -> None:
    """Calls of modules that do the same, LEAST_CALLS or more of them, are calls of one function. `program` is
    as it was in all else: its values, state, stages and transfers.

    A call that writes what it is given, or its state, stays as it is, and so does one with a value inside
    whose name `unfold` would not find. So does a `differentiated` program, whose blocks save values for their
    backward.
    """
    if program.phase == "differentiated":
        return
    namer = Namer(KINDS)
    homes: list[Block] = [program, *program.stages]
    order = _order(program.state)
    odd = _oddly_named(program)
    while homes:
        functions = _fold(homes, order, namer, odd)
        for function in functions:
            order |= _order(function.state)
        homes = [*functions]


def _order(state: list[StateEntry]) -> dict[StateEntry, int]:
    """The place of each entry."""
    return {entry: place for place, entry in enumerate(state)}


def _oddly_named(program: Program) -> set[Value]:
    """The values whose names do not count on from those before them."""
    names = {value: name[1:] for value, name in value_names(program).items()}
    count = Count(names[value] for value in program.inputs)
    odd: set[Value] = set()
    for value in values_of(program.all_ops()):
        name = names[value]
        if name != count.expected(value, name):
            odd.add(value)
        count.seen(value, name)
    return odd


def folded_text(program: Program) -> str:
    """The text of a program in which equal blocks are functions. `program` stays as it is."""
    copy = parse(text(program))
    fold_blocks(copy)
    return text(copy)


@dataclass(frozen=True, slots=True)
class _Run:
    """The ops of one call of a module in a block: `depth` calls of modules are around them there."""

    home: Block
    ops: list[Op]
    depth: int

    def inner(self) -> Iterator[_Run]:
        """The calls of modules among the ops."""
        depth = self.depth
        for frame, ops in groupby(self.ops, lambda op: _frame(op, depth)):
            if frame is not None:
                yield _Run(self.home, [*ops], depth + 1)


def _frame(op: Op, depth: int) -> Frame | None:
    return op.scope[depth] if len(op.scope) > depth else None


@dataclass(frozen=True, slots=True)
class _Call:
    """A run as a call of a function of its own."""

    run: _Run
    function: Function
    operands: list[Value]
    state: list[StateEntry]
    results: list[Value]
    effects: Effects
    contexts: tuple[Context, ...]
    shape: tuple[str, ...]


def _fold(
    homes: list[Block], order: dict[StateEntry, int], namer: Namer, odd: set[Value]
) -> list[Function]:
    """Folds what is equal in these blocks; returns the functions that it made."""
    made: dict[tuple[str, ...], Function] = {}
    runs: list[_Run] = []
    for home in homes:
        whole = _Run(home, home.ops, 0)
        runs.extend(whole.inner())
    while runs:
        chosen = _repeated(runs, order, odd)
        for call in chosen:
            if call.shape in made:
                continue
            name = _name(call.run)
            call.function.name = namer(name, "block")
            made[call.shape] = call.function
        _replace(chosen, made)
        folded = {call.run.ops[0] for call in chosen}
        rest = [run for run in runs if run.ops[0] not in folded]
        runs = []
        for run in rest:
            runs.extend(run.inner())
    return [*made.values()]


def _repeated(
    runs: list[_Run], order: dict[StateEntry, int], odd: set[Value]
) -> list[_Call]:
    """The runs that are worth a function, as calls."""
    calls: list[_Call] = []
    for run in runs:
        call = _as_call(run, order, odd)
        if call is not None:
            calls.append(call)
    count = Counter(call.shape for call in calls)
    return [call for call in calls if count[call.shape] >= LEAST_CALLS]


def _name(run: _Run) -> str:
    """The last part of the module's path that is no number."""
    parts = _path(run).split(".")
    words = [part for part in parts if not part.isdecimal()]
    if not words:
        return ""
    return words[-1]


def _as_call(run: _Run, order: dict[StateEntry, int], odd: set[Value]) -> _Call | None:
    """A run as a call; None for one that no call can stand for."""
    ops = run.ops
    if len(ops) < LEAST_OPS:
        return None
    mine = set(ops)
    path = _path(run)
    names: dict[Value, str] = {}
    state: list[StateEntry] = []
    operands: list[Value] = []
    results: list[Value] = []
    for value in _live_ins(ops, mine):
        entry = value.owner
        name = _below(value, path)
        if name and isinstance(entry, StateEntry):
            names[value] = name
            state.append(entry)
        else:
            operands.append(value)
    state.sort(key=order.__getitem__)
    for op in ops:
        for value in op.definitions():
            if not mine.issuperset(value.uses):
                results.append(value)
    live = {*operands, *names}
    effects = _effects(ops, operands, results, live)
    if effects is None or not results:
        return None
    if odd.intersection(values_of(ops)).difference(results):
        return None
    contexts = _common([op.context for op in ops])
    depth = len(contexts)
    function = _function(run, operands, state, names, results, depth)
    hints = [value.hint for value in values_of(function.ops)]
    alike = (shape(function), *hints)
    return _Call(run, function, operands, state, results, effects, contexts, alike)


def _live_ins(ops: list[Op], mine: set[Op]) -> list[Value]:
    """The values that ops read and do not define, in the order in which they are read."""
    live: dict[Value, None] = {}
    for op in ops:
        for value in op.reads:
            if value.owner not in mine:
                live[value] = None
    return [*live]


def _path(run: _Run) -> str:
    """The path of the module that is called."""
    scope = run.ops[0].scope
    return scope_fqn(scope[: run.depth])


def _below(value: Value, path: str) -> str:
    """The name of a state entry below a module; '' for values, and for state of other modules."""
    entry = value.owner
    if not isinstance(entry, StateEntry):
        return ""
    names = (name for name in entry.names if name.startswith(f"{path}."))
    return next((name.removeprefix(f"{path}.") for name in names), "")


def _effects(
    ops: list[Op], operands: list[Value], results: list[Value], live: set[Value]
) -> Effects | None:
    """The effects of a call of these ops. None where they write what they did not make, or where results
    share storage with each other or with state: a call cannot say that.
    """
    aliases = Aliases(ops, roots=live)
    if not aliases.written.isdisjoint(live):
        return None
    for op in ops:
        if not live.isdisjoint(op.versions):
            return None
    roots = [aliases.root(value) for value in results]
    shown = live.intersection(roots)
    if len(set(roots)) < len(roots) or not shown.issubset(operands):
        return None
    views: tuple[Value | None, ...] = ()
    if shown:
        views = tuple(root if root in shown else None for root in roots)
    random = any(op.effects.random for op in ops)
    effect = any(op.effects.effect for op in ops)
    return Effects((), views, random, effect)


def _common(contexts: list[tuple[Context, ...]]) -> tuple[Context, ...]:
    """The contexts that all begin with."""
    first = contexts[0]
    length = min(map(len, contexts))
    while any(other[:length] != first[:length] for other in contexts):
        length -= 1
    return first[:length]


def _function(
    run: _Run,
    operands: list[Value],
    state: list[StateEntry],
    names: dict[Value, str],
    results: list[Value],
    contexts: int,
) -> Function:
    """A function that does what the run does. Its ops have places below the call's."""
    swap: dict[Value, Value] = {}
    inputs: list[Value] = []
    for value in operands:
        twin = Value(value.type, base_of(value.hint))
        swap[value] = twin
        inputs.append(twin)
    declared: list[StateEntry] = []
    for entry in state:
        name = names[entry.value]
        own = -1 - len(declared)
        transient = frozenset((name,) if entry.transient else ())
        below = StateEntry((name,), entry.kind, entry.type, transient, own, own)
        swap[entry.value] = below.value
        declared.append(below)
    ops: list[Op] = []
    for op in run.ops:
        copy = op.elsewhere(swap)
        copy.origin = None
        scope = op.scope[run.depth :]
        context = op.context[contexts:]
        copy.place = Place(scope, context, op.loc)
        ops.append(copy)
    for value in values_of(ops):
        old = value.version_of
        value.hint = base_of(value.hint) if old is None else next_version(old.hint)
    outputs = tuple(swap[value] for value in results)
    tree = outputs[0] if len(outputs) == 1 else outputs
    return Function("", inputs, ops, tree, declared)


def _replace(calls: list[_Call], made: dict[tuple[str, ...], Function]) -> None:
    """Calls stand where their ops stood."""
    begins: dict[Op, Op] = {}
    gone: set[Op] = set()
    homes: dict[Block, None] = {}
    for call in calls:
        ops = call.run.ops
        first = ops[0]
        function = made[call.shape]
        state = [entry.value for entry in call.state]
        op = Op(CALL, (call.operands, state), regions=(function,))
        op.effects = call.effects
        scope = first.scope[: call.run.depth]
        op.place = Place(scope, call.contexts)
        for value in call.results:
            _give(value, op)
        for old in ops:
            old.drop()
        gone.update(ops)
        begins[first] = op
        homes[call.run.home] = None
    for home in homes:
        kept: list[Op] = []
        for op in home.ops:
            if op in begins:
                kept.append(begins[op])
            elif op not in gone:
                kept.append(op)
        home.ops = kept


def _give(value: Value, op: Op) -> None:
    """The value is the next result of an op."""
    value.owner, value.index, value.version_of = op, len(op.results), None
    op.results.append(value)


def unfold(program: Program) -> None:
    """Each call of a function is the ops of the function again. Values that the calls did not return have
    names that count on from those before them, as they had when the program was folded; all others keep their
    names.
    """
    before = {*program.inputs, *values_of(program.all_ops())}
    taken = {value.hint for value in before}
    for home in (program, *program.stages):
        home.ops = [inner for op in home.ops for inner in _unfolded(op)]
    count = Count(value.hint for value in program.inputs)
    for value in values_of(program.all_ops()):
        if value in before:
            count.seen(value, value.hint)
        else:
            value.hint = count.name(value, value.hint, taken)


def _unfolded(call: Op) -> Iterator[Op]:
    function = function_of(call)
    if function is None:
        yield call
        return
    operands, state = call.args
    given = [*operands, *state]
    swap = dict(zip(function.sees, given, strict=True))
    outputs = function.output.operands
    returned = dict(zip(outputs, call.results, strict=True))
    for op in function.ops:
        twin = op.elsewhere(swap)
        twin.origin = None
        scope = call.scope + op.scope
        context = call.context + op.context
        twin.place = Place(scope, context, op.loc)
        for value in op.definitions():
            result = returned.get(value)
            if result is None:
                continue
            _take(result, swap[value], twin)
            swap[value] = result
        yield from _unfolded(twin)
    call.results = []
    call.drop()


def _take(value: Value, place: Value, op: Op) -> None:
    """The value stands where `place` stood among the definitions of an op."""
    value.owner, value.index, value.version_of = op, place.index, place.version_of
    if place.version_of is None:
        op.results[place.index] = value
    else:
        op.versions[place.version_of] = value
