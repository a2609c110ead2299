"""canonicalize: guards, dead ops and superfluous markers are gone."""

from __future__ import annotations

from helpers import Bless, diff_of, leaves_alone, load

from stagecut.passes.canonicalize import Canonicalize


def test_dead_code_and_guards(bless: Bless) -> None:
    bless("canonicalize-dead-code.diff", diff_of(Canonicalize(), load("dead-code")))


def test_markers(bless: Bless) -> None:
    bless("canonicalize-markers.diff", diff_of(Canonicalize(), load("markers")))


def test_clean_program_stays() -> None:
    leaves_alone(Canonicalize(), load("clean"))


def test_staged_program_stays() -> None:
    leaves_alone(Canonicalize(), load("shared"))


def test_removed_ops_use_nothing() -> None:
    program = load("dead-code")
    dead = next(op for op in program.ops if op.target == "aten.neg.default")
    Canonicalize().run(program)
    assert dead.operands == []
    assert all(dead not in value.uses for value in program.inputs)
