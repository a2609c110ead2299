"""What a driver notes about a step that may train otherwise than was meant."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType

import torch

from stagecut.backend.stages.staged import Staged
from stagecut.ir.blame import OWN_FOLDERS
from stagecut.ir.graph import Mode, Op, Program, Value
from stagecut.ir.types import carries_grad

NO_LOSS = (
    "step makes no gradients without a loss function, so nothing is trained: Driver(..., loss_fn=...), or "
    "driver.eval(...) for a forward alone"
)

EVAL_MODE = (
    "the pipe is in eval mode, so dropout is off and batch statistics stay as they are: driver.train() on "
    "every rank, or model.train() before pipeline(...)"
)


def notes_of_step(
    pipe: Staged, has_losses: bool, follows_mode: Callable[[], bool]
) -> Iterator[str]:
    """What is to be noted about a step. follows_mode: as the function of that name says of the program."""
    if has_losses:
        if not pipe.training and follows_mode():
            yield EVAL_MODE
    elif torch.is_grad_enabled() and _returns_grad(pipe.program):
        yield NO_LOSS


def warn(note: str) -> None:
    """Python warns of this note, at the line of the user's that called."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_own(frame):
        frame = frame.f_back
    warnings.warn_explicit(note, UserWarning, frame.f_code.co_filename, frame.f_lineno)


def _is_own(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OWN_FOLDERS)


def _returns_grad(program: Program) -> bool:
    """True when gradients could start from an output."""
    values = [leaf for leaf in program.outputs if isinstance(leaf, Value)]
    return any(carries_grad(value.type) for value in values)


def follows_mode(program: Program) -> bool:
    """True when the stages do something else in train mode, or may: nobody knows what a module kept whole
    does.
    """
    return any(map(_op_follows_mode, program.all_ops()))


def _op_follows_mode(op: Op) -> bool:
    if op.is_users:
        return True
    for place, argument in enumerate(op.args):
        if _differs(argument):
            # a dropout, or that of an LSTM, has its probability in front of its flag
            return not (place and op.args[place - 1] == 0.0)
    return any(map(_differs, op.kwargs.values()))


def _differs(argument: object) -> bool:
    return isinstance(argument, Mode) and argument.training != argument.evaluating
