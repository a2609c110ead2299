"""Seeds, states and forks of torch's generator: a trace holds what forward draws, and not where from."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch

from stagecut.frontend.lower import OWN_DIR, TORCH_DIR

KEEP_WHOLE = "or keep the module whole: leaf_modules=[...]"
SEED = "seed, fork and read the state of generators outside of the model, " + KEEP_WHOLE


class Untraceable(RuntimeError):
    """Forward does what no trace holds. `hint` says what to do instead."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class Unread:
    """Stands in `torch.random` for its generator, so that all functions there refuse the model, by whatever name; torch may call them."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        frame, called = sys._getframe(1), name
        while frame.f_back is not None and frame.f_code.co_filename in (torch.random.__file__, contextlib.__file__):
            if frame.f_code.co_filename == torch.random.__file__:
                called = frame.f_code.co_name
            frame = frame.f_back
        if not frame.f_code.co_filename.startswith((TORCH_DIR, OWN_DIR)):
            raise Untraceable(f"{called}() is called in forward, which leaves nothing in a trace", SEED)
        return getattr(self._generator, name)
