"""Comparisons of random numbers whose outcome is known before they are drawn."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_COMPARISON = re.compile("[lg][te]")
"""The names of `<`, `<=`, `>` and `>=` in torch, as in operator."""

_MOST = 1 - 2**-53
"""The largest number below 1: numbers are drawn from [0, 1)."""


class KnownDraws(TorchFunctionMode):
    """A branch on `torch.rand([]) < p` goes where it goes for every number that may be drawn, where p is 0 or
    less, or 1 or more: a layer that is dropped with probability 0 is not dropped. The number is drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: Any = WeakTensorKeyDictionary()
        self._known: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        name = name.strip("_")
        if name == "bool" and self._is_in(self._known, args[0]):
            outcome, _ = self._known[args[0]]
            return outcome
        result = func(*args, **(kwargs or {}))
        if func is torch.rand and _is_one(result):
            version = result._version
            self._drawn[result] = None, version
        elif _COMPARISON.fullmatch(name) and self._is_draw_and_number(args):
            outcome = _outcome(name, args[1])
            if outcome is not None:
                version = result._version
                self._known[result] = outcome, version
        return result

    def _is_draw_and_number(self, args: Any) -> bool:
        if len(args) != 2:
            return False
        draw, number = args
        if not isinstance(number, (int, float)):
            return False
        return self._is_in(self._drawn, draw)

    def _is_in(self, tensors: Any, tensor: Any) -> bool:
        """True for a tensor that is in there, and was not written since."""
        if not isinstance(tensor, torch.Tensor):
            return False
        if tensor not in tensors:
            return False
        _, version = tensors[tensor]
        return bool(tensor._version == version)


def _is_one(tensor: torch.Tensor) -> bool:
    """True for a tensor of one element, whose size is no symbol."""
    return all(isinstance(size, int) and size == 1 for size in tensor.shape)


def _outcome(name: str, bound: float) -> bool | None:
    """The outcome of the comparison for all numbers of [0, 1), None where there are two."""
    compare = getattr(operator, name)
    least: bool = compare(0.0, bound)
    most: bool = compare(_MOST, bound)
    if least != most:
        return None
    return least
