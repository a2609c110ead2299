"""Traced programs on disk, so that a second look at a model does not trace it again.

An entry is one file: a digest, and then JSON with the program as IR text and all facts that the trace
depends on. It counts only while each of these facts holds. So the model's code is not even imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from stagecut.backend.cache import cache_folder
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.ir.version import VERSION
from stagecut.tools.dump_ir.evidence import (
    Fact,
    Outside,
    Uncertain,
    accelerators,
    environment,
    holds,
    watching,
)
from stagecut.tools.dump_ir.options import is_text
from stagecut.tools.dump_ir.sources import Source

FORMAT = 1
MOST_KEPT = 200
"""Entries beyond these are deleted, the oldest first."""

TRACED = ("source", "config", "meta", "batch", "length", "leaf", "trust")
"""The options that decide what is traced."""


@dataclass
class Entry:
    """A traced program, and all that it depends on."""

    format: int
    environment: str
    facts: list[Fact]
    notes: list[str]
    output_names: list[str]
    program: str


def cached(options: Namespace, load: Callable[[], Source], fresh: bool) -> Source:
    """The source that `load` would give. A program from the cache has no bindings and no inputs. With
    `fresh`, it is always loaded.
    """
    if options.no_cache or is_text(options.source):
        return load()
    variables = environment()
    path = _folder() / f"{_key(options)}.trace"
    if not fresh and (source := _read(path, variables)) is not None:
        return source
    with watching(os.path.dirname(options.source.rpartition(":")[0])) as watch:
        source = load()
    try:
        facts = watch.facts()
    except Outside as reason:
        note = f"the trace is not kept for the next look: {reason}"
        return replace(source, notes=[*source.notes, note])
    except Uncertain:
        return source
    entry = Entry(
        FORMAT,
        variables,
        facts,
        [*source.notes],
        [*source.program.output_names],
        text(source.program),
    )
    _write(path, entry)
    return source


def _folder() -> Path:
    return cache_folder() / "traces"


def _key(options: Namespace) -> str:
    """A digest of the question: what is to be traced, where, and by which Python."""
    question = {
        "options": {name: getattr(options, name) for name in TRACED},
        "folder": os.getcwd(),
        "host": platform.node(),
        "accelerators": accelerators(),
        "python": [sys.version, sys.executable, str(sys.flags)],
        "imports": sys.path,
        "stagecut": [VERSION, __file__],
    }
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()


def _read(path: Path, variables: str) -> Source | None:
    """The program of an entry, None where there is none that is whole and true."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if digest.decode() != hashlib.sha256(content).hexdigest():
            return None
        entry = Entry(**json.loads(content))
    except (OSError, ValueError, TypeError):
        return None
    if entry.format != FORMAT or entry.environment != variables:
        return None
    if not holds(entry.facts):
        return None
    program = parse(entry.program, str(path))
    program.output_names = tuple(entry.output_names)
    return Source(program, notes=entry.notes, is_model=True)


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
