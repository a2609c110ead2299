"""Answers on disk: traced programs, the cuts of a search, and reports, so that a second look neither traces
nor searches again.

An entry is one file: a digest, and then JSON with the answer and all facts that it depends on. It counts only
while each of these facts holds. So neither the model's code nor torch is even imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from stagecut.backend.cache import cache_folder
from stagecut.ir.graph import Program
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.ir.version import VERSION
from stagecut.tools.dump_ir.evidence import (
    Fact,
    Outside,
    Uncertain,
    Watch,
    accelerators,
    change,
    folders,
    has_computed_number,
    watching,
)
from stagecut.tools.dump_ir.options import is_text
from stagecut.tools.dump_ir.sources import Source
from stagecut.tools.dump_ir.variables import Counting, environment, other_variables

FORMAT = 3
MOST_KEPT = 200
"""Entries of a kind beyond these are deleted, the oldest first."""

TRACED = ("source", "config", "meta", "batch", "length", "leaf", "trust")
"""The options that decide what is traced."""

_SUFFIX = ".kept"


@dataclass
class Entry:
    """An answer, and all that it depends on."""

    format: int
    place: dict[str, Any]
    counting: dict[str, Any]
    environment: dict[str, str]
    facts: list[Fact]
    answer: Any


@dataclass(frozen=True)
class Answer:
    """An answer; whether it is from the cache; and where it is not, and there was one: why that one does not
    count any more.
    """

    content: Any
    is_kept: bool
    why: str = ""


# --- what is kept -------------------------------------------------------------------------------------


def cached(options: Namespace, load: Callable[[], Source], fresh: bool) -> Source:
    """The source that `load` would give. A program from the cache has no bindings and no inputs. With
    `fresh`, it is always loaded.
    """
    if options.no_cache or is_text(options.source):
        return load()
    kept = _Kept("traces", _question(options))
    found = kept.read()
    if not fresh and found.is_kept:
        return _source_of(found.content)
    with watching(os.path.dirname(options.source.rpartition(":")[0])) as watch:
        source = load()
    answer: dict[str, Any] = {
        "notes": [*source.notes],
        "output_names": [*source.program.output_names],
        "program": text(source.program),
    }
    notes = [*source.notes]
    if has_computed_number(answer["program"]):
        watch.ask_threads()
    try:
        kept.write(answer, watch)
    except Outside as reason:
        notes.append(f"the trace is not kept for the next look: {reason}")
    except Uncertain:
        pass
    if found.why:
        notes.append(f"traced again: {found.why}")
    return replace(source, notes=notes)


def computed(
    options: Namespace,
    kind: str,
    question: Mapping[str, Any],
    compute: Callable[[], Any],
    first: tuple[str, ...],
) -> Answer:
    """What `compute` gives, in forms that JSON has; it reads nothing but what `question` says. `first` are
    the modules that it needs.
    """
    if options.no_cache:
        return Answer(compute(), False)
    kept = _Kept(kind, question)
    found = kept.read()
    if found.is_kept and not options.time:
        return found
    with watching("", ("torch", *first)) as watch:
        content = compute()
    with suppress(Uncertain):
        kept.write(content, watch)
    return Answer(content, False, found.why)


def digest_of(program: Program) -> str:
    """A digest of a program."""
    names = " ".join(program.output_names)
    return hashlib.sha256(f"{names}\n{text(program)}".encode()).hexdigest()


def _question(options: Namespace) -> dict[str, Any]:
    """What is to be traced."""
    asked = {name: getattr(options, name) for name in TRACED}
    return {"options": asked, "folder": os.getcwd()}


def _source_of(answer: Any) -> Source:
    program = parse(answer["program"], "<cache>")
    program.output_names = tuple(answer["output_names"])
    return Source(program, notes=answer["notes"], is_model=True, is_kept=True)


# --- entries ------------------------------------------------------------------------------------------


def _place() -> dict[str, Any]:
    """By which Python an answer is found, and on which machine."""
    return {
        "machine": platform.node(),
        "GPUs": accelerators(),
        "Python": [sys.version, sys.executable, str(sys.flags)],
        "list of folders for imports": folders,
        "version of stagecut": [VERSION, __file__],
    }


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class _Kept:
    """The file of the answer to one question, in this place."""

    def __init__(self, kind: str, question: Mapping[str, Any]) -> None:
        self._place = _place()
        self._folder = cache_folder() / kind
        self._asked = _digest(question)[:32]
        here = _digest(self._place)[:16]
        self._path = self._folder / f"{self._asked}-{here}{_SUFFIX}"

    def read(self) -> Answer:
        """The answer, where there is one that is whole and true."""
        entry = _read(self._path)
        if entry is None:
            return Answer(None, False, self._elsewhere())
        variables = environment(Counting(**entry.counting))
        why = other_variables(entry.environment, variables)
        why = why or change(entry.facts)
        return Answer(None if why else entry.answer, not why, why)

    def _elsewhere(self) -> str:
        """What is another than where the question was answered last; empty where it never was."""
        others = self._folder.glob(f"{self._asked}-*{_SUFFIX}")
        for path in sorted(others, key=_age):
            entry = None if path == self._path else _read(path)
            if entry is not None:
                now = json.loads(json.dumps(self._place))
                apart = [name for name in now if now[name] != entry.place.get(name)]
                return f"another {', another '.join(apart)}"
        return ""

    def write(self, answer: Any, watch: Watch) -> None:
        """The answer is in the cache, where the folder can be written. Raises Uncertain where it is not known
        on what it depends.
        """
        facts, counting = watch.facts(), watch.counting
        variables = environment(counting)
        entry = Entry(FORMAT, self._place, asdict(counting), variables, facts, answer)
        _write(self._path, entry)


def _age(path: Path) -> int:
    """By this number newer files come first."""
    try:
        return -path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> Entry | None:
    """An entry, None where there is none that is whole."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if digest.decode() != hashlib.sha256(content).hexdigest():
            return None
        entry = Entry(**json.loads(content))
    except (OSError, ValueError, TypeError):
        return None
    return entry if entry.format == FORMAT else None


def _write(path: Path, entry: Entry) -> None:
    """The entry is in the cache, where the folder can be written. It appears whole or not at all."""
    content = json.dumps(asdict(entry)).encode()
    digest = hashlib.sha256(content).hexdigest()
    part = path.with_suffix(f".{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(digest.encode() + b"\n" + content)
        part.replace(path)
        _prune(path.parent)
    except OSError:
        with suppress(OSError):
            part.unlink()


def _prune(folder: Path) -> None:
    """The folder has at most MOST_KEPT entries: those written last."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-MOST_KEPT]:
        file.unlink(missing_ok=True)
