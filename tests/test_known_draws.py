"""A layer that is dropped with probability 0 is not dropped: transformers asks `torch.rand([]) < 0.0`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stagecut import CaptureError, Pipe, pipeline

COMPARE = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
SURE = [("lt", 0.0), ("lt", -1), ("lt", 1), ("le", -0.5), ("le", 1.0), ("gt", 1.0), ("gt", -0.1), ("ge", 0), ("ge", 1.5)]
UNSURE = [("lt", 0.5), ("le", 0.0), ("gt", 0.0), ("ge", 1 - 1e-9)]


class Dropping(nn.Module):
    """Drops layers where `drops` says so, and values."""

    def __init__(self, drops: Callable[[], Any]) -> None:
        super().__init__()
        self.drops = drops
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.training and self.drops():
                continue
            x = self.drop(layer(x))
        return self.last(x)


def cut(drops: Callable[[], Any]) -> tuple[nn.Module, Pipe]:
    torch.manual_seed(0)
    model = Dropping(drops).train()
    return model, pipeline(model, (torch.randn(2, 4),), stages=2)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("name", "bound"), SURE)
def test_the_outcome_is_that_of_every_draw(name: str, bound: float, turned: bool, shape: tuple[int, ...]) -> None:
    """The numbers are drawn nevertheless, so that dropout drops what it drops in the model."""

    def drops() -> Any:
        drawn = torch.rand(shape)
        return COMPARE[{"l": "g", "g": "l"}[name[0]] + name[1]](bound, drawn) if turned else COMPARE[name](drawn, bound)

    model, pipe = cut(drops)
    assert pipe.notes == ()
    x = torch.randn(2, 4)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        assert torch.equal(pipe.module()(x), expected)
    model.eval()
    pipe.eval()
    assert torch.equal(pipe.module()(x), model(x))


def _written() -> Any:
    drawn = torch.rand([])
    drawn += 0.6
    return drawn < 1.0


def _asked_otherwise() -> Any:
    answer = torch.rand([]) < 0.0
    answer.logical_not_()
    return answer


def _of_two() -> Any:
    return (torch.rand(2) < 0.0).any()


OTHERS: dict[str, Callable[[], Any]] = {
    **{f"{name} {bound}": lambda name=name, bound=bound: COMPARE[name](torch.rand([]), bound) for name, bound in UNSURE},
    "written": _written,
    "answer written": _asked_otherwise,
    "normal": lambda: torch.randn([]) < 0.0,
    "two": _of_two,
    "computed": lambda: torch.rand([]) * 3 < 1.0,
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_depends_on_what_is_drawn(name: str) -> None:
    with pytest.raises(CaptureError, match="depends on the data"):
        cut(OTHERS[name])
