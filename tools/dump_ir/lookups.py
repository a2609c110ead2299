"""Where Python has looked for modules since this file was imported: the folders, and the names in each.

A file in one of these folders matters to an import by its name alone. So what else appears there is no
change.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import FileFinder, ModuleSpec
from types import ModuleType

_MODULES = (".py", ".pyc", ".so")

IS_LATE = "torch" in sys.modules
"""True where torch was imported before: for what it looked in vain is not known."""

looked: dict[str, set[str]] = {}
"""Folder -> the names of the modules that were looked for in it."""
at_first: dict[str, Mapping[str, str]] = {}
"""Folder -> the modules in it at the first look."""


def modules_in(folder: str) -> dict[str, str]:
    """Name of each module that an import could find in a folder -> its files and folders."""
    found: dict[str, list[str]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, dot, _ = entry.name.partition(".")
                if entry.name.endswith(_MODULES) if dot else entry.is_dir():
                    found.setdefault(name, []).append(entry.name)
    except OSError:
        return {}
    return {name: " ".join(sorted(entries)) for name, entries in found.items()}


def import_folders() -> set[str]:
    """The folders in which imports look."""
    return {os.path.abspath(path) for path in sys.path}


def note_look(folder: str, names: Iterable[str]) -> None:
    """Modules of these names were looked for in a folder."""
    path = os.path.abspath(folder)
    if path not in looked:
        looked[path] = set()
        at_first[path] = modules_in(path)
    looked[path].update(names)


_find_spec = FileFinder.find_spec


def _noted_find_spec(
    self: FileFinder, fullname: str, target: ModuleType | None = None
) -> ModuleSpec | None:
    note_look(self.path, (fullname.rpartition(".")[2],))
    return _find_spec(self, fullname, target)


def _begin() -> None:
    """From now on looks are noted. Those for what is imported already may have been anywhere."""
    loaded = {name for name in sys.modules if "." not in name}
    for folder in import_folders():
        note_look(folder, loaded)
    FileFinder.find_spec = _noted_find_spec  # type: ignore


_begin()
