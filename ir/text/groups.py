"""State that calls of one function read: printed as one line for the module, and for modules in a row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from stagecut.ir.graph import Function, Op, StateEntry, function_of, scope_fqn

_NUMBERED = re.compile(r"(?:[A-Za-z0-9_]+\.)*([0-9]{1,9})\Z")


class StateGroup(NamedTuple):
    """The entries at the path of a module that are just those which a function reads of it, in its order."""

    path: str
    function: Function
    entries: tuple[StateEntry, ...]

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that hold the entries, all the same."""
        return self.entries[0].stages


def state_groups(
    entries: Sequence[StateEntry], ops: Iterable[Op]
) -> dict[StateEntry, StateGroup]:
    """The groups among `entries` which calls among `ops` read, by their first entries, in order."""
    at = {entry: place for place, entry in enumerate(entries)}
    by_name = {entry.name: entry for entry in entries}
    shared = _shared(entries)
    found: dict[int, StateGroup] = {}
    for op in ops:
        function = function_of(op)
        if function is None or not function.state:
            continue
        path = scope_fqn(op.scope)
        first = by_name.get(f"{path}.{function.state[0].name}")
        start = at.get(first, -1) if first is not None else -1
        group = StateGroup(
            path, function, tuple(entries[start : start + len(function.state)])
        )
        if start >= 0 and _fits(group) and shared.isdisjoint(group.entries):
            found[start] = group
    return {entries[start]: found[start] for start in sorted(found)}


def _shared(entries: Iterable[StateEntry]) -> set[StateEntry]:
    """The entries that share a tensor or a storage with another one."""
    entries = [*entries]
    tensors = Counter(entry.tensor for entry in entries)
    storages = Counter(entry.storage for entry in entries)
    return {e for e in entries if tensors[e.tensor] > 1 or storages[e.storage] > 1}


def _fits(group: StateGroup) -> bool:
    """True when path and function say everything of the entries but their stages, which are the same."""
    declared = group.function.state
    if len(declared) != len(group.entries):
        return False
    for entry, wanted in zip(group.entries, declared, strict=True):
        name = f"{group.path}.{wanted.name}"
        if entry.names != (name,) or entry.kind != wanted.kind:
            return False
        if entry.type != wanted.type or entry.stages != group.stages:
            return False
        if bool(entry.transient) != bool(wanted.transient):
            return False
        if entry.share is not None:
            return False
    return True


class Span(NamedTuple):
    """Groups of modules in a list that follow each other."""

    groups: list[StateGroup]

    @property
    def last(self) -> str:
        """The number of the last module; '' for a single one."""
        return self.groups[-1].path.rpartition(".")[2] if len(self.groups) > 1 else ""


def spans(
    entries: Sequence[StateEntry], groups: dict[StateEntry, StateGroup]
) -> Iterator[Span | StateEntry]:
    """The entries in order, those of groups as spans of equal groups."""
    place = 0
    span: Span | None = None
    while place < len(entries):
        entry = entries[place]
        group = groups.get(entry)
        if group is not None:
            end = place + len(group.entries)
            if tuple(entries[place:end]) != group.entries:
                group = None
        follows = span is not None and group is not None and _follows(span, group)
        if span is not None and not follows:
            yield span
            span = None
        if group is None:
            yield entry
            place += 1
            continue
        if span is None:
            span = Span([])
        span.groups.append(group)
        place = end
    if span is not None:
        yield span


def _follows(span: Span, group: StateGroup) -> bool:
    last = span.groups[-1]
    if last.function is not group.function or last.stages != group.stages:
        return False
    return next_path(last.path) == group.path


def next_path(path: str) -> str | None:
    """The path of the module that stands behind another one in a list; None where none can."""
    match = _NUMBERED.match(path)
    if match is None:
        return None
    return f"{path[: match.start(1)]}{int(match[1]) + 1}"
