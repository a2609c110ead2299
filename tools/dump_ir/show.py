"""The output of `dump-ir`: tables, diffs, files that appear whole, and a bar for long steps."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from rich.progress import Progress, TextColumn, TimeElapsedColumn

from stagecut.backend.progress import bar
from stagecut.backend.tables import table
from stagecut.ir.errors import InputError, nearest
from stagecut.ir.graph import Op, Program, nested_ops, scope_fqn
from stagecut.ir.ops import module_path
from stagecut.ir.text.printer import size_text
from stagecut.ir.types import value_bytes

_COLORS = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"}
_PLAIN = "\033[0m"


@dataclass(frozen=True)
class Stats:
    """The contents of a program: ops, values, state entries, stages, and crossings between stages, in bytes
    for one micro-batch.
    """

    HEAD: ClassVar[tuple[str, ...]] = (
        "ops",
        "values",
        "state",
        "stages",
        "crossing",
        "bytes",
    )

    ops: int
    values: int
    state: int
    stages: int
    crossing: int
    bytes: int

    def cells(self) -> tuple[str, ...]:
        """The numbers as a row of a table."""
        return (
            str(self.ops),
            str(self.values),
            str(self.state),
            str(self.stages),
            str(self.crossing),
            size_text(self.bytes),
        )


def stats_of(program: Program) -> Stats:
    """The numbers of a program. Inputs and recomputed values do not cross."""
    ops = list(program.all_ops())
    values = (
        len(program.inputs)
        + len(program.state)
        + sum(len(op.results) + len(op.versions) for op in ops)
    )
    crossing = [
        transfer.value
        for transfer in program.transfers
        if transfer.source is not None and transfer.recomputed is None
    ]
    size = sum(value_bytes(value.type) or 0 for value in crossing)
    return Stats(
        len(ops), values, len(program.state), len(program.stages), len(crossing), size
    )


def times(steps: Sequence[tuple[str, float]]) -> str:
    """A table of steps with their times and their shares of the whole."""
    whole = sum(seconds for _, seconds in steps) or 1.0
    rows = [
        (title, f"{1000 * seconds:.1f} ms", f"{100 * seconds / whole:.1f} %")
        for title, seconds in steps
    ]
    return table([("step", "time", "part"), *rows]) + "\n"


def diff(old: str, new: str, before: str, after: str) -> str:
    """The changes, as a unified diff of lines."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), before, after, lineterm="", n=2
    )
    return "\n".join(lines) + "\n"


@contextmanager
def shown_source(program: Program, shown: bool) -> Iterator[None]:
    """Inside, ops show the user's lines that they come from, or with `shown=False` none."""
    if shown:
        yield
        return
    ops = [*_every_op(program)]
    places = [op.place for op in ops]
    for op in ops:
        op.place = op.place._replace(loc=None)
    try:
        yield
    finally:
        for op, place in zip(ops, places, strict=True):
            op.place = place


def name_files_from_here(program: Program) -> None:
    """Ops name the files in the working directory from there, as a person does who asks for one of them."""
    for op in _every_op(program):
        if op.loc is not None:
            file = from_here(op.loc.file)
            op.place = op.place._replace(loc=op.loc._replace(file=file))


def from_here(path: str) -> str:
    """The path of a file from the working directory, where it is in it; otherwise the path as it is."""
    if not os.path.isabs(path):
        return path
    beside = os.path.relpath(os.path.realpath(path))
    return path if beside.startswith(os.pardir) else beside


def _every_op(program: Program) -> Iterator[Op]:
    """Every op: those of stages, of their backward, and of regions."""
    backward = (op for _, block in program.backward_blocks() for op in block.ops)
    yield from nested_ops(chain(program.all_ops(), backward))


def only(program: Program, specs: Sequence[str]) -> Callable[[Op], bool] | None:
    """The ops that `--only` keeps: those that match all of `specs`; None for all ops. Raises InputError when
    none matches.
    """
    if not specs:
        return None
    tests = [_part(program, spec) for spec in specs]
    kept = {op for op in program.all_ops() if all(test(op) for test in tests)}
    if not kept:
        raise InputError(
            f"--only {' --only '.join(specs)}: no op is in both",
            hint="give one of them",
        )
    return kept.__contains__


def _part(program: Program, spec: str) -> Callable[[Op], bool]:
    """The ops that one `--only` names."""
    kind, _, name = spec.partition("=")
    if kind == "stage" and name.isdecimal():
        if int(name) >= len(program.stages):
            raise InputError(
                f"--only {spec}: there are {len(program.stages)} stages",
                hint="they are numbered from 0",
            )
        return set(program.stages[int(name)].ops).__contains__
    if kind != "scope" or not name:
        raise InputError(
            f"--only {spec} is not known", hint="--only stage=N or --only scope=MODULE"
        )
    if not any(_runs_in(op, name) for op in program.all_ops()):
        raise InputError(
            f"--only {spec}: no op is in such a module",
            hint=nearest(name, sorted({_path(op) for op in program.all_ops()})),
        )
    return lambda op: _runs_in(op, name)


def _path(op: Op) -> str:
    """The module that an op is in, or that it is, when the module is kept whole."""
    return module_path(op) or scope_fqn(op.scope)


def _runs_in(op: Op, path: str) -> bool:
    return f"{_path(op)}.".startswith(f"{path}.")


class Writer:
    """Writes to standard output, or whole files into a directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        if directory is None and sys.stdout is None:
            raise InputError("standard output is closed", hint="-o DIR writes files")
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"cannot make directory '{directory}': {error}"
                ) from None

    def show(self, name: str, content: str) -> None:
        """Shows a program between passes."""
        if self._directory is None:
            sys.stdout.write(f"# {name.removesuffix('.ir')}\n{content}\n")
        else:
            self.final(name, content)

    def colored(self, name: str, content: str) -> None:
        """A diff, in colours on a terminal that wants them."""
        wants = (
            self._directory is None
            and sys.stdout.isatty()
            and not os.environ.get("NO_COLOR")
        )
        self.final(
            name,
            "".join(map(_painted, content.splitlines(keepends=True)))
            if wants
            else content,
        )

    def final(self, name: str, content: str) -> None:
        """Writes the result. A file appears whole or not at all. Raises InputError when it cannot be
        written.
        """
        if self._directory is None:
            sys.stdout.write(content)
            return
        part = self._directory / f".{name}.part"
        try:
            part.write_text(content, encoding="utf-8")
            part.replace(self._directory / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(
                f"cannot write '{self._directory / name}': {error}"
            ) from None


def _painted(line: str) -> str:
    color = _COLORS.get(line[:1])
    return line if color is None else color + line.rstrip("\n") + _PLAIN + "\n"


class Steps:
    """A bar on a terminal that shows the step that runs; nothing where the output is no terminal."""

    def __enter__(self) -> Steps:
        columns = (
            *Progress.get_default_columns()[:-1],
            TimeElapsedColumn(),
            TextColumn("{task.fields[step]}"),
        )
        self._open = ExitStack()
        self._bar = self._open.enter_context(bar(*columns))
        if self._bar is not None:
            self._task = self._bar.add_task("dump-ir", total=None, step="")
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def do(self, step: str, action: Callable[[], Any]) -> Any:
        """The result of `action`; meanwhile the bar shows its name."""
        if self._bar is not None:
            self._bar.update(self._task, step=step)
        return action()

    def say(self, text: str) -> None:
        """Writes a text on standard error, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif sys.stderr is not None:
            print(text, file=sys.stderr)

    def expect(self, count: int) -> None:
        """`count` passes follow."""
        if self._bar is not None:
            self._bar.update(self._task, total=count)

    def done(self, step: str) -> None:
        """One pass is done."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, step=step)
