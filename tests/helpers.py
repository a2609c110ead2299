"""Reading IR cases and showing what a pass does to them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import ParseError, VerifyError
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text, value_names
from stagecut.passes.base import Pass

CASES = Path(__file__).parent / "cases"
Bless = Callable[[str, str], None]


def load(case: str, *passes: Pass) -> Program:
    """The program in tests/cases/<case>.ir after `passes`; it is valid."""
    program = parse((CASES / f"{case}.ir").read_text(encoding="utf-8"), f"{case}.ir")
    verify(program)
    for step in passes:
        step.run(program)
        verify(program, after=step.name)
    return program


def diff_of(step: Pass, program: Program) -> str:
    """The diff `step` makes in the text. Afterwards the program is valid, reads back, and `step` has nothing left to do."""
    before = text(program)
    assert step.run(program)
    after = text(program)
    verify(program, after=step.name)
    assert text(parse(after)) == after
    leaves_alone(step, program)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", f"after {step.name}", lineterm="", n=100)
    return "\n".join(lines) + "\n"


def leaves_alone(step: Pass, program: Program) -> None:
    """`step` changes nothing in `program`, and says so."""
    before = text(program)
    assert not step.run(program)
    assert text(program) == before


def named(program: Program, name: str) -> Value:
    """The value printed as `name` (`%x`, `@w`)."""
    return next(value for value, printed in value_names(program).items() if printed == name)


def defining(program: Program, name: str) -> Op:
    """The op that defines the value printed as `name`."""
    owner = named(program, name).owner
    assert isinstance(owner, Op)
    return owner


def rules_broken(program: Program) -> set[str]:
    """The ids of the invariants `program` breaks."""
    try:
        verify(program)
    except VerifyError as error:
        return {violation.partition(":")[0] for violation in error.violations}
    return set()


def refusal(source: str) -> ParseError:
    """The error with which `source` is refused."""
    with pytest.raises(ParseError) as caught:
        parse(source, "bad.ir")
    return caught.value
