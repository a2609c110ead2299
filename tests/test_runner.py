"""The runner: holds passes to what they say, names the one at fault, tells what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from helpers import load, named

from stagecut.ir.errors import PassError, VerifyError
from stagecut.ir.graph import Program
from stagecut.passes.pipeline import NAMES, default_pipeline
from stagecut.passes.runner import PassRecord, run_passes


@dataclass(frozen=True)
class Fake:
    """A pass that does `work` and says `claim`."""

    work: Callable[[Program], object]
    claim: bool
    name: str = "fake"

    def run(self, program: Program) -> bool:
        self.work(program)
        return self.claim


def rename(program: Program) -> None:
    """A change that keeps the program valid."""
    program.name += "2"


def nothing(program: Program) -> None:
    """No change."""


def corrupt(program: Program) -> None:
    """A change that breaks V2."""
    named(program, "%x").uses.clear()


def test_a_denied_change_is_caught() -> None:
    with pytest.raises(PassError, match=r"^pass 'fake' changed the program but says it did not$"):
        run_passes(load("clean"), [Fake(rename, False)], check=True)


def test_a_claimed_change_is_caught() -> None:
    with pytest.raises(PassError, match=r"^pass 'fake' left the program as it was but says it changed it$"):
        run_passes(load("clean"), [Fake(nothing, True)], check=True)


def test_the_pass_that_breaks_the_program_is_named() -> None:
    steps = [Fake(rename, True, "good"), Fake(corrupt, False, "bad"), Fake(rename, True, "late")]
    seen: list[str] = []
    with pytest.raises(VerifyError, match="invalid program after pass 'bad'"):
        run_passes(load("clean"), steps, check=True, after=lambda record, program: seen.append(record.name))
    assert seen == ["good"]


def test_a_program_broken_before_is_no_fault_of_a_pass() -> None:
    program = load("clean")
    corrupt(program)
    with pytest.raises(VerifyError) as caught:
        run_passes(program, [Fake(nothing, False)], check=True)
    assert "after pass" not in str(caught.value)


def test_nothing_is_checked_unasked() -> None:
    program = load("clean")
    records = run_passes(program, [Fake(rename, False), Fake(corrupt, True)])
    assert [record.changed for record in records] == [False, True]


def test_records_and_callback() -> None:
    program = load("clean")
    seen: list[tuple[PassRecord, str]] = []
    records = run_passes(program, default_pipeline(), check=True, after=lambda record, p: seen.append((record, p.phase)))
    assert records == [record for record, _ in seen]
    assert [(record.index, record.name) for record in records] == list(enumerate(NAMES))
    assert [phase for _, phase in seen] == ["traced"] * 5 + ["partitioned"] * 5 + ["linked"] * 2
    assert [record.name for record in records if record.changed] == ["partition", "share-state", "liveness", "route"]
    assert all(record.seconds >= 0 for record in records)


@pytest.mark.parametrize(
    "case", ["dead-code", "markers", "tied", "writes", "last-write", "double-write", "gradients", "modules", "written-sources"]
)
def test_the_whole_pipeline_keeps_its_word(case: str) -> None:
    """Under check, every pass leaves a valid program and is right about what it changed; the second time nothing is left to do."""
    program = load(case)
    run_passes(program, default_pipeline(), check=True)
    assert program.phase == "linked"
    again = run_passes(program, default_pipeline(), check=True)
    assert not any(record.changed for record in again)
