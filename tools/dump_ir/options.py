"""Rules for which options of `dump-ir` go together, and the option names in messages that name arguments of
functions.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOOKS = (
    "print_after",
    "print_before",
    "diff",
    "stats",
    "time",
    "trace_value",
    "trace_param",
)
"""Options that print something of their own; the program is then written only as a file."""

WRITTEN = (
    "format",
    "roles",
    "report",
    "timeline",
    "only",
    "level",
    "depth",
    "unfold",
)
"""Options that choose what is written at the end."""

CHECKS = ("verify_each", "check_each", "bisect")


@dataclass(frozen=True)
class Rule:
    """These options have no effect unless `holds`; `says` ends the sentence that begins with the option."""

    options: tuple[str, ...]
    says: str
    holds: Callable[[Namespace], bool]


def is_text(source: str) -> bool:
    """True for IR text, False for a model."""
    return source == "-" or source.endswith(".ir")


def _sources(options: Namespace) -> list[str]:
    """SOURCE, and the one that it is compared with."""
    return [options.source] + [options.against] * (options.against is not None)


def _is_python(source: str) -> bool:
    return not is_text(source) and not source.endswith(".pt2")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kinds(options: Namespace) -> list[str]:
    return [spec.partition("=")[0] for spec in options.only]


def _is_program(options: Namespace) -> bool:
    return not (options.report or options.timeline or options.format == "html")


def _is_picture(options: Namespace) -> bool:
    return _is_program(options) and options.format in ("dot", "svg")


def _is_whole_text(options: Namespace) -> bool:
    is_text_out = _is_program(options) and options.format == "text"
    return is_text_out and not options.only and not options.roles


def _runs_passes(options: Namespace) -> bool:
    return bool(options.passes) or (
        options.passes is None and not is_text(options.source)
    )


def _leaves_output_free(look: str) -> Callable[[Namespace], bool]:
    """A rule that holds where the option is not named, or where what it prints goes into a file."""

    def holds(options: Namespace) -> bool:
        return look not in options.named or options.directory is not None

    return holds


RULES = (
    Rule(
        ("config", "meta", "batch", "length"),
        "needs a SOURCE hf:NAME",
        lambda options: any(name.startswith("hf:") for name in _sources(options)),
    ),
    Rule(
        ("leaf",),
        "needs a SOURCE in Python: FILE.py:FACTORY, pkg.mod:FACTORY or hf:NAME",
        lambda options: any(map(_is_python, _sources(options))),
    ),
    Rule(
        ("trust",),
        "needs a SOURCE FILE.pt2",
        lambda options: any(name.endswith(".pt2") for name in _sources(options)),
    ),
    Rule(
        ("no_cache",),
        "needs a model, --stages, --report or --timeline: nothing else is kept",
        lambda options: (
            not all(map(is_text, _sources(options)))
            or options.stages is not None
            or options.report
            or options.timeline
        ),
    ),
    Rule(
        (*LOOKS, *CHECKS, "format", "roles", "report", "timeline", "interactive"),
        "does not go with --against, which compares the text of two programs",
        lambda options: options.against is None,
    ),
    Rule(
        ("against",),
        "- reads standard input, and so does SOURCE -",
        lambda options: _sources(options).count("-") < 2,
    ),
    Rule(
        ("unfold",),
        "needs --format text of the whole program: nothing else is folded",
        _is_whole_text,
    ),
    Rule(
        ("interactive",),
        "reads lines from standard input, and so does SOURCE -",
        lambda options: options.source != "-",
    ),
    Rule(
        (*LOOKS, *WRITTEN, *CHECKS, "stop_after", "directory"),
        "does not go with --interactive: say it there",
        lambda options: not options.interactive,
    ),
    Rule(
        ("split_at",),
        "does not go with --stages: both say where to cut",
        lambda options: options.stages is None,
    ),
    Rule(
        ("schedule", "microbatches", "device"),
        "needs --stages, --report, --timeline or --format html",
        lambda options: (
            options.stages is not None
            or options.report
            or options.timeline
            or options.format == "html"
            or options.interactive
        ),
    ),
    Rule(
        ("diff", "check_each", "bisect"),
        "needs passes to run: --passes all, or --passes A,B",
        _runs_passes,
    ),
    Rule(
        (*LOOKS, *WRITTEN),
        "does not go with --bisect, which prints its verdict and nothing else",
        lambda options: not options.bisect,
    ),
    *(
        Rule(
            WRITTEN,
            f"does not go with {_flag(look)} on standard output: -o DIR writes both",
            _leaves_output_free(look),
        )
        for look in LOOKS
    ),
    Rule(
        ("timeline",),
        "does not go with --report: ask for one of them",
        lambda options: not options.report,
    ),
    Rule(
        ("timeline",),
        "needs --format svg or --format json",
        lambda options: options.format in ("svg", "json"),
    ),
    Rule(
        ("report",),
        "needs --format text, json or svg",
        lambda options: options.format in ("text", "json", "svg"),
    ),
    Rule(
        ("roles",),
        "needs a model: IR text has no code to differentiate",
        lambda options: not is_text(options.source),
    ),
    Rule(
        ("roles",),
        "needs --format text, and no --only, --report or --timeline",
        lambda options: (
            options.format == "text" and not options.only and _is_program(options)
        ),
    ),
    Rule(
        ("only",),
        "shows a part of the program: it needs --format text, json, dot or svg, and no --report or "
        "--timeline",
        _is_program,
    ),
    Rule(
        ("only",),
        "takes one stage=N and one scope=NAME, not two of a kind",
        lambda options: len(set(_kinds(options))) == len(options.only),
    ),
    Rule(
        ("only",),
        "takes a stage=N for a picture, not a scope=NAME",
        lambda options: not _is_picture(options) or "scope" not in _kinds(options),
    ),
    Rule(
        ("level", "depth"),
        "needs --format dot or svg, and no --report or --timeline",
        _is_picture,
    ),
    Rule(
        ("level",),
        "takes modules or ops next to --only, not stages",
        lambda options: options.level != "stages" or not options.only,
    ),
    Rule(
        ("depth",),
        "needs --level modules, --level ops or --only stage=N",
        lambda options: options.level != "stages" or bool(options.only),
    ),
)
"""In this order; the first broken rule is reported."""


def named(parser: ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """The options that a command line names, including those that state what holds anyway. `--format text` is
    left out, because most options write text.
    """
    nothing = Namespace(**{action.dest: None for action in parser._actions})
    options = vars(parser.parse_args(argv, nothing))
    names = {name for name, value in options.items() if value is not None}
    if options["format"] == "text":
        names.discard("format")
    return names - {"source"}


def misuse(options: Namespace) -> str | None:
    """The first fault of the options as a whole, None for no fault. `options.named` are those that were
    named.
    """
    for rule in RULES:
        for name in rule.options:
            if name in options.named and not rule.holds(options):
                return f"{_flag(name)} {rule.says}"
    return None


_SPELLED = {
    r"leaf_modules=\['([^']*)'\]": r"--leaf \1",
    r"leaf_modules=\[\.\.\.\]": "--leaf NAME",
    r"\bleaf_modules\b": "--leaf",
    r"\bstages=(\d+)": r"--stages \1",
    r"level='(\w+)'": r"--level \1",
    r"pass ranks=, a divisor of the stages": "another --schedule",
    r" a Device\(\.\.\.\) describes any other": "",
    r"\bto_dot needs": "--format dot needs",
}
"""Argument of a function -> its option on the command line."""


def spelled(message: str) -> str:
    """A message with options in place of arguments of functions."""
    for argument, option in _SPELLED.items():
        message = re.sub(argument, option, message)
    return message
