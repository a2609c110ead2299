"""The comparer of the tests: what it takes for a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import EXACT, Near, assert_same, differences, observe
from edge import buffer, linear, t
from torch import nn

X = t(3, 4)
NAN = torch.tensor([float("nan"), 1.0])


@pytest.mark.parametrize(
    ("name", "one", "other", "near"),
    [
        ("output", X, X + 1e-12, EXACT),
        ("output", X, X.float(), EXACT),
        ("output", X, X[:2], EXACT),
        ("output", X, X.t().contiguous().t(), EXACT),
        ("output", X, X.clone().requires_grad_(), EXACT),
        ("output", X, None, EXACT),
        ("output", NAN, torch.ones(2), EXACT),
        ("output", 1, True, EXACT),
        ("output", X.to(torch.float8_e5m2), (X * 2).to(torch.float8_e5m2), EXACT),
        ("gradient of p", X, X + 1e-6, EXACT),
        ("gradient of p", X, None, EXACT),
        ("gradient of p", X * 1e-6, X * 1.1e-6, Near(1e-6, least=0.0)),
    ],
)
def test_what_differs(name: str, one: Any, other: Any, near: Near) -> None:
    assert differences({name: one}, {name: other}, near)
    assert differences({name: one}, {}, near) == [f"{name} is missing"]
    assert differences({}, {name: one}, near) == [f"{name} is new"]


@pytest.mark.parametrize(
    ("name", "one", "other", "near"),
    [
        ("output", X, X.clone(), EXACT),
        ("output", NAN, NAN.clone(), EXACT),
        ("output", X, X + 1e-8, Near(others=1e-6)),
        ("output", X, X.t().contiguous().t(), Near(strides=False)),
        ("output", X, X.clone().requires_grad_(), Near(requires_grad=False)),
        ("gradient of p", X, X + 1e-12, EXACT),
        ("gradient of p", X * 1e-6, X * 1.1e-6, Near(1e-6)),
        ("gradient of p", X.bfloat16(), X.bfloat16() * 1.01, EXACT),
    ],
)
def test_what_does_not_differ(name: str, one: Any, other: Any, near: Near) -> None:
    assert not differences({name: one}, {name: other}, near)
    assert not differences({name: one}, {}, near, without=(name[:3],))


def test_trees_differ_by_leaf() -> None:
    assert_same({"a": [X, 1]}, {"a": [X, 1]}, "it")
    with pytest.raises(AssertionError, match=r"it\['a'\]\[1\] differs: 2 instead of 1"):
        assert_same({"a": [X, 2]}, {"a": [X, 1]}, "it")


class Returns(nn.Module):
    """Returns an input, a buffer, a part of it and a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), buffer(4)

    def forward(self, x: torch.Tensor) -> Any:
        return x, self.b, {"part": self.b[:2], "new": self.a(x)}


def test_what_is_observed() -> None:
    model, x = Returns(), X.clone().requires_grad_()
    seen = observe(model, ((x,), {}))
    assert {"output[0]", "output[2]['new']", "input 0", "gradient of input 0", "buffer b", "parameter a.weight"} <= seen.keys()
    assert torch.equal(seen["gradient of a.weight"], model.a.weight.grad)  # type: ignore[arg-type]
    assert seen["aliases"] == [["is input 0"], [], ["shares output[1]"], []]
    assert seen["aliases of state"] == [[], ["is buffer b"], ["shares buffer b", "shares output[1]"], []]
