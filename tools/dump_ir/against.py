"""`dump-ir A --against B`: how the texts of two programs differ."""

from __future__ import annotations

import os
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
    """
    sides = _side(options, options.source), _side(options, options.against)
    texts = [opened(side, _reader(side)).text() for side in sides]
    old, new = texts
    if old == new:
        return True
    changes = diff(old, new, options.source, options.against)
    Writer(options.directory).colored("against.diff", changes)
    return False


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
