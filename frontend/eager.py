"""The trace takes the path of the eager run: what asks whether it is traced is told no, and values that no input went into are known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn


from stagecut.frontend.kept import is_users

_QUESTIONS = (
    torch.compiler.is_compiling,
    torch.compiler.is_exporting,
    torch.compiler.is_dynamo_compiling,
    torch.jit.is_tracing,
)
"""Functions that tell whether code is traced."""

_NAMES = frozenset(question.__name__ for question in _QUESTIONS)
_ANSWERS: dict[int, Callable[[], bool]] = {}

FORWARDS = ("_call_impl", "forward")
"""The functions that run a module."""


class EagerPath:
    """While open, code of the user's that asks whether it is traced is told no, as in the eager run.

    Where that path cannot be traced, `fall_back` lets a class of modules have the answer of the trace. `notes` tells which, and why.
    """

    def __init__(self, module: nn.Module) -> None:
        self._paths = {id(vars(owner)): path for path, owner in module.named_modules()}
        self._module = module
        self._asked: dict[type, None] = {}
        self._traced: dict[type, str] = {}

    @property
    def notes(self) -> list[str]:
        """The classes whose code takes the path it has for tracing, why, and what that costs."""
        return [
            f"{kind.__name__} asks whether it is traced and takes the path for that, as its eager one cannot be traced: {reason}; "
            "the stages may run other, slower ops there than the model, such as attention with a mask"
            for kind, reason in self._traced.items()
        ]

    def fall_back(self, path: str, reason: str) -> bool:
        """The class of the innermost module around the one at `path` that was told no is told the truth from now on; False where none was."""
        parts = path.split(".") if path else []
        for end in range(len(parts), -1, -1):
            kind = type(self._module.get_submodule(".".join(parts[:end])))
            if kind in self._asked and kind not in self._traced:
                self._traced[kind] = reason
                return True
        return False

    def fall_back_everywhere(self, reason: str) -> bool:
        """All classes that were told no are told the truth from now on; False where there are none."""
        pending = [kind for kind in self._asked if kind not in self._traced]
        self._traced |= dict.fromkeys(pending, reason)
        return bool(pending)

    @contextmanager
    def open(self) -> Iterator[None]:
        """The questions of the user's code are answered, those of torch's as ever."""
        own = [(question, question.__code__) for question in _QUESTIONS]
        package: Any = torch._subclasses
        try:
            for number, (question, _) in enumerate(own):
                _ANSWERS[number] = self._answer(question)
                question.__code__ = _asking(number)
            package.__class__ = _subclasses(self._tells_the_truth)
            yield
        finally:
            package.__class__ = ModuleType
            for question, code in own:
                question.__code__ = code

    def _answer(self, question: Callable[[], bool]) -> Callable[[], bool]:
        truth = FunctionType(question.__code__, question.__globals__)

        def answer() -> bool:
            asker: FrameType | None = sys._getframe(2)
            while asker is not None and asker.f_code.co_name in _NAMES:  # torch has a question under several names
                asker = asker.f_back
            return asker is not None and self._tells_the_truth(asker) and truth()

        return answer

    def _tells_the_truth(self, asker: FrameType) -> bool:
        """Whether the frame that asks gets the answer of the trace: torch's own code does, and modules whose eager path cannot be traced."""
        if not is_users(asker.f_code.co_filename):
            return True
        kind = self._kind_around(asker)
        if kind in self._traced:
            return True
        self._asked[kind] = None
        return False

    def _kind_around(self, frame: FrameType | None) -> type:
        """The class of the innermost module of the model that a frame runs for."""
        while frame is not None:
            path = self._paths.get(id(getattr(frame.f_locals.get("self"), "__dict__", None)))
            if path is not None and frame.f_code.co_name in FORWARDS:
                return type(self._module.get_submodule(path))
            frame = frame.f_back
        return type(self._module)


def _asking(number: int) -> CodeType:
    """The code of a function that gives an answer of ours. The function stays itself: whoever has imported it asks it too."""
    scope: dict[str, Any] = {}
    exec(f"def question():\n    from stagecut.frontend.eager import _ANSWERS\n    return _ANSWERS[{number}]()", scope)
    code: CodeType = scope["question"].__code__
    return code


class _Nothing:
    """A class that no tensor is of."""


def _subclasses(tells_the_truth: Callable[[FrameType], bool]) -> type[ModuleType]:
    """The class of the module `torch._subclasses` while we answer: code that asks for its FakeTensor finds one that no tensor is of."""

    def fake_tensor(package: ModuleType) -> Any:
        return vars(package)["FakeTensor"] if tells_the_truth(sys._getframe(1)) else _Nothing

    return type("_Subclasses", (ModuleType,), {"FakeTensor": property(fake_tensor)})
