"""Runs passes. Verifying, timing and showing belong here, so that a pass holds nothing but its own work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import PassError
from stagecut.ir.graph import CALL, Program
from stagecut.ir.text.printer import text
from stagecut.passes.base import Pass


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass: its place in the list, whether it changed the program, and how long it took in
    seconds.
    """

    index: int
    name: str
    changed: bool
    seconds: float


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    check: bool = False,
    after: Callable[[PassRecord, Program], None] = lambda record, program: None,
) -> list[PassRecord]:
    """Runs `passes` on `program` in order and calls `after` after each.

    With `check`, the program is verified before the first pass and after every pass, and a pass must say
    truly whether it changed the program. PassError or VerifyError names the pass at fault.
    """
    if any(op.target == CALL for op in program.all_ops()):
        raise PassError(
            "passes take the long form of a program, this one calls functions",
            hint="unfold(program) gives it",
        )
    if check:
        verify(program)
    records = []
    for index, step in enumerate(passes):
        old_text = text(program) if check else ""
        start = time.perf_counter()
        changed = step.run(program)
        record = PassRecord(index, step.name, changed, time.perf_counter() - start)
        if check:
            verify(program, after=step.name)
            if changed != (text(program) != old_text):
                claim = (
                    "left the program as it was but says it changed it"
                    if changed
                    else "changed the program but says it did not"
                )
                raise PassError(f"pass '{step.name}' {claim}")
        records.append(record)
        after(record, program)
    return records
