"""The texts of the boxes in a picture of module calls: state, ops, source lines, ids and titles."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

from stagecut.backend.pictures.drawing import (
    more_text,
    reduced,
    short,
    spans,
)
from stagecut.backend.pictures.folded import ModuleCall
from stagecut.ir.graph import (
    Kind,
    Op,
    Scope,
    StateEntry,
    Target,
)
from stagecut.ir.text.printer import target_text


def state_of(ops: Iterable[Op]) -> list[StateEntry]:
    """The state that ops read, each entry once."""
    entries: dict[StateEntry, None] = {}
    for op in ops:
        for value in op.reads:
            if isinstance(value.owner, StateEntry):
                entries[value.owner] = None
    return list(entries)


def ops_text(ops: Iterable[Op], most: int = 3) -> str:
    """The first short names of ops, each once, and how many ops have another one."""
    names = [_short_target(op.target) for op in ops]
    shown = list(dict.fromkeys(names))[:most]
    parts = [short(name) for name in shown]
    rest = sum(name not in shown for name in names)
    if rest:
        parts.append(more_text(rest, "op"))
    return ", ".join(parts)


def _short_target(target: Target) -> str:
    if target.kind is Kind.ATEN:
        return target.name
    return target_text(target)


def source_lines(ops: Iterable[Op]) -> list[str]:
    """The user's source lines of ops, a text for each file."""
    files: dict[str, list[int]] = {}
    for op in ops:
        if op.loc:
            name = PurePath(op.loc.file).name
            files.setdefault(name, []).append(op.loc.line)
    return [f"{file}:{spans(lines)}" for file, lines in files.items()]


def path_text(scope: Scope) -> str:
    """A scope as the name in an id: the module's path, and the number of the call where it is not the
    first.
    """
    names: list[str] = []
    for frame in scope:
        names.append(frame.name)
        if frame.call:
            names.append(f"call{frame.call}")
    return ".".join(names)


def title_text(block: ModuleCall) -> str:
    """The name of a block, with the last of those it stands for."""
    if not block.copies:
        return block.name
    last = block.copies[-1]
    count = len(block.copies) + 1
    return f"{block.name} to {last.name}  x {count}"


def module_classes(block: ModuleCall) -> dict[str, str]:
    """A class for each module a block stands for."""
    calls = (block, *block.copies)
    classes = [f"module-{reduced(path_text(call.scope))}" for call in calls]
    return {"class": " ".join(classes)}
