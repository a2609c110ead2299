"""Ops that suit any order have one: the text of a program does not depend on the order in which a model goes through a set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stagecut import Driver, Pipe, StagecutError, pipeline

KINDS = "abcd"


class Angles(nn.Module):
    """Has a buffer for each kind, and an inner module that each of its calls calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        for number, kind in enumerate(KINDS, 1):
            self.register_buffer(f"{kind}_rate", torch.arange(4.0) / number, persistent=False)

    @torch.no_grad()
    def forward(self, places: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        angle = self.inner(places[:, None] * getattr(self, f"{kind}_rate"))
        return angle.cos(), angle.sin()


class Kinds(nn.Module):
    """Layers of several kinds. What a kind needs is made first, kind by kind in the order of `order`: by a module, by ops, or by both."""

    def __init__(self, order: Sequence[str], layers: Sequence[str], by: dict[str, str]) -> None:
        super().__init__()
        self.order, self.kinds, self.by = list(order), list(layers), dict(by)
        self.angles = Angles()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in layers])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[0]) + 1
        made = {kind: self.made(places, kind) for kind in self.order}
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            x = layer(x)
            for part in made[kind]:
                x = x * part
        return x

    def made(self, places: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
        number = KINDS.index(kind)
        if self.by[kind] == "module":
            return self.angles(places, kind)
        seen = ((places[:, None] - places > number) & (places > 1)).any(1, keepdim=True)
        if self.by[kind] == "ops":
            return (seen + number,)
        return seen, *self.angles(places * 2, kind)


WAYS = st.fixed_dictionaries({kind: st.sampled_from(["module", "ops", "both"]) for kind in KINDS})


def cut(order: Sequence[str], layers: Sequence[str], by: dict[str, str]) -> Pipe:
    torch.manual_seed(0)
    return pipeline(Kinds(order, layers, by), (torch.randn(3, 4),), stages=2)


@settings(max_examples=20, deadline=None)
@given(st.permutations(KINDS), st.lists(st.sampled_from(KINDS), min_size=2, max_size=6), WAYS)
def test_the_text_does_not_depend_on_the_order_of_kinds(order: list[str], layers: list[str], by: dict[str, str]) -> None:
    """The cut compares with the model. A kind that no layer reads is no part of the program."""
    order = [kind for kind in order if kind in layers]
    assert cut(order, layers, by).ir() == cut(sorted(order), layers, by).ir()


class Between(nn.Module):
    """For each kind an angle, and between them something that keeps its place."""

    def __init__(self, order: Sequence[str], between: str) -> None:
        super().__init__()
        self.order, self.between = list(order), between
        self.angles, self.first, self.second = Angles(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places, made = torch.arange(3) + 1, {}
        for number, kind in enumerate(self.order):
            made[kind] = self.angles(places, kind)[0]
            if self.between == "draws":
                made[kind] = made[kind] + torch.rand(4)
            elif self.between == "writes":
                self.seen += number + 1
                made[kind] = made[kind] + self.seen[:, None]
            elif self.between == "constant":
                made[kind] = made[kind] + torch.tensor([float(number)] * 4)
            elif self.between == "gradient":
                made[kind] = made[kind] + self.first.bias
        return self.second(self.first(x) * made["a"]) * made["b"]


@pytest.mark.parametrize("between", ["draws", "writes", "constant", "gradient"])
def test_what_is_no_such_op_keeps_its_place(between: str) -> None:
    """Random numbers, writes, constants and gradients come in the order of the model: the cut compares with it."""
    texts = []
    for kinds in permutations("ab"):
        torch.manual_seed(0)
        texts.append(pipeline(Between(kinds, between), (torch.randn(3, 4),), stages=2).ir())
    assert texts[0] != texts[1]


SETS = """
import sys; sys.path[:0] = {path!r}
import torch
from test_order import KINDS, Kinds
from stagecut import pipeline
order = list(set(KINDS))
torch.manual_seed(0)
print("".join(order), file=sys.stderr)
print(pipeline(Kinds(order, "abcd", dict.fromkeys(KINDS, "both")), (torch.randn(3, 4),), stages=2).ir())
"""


def test_processes_that_hash_otherwise_have_the_same_text() -> None:
    texts, orders = set(), set()
    for seed in ("1", "2"):
        variables = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "ignore", "-c", SETS.format(path=sys.path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=variables, timeout=200)
        texts.add(shown.stdout)
        orders.add(shown.stderr.splitlines()[-1])
    assert len(orders) == 2
    assert len(texts) == 1


class Branches(nn.Module):
    """Adds what its branches say, in the order of `order`: with gradients, which are added in that order."""

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__()
        self.order = list(order)
        self.branches = nn.ModuleDict({kind: nn.Linear(4, 4) for kind in "ab"})
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(sum(self.branches[kind](x) for kind in self.order))


class Scaled(nn.Module):
    """A number of its own is a constant of the code, which the text does not show."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * torch.tensor(self.rate))


def _refused(pipes: list[Any], said: str) -> str:
    with pytest.raises(StagecutError, match=said) as caught:
        Driver(pipes[dist.get_rank()], "GPipe", 2)
    assert "PYTHONHASHSEED=0" in caught.value.hint
    return "ok"


@pytest.mark.parametrize(
    ("model", "orders", "said"),
    [
        (Branches, ("ab", "ba"), "do not run the same program"),
        (Scaled, (1.0, 2.0), "lifted_tensor_0.*a constant of the code"),
    ],
)
def test_ranks_that_differ_by_the_order_of_a_set_are_told_the_cure(model: Any, orders: Any, said: str) -> None:
    pipes = []
    for kinds in orders:
        torch.manual_seed(0)
        pipes.append(pipeline(model(kinds), (torch.randn(2, 4),), stages=2))
    assert on_ranks(2, _refused, pipes, said) == ["ok", "ok"]


def test_a_long_chain_is_settled_without_recursion() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, z = torch.ones(4), torch.zeros(4)
            for _ in range(1500):
                y, z = y * 0.5, z + 1
            return self.last(x * z) * y

    assert pipeline(Long(), (torch.randn(2, 4),), stages=2, check=None).num_stages == 2
