"""`dump-ir A --against B`: how the texts of two programs differ."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable

from stagecut.tools.dump_ir.options import is_text
from stagecut.tools.dump_ir.session import Session, source_of
from stagecut.tools.dump_ir.show import Writer, diff
from stagecut.tools.dump_ir.sources import Source, text_file

Opened = Callable[[Namespace, Callable[[Namespace], Source]], Session]
"""The options of one side, and how its source is read -> a session."""


def compare(options: Namespace, opened: Opened) -> bool:
    """Writes how the program of SOURCE differs from that of `--against`, as a unified diff. True when their
    texts are equal, and nothing is written.

    Where the text of one side has no files and lines that ops come from, they do not count.
    """
    sides = _side(options, options.source), _side(options, options.against)
    old, new = (opened(side, _reader(side)).text() for side in sides)
    bare = _changes(options, old.bare, new.bare)
    with_lines = [text.whole != text.bare for text in (old, new)]
    if any(with_lines) and not all(with_lines):
        without = sides[with_lines.index(False)].source
        _note(f"'{without}' has no lines of the source: compared without them")
        changes = bare
    else:
        changes = _changes(options, old.whole, new.whole)
    if not changes:
        return True
    Writer(options.directory).colored("against.diff", changes)
    only_lines = _count(changes) - _count(bare)
    if only_lines > 0:
        _note(
            f"{only_lines} of {_count(changes)} changed lines differ only in the file and line of an op",
            hint="--no-source",
        )
    return False


def _changes(options: Namespace, old: str, new: str) -> str:
    """A unified diff, '' for equal texts."""
    return "" if old == new else diff(old, new, options.source, options.against)


def _count(changes: str) -> int:
    """How many lines a diff removes and adds."""
    lines = changes.splitlines()[2:]
    return sum(line.startswith(("-", "+")) for line in lines)


def _note(text: str, hint: str = "") -> None:
    print(f"dump-ir: note: {text}", file=sys.stderr)
    if hint:
        print(f"  try: {hint}", file=sys.stderr)


def _side(options: Namespace, source: str) -> Namespace:
    """The options with which one of both sources is compiled. Text beside a model is a program that went
    through the passes when it was written: it is taken as it is, unless `--passes` says otherwise.
    """
    side = Namespace(**{**vars(options), "source": source, "directory": None})
    other = options.against if source == options.source else options.source
    is_done = options.passes is None and is_program(source) and not is_program(other)
    if is_done:
        side.stages, side.split_at, side.stop_after = None, [], None
    return side


def is_program(source: str) -> bool:
    """True for text of a program, whatever its file is called."""
    is_code = source.endswith((".py", ".pt2"))
    return is_text(source) or (os.path.isfile(source) and not is_code)


def _reader(side: Namespace) -> Callable[[Namespace], Source]:
    """A function that reads the source of a side."""
    is_file = is_program(side.source) and not is_text(side.source)
    return (lambda _: text_file(side.source)) if is_file else source_of
