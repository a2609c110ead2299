"""dump-ir: shows what the compiler does to a model, pass by pass."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stagecut.ir.errors import InputError, StagecutError, nearest
from stagecut.passes.base import Pass
from stagecut.passes.find_splits import BEGINNING, END, FindSplits
from stagecut.passes.pipeline import NAMES, default_pipeline, pass_by_name
from stagecut.tools.dump_ir.evidence import begin, folders
from stagecut.tools.dump_ir.options import misuse, named, spelled
from stagecut.tools.dump_ir.search import Search
from stagecut.tools.dump_ir.session import Session, opened, source_of
from stagecut.tools.dump_ir.sources import Source

EXAMPLES = """\
examples:
  dump-ir model.py:make --split-at layers.2 --split-at layers.4
        the linked program of the model that make() returns as (module, args, kwargs)
  dump-ir hf:LlamaForCausalLM --stages 4 --report
        what four balanced stages cost, what crosses and why
  dump-ir my.models:make --print-after partition | dump-ir - --stats
        the program right after one pass; text is read back
  dump-ir model.py:make --stages 4 --diff
        what each pass changes
  dump-ir model.py:make --stages 4 --against before.ir
        how the program differs from one that was written before, or from that of another model
  dump-ir model.py:make --stages 4 --bisect
        the first pass after which the program computes something else
  dump-ir model.py:make --stages 4 --format html -o out/
        one page with everything: out/index.html
"""

FORMATS = ("text", "json", "dot", "svg", "html")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when it worked, 1 for an error in what it was given, 2 for a wrong command line.

    With `--against`, as diff does: 0 for equal texts, 1 for different ones, 2 for every error.
    """
    begin()
    command_line = parser()
    options = command_line.parse_args(argv)
    options.named = named(command_line, argv)
    fault = misuse(options)
    if fault:
        return _failed(2, fault)
    try:
        return _status(options)
    finally:
        # a source in Python has added its folder
        sys.path[:] = folders


def _status(options: argparse.Namespace) -> int:
    """The exit status, after all is written that is asked for."""
    failure = 1 if options.against is None else 2
    try:
        _check(options)
        if options.interactive:
            return _interactive(options)
        status = _run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except StagecutError as error:
        return _failed(failure, spelled(str(error)))
    except BrokenPipeError:
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        return _failed(failure, str(error))
    except KeyboardInterrupt:
        return 130
    return status


def _run(options: argparse.Namespace) -> int:
    """Writes all that is asked for; 1 where two programs are compared and differ."""
    if options.against is None:
        _session(options).run()
        return 0
    from stagecut.tools.dump_ir.against import compare

    return int(not compare(options, _session))


def _session(
    options: argparse.Namespace, source: Callable[[argparse.Namespace], Any] = source_of
) -> Session:
    return Session(options, lambda is_model: _passes(options, is_model), source)


def _interactive(options: argparse.Namespace) -> int:
    """Does line after line of standard input; 1 when a line failed that no person typed."""
    from stagecut.tools.dump_ir.interactive import Interactive, Parser

    def session(line: argparse.Namespace, source: Callable[..., Any]) -> Session:
        _check(line)
        return _session(line, source)

    def told(fresh: bool) -> Source:
        source = opened(options, fresh)
        for note in source.notes:
            print(f"dump-ir: note: {spelled(note)}", file=sys.stderr)
        return source

    command_line = parser(Parser)
    lines = Interactive(
        options,
        told(fresh=False),
        command_line,
        lambda argv: named(command_line, argv),
        Session.run,
        session,
        lambda: told(fresh=True),
    )
    lines.cmdloop()
    return int(lines.failed and not sys.stdin.isatty())


def _failed(status: int, message: str) -> int:
    if sys.stderr is not None:
        print(f"dump-ir: error: {message}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """Output that is still unwritten is dropped, so that Python's own flush at the end does not fail
    again.
    """
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser(
    kind: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> Any:
    """The parser of the command line."""
    parser = kind(
        prog="dump-ir",
        usage="dump-ir SOURCE [options]",
        description="Show what stagecut does to a model, pass by pass.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="FILE.py:FACTORY, pkg.mod:FACTORY, hf:NAME of transformers, FILE.pt2, FILE.ir, - for text",
    )
    _add_model(parser.add_argument_group("the model"))
    _add_cuts(parser.add_argument_group("where to cut"))
    _add_shown(parser.add_argument_group("what to show"))
    _add_checks(parser.add_argument_group("what to check"))
    _add_completion(parser)
    return parser


def whole_number(text: str) -> int:
    """A number of things, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _depth(text: str) -> int:
    """The depth to which modules are opened, from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(
            f"{number} opens no modules; 0 shows one box for each outermost module"
        )
    return number


WRITTEN_AS = (".svg", ".html", ".json", ".dot", ".ir", ".txt")
"""Names of files that end so are taken for no folder."""


def _directory(text: str) -> Path:
    """The folder for files. An empty name, as of a variable that is not set, would be the working
    directory.
    """
    if not text:
        raise argparse.ArgumentTypeError(
            "the name is empty; '.' is the working directory"
        )
    path = Path(text)
    if path.suffix in WRITTEN_AS and not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"'{text}' is the name of a file, and DIR is a folder; without -o, write '> {text}'"
        )
    return path


def _add_model(group: Any) -> None:
    group.add_argument(
        "--config",
        metavar="FILE|K=V",
        action="append",
        default=[],
        help="hf: settings of the config (default: small)",
    )
    group.add_argument(
        "--meta",
        action="store_true",
        help="hf: on the meta device, at any size without memory",
    )
    group.add_argument(
        "--batch",
        metavar="N",
        type=whole_number,
        default=2,
        help="hf: rows of the inputs (default: 2)",
    )
    group.add_argument(
        "--length",
        metavar="N",
        type=whole_number,
        default=16,
        help="hf: tokens of each row (default: 16)",
    )
    group.add_argument(
        "--leaf",
        metavar="NAME",
        action="append",
        default=[],
        help="keep module NAME whole, as leaf_modules= does",
    )
    group.add_argument(
        "--trust",
        action="store_true",
        help="open a .pt2, which may run code that is inside",
    )
    group.add_argument(
        "--no-cache",
        action="store_true",
        help="trace and search, whatever the cache has, and leave it as it is",
    )


def _add_cuts(group: Any) -> None:
    group.add_argument(
        "--split-at",
        metavar="NAME",
        action="append",
        default=[],
        help="cut before module NAME (NAME:end: behind it)",
    )
    group.add_argument(
        "--stages",
        metavar="N",
        type=whole_number,
        help="cut into N stages that are balanced by predicted time",
    )
    group.add_argument(
        "--schedule",
        default="1F1B",
        help="the schedule that --stages and --report reckon with (default: 1F1B)",
    )
    group.add_argument(
        "--microbatches",
        metavar="N",
        type=whole_number,
        default=8,
        help="how many micro-batches they reckon with (default: 8)",
    )
    group.add_argument(
        "--device",
        default="H100",
        help="the device that they reckon with: H100, H200, A100, ... (default: H100)",
    )


def _add_shown(group: Any) -> None:
    group.add_argument(
        "--passes",
        metavar="A,B",
        help="run just these ('all' for all); default: all on a model, none on IR text",
    )
    group.add_argument(
        "--stop-after", metavar="PASS", help="run no pass behind this one"
    )
    group.add_argument(
        "--print-after",
        metavar="PASS",
        action="append",
        default=[],
        help="the program after PASS, or after 'all'",
    )
    group.add_argument(
        "--print-before",
        metavar="PASS",
        action="append",
        default=[],
        help="the program before PASS, or before 'all'",
    )
    group.add_argument(
        "--against",
        metavar="OTHER",
        help="how its text differs from that of OTHER, compiled with the same options, or a file of text",
    )
    group.add_argument(
        "--no-source",
        action="store_true",
        help="show no file and no line that ops come from",
    )
    group.add_argument(
        "--diff", action="store_true", help="what each pass changes, as a diff"
    )
    group.add_argument(
        "--stats",
        action="store_true",
        help="ops, values, state and bytes that cross, after each pass",
    )
    group.add_argument(
        "--time",
        action="store_true",
        help="how long tracing and each pass take, as parts of the whole",
    )
    group.add_argument(
        "--only",
        metavar="stage=N|scope=NAME",
        action="append",
        default=[],
        help="only one stage, the ops of one module, or both",
    )
    group.add_argument(
        "--trace-value",
        metavar="NAME",
        help="where a value is born, written, read, sent, and last used",
    )
    group.add_argument(
        "--trace-param",
        metavar="FQN",
        help="a parameter's or buffer's names, owners, uses and policy",
    )
    group.add_argument(
        "--unfold",
        action="store_true",
        help="the ops of every block, as pipe.ir() has them, where blocks that do the same would be calls of "
        "one function",
    )
    group.add_argument(
        "--roles",
        action="store_true",
        help="each stage as its forward, the gradients of its inputs, those of its weights",
    )
    group.add_argument(
        "--report",
        action="store_true",
        help="what the stages cost; also as --format json or svg",
    )
    group.add_argument(
        "--timeline",
        action="store_true",
        help="what each rank does when, predicted: svg, or json for Chrome's tracing",
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="what to write (default: text)",
    )
    group.add_argument(
        "--level",
        choices=["stages", "modules", "ops"],
        default="stages",
        help="dot, svg: what a node is (default: stages)",
    )
    group.add_argument(
        "--depth",
        metavar="N",
        type=_depth,
        help="dot, svg: fold modules that lie deeper",
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="trace once, then cut and look, line after line",
    )
    group.add_argument(
        "-o",
        dest="directory",
        metavar="DIR",
        type=_directory,
        help="write files into DIR instead of standard output",
    )


def _add_checks(group: Any) -> None:
    group.add_argument(
        "--verify-each",
        action="store_true",
        help="hold the program to its invariants after every pass",
    )
    group.add_argument(
        "--check-each",
        action="store_true",
        help="run it before and after every pass, and compare",
    )
    group.add_argument(
        "--bisect",
        action="store_true",
        help="name the first pass after which results differ, and what differs",
    )


def _add_completion(parser: argparse.ArgumentParser) -> None:
    import shtab

    shtab.add_argument_to(
        parser,
        "--print-completion",
        help="a script with which that shell completes this command",
    )


def _check(options: argparse.Namespace) -> None:
    for option, name in _printed(options):
        _check_pass(option, name)
    if options.stop_after is not None:
        _check_pass("--stop-after", options.stop_after)


def _printed(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The passes that are named to print the program after or before them, with the option that names
    them.
    """
    after = [("--print-after", name) for name in options.print_after]
    before = [("--print-before", name) for name in options.print_before]
    return [(option, name) for option, name in (*after, *before) if name != "all"]


def _check_pass(option: str, name: str) -> None:
    if name not in NAMES:
        raise InputError(
            f"unknown pass '{name}' after {option}", hint=nearest(name, NAMES)
        )


def _passes(options: argparse.Namespace, is_model: bool) -> list[Pass]:
    """The passes to run, in order."""
    splits = FindSplits(
        tuple(_split_point(name) for name in options.split_at), _policy(options)
    )
    if options.passes == "all" or (options.passes is None and is_model):
        chosen = default_pipeline(splits)
    else:
        names = [name for name in (options.passes or "").split(",") if name]
        chosen = [
            splits if name == FindSplits.name else pass_by_name(name) for name in names
        ]
    if (options.stages is not None or options.split_at) and splits not in chosen:
        raise InputError(
            "where to cut is said, and the pass that cuts is not run",
            hint="--passes all",
        )
    if options.stop_after is not None:
        chosen = chosen[: _place("--stop-after", options.stop_after, chosen) + 1]
    for option, name in _printed(options):
        _place(option, name, chosen)
    return chosen


def _place(option: str, name: str, chosen: list[Pass]) -> int:
    """The place, among the passes that run, of a pass that an option names."""
    ran = [step.name for step in chosen]
    if name not in ran:
        raise InputError(
            f"{option} {name}: this pass is not run",
            hint=nearest(name, ran) if ran else "--passes all",
        )
    return ran.index(name)


def _policy(options: argparse.Namespace) -> Any:
    """The policy that finds the cuts; the search stays with the options, for the report."""
    options.search = None
    if options.stages is None:
        return None
    options.search = Search(options)
    return options.search.cuts


def _split_point(name: str) -> tuple[str, str]:
    module, _, side = name.partition(":")
    if not module:
        raise InputError(
            f"--split-at '{name}' names no module", hint="--split-at layers.4"
        )
    if side not in ("", BEGINNING, END):
        raise InputError(
            f"--split-at {name}: '{side}' is no side of a module",
            hint=f"'{module}' or '{module}:end'",
        )
    return module, side or BEGINNING


if __name__ == "__main__":
    sys.exit(main())
