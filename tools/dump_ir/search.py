"""The cuts that `--stages` asks for: searched, or as an earlier search of the same program had them."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from stagecut.ir.graph import Program
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.tools.dump_ir.cache import computed, digest_of

if TYPE_CHECKING:
    from stagecut.backend.costs.balance import Balanced
    from stagecut.backend.costs.plan import Plan

DECIDE = ("stages", "schedule", "microbatches", "device")
"""The options that decide where a program is cut."""


def balanced(options: Namespace) -> Balanced:
    """The policy that `--stages` asks for."""
    from stagecut.backend.costs.balance import Balanced
    from stagecut.backend.costs.setting import Setting

    return Balanced(
        options.stages,
        Setting(options.device, options.schedule, options.microbatches),
        budget=math.inf,
    )


class Search:
    """The search for one program. `question` says all that decides its cuts; `why` why it was done again."""

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._plan: Plan | None = None
        self.question: dict[str, Any] = {}
        self.why = ""

    def cuts(self, program: Program) -> list[int]:
        """The positions of ops in front of which to cut. Raises as `Balanced.plan`."""
        self._text, self._names = text(program), program.output_names
        self.question = {name: getattr(self._options, name) for name in DECIDE}
        self.question["program"] = digest_of(program)

        def search() -> list[int]:
            self._plan = balanced(self._options).plan(program)
            return list(self._plan.cuts)

        needs = ("stagecut.backend.costs.balance",)
        answer = computed(self._options, "cuts", self.question, search, needs)
        self.why = answer.why
        return list(answer.content)

    def plan(self) -> Plan:
        """The cuts with their predicted costs."""
        if self._plan is None:
            program = parse(self._text)
            program.output_names = self._names
            self._plan = balanced(self._options).plan(program)
        return self._plan
