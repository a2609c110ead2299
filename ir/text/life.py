"""The life of a value or of a state entry: where it is born, its versions, its readers, its crossings, where
it dies.

    print(life_of_value(program, "relu_3"))
    print(life_of_state(program, "lin.weight"))

Linear in the program, and `Lives` answers any number of questions after reading the program once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from typing import TypeVar

from stagecut.ir.aliases import unwritten, viewed_value
from stagecut.ir.errors import UnknownNameError, nearest
from stagecut.ir.graph import (
    Block,
    Loc,
    Op,
    Program,
    StateEntry,
    Transfer,
    Value,
    leaves,
    scope_fqn,
)
from stagecut.ir.text.printer import Printer, size_text, target_text
from stagecut.ir.types import carries_grad, value_bytes

K = TypeVar("K")
V = TypeVar("V")

READS, VIEWS, WRITES, RENEWS = "reads", "views", "writes", "renews"
"""The ways in which an op uses a value: it reads it, gives a view of it, writes it, or writes its storage
without naming it.
"""

YIELD = "yield"
"""The target of the place where a region returns its values."""


@dataclass(frozen=True, slots=True)
class Site:
    """One op: its number in program order (regions included), stage (None while there are none), target,
    module path, line of source.

    `text` is the op as it is printed.
    """

    number: int
    stage: int | None
    target: str
    module: str
    loc: Loc | None
    text: str

    def __str__(self) -> str:
        parts = [] if self.stage is None else [f"stage {self.stage}"]
        if self.loc:
            parts += [str(self.loc), self.text.rpartition(" at ")[0]]
        else:
            parts.append(self.text)
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a value by an op. `version` is the printed name under which the op uses it."""

    how: str
    version: str
    place: Site


@dataclass(frozen=True, slots=True)
class Version:
    """A value after a write: its name, and the op that wrote. `by` is None for the first version, which
    exists before any write.
    """

    name: str
    by: Site | None


@dataclass(frozen=True, slots=True)
class Crossing:
    """The way of a value to another stage. source is None for an input of the model; via are the stages that
    hand the value on.

    made is the name of the copy that the target computes itself, by the route `recompute`.
    """

    source: int | None
    target: int
    route: str | None
    via: tuple[int, ...]
    bytes: int | None
    made: str | None

    def __str__(self) -> str:
        through = f" through {', '.join(map(str, self.via))}" if self.via else ""
        name = f" as {self.made}" if self.made else ""
        origin = "input" if self.source is None else f"stage {self.source}"
        return (
            f"{origin} -> stage {self.target}, {self.route or 'no route yet'}{through}{name}, "
            f"{size_text(self.bytes)}"
        )


@dataclass(frozen=True, slots=True)
class Holding:
    """A stage that holds a state entry, and the names it holds it under."""

    stage: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ValueLife:
    """The life of one value.

    kind: 'input' (of the model), 'param' (of a region), 'result' (of an op) or 'version' (another value after
    a write). born: the op that defines it, None for inputs of the model. versions: all versions in its line,
    oldest first, itself among them; a single one where nothing is written. view_of: the value that it is a
    view of. copy_of, copies: by recomputation. returned: places among the outputs. dies: the last op that
    reads it, None when nothing does or when the model returns it.
    """

    name: str
    kind: str
    type: str
    bytes: int | None
    gradient: bool
    born: Site | None
    versions: tuple[Version, ...]
    view_of: str | None
    copy_of: str | None
    copies: tuple[str, ...]
    uses: tuple[Use, ...]
    crossings: tuple[Crossing, ...]
    returned: tuple[int, ...]

    @property
    def dies(self) -> Site | None:
        return self.uses[-1].place if self.uses and not self.returned else None

    def __str__(self) -> str:
        return "\n".join(_value_lines(self))


@dataclass(frozen=True, slots=True)
class StateLife:
    """The life of one distinct tensor of the model.

    names: all names, in state_dict order; transient: those that stay out of the state_dict. held: the stages
    that hold it, and the names they hold it under; share: the policy when these stages are several. overlaps:
    other entries in the same storage. uses: of the entry and of its versions, in program order. returned:
    places among the outputs, of any version.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    type: str
    bytes: int | None
    trained: bool
    transient: tuple[str, ...]
    held: tuple[Holding, ...]
    share: str | None
    overlaps: tuple[str, ...]
    versions: tuple[Version, ...]
    uses: tuple[Use, ...]
    crossings: tuple[Crossing, ...]
    returned: tuple[int, ...]

    def __str__(self) -> str:
        return "\n".join(_state_lines(self))


def life_of_value(program: Program, name: str) -> ValueLife:
    """The life of the value printed as `name`, with or without its `%`. Raises UnknownNameError with the
    nearest names.
    """
    return Lives(program).value(name)


def life_of_state(program: Program, fqn: str) -> StateLife:
    """The life of the state that has this name, which may be any of its names, with or without `@`. Raises
    UnknownNameError with the nearest names.
    """
    return Lives(program).state(fqn)


class Lives:
    """All lives of a program, which must not change meanwhile."""

    def __init__(self, program: Program) -> None:
        self._program = program
        printer = Printer(program)
        self._names, self._line = printer.names, printer.op_line
        self._numbers: dict[Op, tuple[int, int | None]] = {}
        self._params: dict[Value, Op] = {}
        self._yields: set[Op] = set()
        for stage, op in _staged(program):
            self._number(op, stage)
        for stage_of_block, block in program.backward_blocks():
            for op in block.ops:
                self._number(op, stage_of_block.index)
        self._sites: dict[Op, Site] = {}
        self._lines_of_versions: dict[Value, tuple[Version, ...]] = {}

    def value(self, name: str) -> ValueLife:
        """The life of one value."""
        printed = "%" + name.removeprefix("%")
        if printed not in self._values:
            raise UnknownNameError(
                f"there is no value '{printed}'", hint=self._hint_for(name)
            )
        return self._life(self._values[printed])

    def state(self, fqn: str) -> StateLife:
        """The life of one state entry."""
        entry = self._entries.get(fqn) or self._entries.get(_unmarked(fqn))
        if entry is None:
            raise UnknownNameError(
                f"there is no parameter, buffer or constant '{fqn}'",
                hint=_nearest(_unmarked(fqn), self._entries),
            )
        return self._state_life(entry)

    def places(self) -> list[Site]:
        """Every op in program order, those of regions and the yields of regions included."""
        return [self._site(op) for op in self._numbers]

    def number(self, op: Op) -> int:
        """The number of an op in `places`."""
        number, _ = self._numbers[op]
        return number

    def values(self) -> Iterator[ValueLife]:
        """Every value that is no state, inputs first, then in order of definition."""
        return map(self._life, self._values.values())

    def states(self) -> Iterator[StateLife]:
        """Every state entry, in order."""
        return map(self._state_life, self._program.state)

    @cached_property
    def _values(self) -> dict[str, Value]:
        return {
            name: value
            for value, name in self._names.items()
            if not isinstance(value.owner, StateEntry)
        }

    @cached_property
    def _entries(self) -> dict[str, StateEntry]:
        return self._program.name_owners()

    @cached_property
    def _transfers(self) -> dict[Value, list[Transfer]]:
        program = self._program
        transfers = [*program.transfers, *program.backward_transfers]
        return _grouped((transfer.value, transfer) for transfer in transfers)

    @cached_property
    def _copies(self) -> dict[Value, list[Value]]:
        """Value -> the copies that stages compute in its place."""
        pairs = {
            transfer.recomputed: transfer.value
            for transfer in self._program.transfers
            if transfer.recomputed is not None
        }
        twins = [(op.origin, op) for op in self._numbers if op.origin is not None]
        pairs |= {
            copy: value
            for first, op in twins
            for value, copy in zip(first.results, op.results, strict=True)
        }
        return _grouped(
            (value, copy)
            for copy, value in pairs.items()
            if copy in self._names and value in self._names
        )

    @cached_property
    def _copied(self) -> dict[Value, Value]:
        return {
            copy: value for value, copies in self._copies.items() for copy in copies
        }

    @cached_property
    def _returned(self) -> dict[Value, list[int]]:
        return _grouped(
            (value, place)
            for place, output in enumerate(self._program.outputs)
            for value in leaves([output])
        )

    @cached_property
    def _overlaps(self) -> dict[int, list[StateEntry]]:
        return _grouped((entry.storage, entry) for entry in self._program.state)

    def _hint_for(self, name: str) -> str:
        if _unmarked(name) in self._entries:
            return f"'{_unmarked(name)}' is state, no value"
        if name.removeprefix("%").startswith("."):
            return (
                "a name with a dot stands for one value of each call of a function, and unfolded text names "
                "each of them"
            )
        return _nearest("%" + name.removeprefix("%"), self._values)

    def _number(self, op: Op, stage: int | None) -> None:
        self._numbers[op] = (len(self._numbers), stage)
        for region in op.regions:
            self._number_region(op, region, stage)

    def _number_region(self, op: Op, region: Block, stage: int | None) -> None:
        self._params |= dict.fromkeys(region.inputs, op)
        for inner in region.ops:
            self._number(inner, stage)
        self._numbers[region.output] = (len(self._numbers), stage)
        self._yields.add(region.output)

    def _site(self, op: Op) -> Site:
        if op not in self._sites:
            self._sites[op] = self._new_site(op)
        return self._sites[op]

    def _new_site(self, op: Op) -> Site:
        number, stage = self._numbers[op]
        line = self._line(op)
        target = target_text(op.target)
        if op in self._yields:
            target = YIELD
            line = f"{YIELD} {line.partition('(')[2].removesuffix(')')}"
        return Site(number, stage, target, scope_fqn(op.scope), op.loc, line)

    def _life(self, value: Value) -> ValueLife:
        kind, born = self._birth(value)
        copied = self._copied.get(value)
        return ValueLife(
            self._names[value],
            kind,
            str(value.type),
            value_bytes(value.type),
            carries_grad(value.type),
            self._site(born) if born is not None else None,
            self._versions(value),
            self._viewed(value, kind),
            self._names[copied] if copied is not None else None,
            tuple(self._names[copy] for copy in self._copies.get(value, ())),
            tuple(self._uses([value])),
            tuple(self._crossings(value)),
            tuple(self._returned.get(value, ())),
        )

    def _birth(self, value: Value) -> tuple[str, Op | None]:
        if value in self._params:
            return "param", self._params[value]
        if not isinstance(value.owner, Op):
            return "input", None
        return ("result" if value.version_of is None else "version"), value.owner

    def _viewed(self, value: Value, kind: str) -> str | None:
        viewed = viewed_value(value) if kind == "result" else None
        return None if viewed is None else self._names[viewed]

    def _versions(self, value: Value) -> tuple[Version, ...]:
        """The line of versions that a value stands in; made once for all values in it."""
        if value not in self._lines_of_versions:
            line = _line_of(value)
            versions = tuple(
                Version(self._names[version], self._writer(version)) for version in line
            )
            self._lines_of_versions |= dict.fromkeys(line, versions)
        return self._lines_of_versions[value]

    def _writer(self, value: Value) -> Site | None:
        return (
            self._site(value.owner)
            if value.version_of is not None and isinstance(value.owner, Op)
            else None
        )

    def _uses(self, line: list[Value]) -> list[Use]:
        uses: list[Use] = []
        for value in line:
            for op in value.uses:
                if op in self._numbers:
                    name = self._names[value]
                    uses.append(Use(_how(op, value), name, self._site(op)))
        return sorted(uses, key=lambda use: use.place.number)

    def _crossings(self, value: Value) -> Iterator[Crossing]:
        for transfer in self._transfers.get(value, ()):
            yield Crossing(
                transfer.source,
                transfer.target,
                transfer.route,
                transfer.via,
                value_bytes(value.type),
                None
                if transfer.recomputed is None
                else self._names[transfer.recomputed],
            )

    def _state_life(self, entry: StateEntry) -> StateLife:
        line = _line_of(entry.value)
        overlapping = self._overlaps[entry.storage]
        return StateLife(
            entry.name,
            entry.names,
            entry.kind,
            str(entry.type),
            value_bytes(entry.type),
            entry.requires_grad,
            tuple(name for name in entry.names if name in entry.transient),
            tuple(self._holdings(entry)),
            entry.share,
            tuple(other.name for other in overlapping if other is not entry),
            self._versions(entry.value),
            tuple(self._uses(line)),
            tuple(chain.from_iterable(map(self._crossings, line))),
            tuple(sorted(self._returned_places(line))),
        )

    def _holdings(self, entry: StateEntry) -> Iterator[Holding]:
        for stage in self._program.stages:
            names = stage.state.get(entry)
            if names:
                yield Holding(stage.index, names)

    def _returned_places(self, line: list[Value]) -> Iterator[int]:
        for value in line:
            yield from self._returned.get(value, ())


def _line_of(value: Value) -> list[Value]:
    """All versions of a value, oldest first."""
    line: list[Value] = []
    version: Value | None = unwritten(value)
    while version is not None:
        line.append(version)
        version = _next_version(version)
    return line


def _next_version(value: Value) -> Value | None:
    versions = (op.versions[value] for op in value.uses if value in op.versions)
    return next(versions, None)


def _staged(program: Program) -> Iterator[tuple[int | None, Op]]:
    if program.phase == "traced":
        yield from ((None, op) for op in program.ops)
    for stage in program.stages:
        yield from ((stage.index, op) for op in stage.ops)


def _grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    groups: dict[K, list[V]] = {}
    for key, member in pairs:
        groups.setdefault(key, []).append(member)
    return groups


def _how(op: Op, value: Value) -> str:
    if value in op.effects.writes:
        return WRITES
    if value not in op.operands:
        return RENEWS
    return VIEWS if value in op.effects.views else READS


def _unmarked(fqn: str) -> str:
    """A state name without the marks that the printer adds: `@w` -> `w`, `@"a b"` -> `a b`."""
    bare = fqn.removeprefix("@")
    if not bare.startswith('"'):
        return bare
    try:
        return str(json.loads(bare))
    except ValueError:
        return bare


def _nearest(name: str, names: Iterable[str]) -> str:
    """The nearest names. Names that begin as `name` does are compared first, because only the first thousands
    are compared.
    """
    return nearest(name, sorted(names, key=lambda other: -_common_letters(name, other)))


def _common_letters(one: str, other: str) -> int:
    """The number of letters that two names begin with in common."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _value_lines(life: ValueLife) -> Iterator[str]:
    yield f"{life.name} : {life.type}, {size_text(life.bytes)}"
    yield _row("born", str(life.born) if life.born else "an input of the model")
    yield from _relation_lines(life)
    yield from (_row(use.how, str(use.place)) for use in life.uses)
    yield from (_row("crosses", str(crossing)) for crossing in life.crossings)
    yield from _end_lines(life.uses, life.returned)


def _relation_lines(life: ValueLife) -> Iterator[str]:
    """The lines that tell which other values it is a version, a view or a copy of."""
    yield from _version_lines(life.versions)
    if life.view_of:
        yield _row("view of", life.view_of)
    if life.copy_of:
        yield _row("copy of", life.copy_of)
    if life.copies:
        yield _row("copies", ", ".join(life.copies))


def _version_lines(versions: tuple[Version, ...]) -> Iterator[str]:
    if len(versions) < 2:
        return
    for version in versions:
        origin = f"written by {version.by}" if version.by else "the first"
        yield _row("version", f"{version.name}, {origin}")


def _end_lines(uses: tuple[Use, ...], returned: tuple[int, ...]) -> Iterator[str]:
    if returned:
        yield _row("returned", f"as output {', '.join(map(str, returned))}")
    elif uses:
        yield _row("dies", str(uses[-1].place))
    else:
        yield _row("dies", "at once: nothing reads it")


def _state_lines(life: StateLife) -> Iterator[str]:
    trained = ", trained" if life.trained else ""
    yield f"@{life.name} : {life.kind} {life.type}, {size_text(life.bytes)}{trained}"
    yield from (_row("also", name) for name in life.names[1:])
    yield from (_row("storage", f"shared with {name}") for name in life.overlaps)
    if life.transient:
        yield _row("transient", ", ".join(life.transient))
    yield from (
        _row("held", f"stage {holding.stage} as {', '.join(holding.names)}")
        for holding in life.held
    )
    if life.share:
        yield _row("shared", life.share)
    yield from _version_lines(life.versions)
    yield from (_row(use.how, str(use.place)) for use in life.uses)
    yield from (_row("crosses", str(crossing)) for crossing in life.crossings)
    if life.returned:
        yield _row("returned", f"as output {', '.join(map(str, life.returned))}")
    elif not life.uses:
        yield _row("unused", "no op reads it")


def _row(label: str, content: str) -> str:
    return f"  {label:9} {content}"
