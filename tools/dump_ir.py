"""dump-ir: shows what the compiler does to a model, pass by pass."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stagecut.ir.errors import InputError, StagecutError, nearest
from stagecut.ir.graph import Program
from stagecut.ir.parser import parse
from stagecut.ir.printer import text
from stagecut.ir.verifier import verify
from stagecut.passes.base import Pass
from stagecut.passes.find_splits import BEGINNING, END, FindSplits
from stagecut.passes.pipeline import NAMES, default_pipeline, pass_by_name
from stagecut.passes.runner import PassRecord, run_passes

EXAMPLES = """\
examples:
  dump-ir model.py:make --split-at layers.2 --split-at layers.4
        the linked program of the model that make() returns as (module, args, kwargs)
  dump-ir my.models:make --print-after partition
        the program right after one pass
  dump-ir model.py:make --print-after all -o out/
        one file a pass that changed something: out/00-canonicalize.ir, ...
  dump-ir program.ir --passes canonicalize,find-splits,partition --split-at layers.2
        reads IR text back and runs passes on it
  dump-ir model.py:make --format dot | dot -Tsvg > stages.svg
  dump-ir model.py:make --stages 4 --schedule GPipe --report
        what four balanced stages cost, what crosses and why
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when it worked, 1 for an error in what it was given, 2 for a wrong command line."""
    options = _arguments().parse_args(argv)
    try:
        _run(options)
        sys.stdout.flush()
    except StagecutError as error:
        print(f"dump-ir: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dump-ir",
        description="Show what stagecut does to a model, pass by pass.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="FILE.py:FACTORY, pkg.mod:FACTORY, or a file of IR text (*.ir, - for standard input)")
    parser.add_argument("--split-at", metavar="NAME", action="append", default=[], help="cut before module NAME (NAME:end: behind it)")
    parser.add_argument("--stages", metavar="N", type=int, help="cut into N stages that are balanced by predicted time")
    parser.add_argument("--schedule", default="1F1B", help="what --stages and --report reckon with (default: 1F1B)")
    parser.add_argument("--microbatches", metavar="N", type=int, default=8, help="so many of them (default: 8)")
    parser.add_argument("--device", default="H100", help="and this device: H100, H200, A100, ... (default: H100)")
    parser.add_argument("--report", action="store_true", help="what the stages cost instead of the program; --format json, svg")
    parser.add_argument("--passes", metavar="A,B", help="run just these passes ('all' for all); default: all on a model, none on IR text")
    parser.add_argument("--print-after", metavar="PASS", action="append", default=[], help="show the program after PASS, or after 'all'")
    parser.add_argument("--format", choices=["text", "dot", "json", "svg"], default="text", help="what to write (default: text)")
    parser.add_argument("-o", dest="directory", metavar="DIR", type=Path, help="write files into DIR instead of standard output")
    return parser


def _run(options: argparse.Namespace) -> None:
    for name in options.print_after:
        if name not in (*NAMES, "all"):
            raise InputError(f"unknown pass '{name}' after --print-after", hint=nearest(name, [*NAMES, "all"]))
    program, is_model = _load(options.source)
    writer = _Writer(options.directory)
    wanted = set(options.print_after)
    if "all" in wanted:
        writer.show("input.ir", text(program))

    def after(record: PassRecord, current: Program) -> None:
        if record.name in wanted or ("all" in wanted and record.changed):
            writer.show(f"{record.index:02}-{record.name}.ir", text(current))

    run_passes(program, _passes(options, is_model), check=True, after=after)
    if wanted and options.directory is None:
        return
    if options.report:
        _report(program, options, writer)
    elif options.format in ("json", "svg"):
        raise InputError(f"--format {options.format} is a format of reports", hint="add --report")
    elif options.format == "dot":
        writer.final("program.dot", _dot(program))
    else:
        writer.final("program.ir", text(program))


def _setting(options: argparse.Namespace) -> Any:
    from stagecut.balance import Setting

    return Setting(options.device, options.schedule, options.microbatches)


def _report(program: Program, options: argparse.Namespace, writer: _Writer) -> None:
    from stagecut.report import report

    if program.phase != "linked":
        raise InputError(f"a report is on linked programs, this one is {program.phase}", hint="run all passes: --passes all")
    if options.format == "dot":
        raise InputError("a report is text, json or svg")
    found = report(program, _setting(options))
    made = {"text": lambda: f"{found}\n", "json": lambda: found.to_json() + "\n", "svg": found.to_svg}[options.format]()
    writer.final({"text": "report.txt", "json": "report.json", "svg": "report.svg"}[options.format], made)


def _passes(options: argparse.Namespace, is_model: bool) -> list[Pass]:
    policy = None
    if options.stages is not None:
        from stagecut.balance import Balanced

        policy = Balanced(options.stages, _setting(options), budget=math.inf)
    splits = FindSplits(tuple(_split_point(name) for name in options.split_at), policy)
    if options.passes == "all" or (options.passes is None and is_model):
        return default_pipeline(splits)
    names = [name for name in (options.passes or "").split(",") if name]
    return [splits if name == FindSplits.name else pass_by_name(name) for name in names]


def _split_point(name: str) -> tuple[str, str]:
    module, _, side = name.partition(":")
    if side not in ("", BEGINNING, END):
        raise InputError(f"--split-at {name}: '{side}' is no side of a module", hint=f"'{module}' or '{module}:end'")
    return module, side or BEGINNING


def _dot(program: Program) -> str:
    from stagecut.backend.dot import to_dot

    if program.phase != "linked":
        raise InputError(f"DOT shows linked programs, this one is {program.phase}", hint="run all passes: --passes all")
    return to_dot(program)


def _load(source: str) -> tuple[Program, bool]:
    if source == "-":
        return _checked(parse(sys.stdin.read(), "<stdin>")), False
    if source.endswith(".ir"):
        return _checked(parse(_read(Path(source)), source)), False
    path, colon, name = source.rpartition(":")
    if not colon or not name or not path:
        raise InputError(f"'{source}' is neither FILE.py:FACTORY, pkg.mod:FACTORY nor a file of IR text", hint="dump-ir model.py:make")
    return _trace(*_call(_factory(path, name), source)), True


def _checked(program: Program) -> Program:
    verify(program)
    return program


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None


def _factory(path: str, name: str) -> Callable[[], Any]:
    module = _module_of_file(Path(path)) if path.endswith(".py") else _import(path)
    factory = getattr(module, name, None)
    if factory is None:
        known = [n for n, item in vars(module).items() if callable(item) and not n.startswith("_")]
        raise InputError(f"'{path}' has no factory '{name}'", hint=nearest(name, known))
    if not callable(factory):
        raise InputError(f"'{name}' in '{path}' is no callable", hint="it must return (module, args, kwargs)")
    made: Callable[[], Any] = factory
    return made


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file '{path}'")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    _guard(lambda: spec.loader.exec_module(module), f"importing '{path}'")  # type: ignore[union-attr]
    return module


def _import(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    module: ModuleType = _guard(lambda: importlib.import_module(name), f"importing '{name}'")
    return module


def _call(factory: Callable[[], Any], source: str) -> tuple[Any, Any, Any]:
    made = _guard(factory, f"calling '{source}'")
    if not isinstance(made, tuple) or len(made) != 3:
        raise InputError(f"'{source}' returned {type(made).__name__}", hint="it must return (module, args, kwargs)")
    return made


def _guard(action: Callable[[], Any], doing: str) -> Any:
    """The result of the user's code; what it raises becomes an error that points at its line."""
    try:
        return action()
    except StagecutError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{doing} failed: {type(error).__name__}: {error}", where=f"{frame.filename}:{frame.lineno}: {frame.line}"
        ) from None


def _trace(module: Any, args: Any, kwargs: Any) -> Program:
    from stagecut.pipe import lower

    return lower(module, args, kwargs)[0]


class _Writer:
    """Writes to standard output, or whole files into a directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make directory '{directory}': {error}") from None

    def show(self, name: str, content: str) -> None:
        """A program on the way."""
        if self._directory is None:
            sys.stdout.write(f"# {name.removesuffix('.ir')}\n{content}\n")
        else:
            self.final(name, content)

    def final(self, name: str, content: str) -> None:
        """The result. A file appears whole or not at all."""
        if self._directory is None:
            sys.stdout.write(content)
            return
        part = self._directory / f".{name}.part"
        part.write_text(content)
        part.replace(self._directory / name)


if __name__ == "__main__":
    sys.exit(main())
