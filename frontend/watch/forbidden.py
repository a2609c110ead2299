"""The calls that leave no op in a trace, and for each what to do instead or what is lost."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Container
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from stagecut.frontend.source import TORCH_DIR, is_pythons_file, is_users_file
from stagecut.ir.blame import OWN_DIR, OnPurpose

KEEP_WHOLE = (
    "or keep the submodule that does it whole, leaf_modules=[...]; the outermost module cannot be one: move "
    "such code of its forward into a submodule"
)
DRAW = (
    "draw with torch functions, such as torch.rand(()), seed outside of the model, "
    + KEEP_WHOLE
)
SEED = "seed, fork and read the state of generators outside of the model, " + KEEP_WHOLE


class Untraceable(OnPurpose):
    """Forward does something that no trace holds. `hint` says what to do instead."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


class Unread:
    """Stands for the generator in `torch.random`, so that all functions there refuse calls of the model,
    under whatever name; torch may call them.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        frame, called = sys._getframe(1), name
        while frame.f_back is not None and frame.f_code.co_filename in (
            torch.random.__file__,
            contextlib.__file__,
        ):
            if frame.f_code.co_filename == torch.random.__file__:
                called = frame.f_code.co_name
            frame = frame.f_back
        if not frame.f_code.co_filename.startswith((TORCH_DIR, OWN_DIR)):
            raise Untraceable(
                f"{called}() is called in forward, which leaves nothing in a trace",
                SEED,
            )
        return getattr(self._generator, name)


_HOOK = (
    "give it to an autograd.Function that passes its input on and has the hook for its backward, "
    + KEEP_WHOLE
)
UNTRACEABLE: tuple[tuple[Any, str, str], ...] = (
    (torch.Tensor, "register_hook", _HOOK),
    (torch.Tensor, "register_post_accumulate_grad_hook", _HOOK),
    (
        torch.autograd.graph.saved_tensors_hooks,
        "__init__",
        "open it around the call, " + KEEP_WHOLE,
    ),
    (os, "urandom", DRAW),
    # the same for SystemRandom, secrets, and numpy's generators without a seed
    (
        random,
        "_urandom",
        DRAW,
    ),
    *(
        (module, name, SEED)
        for module in (torch.cuda, torch.cuda.random)
        for name in torch.cuda.random.__all__
    ),
)
"""Functions that leave no op in a trace, and what to do instead of calling them in forward."""

NOTED: tuple[tuple[Any, str, str], ...] = (
    (
        torch.nn.attention,
        "_sdpa_kernel",
        "sdpa_kernel() is lost: the stages leave it to torch how attention is computed, to rounding",
    ),
    (
        torch.autograd.graph.save_on_cpu,
        "__init__",
        "save_on_cpu() is lost: the stages keep what backward needs where it is",
    ),
)
"""Functions that leave no op in a trace and change no result beyond rounding, and what is lost."""


def refusing(function: Callable[..., Any], hint: str) -> Callable[..., Any]:
    """`function`, refused to the model, and to Python's library when it calls for the model; torch may call
    it.
    """

    name = function.__qualname__.removesuffix(".__init__")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and is_pythons_file(frame.f_code.co_filename):
            frame = frame.f_back
        if not is_users_file(frame.f_code.co_filename):
            return function(*args, **kwargs)
        raise Untraceable(
            f"{name}() is called in forward, which leaves nothing in a trace", hint
        )

    return refuse


_SETS = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


_ASKS = (
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad_fn.__get__,  # type: ignore[union-attr]
    torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
)
"""Attributes of what is computed that depend on whether gradients are on."""


class GradFlags(TorchFunctionMode):
    """While open, requires_grad of the tensors that are `protected`, by id, can be set to what it is and to
    nothing else. `asked` is called where the model's code asks of another tensor whether gradients are on.
    """

    def __init__(
        self, protected: Callable[[], Container[int]], asked: Callable[[], None]
    ) -> None:
        super().__init__()
        self._protected = protected
        self._asked = asked

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ASKS and id(args[0]) not in self._protected():
            self._asked()
        if func in _SETS and id(args[0]) in self._protected():
            wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            if wanted != args[0].requires_grad:
                raise Untraceable(
                    "forward sets requires_grad of an input, a parameter or a buffer, which leaves nothing "
                    "in a trace",
                    "set it outside of the model, or use detach() in forward, "
                    + KEEP_WHOLE,
                )
        return func(*args, **kwargs)
