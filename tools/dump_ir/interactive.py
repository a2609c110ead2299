"""`dump-ir SOURCE --interactive`: one trace, and then line after line that cuts and looks.

A line is what stands after `dump-ir SOURCE`, without the first two dashes. Options that say where to cut stay
until others replace them.
"""

from __future__ import annotations

import argparse
import cmd
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace

from stagecut.ir.errors import InputError, StagecutError, nearest
from stagecut.ir.graph import scope_fqn
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.pipeline import NAMES
from stagecut.tools.dump_ir.options import misuse, spelled
from stagecut.tools.dump_ir.session import Session, needs_model
from stagecut.tools.dump_ir.sources import Source

KEPT = ("stages", "schedule", "microbatches", "device", "passes")
"""Words that hold for the lines after theirs; so does `split-at`."""

_NAMES = {
    "trace-value": r"%([\w.]+)",
    "trace-param": r'@([\w.]+)|@"([^"]+)"',
}
"""A word -> what it takes, in the text of a program."""
FIRST = ("stages", "split-at", "uncut", "cut", "report", "text", "trace-value", "help")
"""The words that an unknown one is answered with, where none is like it."""
_OTHERS = ("history", "quit")
_OF_PASSES = ("print-after", "print-before", "stop-after")

_IN_PYTHON = "pipe.ir() is the program, pipe.report() what it costs"

HELP = """\
A line is an option of dump-ir without its dashes, with more options behind it:
  stages 3            cut into 3 stages of like times
  split-at NAME ...   cut before these modules
  uncut               take all cuts away
  device A100         the device of the costs; schedule NAME, microbatches N: the rest of the setting
  cut                 show where it is cut
  report              what the stages cost
  stats, diff         what each pass changes
  text                the program; only stage=1 a part of it
  trace-value NAME    the life of a value; trace-param NAME that of a parameter
  roles, check-each, bisect, format svg -o DIR, ...   as on the command line
  history, help, help all, quit
"""


class Parser(argparse.ArgumentParser):
    """A parser that raises for a wrong line, and does not end the process."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises InputError."""
        raise InputError(message, hint="help")


class Interactive(cmd.Cmd):
    """The lines of one session. `command_line` is the parser of the command line, `run` does what a line
    says.
    """

    intro = "help shows what can be said, quit ends"

    def __init__(
        self,
        options: Namespace,
        source: Source,
        command_line: Parser,
        named: Callable[[list[str]], set[str]],
        run: Callable[[Session], None],
        again: Callable[[Namespace, Callable[[Namespace], Source]], Session],
        load: Callable[[], Source],
    ) -> None:
        super().__init__()
        self._is_watched = sys.stdin.isatty()
        self.prompt = "dump-ir> " if self._is_watched else ""
        if not self._is_watched:
            self.intro = ""
        self._source, self._text = source, text(source.program)
        self._words = [
            name.removeprefix("--")
            for action in command_line._actions
            for name in action.option_strings
            if name.startswith("--")
        ]
        self._parser, self._named = command_line, named
        self._run, self._session, self._load = run, again, load
        self._base = [options.source]
        self._kept: dict[str, list[str]] = {}
        for word in KEPT:
            if word in options.named:
                self._kept[word] = [f"--{word}={getattr(options, word)}"]
        if options.split_at:
            self._kept["cut"] = [f"--split-at={name}" for name in options.split_at]
        self._lines: list[str] = []
        self.failed = False

    # --- lines ------------------------------------------------------------------------------------

    def onecmd(self, line: str) -> bool:
        """Does what a line says. An error is told, and ends nothing."""
        if line == "EOF":
            return True
        try:
            words = shlex.split(line, comments=True)
            return bool(words) and self._do(line, words)
        except (StagecutError, ValueError) as error:
            self.failed = True
            sys.stdout.flush()
            print(f"error: {spelled(str(error))}", file=sys.stderr, flush=True)
        except OSError as error:
            self.failed = True
            print(f"error: {error}", file=sys.stderr, flush=True)
        return False

    def _do(self, line: str, words: list[str]) -> bool:
        """Does what a line says. True when it ends the session."""
        self._lines.append(line)
        word, *rest = words
        word = word.removeprefix("--")
        if word in ("quit", "exit"):
            return True
        if word == "help":
            self._help(rest)
        elif word == "history":
            self._write("".join(f"{line}\n" for line in self._lines[:-1]))
        elif word == "uncut":
            self._cut("cut", [])
        elif word == "split-at":
            if not rest:
                raise InputError("split-at names no module", hint="split-at layers.4")
            self._cut("cut", [f"--split-at={name}" for name in rest])
        elif word == "stages":
            self._cut("cut", self._one(word, rest))
        elif word in KEPT:
            self._cut(word, self._one(word, rest))
        elif word == "cut":
            self._show([])
        elif word == "text":
            self._look(rest)
        elif word in self._words:
            self._look([f"--{word}", *rest])
        else:
            known = dict.fromkeys([*FIRST, *_OTHERS, *self._words])
            raise InputError(f"'{word}' is not known", hint=nearest(word, known))
        return False

    def _one(self, word: str, values: list[str]) -> list[str]:
        if len(values) != 1:
            raise InputError(f"{word} takes one value", hint="help")
        return [f"--{word}={values[0]}"]

    def _cut(self, word: str, options: list[str]) -> None:
        """These options hold from now on, and where it is cut is shown. A wrong one changes nothing."""
        before = dict(self._kept)
        self._kept[word] = options
        try:
            self._show([])
        except StagecutError:
            self._kept = before
            raise

    def _show(self, options: list[str]) -> None:
        """Shows the stages in a few lines."""
        from stagecut.backend.pictures.summary import summary

        session = self._opened(self._held(reckons=False) + options)
        program = session.program()
        if program.phase != "linked":
            self._write(f"{program.name} is {program.phase}\n")
            return
        table = str(summary(program, ""))
        kept = [option for values in self._kept.values() for option in values]
        table = table.replace(_IN_PYTHON, "text is the program, report what it costs")
        table = table.replace(",  mode", "", 1)
        self._write(f"{table}\n{' '.join(kept)}".rstrip() + "\n")

    def _look(self, options: list[str]) -> None:
        reckons = any(
            word.partition("=")[0] in ("--report", "--timeline") or word == "html"
            for word in options
        )
        self._run(self._opened(self._held(reckons) + options))
        sys.stdout.flush()

    def _held(self, reckons: bool) -> list[str]:
        """The options that hold; those of the costs only where they have an effect."""
        searches = any(
            option.startswith("--stages") for option in self._kept.get("cut", ())
        )
        held: list[str] = []
        for word, options in self._kept.items():
            if word in ("cut", "passes", "stages") or searches or reckons:
                held += options
        return held

    def _opened(self, argv: list[str]) -> Session:
        options = self._parser.parse_args([*self._base, *argv])
        options.named = self._named([*self._base, *argv])
        if options.interactive:
            raise InputError("this is --interactive already", hint="help")
        if options.against is not None:
            raise InputError(
                "two programs are compared by a command of its own",
                hint=f"dump-ir {options.source} --against {options.against}",
            )
        fault = misuse(options)
        if fault:
            raise InputError(fault)
        return self._session(options, self._given)

    def _given(self, options: Namespace) -> Source:
        """The traced program, as it was before any pass."""
        if needs_model(options) and self._source.is_model and not self._source.bindings:
            self._source = self._load()
            self._text = text(self._source.program)
        program = parse(self._text)
        program.output_names = self._source.program.output_names
        return replace(self._source, program=program, notes=())

    def _help(self, words: list[str]) -> None:
        self._write(self._parser.format_help() if words else HELP)

    def _write(self, content: str) -> None:
        sys.stdout.write(content)
        sys.stdout.flush()

    # --- completion -------------------------------------------------------------------------------

    def completenames(self, text: str, *ignored: object) -> list[str]:
        """The words that a line may begin with."""
        return _beginning(text, {*self._words, *FIRST, *_OTHERS})

    def completedefault(self, *ignored: object) -> list[str]:
        """The names that the word at the beginning of the line takes."""
        text, line = str(ignored[0]), str(ignored[1])
        word = line.split(maxsplit=1)[0].removeprefix("--")
        if word in _NAMES:
            names = re.findall(_NAMES[word], self._text)
            parts = ["".join(name) for name in names]
            return _beginning(text, parts)
        if word in _OF_PASSES:
            return _beginning(text, (*NAMES, "all"))
        if word == "split-at":
            return _beginning(text, self._modules())
        if word == "only":
            return _beginning(text, [f"scope={path}" for path in self._modules()])
        return []

    def _modules(self) -> Iterable[str]:
        program = parse(self._text)
        for op in program.all_ops():
            for length in range(1, len(op.scope) + 1):
                yield scope_fqn(op.scope[:length])


def _beginning(start: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(start)})
