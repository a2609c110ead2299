"""Merges two traces of one model, one in each mode, into one program that does what the model does in either
mode.

The ops of both are aligned. If an op differs in literals only, its literals follow the flag of its module. If
the ops differ, one op stands for both runs, with a region for each mode. So everything after the merge sees
one program, with the same stages and boundaries in both modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stagecut.frontend.lower.align import (
    Alignment,
    CannotFollow,
    Pair,
    Part,
    bare,
    same_literal,
)
from stagecut.ir.aliases import Aliases, storage_root
from stagecut.ir.graph import (
    BY_MODE,
    WHOLE,
    Block,
    Context,
    Effects,
    Mode,
    Namer,
    Op,
    Place,
    Program,
    RegionRef,
    Scope,
    StateEntry,
    Value,
    scope_fqn,
    transform,
)


@dataclass
class Flags:
    """The `training` flags in both traces by module path, and the modules by whose flag Python chose.
    `canonical` maps a path to the first path of its module.
    """

    ours: Mapping[str, bool]
    theirs: Mapping[str, bool]
    readers: Sequence[str]
    canonical: Mapping[str, str]

    def switch(self, path: str) -> bool:
        """True when the flag of the module differs between the traces."""
        return path in self.ours and self.ours[path] != self.theirs.get(path)

    def others(self, path: str, scopes: Iterable[str]) -> tuple[str, ...]:
        """The modules besides the one at `path` whose flags may be why ops in `scopes` differ: those by which
        Python chose around these ops, or else all by which it chose.
        """
        around = {above for scope in scopes for above in _above(scope)}
        chose = [*filter(self.switch, self.readers)]
        near = [reader for reader in chose if reader in around] or chose
        owners = {self.canonical.get(reader, reader) for reader in near}
        return tuple(sorted(owners - {self.canonical.get(path, path)}))


def _above(path: str) -> Iterator[str]:
    """A module path, and those of all modules around it."""
    yield ""
    parts = path.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


class Merge:
    """Makes one program of two. Everything that can be wrong is found before anything changes."""

    def __init__(
        self, alignment: Alignment, flags: Flags, asked: Iterable[str]
    ) -> None:
        self._both, self._flags = alignment, flags
        self._parts = alignment.parts
        self._runs = [
            [part.ours for part in self._parts],
            [part.theirs for part in self._parts],
        ]
        self._trains = 0 if flags.ours[""] else 1
        self._joined: dict[Pair, Value] = {}
        self.constants: dict[str, StateEntry] = {}
        self._namer = Namer(alignment.ours.name_owners())
        self._memory = [
            _Memory(runs, program)
            for runs, program in zip(
                self._runs, (alignment.ours, alignment.theirs), strict=True
            )
        ]
        for number, part in enumerate(self._parts):
            if part.shared:
                self._check_flag(part)
            else:
                self._check_way(number, part, [*asked])
                self._check_memory(number, part)

    # --- checks -----------------------------------------------------------------------------------

    def _check_flag(self, part: Part) -> None:
        op = part.ours[0]
        path = scope_fqn(op.scope)
        if not self._flags.switch(path) and any(
            _differ(pair) for pair in self._both.pairs(op, part.theirs[0]) or ()
        ):
            raise CannotFollow(
                f"what '{path}' does changes with the mode of others, while its own flag stays, {op.where()}"
            )

    def _check_way(self, number: int, part: Part, asked: list[str]) -> None:
        if any(op.is_split for op in part.ops):
            raise CannotFollow("it goes another way there across a split point")
        for path in asked:
            inside = [
                f"{scope_fqn(op.scope)}.".startswith(f"{path}.") for op in part.ops
            ]
            if any(inside) and not all(inside):
                raise CannotFollow(
                    f"it goes another way there across a split point, at module '{path}'"
                )
        around = {*self._context(number)}
        for runs in self._runs:
            transforms = _transforms(runs[number]) - around
            elsewhere = [*runs[:number], *runs[number + 1 :]]
            if transforms and any(transforms & _transforms(run) for run in elsewhere):
                raise CannotFollow("it goes another way there inside a vmap")

    def _check_memory(self, number: int, part: Part) -> None:
        """Raises CannotFollow where a tensor that is written after a run shares memory with another one in
        only one of the two modes, and is read there.
        """
        seen: tuple[set[Value], set[Value]] = (set(), set())
        aliases = self._aliases(number)
        for pair in part.joins:
            if self._viewed(number, aliases, pair) is not None:
                continue
            roots = [own.root(value) for own, value in zip(aliases, pair, strict=True)]
            outside = [
                side
                for side, root in enumerate(roots)
                if root.owner not in self._runs[side][number]
            ]
            shared = len(outside) == 2 or any(
                root in roots_seen for root, roots_seen in zip(roots, seen, strict=True)
            )
            written = any(
                memory.is_written_behind(root, number)
                for memory, root in zip(self._memory, roots, strict=True)
            )
            if written and (
                shared
                or (outside and self._is_read(number, roots[outside[0]], outside[0]))
            ):
                raise CannotFollow(
                    "what is written shares memory with another tensor in one of the two modes only, "
                    f"{_where(part)}"
                )
            for root, roots_seen in zip(roots, seen, strict=True):
                roots_seen.add(root)

    def _is_read(self, number: int, value: Value, side: int) -> bool:
        """True when a value from before a run, which the run returns in one mode only, is read after the run
        by its own name.
        """
        ours = self._ours(value) if side else value
        theirs = value if side else self._theirs(value)
        if theirs is None or not isinstance(storage_root(ours).owner, Op):
            return True
        names = (ours, theirs)
        later = [
            place
            for place, part in enumerate(self._parts)
            if place > number and not part.shared
        ]
        return self._memory[1 - side].is_read_behind(
            names[1 - side], number
        ) or self._memory[side].is_read_in(names[side], later)

    def _theirs(self, value: Value) -> Value | None:
        """The first value of theirs for which one of ours stands; None for none."""
        for theirs, ours in self._both.partner.items():
            if ours is value:
                return theirs
        return None

    # --- the merged program -----------------------------------------------------------------------

    def run(self) -> None:
        """Our program does what the model does in either mode; theirs is used up."""
        ours, theirs = self._both.ours, self._both.theirs
        ops = [
            self._shared(number, part) if part.shared else self._by_mode(number, part)
            for number, part in enumerate(self._parts)
            if part.ops or part.joins
        ]
        pairs = zip(ours.outputs, theirs.outputs, strict=True)
        ours.set_outputs([self._output(pair) for pair in pairs])
        ours.ops = ops
        ours.state += self.constants.values()
        for part in self._parts:
            for op in part.theirs if part.shared else ():
                op.drop()
        theirs.output.drop()

    def _output(self, pair: tuple[Any, Any]) -> Any:
        """The value that stands for a pair of outputs. A literal is the same in both."""
        ours = pair[0]
        return self._joined.get(pair, ours) if isinstance(ours, Value) else ours

    def _shared(self, number: int, part: Part) -> Op:
        our_op, their_op = part.ours[0], part.theirs[0]
        pairs = self._both.pairs(our_op, their_op)
        assert pairs is not None
        operands = iter([self._leaf(pair, our_op) for pair in pairs])
        alike = (
            len(our_op.args) == len(their_op.args)
            and our_op.kwargs.keys() == their_op.kwargs.keys()
        )
        joined: dict[Value, Value] = {}
        partner: dict[Value, Value] = {}
        for ours, theirs in pairs:
            if isinstance(ours, Value):
                joined.setdefault(ours, self._leaf((ours, theirs), our_op))
                partner.setdefault(theirs, ours)
        args, kwargs = transform(
            (our_op.args, our_op.kwargs)
            if alike
            else self._both.filled(our_op, their_op),
            lambda _: next(operands),
        )
        our_effects, their_effects = our_op.effects, their_op.effects
        writes = (
            *our_effects.writes,
            *(partner[value] for value in their_effects.writes),
        )
        our_op.effects = replace(
            our_effects,
            writes=tuple(dict.fromkeys(writes)),
            random=our_effects.random or their_effects.random,
            effect=our_effects.effect or their_effects.effect,
        ).substitute(joined)
        our_op.set_operands(args, kwargs)
        context = (our_op, their_op)[self._trains].context
        our_op.place = our_op.place._replace(context=context)
        return our_op

    def _leaf(self, pair: tuple[Any, Any], op: Op) -> Any:
        """The operand that stands for a pair of operands: the value that both are, or a literal that follows
        the flag.
        """
        ours, theirs = pair
        if isinstance(ours, Value):
            return self._joined.get((ours, theirs), ours)
        if not _differ(pair):
            return ours
        path = scope_fqn(op.scope)
        flag = self._flags.ours[path]
        literals = (_captured(ours), _captured(theirs))
        training, evaluating = literals if flag else reversed(literals)
        return Mode(flag, training, evaluating, self._flags.others(path, [path]))

    def _by_mode(self, number: int, part: Part) -> Op:
        """The op that stands for a run of ours and one of theirs."""
        scope = self._scope(part)
        path = scope_fqn(scope)
        readers = [op for op in part.joins.values() if op is not None]
        flag = Mode(
            self._flags.ours[path],
            others=self._flags.others(
                path, [scope_fqn(op.scope) for op in (*part.ops, *readers)]
            ),
        )
        operands = self._operands(number, part)
        effects = self._effects(number, part)
        loc = next((op.loc for op in (*part.ops, *readers) if op.loc), None)
        regions = [
            self._region(number, part, operands, side)
            for side in ((0, 1) if self._trains == 0 else (1, 0))
        ]
        op = Op(
            BY_MODE,
            (flag, RegionRef(0), RegionRef(1), operands),
            effects=effects,
            place=Place(scope, self._context(number), loc),
            regions=(*regions,),
        )
        for pair in part.joins:
            self._joined[pair] = op.add_result(bare(pair[0].type), pair[0].hint)
        return op

    def _region(
        self, number: int, part: Part, operands: list[Value], side: int
    ) -> Block:
        inputs = {value: Value(value.type, value.hint) for value in operands}
        run = self._runs[side][number]
        swap = {
            value: inputs[self._ours(value) if side else value]
            for value in self._outer(number, part, side)
        }
        for op in run:
            op.substitute(swap)
            context = tuple(mark for mark in op.context if mark.kind not in WHOLE)
            op.place = op.place._replace(context=context)
        yielded = tuple(swap.get(pair[side], pair[side]) for pair in part.joins)
        return Block(
            _NAMES[side != self._trains],
            inputs.values(),
            run,
            yielded[0] if len(yielded) == 1 else yielded,
        )

    def _outer(self, number: int, part: Part, side: int) -> list[Value]:
        """The values from before that a run reads or returns, in the names of its side."""
        run = self._runs[side][number]
        results = {value for op in run for value in op.results}
        read = [value for op in run for value in op.operands]
        returned = [pair[side] for pair in part.joins]
        return [
            value for value in dict.fromkeys([*read, *returned]) if value not in results
        ]

    def _operands(self, number: int, part: Part) -> list[Value]:
        operands: dict[Value, None] = {}
        for side in (self._trains, 1 - self._trains):
            for value in self._outer(number, part, side):
                operands[self._ours(value) if side else value] = None
        return [*operands]

    def _ours(self, value: Value) -> Value:
        """The value of ours that stands for one of theirs. A constant that only their trace has becomes one
        of ours.
        """
        ours = self._both.partner.get(value)
        if ours is not None:
            return ours
        entry = value.owner
        assert isinstance(entry, StateEntry)
        constant = self._equal_constant(entry) or self._new_constant(entry)
        self._both.partner[value] = constant.value
        return constant.value

    def _equal_constant(self, entry: StateEntry) -> StateEntry | None:
        """The constant of our program that equals one of theirs; None for none."""
        for constant in self._both.ours.state:
            if constant.kind == "const" and self._both.same_constant(
                constant.name, entry.name
            ):
                return constant
        return None

    def _new_constant(self, entry: StateEntry) -> StateEntry:
        """The constant that our program gains for one of theirs."""
        if entry.name not in self.constants:
            name = self._namer(entry.name)
            constant = StateEntry((name,), "const", entry.type)
            constant.tensor = len(self._both.ours.state) + len(self.constants)
            constant.storage = constant.tensor
            self.constants[entry.name] = constant
        return self.constants[entry.name]

    def _effects(self, number: int, part: Part) -> Effects:
        writes: dict[Value, None] = {}
        aliases = self._aliases(number)
        for side, own in enumerate(aliases):
            inside = set(self._runs[side][number])
            for _, root in own.writes:
                if root.owner not in inside:
                    writes[self._ours(root) if side else root] = None
        views = tuple(self._viewed(number, aliases, pair) for pair in part.joins)
        random = any(op.effects.random for op in part.ops)
        effect = any(op.effects.effect for op in part.ops)
        return Effects(
            (*writes,),
            views if any(v is not None for v in views) else (),
            random,
            effect,
        )

    def _aliases(self, number: int) -> list[Aliases]:
        return [Aliases(runs[number]) for runs in self._runs]

    def _viewed(self, number: int, aliases: list[Aliases], pair: Pair) -> Value | None:
        """The value of ours of which both results in a pair are views, each in its mode."""
        ours, theirs = (
            own.root(value) for own, value in zip(aliases, pair, strict=True)
        )
        if ours.owner in self._runs[0][number] or theirs.owner in self._runs[1][number]:
            return None
        return ours if self._ours(theirs) is ours else None

    def _scope(self, part: Part) -> Scope:
        """The innermost module call around a run whose module has another flag in each mode."""
        scopes = [op.scope for op in part.ops or part.joins.values() if op is not None]
        scope = _common(scopes) if len(scopes) == len(part.ops or part.joins) else ()
        while scope and not self._flags.switch(scope_fqn(scope)):
            scope = scope[:-1]
        return scope

    def _context(self, number: int) -> tuple[Context, ...]:
        """The regions around a run that run as a whole, as they are in training."""
        runs = self._runs[self._trains]
        between = 0 < number < len(runs) - 1 and runs[number - 1] and runs[number + 1]
        near = runs[number] or (
            [runs[number - 1][-1], runs[number + 1][0]] if between else []
        )
        return _common(
            [tuple(mark for mark in op.context if mark.kind in WHOLE) for op in near]
        )


_NAMES = ("training", "evaluation")


class _Memory:
    """The parts of one trace that write each memory, and the parts that read it."""

    def __init__(self, runs: list[list[Op]], program: Program) -> None:
        self._writers: dict[Value, set[int]] = {}
        self._readers: dict[Value, set[int]] = {}
        self._root = Aliases((op for ops in runs for op in ops), program.state).root
        for number, ops in enumerate(runs):
            for op in ops:
                for value in op.operands:
                    self._readers.setdefault(self._root(value), set()).add(number)
                for value in op.effects.writes:
                    self._writers.setdefault(self._root(value), set()).add(number)
        for value in program.output.operands:
            self._readers.setdefault(self._root(value), set()).add(len(runs))

    def is_written_behind(self, value: Value, number: int) -> bool:
        """True when a part after that one writes the memory of a value."""
        return any(
            writer > number for writer in self._writers.get(self._root(value), ())
        )

    def is_read_behind(self, value: Value, number: int) -> bool:
        """True when a part after that one reads the memory of a value."""
        return any(
            reader > number for reader in self._readers.get(self._root(value), ())
        )

    def is_read_in(self, value: Value, parts: list[int]) -> bool:
        """True when one of these parts reads it."""
        return not self._readers.get(self._root(value), set()).isdisjoint(parts)


def _differ(pair: tuple[Any, Any]) -> bool:
    return not isinstance(pair[0], Value) and not same_literal(*pair)


def _captured(literal: Any) -> Any:
    """A literal as it was in its trace."""
    return literal.in_trace if isinstance(literal, Mode) else literal


def _common(paths: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The longest common beginning of all paths."""
    common = paths[0] if paths else ()
    for path in paths:
        while path[: len(common)] != common:
            common = common[:-1]
    return common


def _transforms(ops: Iterable[Op]) -> set[Context]:
    marks = {mark for op in ops for mark in op.context}
    return {mark for mark in marks if mark.kind == "transform"}


def _where(part: Part) -> str:
    return next(
        (op.where() for op in (*part.ops, *part.joins.values()) if op is not None), ""
    )
