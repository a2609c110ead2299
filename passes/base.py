"""A pass is a frozen dataclass with a name, options as fields, and `run(program) -> changed`."""

from __future__ import annotations

from typing import Protocol

from stagecut.ir.graph import Program


class Pass(Protocol):
    """One step of the compiler. Timing, dumping and verifying belong to the runner, not here."""

    @property
    def name(self) -> str:
        """The pass's name on the command line and in dumps."""
        ...

    def run(self, program: Program) -> bool:
        """Transforms `program` in place; True when anything changed."""
        ...
