"""Gives every state entry its owner stages, the names each stage holds it under, and a policy when shared."""

from __future__ import annotations

from dataclasses import dataclass

from stagecut.ir.errors import SplitError, nearest
from stagecut.ir.graph import SHARES, Op, Program, StateEntry, closest_name, scope_fqn
from stagecut.ir.ops import module_path

REPLICATE, FEEDBACK, TRANSMIT = SHARES
EVERY = "*"
"""In `transmit`: all parameters that can be transmitted."""


@dataclass(frozen=True)
class ShareState:
    """Every state name is held by a stage.

    An entry that several stages read is shared. `replicate`: no op writes it; each stage has a copy, and
    gradients are summed. `feedback`: a later stage writes it, and an earlier one reads it in the next step.
    `transmit`, where the user asks for it: the first stage that reads a parameter holds it, sends it on, and
    gets its gradient back.

    transmit: names of parameters, or EVERY.
    """

    transmit: tuple[str, ...] = ()
    name = "share-state"

    def run(self, program: Program) -> bool:
        if program.phase != "partitioned" or _is_done(program):
            return False
        home = {op: stage.index for stage in program.stages for op in stage.ops}
        places = _module_places(program)
        _refuse_unknown(self.transmit, program)
        last = len(program.stages) - 1
        for entry in program.state:
            readers = _readers(entry, home, last)
            if not readers:
                if entry.kind == "const":
                    continue
                nearest_stage = _nearest_stage(entry.name, places)
                readers[nearest_stage] = []
            entry.share = _policy(entry, home, len(readers))
            if entry.share == REPLICATE and self._is_sent(entry):
                entry.share = TRANSMIT
                first = next(iter(readers))
                readers = {first: readers[first]}
            _hold(program, entry, readers)
        return _is_done(program)

    def _is_sent(self, entry: StateEntry) -> bool:
        named = any(name in self.transmit for name in entry.names)
        for op in entry.value.uses:
            if not module_path(op):
                continue
            if not named:
                return False
            raise SplitError(
                f"'{entry.name}' cannot be transmitted: a module kept whole holds it",
                where=op.where(),
                hint=REPLICATE,
            )
        if named:
            return True
        return EVERY in self.transmit and entry.kind == "param"


def _is_done(program: Program) -> bool:
    return any(stage.state for stage in program.stages)


def _refuse_unknown(transmit: tuple[str, ...], program: Program) -> None:
    owners = program.name_owners()
    for name in transmit:
        if name == EVERY or name in owners:
            continue
        raise SplitError(
            f"tied names '{name}', which the model does not have",
            hint=nearest(name, owners),
        )


def _readers(entry: StateEntry, home: dict[Op, int], last: int) -> dict[int, list[str]]:
    """Stage -> module paths of the ops in it that read `entry`, in stage order. Returning it counts as a read
    in the last stage.
    """
    readers: dict[int, list[str]] = {}
    for op in entry.value.uses:
        stage = home.get(op, last)
        path = scope_fqn(op.scope)
        readers.setdefault(stage, []).append(path)
    return dict(sorted(readers.items()))


def _hold(program: Program, entry: StateEntry, readers: dict[int, list[str]]) -> None:
    """Each of these stages holds the entry, under the names that its modules know. The first has the rest."""
    names_in: dict[int, set[str]] = {}
    rest = set(entry.names)
    for stage, paths in readers.items():
        names = {closest_name(entry.names, path) for path in paths}
        names_in[stage] = names
        rest -= names
    first = next(iter(names_in))
    names_in[first] |= rest
    for stage, names in names_in.items():
        ordered = tuple(name for name in entry.names if name in names)
        program.stages[stage].state[entry] = ordered
    entry.stages = tuple(names_in)


def _policy(entry: StateEntry, home: dict[Op, int], readers: int) -> str | None:
    writers: set[int] = set()
    versions = [entry.value]
    for version in versions:
        for op in version.uses:
            if version in op.versions:
                writers.add(home[op])
                versions.append(op.versions[version])
    if len(writers) > 1:
        return FEEDBACK
    if readers <= 1:
        return None
    if writers:
        return FEEDBACK
    return REPLICATE


def _module_places(program: Program) -> dict[str, int]:
    """Module path -> the first stage that runs an op in it or below it."""
    places: dict[str, int] = {}
    for stage in program.stages:
        for op in stage.ops:
            path = scope_fqn(op.scope)
            while path and path not in places:
                places[path] = stage.index
                path = path.rpartition(".")[0]
    return places


def _nearest_stage(name: str, places: dict[str, int]) -> int:
    path = name.rpartition(".")[0]
    while path and path not in places:
        path = path.rpartition(".")[0]
    return places.get(path, 0)
