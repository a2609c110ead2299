"""fold: code that reads what no attribute, global or argument shows is traced in each call."""

from __future__ import annotations

import itertools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stagecut import pipeline

COUNT = 6
FIRST = 3
"""So many calls double nothing."""


class Blocks(nn.Module):
    """Blocks that double what their `turn` says is to be doubled."""

    def __init__(self, turn: Callable[[nn.Module], int]) -> None:
        super().__init__()

        class Block(nn.Module):
            def __init__(self, number: int) -> None:
                super().__init__()
                self.linear, self.number = nn.Linear(4, 4), number

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.linear(x)
                return x * 2 if turn(self) % COUNT >= FIRST else x

        self.blocks = nn.ModuleList(Block(number) for number in range(COUNT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number_of_the_loop, block in enumerate(self.blocks):
            assert number_of_the_loop < COUNT
            x = block(x)
        return x


def _function() -> Callable[[Any], int]:
    def turn(_: Any) -> int:
        turn.count += 1  # type: ignore[attr-defined]
        return turn.count - 1  # type: ignore[attr-defined, no-any-return]

    turn.count = 0  # type: ignore[attr-defined]
    return turn


def _iterator() -> Callable[[Any], int]:
    numbers = itertools.count()
    return lambda _: next(numbers)


def _closure() -> Callable[[Any], int]:
    count = {"n": -1}

    class Counter:
        @property
        def n(self) -> int:
            count["n"] += 1
            return count["n"]

    counter = Counter()
    return lambda _: counter.n


def _global() -> Callable[[Any], int]:
    globals()["COUNT_OF_CALLS"] = -1

    def turn(_: Any) -> int:
        globals()["COUNT_OF_CALLS"] += 1
        return globals()["COUNT_OF_CALLS"]  # type: ignore[no-any-return]

    return turn


def _import() -> Callable[[Any], int]:
    module: Any = types.ModuleType("counted_calls")
    module.n = -1
    sys.modules["counted_calls"] = module

    def turn(_: Any) -> int:
        import counted_calls  # type: ignore[import-not-found]

        counted_calls.n += 1
        return counted_calls.n  # type: ignore[no-any-return]

    return turn


def _environment() -> Callable[[Any], int]:
    os.environ["COUNTED_CALLS"] = "-1"

    def turn(_: Any) -> int:
        os.environ["COUNTED_CALLS"] = str(int(os.environ["COUNTED_CALLS"]) + 1)
        return int(os.environ["COUNTED_CALLS"])

    return turn


def _lookup() -> Callable[[Any], int]:
    return lambda block: object.__getattribute__(block, "number")


def _frame() -> Callable[[Any], int]:
    def turn(_: Any) -> int:
        frame: Any = sys._getframe()
        while "number_of_the_loop" not in frame.f_locals:
            frame = frame.f_back
        return frame.f_locals["number_of_the_loop"]  # type: ignore[no-any-return]

    return turn


@pytest.mark.parametrize(
    "made", [_function, _iterator, _closure, _global, _import, _environment, _lookup, _frame], ids=lambda made: made.__name__
)
def test_what_nobody_sees_a_block_read_is_read_in_each_call(made: Callable[[], Callable[[Any], int]]) -> None:
    texts = []
    for fold in (True, False):
        model = Blocks(made()).eval()
        texts.append(pipeline(model, (torch.zeros(3, 4),), stages=1, check=None, fold=fold).ir())
    assert texts[0] == texts[1]
    assert texts[1].count("aten.mul.Tensor") == COUNT - FIRST
