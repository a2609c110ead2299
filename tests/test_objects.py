"""objects: what a model returns, taken apart into tensors and put together again."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_structure, tree_unflatten

from stagecut import StagecutError, pipe_split, pipeline
from stagecut.ir.run.objects import Opened, hides_tensors, opened

X = torch.arange(12.0).view(3, 4)


class Plain:
    """Attributes, and nothing else."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@dataclass(frozen=True)
class Frozen:
    a: Any


@dataclass(slots=True)
class Slots:
    a: Any


class Failing(Exception):
    """An exception is more than its attributes."""

    def __init__(self, a: Any) -> None:
        self.a = a


def again(tree: Any) -> Any:
    """The tree after a journey as flat leaves."""
    flat, spec = tree_flatten(opened(tree))
    return tree_unflatten(flat, spec)


def test_an_object_comes_back_with_all_its_attributes() -> None:
    item = Plain(keys=X, parts=[Plain(x=X + 1), {"n": 3}], dtype=X.dtype, name="a", empty=[], kinds=[X.dtype])
    made = again((item, 5))[0]
    assert type(made) is Plain
    assert list(made.__dict__.keys() ^ item.__dict__.keys()) == []
    assert made.keys is X
    assert type(made.parts[0]) is Plain
    assert torch.equal(made.parts[0].x, X + 1)
    assert (made.dtype, made.name, made.empty, made.kinds) == (X.dtype, "a", [], [X.dtype])
    made.kinds.append(1)
    assert item.kinds == [X.dtype]
    assert again(Frozen(X)) == Frozen(X)
    assert again(UserDict(a=X)) == UserDict(a=X)


def test_an_object_without_tensors_is_data_beside_one_with_them() -> None:
    """The layers of a cache, of which some keep nothing."""
    layers = [Plain(keys=X, dtype=X.dtype), Plain(keys=None, dtype=X.dtype)]
    config = Plain(width=4)
    made = again(Plain(layers=layers, config=config))
    assert [type(layer) for layer in made.layers] == [Plain, Plain]
    assert made.layers[1].keys is None
    assert made.layers[1].dtype is X.dtype
    assert made.config is config


def test_its_tensors_are_leaves_by_name() -> None:
    flat, spec = tree_flatten(opened(Plain(a=X, b=(X, 2), c=X.dtype)))
    assert [type(leaf) for leaf in flat] == [torch.Tensor, torch.Tensor, int]
    assert spec.context.names == ("a", "b")
    assert torch.equal(tree_map(lambda leaf: leaf * 2, opened(Plain(a=X))).a, X * 2)


@pytest.mark.parametrize(
    "item", [3, "a", None, X, X.device, {X}, Plain(a=1), Slots(X), Failing(X), nn.Linear(2, 2), Plain(a=[X, X.device])]
)
def test_everything_else_stays(item: Any) -> None:
    assert opened(item) is item
    assert hides_tensors(item) == ("tensor" in repr(getattr(item, "a", item)) and not isinstance(item, torch.Tensor))


@pytest.mark.parametrize("item", [X.dtype, 1j, b"a", range(3), {1, None}, frozenset("ab"), torch.strided])
def test_what_never_changes_is_part_of_the_structure(item: Any) -> None:
    flat, spec = tree_flatten(opened([X, item]))
    assert len(flat) == 1
    assert tree_unflatten(flat, spec)[1] == item
    assert again(Plain(a=[X, item])).a[1] == item
    assert spec != tree_structure(opened([X, 2j]))


def test_a_set_is_a_new_one_each_time() -> None:
    flat, spec = tree_flatten(opened((X, {1})))
    tree_unflatten(flat, spec)[1].add(2)
    assert tree_unflatten(flat, spec)[1] == {1}


def test_an_object_that_holds_itself_stays() -> None:
    ring = Plain(a=X)
    ring.me = [ring]
    assert opened({"ring": ring})["ring"] is ring
    twice = Plain(a=X)
    assert isinstance(opened(Plain(one=twice, other=twice)), Opened)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return Plain(hidden=self.lin(x), n=x.shape[0])


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lin = Inner(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        made = self.inner(x)
        pipe_split()
        return {"y": self.lin(made.hidden), "made": made}


@pytest.mark.parametrize("whole", [[], ["inner"]])
def test_a_module_hands_an_object_to_the_next_stage(whole: list[str]) -> None:
    """Kept whole or not: what crosses is the tensor in it, new in every call."""
    model = Outer()
    pipe = pipeline(model, (X,), leaf_modules=whole)
    assert pipe.num_stages == 2
    found, expected = pipe.module()(X * 3), model(X * 3)
    assert torch.equal(found["y"], expected["y"])
    assert type(found["made"]) is Plain
    assert torch.equal(found["made"].hidden, expected["made"].hidden)
    assert found["made"].n == 3
    assert model._forward_hooks == {}


class Slotted(Inner):
    def forward(self, x: torch.Tensor) -> Any:
        return Slots([super().forward(x).hidden])


def test_a_module_kept_whole_may_not_hide_tensors() -> None:
    """They would be those of the example, in every call."""

    class OfSlots(Outer):
        def forward(self, x: torch.Tensor) -> Any:
            return self.lin(self.inner(x).a[0])

    model = OfSlots()
    model.inner = Slotted()
    with pytest.raises(StagecutError, match="module 'inner' is kept whole and returns a Slots") as caught:
        pipeline(model, (X,), leaf_modules=["inner"])
    assert "test_objects.py:" in caught.value.where


def test_a_pipe_that_returns_an_object_is_not_saved(tmp_path: Any) -> None:
    with pytest.raises(StagecutError, match=r"the output of the model holds a (tests\.)?test_objects\.Plain") as caught:
        pipeline(Inner(), (X,)).save(tmp_path / "pipe")
    assert "use_cache=False" in caught.value.hint
