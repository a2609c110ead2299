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
from stagecut.ir.text.printer import shape, text

LEAST_CALLS = 3
"""So many equal calls are worth a function."""
LEAST_OPS = 4
"""So many ops are."""


def fold_blocks(program: Program) -> None:
    """Calls of modules that do the same, LEAST_CALLS or more of them, are calls of one function. `program` is
    as it was in all else: its values, state, stages and transfers.

    A call that writes what it is given, or its state, stays as it is. So does a `differentiated` program,
    whose blocks save values for their backward.
    """
    if program.phase == "differentiated":
        return
    namer = Namer(KINDS)
    homes: list[Block] = [program, *program.stages]
    order = {entry: place for place, entry in enumerate(program.state)}
    while homes:
        homes = _fold(homes, order, namer)
        for function in homes:
            if isinstance(function, Function):
                order |= {entry: place for place, entry in enumerate(function.state)}


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
    shape: str


def _fold(
    homes: list[Block], order: dict[StateEntry, int], namer: Namer
) -> list[Block]:
    """Folds what is equal in these blocks; returns the functions that it made."""
    made: dict[str, Function] = {}
    runs = [run for home in homes for run in _Run(home, home.ops, 0).inner()]
    while runs:
        calls = [call for run in runs if (call := _as_call(run, order)) is not None]
        count = Counter(call.shape for call in calls)
        chosen = [call for call in calls if count[call.shape] >= LEAST_CALLS]
        for call in chosen:
            function = made.get(call.shape)
            if function is None:
                function = made[call.shape] = call.function
                function.name = namer(_name(call.run), "block")
        _replace(chosen, made)
        folded = {call.run.ops[0] for call in chosen}
        runs = [
            inner for run in runs if run.ops[0] not in folded for inner in run.inner()
        ]
    return [*made.values()]


def _name(run: _Run) -> str:
    """The last part of the module's path that is no number."""
    path = scope_fqn(run.ops[0].scope[: run.depth])
    words = [part for part in path.split(".") if not part.isdecimal()]
    return words[-1] if words else ""


def _as_call(run: _Run, order: dict[StateEntry, int]) -> _Call | None:
    """A run as a call; None for one that no call can stand for."""
    if len(run.ops) < LEAST_OPS:
        return None
    mine = set(run.ops)
    path = scope_fqn(run.ops[0].scope[: run.depth])
    read = dict.fromkeys(value for op in run.ops for value in op.reads)
    live = [value for value in read if value.owner not in mine]
    own = {value: name for value in live if (name := _below(value, path))}
    entries = (value.owner for value in own)
    state = sorted(
        (entry for entry in entries if isinstance(entry, StateEntry)),
        key=order.__getitem__,
    )
    operands = [value for value in live if value not in own]
    results = [
        value
        for op in run.ops
        for value in op.definitions()
        if any(user not in mine for user in value.uses)
    ]
    effects = _effects(run.ops, operands, results, set(live))
    if effects is None or not results:
        return None
    contexts = _common([op.context for op in run.ops])
    function = _function(run, operands, state, own, results, len(contexts))
    text = shape(function)
    return _Call(run, function, operands, state, results, effects, contexts, text)


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
    if any(old in live for op in ops for old in op.versions):
        return None
    roots = [aliases.root(value) for value in results]
    if len(set(roots)) < len(roots) or any(
        root in live and root not in operands for root in roots
    ):
        return None
    views = tuple(root if root in live else None for root in roots)
    return Effects(
        (),
        views if any(view is not None for view in views) else (),
        any(op.effects.random for op in ops),
        any(op.effects.effect for op in ops),
    )


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
    inputs = [Value(value.type, value.hint) for value in operands]
    declared = [
        StateEntry(
            (names[entry.value],),
            entry.kind,
            entry.type,
            frozenset((names[entry.value],) if entry.transient else ()),
            -1 - number,
            -1 - number,
        )
        for number, entry in enumerate(state)
    ]
    swap = dict(zip(operands, inputs, strict=True))
    swap |= {
        entry.value: twin.value for entry, twin in zip(state, declared, strict=True)
    }
    ops: list[Op] = []
    for op in run.ops:
        twin = op.elsewhere(swap)
        twin.origin = None
        twin.place = Place(op.scope[run.depth :], op.context[contexts:], op.loc)
        ops.append(twin)
    outputs = tuple(swap[value] for value in results)
    tree = outputs[0] if len(outputs) == 1 else outputs
    return Function("", inputs, ops, tree, declared)


def _replace(calls: list[_Call], made: dict[str, Function]) -> None:
    """Calls stand where their ops stood."""
    begins: dict[Op, Op] = {}
    gone: set[Op] = set()
    for call in calls:
        ops = call.run.ops
        gone.update(ops)
        place = Place(ops[0].scope[: call.run.depth], call.contexts)
        op = Op(
            CALL,
            (call.operands, [entry.value for entry in call.state]),
            effects=call.effects,
            place=place,
            regions=(made[call.shape],),
        )
        for value in call.results:
            _give(value, op)
        for old in ops:
            old.drop()
        begins[ops[0]] = op
    for home in {call.run.home: None for call in calls}:
        home.ops = [
            begins.get(op, op) for op in home.ops if op in begins or op not in gone
        ]


def _give(value: Value, op: Op) -> None:
    """The value is the next result of an op."""
    value.owner, value.index, value.version_of = op, len(op.results), None
    op.results.append(value)


def unfold(program: Program) -> None:
    """Each call of a function is the ops of the function again. Values that the calls did not return have the
    names of the function's.
    """
    for home in (program, *program.stages):
        home.ops = [inner for op in home.ops for inner in _unfolded(op)]


def _unfolded(call: Op) -> Iterator[Op]:
    function = function_of(call)
    if function is None:
        yield call
        return
    operands, state = call.args
    swap = dict(zip(function.sees, (*operands, *state), strict=True))
    returned = dict(zip(function.output.operands, call.results, strict=True))
    for op in function.ops:
        twin = op.elsewhere(swap)
        twin.origin = None
        scope, context = (*call.scope, *op.scope), (*call.context, *op.context)
        twin.place = Place(scope, context, op.loc)
        for value in op.definitions():
            if value in returned:
                _take(returned[value], swap[value], twin)
                swap[value] = returned[value]
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
