"""The trace takes the path of the eager run: code that asks whether it is traced is told no."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from stagecut.frontend.source import is_users_file

_QUESTIONS = (
    torch.compiler.is_compiling,
    torch.compiler.is_exporting,
    torch.compiler.is_dynamo_compiling,
    torch.jit.is_tracing,  # type: ignore[attr-defined]
)
"""Functions that tell whether code is traced."""

_NAMES = frozenset(question.__name__ for question in _QUESTIONS)
_ANSWERS: dict[int, Callable[[], bool]] = {}

FORWARDS = ("_call_impl", "forward")
"""The functions that run a module."""

_Asker = tuple[type, CodeType]
"""A function that asks, itself or by others, and the class of the module it runs for."""


class Reason(NamedTuple):
    """Why an attempt to trace failed, at which line, and how that line could be traced."""

    why: str
    where: str
    otherwise: str

    def __str__(self) -> str:
        return f"{self.why} at {self.where}"


class EagerPath:
    """While open, the user's code that asks whether it is traced is told no, as in the eager run; torch's own
    code hears the truth.

    Where the eager path cannot be traced, `fall_back` lets the function that failed, or the nearest around it
    that asked, hear the truth too. `notes` tells which functions those are, and why.
    """

    def __init__(self, module: nn.Module) -> None:
        self._classes = {id(vars(owner)): type(owner) for owner in module.modules()}
        self._root = type(module)
        self._asked: dict[_Asker, None] = {}
        self._told: dict[_Asker, Reason] = {}
        self._in_vain: set[_Asker] = set()

    @property
    def notes(self) -> list[str]:
        """Notes on the functions that take the path they have for tracing: which they are, why, and how to
        have the other one.
        """
        return [
            f"{code.co_qualname}, called by {cls.__name__}, takes the path that it has for tracing, which "
            f"may run other ops: {reason.why}\n"
            f"  at: {reason.where}\n"
            f"  otherwise: {reason.otherwise}"
            for (cls, code), reason in self._told.items()
        ]

    def fall_back(self, error: BaseException, reason: Reason) -> bool:
        """The innermost function that `error` went through and that asked hears the truth from now on; False
        where none asked.

        The function that was told the truth last hears our answer again, if it failed for the same reason.
        """
        passed = self._passed(error)
        last = next(reversed(self._told), None)
        if last in passed and self._told[last] == reason:
            del self._told[last]
            self._in_vain.add(last)
        pending = [
            asker
            for asker in reversed(passed)
            if asker in self._asked
            and asker not in self._told
            and asker not in self._in_vain
        ]
        if pending:
            self._told[pending[0]] = reason
        return bool(pending)

    def _passed(self, error: BaseException) -> list[_Asker]:
        """The functions that `error` went through, the outermost first."""
        cls = self._root
        passed: list[_Asker] = []
        for frame, _ in walk_tb(error.__traceback__):
            cls = self._class_of(frame) or cls
            passed.append((cls, frame.f_code))
        return passed

    def fall_back_everywhere(self, reason: Reason) -> bool:
        """All functions that asked hear the truth from now on; False where there are no more."""
        pending = [asker for asker in self._asked if asker not in self._told]
        self._told |= dict.fromkeys(pending, reason)
        return bool(pending)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, the code of the model hears our answers."""
        codes = [(question, question.__code__) for question in _QUESTIONS]
        package: Any = torch._subclasses
        try:
            for number, (question, _) in enumerate(codes):
                _ANSWERS[number] = self._answer(question)
                question.__code__ = _asking(number)
            package.__class__ = _subclasses(self._hears_the_truth)
            yield
        finally:
            package.__class__ = ModuleType
            for question, code in codes:
                question.__code__ = code

    def _answer(self, question: Callable[[], bool]) -> Callable[[], bool]:
        truth = FunctionType(question.__code__, question.__globals__)

        def answer() -> bool:
            asker: FrameType | None = sys._getframe(2)
            # torch has a question under several names
            while asker is not None and asker.f_code.co_name in _NAMES:
                asker = asker.f_back
            return asker is not None and self._hears_the_truth(asker) and truth()

        return answer

    def _hears_the_truth(self, frame: FrameType) -> bool:
        """True for torch's own code, and where the eager path cannot be traced."""
        if not is_users_file(frame.f_code.co_filename):
            return True
        codes, cls = self._call(frame)
        askers = [(cls, code) for code in codes]
        if any(asker in self._told for asker in askers):
            return True
        self._asked |= dict.fromkeys(askers)
        return False

    def _call(self, frame: FrameType) -> tuple[list[CodeType], type]:
        """The functions from the one that a frame runs out to the forward of the module it runs for, and the
        class of that module.
        """
        codes: list[CodeType] = []
        outer: FrameType | None = frame
        while outer is not None:
            codes.append(outer.f_code)
            cls = self._class_of(outer)
            if cls is not None:
                return codes, cls
            outer = outer.f_back
        return codes, self._root

    def _class_of(self, frame: FrameType) -> type | None:
        """The class of the module whose forward a frame runs, None for another function."""
        if frame.f_code.co_name not in FORWARDS:
            return None
        return self._classes.get(
            id(getattr(frame.f_locals.get("self"), "__dict__", None))
        )


def _asking(number: int) -> CodeType:
    """The code of a function that gives our answer. Only the code of torch's function is replaced, so that
    code that has imported the function asks it too.
    """
    scope: dict[str, Any] = {}
    exec(
        "def question():\n    from stagecut.frontend.capture.eager import _ANSWERS\n    return "
        f"_ANSWERS[{number}]()",
        scope,
    )
    code: CodeType = scope["question"].__code__
    return code


class _Nothing:
    """A class that no tensor is an instance of."""


def _subclasses(hears_the_truth: Callable[[FrameType], bool]) -> type[ModuleType]:
    """The class of the module `torch._subclasses` while we answer: code that asks for its FakeTensor finds a
    class that no tensor is an instance of.
    """

    def fake_tensor(package: ModuleType) -> Any:
        return (
            vars(package)["FakeTensor"]
            if hears_the_truth(sys._getframe(1))
            else _Nothing
        )

    return type("_Subclasses", (ModuleType,), {"FakeTensor": property(fake_tensor)})
