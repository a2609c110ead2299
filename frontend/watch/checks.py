"""Checks of data that only raise: a trace takes them as passing, and its stages do not check."""

from __future__ import annotations

import dis
import sys
from types import FrameType
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from stagecut.frontend.source import outside_of_modes
from stagecut.frontend.watch.lost_lines import LostLines


class Checks(TorchFunctionMode):
    """While open, a condition on data of which one branch does nothing but raise has the outcome that takes
    the other, and the line is noted.
    """

    def __init__(self, lines: LostLines) -> None:
        super().__init__()
        self._lines = lines

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__bool__" and isinstance(args[0], FakeTensor):
            frame = outside_of_modes(sys._getframe(1))
            outcome = _outcome_that_goes_on(frame)
            if outcome is not None:
                self._note(frame)
                return outcome
        return func(*args, **(kwargs or {}))

    def _note(self, frame: FrameType) -> None:
        self._lines.note(
            frame,
            "{forward} checks data here and raises where the check fails; the stages do not check, and go on",
            "check the output instead, outside of the model",
            "checks in each call",
        )


def _outcome_that_goes_on(frame: FrameType) -> bool | None:
    """If exactly one branch of the condition that `frame` is at does nothing but raise, the value that takes
    the other branch; else None.
    """
    steps = [
        step
        for step in dis.get_instructions(frame.f_code)
        if step.opname not in ("CACHE", "NOP", "EXTENDED_ARG")
    ]
    numbers = {step.offset: number for number, step in enumerate(steps)}
    at = numbers.get(frame.f_lasti, len(steps))
    if at < len(steps) and steps[at].opname == "TO_BOOL":
        at += 1
    if (
        at >= len(steps)
        or "POP_JUMP" not in steps[at].opname
        or not steps[at].opname.endswith(("IF_FALSE", "IF_TRUE"))
    ):
        return None
    jumps_on = steps[at].opname.endswith("IF_TRUE")
    raises = {
        jumps_on: _raises(steps, numbers[steps[at].argval]),
        not jumps_on: _raises(steps, at + 1),
    }
    return raises[False] if raises[True] != raises[False] else None


def _raises(steps: list[dis.Instruction], start: int) -> bool:
    """True when the code from `start` on runs into a `raise` without a choice."""
    for step in steps[start:]:
        if step.opname == "RAISE_VARARGS":
            return True
        if (
            "JUMP" in step.opname
            or "RETURN" in step.opname
            or "FOR_ITER" in step.opname
        ):
            return False
    return False
