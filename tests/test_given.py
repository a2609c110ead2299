"""given: objects of any class are arguments, and the stages leave in them what forward leaves there."""

from __future__ import annotations

from collections import OrderedDict, deque
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from stagecut import Balanced, CaptureError, InputError, Pipe, SplitPoint, StagecutError, pipe_split, pipeline
from stagecut.ir.run.given import Apart, closed_arguments, mapped, opened_arguments
from stagecut.ir.run.objects import opened

X = torch.arange(12.0).view(3, 4)


class Plain:
    """Attributes, and nothing else."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """The parts of a structure of objects, by their places."""
    return [(str(path), leaf) for path, leaf in tree_flatten_with_path(opened(tree, every=True))[0]]


def assert_alike(one: Any, other: Any) -> None:
    """Both are structures of the same parts, the tensors equal to the bit."""
    assert [path for path, _ in leaves(one)] == [path for path, _ in leaves(other)]
    for (path, left), (_, right) in zip(leaves(one), leaves(other), strict=True):
        assert type(left) is type(right), path
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, path


# --- taken apart and put together -------------------------------------------------------------------------


def test_an_object_is_taken_apart_and_put_together() -> None:
    item = Plain(keys=X, n=3, flag=True, name="a", nothing=None, kind=X.dtype, parts=[Plain(x=X + 1), {"e": []}])
    flat, apart = [leaf for _, leaf in leaves(item)], opened_arguments((item,))
    assert isinstance(apart[0], Apart)
    again = closed_arguments(apart)[0]
    assert type(again) is Plain
    assert again is not item
    assert again.parts is not item.parts
    assert again.keys is X
    assert [leaf for _, leaf in leaves(again)] == flat
    assert vars(again).keys() == vars(item).keys()


def test_mapping_makes_new_objects() -> None:
    item = Plain(layers=[Plain(k=X)], table={"a": X})
    twin = mapped(lambda leaf: leaf * 2, (item,))[0]
    assert torch.equal(twin.layers[0].k, X * 2)
    assert item.layers[0].k is X


@pytest.mark.parametrize("item", [X.dtype, slice(0, 2), X.device, {X}, nn.Linear(2, 2), print])
def test_what_is_no_such_object_stays(item: Any) -> None:
    assert opened_arguments(item) is item


def test_a_ring_stays() -> None:
    ring = Plain(a=X)
    ring.me = [ring]
    assert opened_arguments(ring) is ring


# --- models -----------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """Two layers, each with a part of the state that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        state.rows.append(x)
        state.h = x = torch.tanh(self.a(x) + state.h)
        pipe_split()
        state.table["c"] = self.b(x) + state.table["c"]
        state.count += 1
        state.seen = True
        del state.gone
        state.extra = Plain(h=x * 2, again=state.table)
        return {"y": state.table["c"] * 3, "state": state}


def a_state() -> Plain:
    torch.manual_seed(3)
    return Plain(rows=[X], h=torch.randn(3, 4), table={"c": torch.randn(3, 4)}, count=3, seen=False, gone=1)


def cut(model: nn.Module, *args: Any, **kwargs: Any) -> Pipe:
    torch.manual_seed(0)
    return pipeline(model, mb_args=args, mb_kwargs=kwargs)


def test_stages_leave_in_an_object_what_forward_leaves_there() -> None:
    model, example = Cell(), a_state()
    before = deepcopy(example)
    pipe = cut(model, X, example)
    assert_alike(example, before)
    ours, theirs = a_state(), a_state()
    table, rows = ours.table, ours.rows
    expected, output = model(X, theirs), pipe.module()(X, ours)
    assert_alike(ours, theirs)
    assert torch.equal(output["y"], expected["y"])
    assert output["state"] is ours
    assert ours.table is table
    assert ours.rows is rows
    assert ours.extra.again is table
    assert vars(ours).keys() == vars(theirs).keys()


def test_only_new_tensors_are_outputs() -> None:
    pipe = cut(Cell(), X, a_state())
    assert pipe.program.output_names == ("y", "state.h", "state.count", "state.seen", "state.extra.h", "state.table.c")
    assert len(pipe(X, a_state())) == 1


def test_gradients_flow_through_what_is_left() -> None:
    model = Cell()
    pipe = cut(model, X, a_state())
    grads = []
    for run in (model, pipe.module()):
        state, x = a_state(), X.clone().requires_grad_()
        run(x, state)
        (state.h.sum() + 2 * state.table["c"].sum()).backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"count": 4}, r"(?s)'state_count' is 4, but the program was specialised to 3"),
        ({"seen": True}, "'state' has another structure"),
        ({"h": torch.zeros(2, 4)}, r"shape mismatch: input 'state_h'"),
        ({"h": None}, "'state' has another structure"),
        ({"more": 1}, "'state' has another structure"),
    ],
)
def test_an_object_that_does_not_fit_the_trace(change: dict[str, Any], pattern: str) -> None:
    pipe = cut(Cell(), X, a_state())
    state = a_state()
    vars(state).update(change)
    before = deepcopy(state)
    with pytest.raises(InputError, match=pattern):
        pipe.module()(X, state)
    assert_alike(state, before)


class Adds(nn.Module):
    """Calls a function that it is given."""

    def forward(self, x: torch.Tensor, how: Any) -> torch.Tensor:
        pipe_split()
        return how.function(x + 1)


def test_what_no_trace_takes_must_be_the_same() -> None:
    pipe = cut(Adds(), X, Plain(function=torch.sin, device=torch.device("cpu")))
    assert torch.equal(pipe.module()(X, Plain(function=torch.sin, device=torch.device("meta"))), torch.sin(X + 1))
    with pytest.raises(InputError, match="attribute 'function' of an argument"):
        pipe(X, Plain(function=torch.cos, device=torch.device("cpu")))


class Writes(nn.Module):
    """Writes the tensors of an object in place, and replaces none."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        state.first.index_copy_(0, state.at, self.a(x))
        x = x + state.first.sum(0)
        pipe_split()
        state.second.mul_(2).add_(x)
        state.at.add_(1)
        return x * state.second, state


def test_tensors_of_an_object_are_written_in_place() -> None:
    def state() -> Plain:
        return Plain(first=torch.ones(5, 4), second=torch.ones(1, 4), at=torch.tensor([2]))

    model = Writes()
    with torch.no_grad():
        pipe = cut(model, X[:1], state())
        ours, theirs = state(), state()
        held = dict(vars(ours))
        for _ in range(2):
            output, expected = pipe.module()(X[:1], ours), model(X[:1], theirs)
            assert torch.equal(output[0], expected[0])
            assert output[1] is ours
            assert_alike(ours, theirs)
    assert all(vars(ours)[name] is tensor for name, tensor in held.items())


class Shifts(nn.Module):
    """Keeps the last inputs in a queue."""

    def forward(self, x: torch.Tensor, queue: Any, table: Any) -> torch.Tensor:
        queue.append(x * 2)
        pipe_split()
        table["seen"] = old = queue.popleft() + x
        return old


def test_queues_and_dicts_are_changed() -> None:
    pipe = cut(Shifts(), X, deque([X, X + 1]), {})
    queue, table = deque([X, X + 1]), dict[str, Any]()
    first = queue[1]
    pipe(X, queue, table)
    assert len(queue) == 2
    assert queue[0] is first
    assert torch.equal(queue[1], X * 2)
    assert torch.equal(table["seen"], X * 2)


class Discards(nn.Module):
    def forward(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        state.names.discard("a")
        pipe_split()
        return x + state.x


class Moves(nn.Module):
    """Changes the order of a dict and of attributes."""

    def forward(self, x: torch.Tensor, table: Any, state: Any) -> torch.Tensor:
        table["a"] = table.pop("a")
        table["c"] = x * 2
        pipe_split()
        h = state.h
        del state.h
        state.h = h + x
        return x + h


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_keys_stand_in_the_order_that_forward_leaves(kind: Any) -> None:
    def inputs() -> tuple[Any, Plain]:
        return kind(a=X, b=X + 1), Plain(h=X, k=X + 2)

    pipe = cut(Moves(), X, *inputs())
    ours, theirs = inputs(), inputs()
    pipe(X, *ours)
    Moves()(X, *theirs)
    assert_alike(ours, theirs)
    assert [*ours[0]] == [*theirs[0]] == ["b", "a", "c"]
    assert [*vars(ours[1])] == [*vars(theirs[1])] == ["k", "h"]
    assert ours[0]["b"] is not theirs[0]["b"]


class Slots:
    """An attribute that is in no `__dict__`."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Row(list[Any]):
    """No list to a trace, which is of the very class list."""


class Scales(nn.Module):
    """Reads one attribute of an object as a factor."""

    def forward(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        x = x * state.h
        pipe_split()
        factor = state.factor
        if isinstance(factor, np.ndarray):
            return x * float(factor[0])
        if isinstance(factor, list):
            factor = factor[0]
        return x * (factor.value if isinstance(factor, Slots) else float(factor))


@pytest.mark.parametrize(
    "factor",
    [Slots(2), np.ones(3), Fraction(1, 2), np.int64(3), Decimal(2), Row([2.0]), [Slots(2), print], deque([1, Slots(3)])],
    ids=["slots", "array", "fraction", "int64", "decimal", "row", "list", "deque"],
)
def test_what_cannot_be_looked_into_must_hold_the_same(factor: Any) -> None:
    class First(Scales):
        def forward(self, x: torch.Tensor, state: Any) -> torch.Tensor:
            inner = Plain(h=state.h, factor=state.factor[0] if isinstance(state.factor, deque) else state.factor)
            return super().forward(x, inner)

    pipe = cut(First(), X, Plain(h=X, factor=factor))
    again = Plain(h=X + 1, factor=deepcopy(factor))
    assert torch.equal(pipe.module()(X, again), First()(X, again))
    others = {Slots: Slots(3), np.ndarray: np.zeros(3), Row: Row([3.0]), list: [Slots(3), print], deque: deque([2, Slots(3)])}
    other = others[type(factor)] if type(factor) in others else factor + type(factor)(1)
    with pytest.raises(InputError, match="attribute 'factor' of an argument"):
        pipe(X, Plain(h=X, factor=other))


def test_a_lock_cannot_be_compared() -> None:
    pipe = cut(Scales(), X, Plain(h=X, factor=2.0, lock=Lock()))
    with pytest.raises(InputError, match="attribute 'lock' of an argument"):
        pipe(X, Plain(h=X, factor=2.0, lock=Lock()))


@pytest.mark.parametrize("hidden", [Slots(X[0, 0]), Row([X[0, 0]])], ids=["slots", "row"])
def test_a_tensor_that_is_hidden_from_the_trace_is_refused(hidden: Any) -> None:
    with pytest.raises(CaptureError, match=r"(?s)Unsupported input type.*Plain.*no __slots__"):
        cut(Scales(), X, Plain(h=X, factor=hidden))


def test_a_set_that_changes_is_refused() -> None:
    with pytest.raises(CaptureError, match="container it is given"):
        cut(Discards(), X, Plain(x=X, names={"a", "b"}))


class Branches(nn.Module):
    """No trace goes through its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Notes(nn.Module):
    """Notes its first call in what it is given; the next one scales."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = Branches()

    def forward(self, x: torch.Tensor, item: Plain) -> Any:
        x = x * 10 if item.notes else x
        item.notes.add("called")
        return self.branches(x)


@pytest.mark.parametrize("fold", [True, False])
def test_each_trace_begins_with_what_the_caller_gave(fold: bool) -> None:
    """The first attempt ends in Branches, which is kept whole in the second."""
    item = Plain(notes=set())
    with pytest.raises(CaptureError, match="changes a container it is given") as caught:
        pipeline(Notes(), (X, item), fold=fold)
    assert "item.notes.add" in caught.value.where
    assert not item.notes


def test_one_object_in_two_places_is_refused_where_it_changes() -> None:
    table = {"c": X}

    class Both(nn.Module):
        def forward(self, x: torch.Tensor, one: Any, other: Any) -> torch.Tensor:
            one.table["c"] = x + 1
            pipe_split()
            return x + other.table["c"]

    with pytest.raises(StagecutError, match="two places"):
        cut(Both(), X, Plain(table=table), Plain(table=table))
    pipe = cut(Both(), X, Plain(table={"c": X}), Plain(table={"c": X}))
    with pytest.raises(InputError, match="two places"):
        pipe(X, Plain(table=table), Plain(table=table))


def test_schedules_refuse_what_they_cannot_put_back() -> None:
    pipe = cut(Cell(), X, a_state())
    with pytest.raises(StagecutError, match=r"(?s)changes what it is given.*state.h, state.count, state.seen"):
        pipe.build_stage(0, "cpu")
    pipe = cut(Reads(), X, Plain(h=X))
    with pytest.raises(StagecutError, match="returns an object that it is given"):
        pipe.build_stage(0, "cpu")


class Reads(nn.Module):
    """Returns what it is given, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        return self.b(self.a(x) * state.h), [state]


class Replaces(Reads):
    """Changes what it is given."""

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        state.h = torch.tanh(self.a(x) + state.h)
        return {"y": self.b(state.h)}


@pytest.mark.parametrize("on", [None, "cpu"], ids=["model", "measured"])
@pytest.mark.parametrize("make", [Reads, Replaces])
def test_a_loss_is_counted_without_what_is_given(make: Any, on: str | None) -> None:
    def loss(output: Any, _: Any) -> torch.Tensor:
        first: torch.Tensor = output["y"] if isinstance(output, dict) else output[0]
        return first.sum()

    model = make()
    pipe = pipeline(model, (X, Plain(h=X)), split_policy=Balanced(2, loss_fn=loss, profile_on=on))
    assert pipe.num_stages == 2
    assert torch.equal(pipe(X, Plain(h=X))[0], tree_leaves(model(X, Plain(h=X)))[0])


@dataclass
class Layers:
    """The state of a `Tower`."""

    layers: list[Any]


class Tower(nn.Module):
    """Layers that keep state in one of several ways each."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in kinds)

    def forward(self, x: torch.Tensor, cache: Layers, heads: dict[str, Any]) -> torch.Tensor:
        for number, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            x = torch.tanh(layer(x))
            part = cache.layers[number]
            if kind == "grows":
                part.keys = torch.cat([part.keys, x], 0)
                x = x + part.keys.mean(0)
            if kind == "replaced":
                part["h"] = part["h"] * 0.5 + x
                x = x + part["h"]
            if kind == "written":
                part[0].mul_(0.5).add_(x)
                x = x + part[0]
            if kind == "shared":
                heads["sum"] = heads["sum"] + x
                x = x + heads["sum"]
            if number % 2:
                pipe_split()
        return x


def tower_state(kinds: list[str]) -> tuple[Layers, dict[str, Any]]:
    makers = {
        "grows": lambda: Plain(keys=X.clone(), n=1),
        "replaced": lambda: {"h": X.clone()},
        "written": lambda: [X.clone()],
        "shared": dict,
    }
    return Layers([makers[kind]() for kind in kinds]), {"sum": X.clone()}


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(["grows", "replaced", "written", "shared"]), min_size=2, max_size=6))
def test_state_of_several_kinds_is_left_as_eager_leaves_it(kinds: list[str]) -> None:
    torch.manual_seed(0)
    model = Tower(kinds)
    with torch.no_grad():
        pipe = pipeline(model, mb_args=(X, *tower_state(kinds)))
        ours, theirs = tower_state(kinds), tower_state(kinds)
        assert torch.equal(pipe(X, *ours)[0], model(X, *theirs))
    assert_alike(ours, theirs)


# --- decoders ---------------------------------------------------------------------------------------------


def llama() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3, **size)).eval()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prefill_and_decode_steps_of_a_llama(kind: str) -> None:
    model = llama()
    ids, token = torch.randint(64, (2, 5)), torch.tensor([[3], [4]])

    def cache() -> Any:
        if kind == "dynamic":
            return transformers.DynamicCache(config=model.config)
        return transformers.StaticCache(config=model.config, max_cache_len=8)

    with torch.no_grad():
        theirs, ours = cache(), cache()
        for stages, call in ((2, ids), (2, token), (3, token)):
            spec = {f"model.layers.{number}": SplitPoint.BEGINNING for number in range(1, stages)}
            pipe = pipeline(model, mb_kwargs={"input_ids": call, "past_key_values": deepcopy(ours)}, split_spec=spec)
            assert pipe.num_stages == stages
            expected = model(input_ids=call, past_key_values=theirs)
            output = pipe.module()(input_ids=call, past_key_values=ours)
            assert type(output) is type(expected)
            assert output.past_key_values is ours
            torch.testing.assert_close(output.logits, expected.logits)
            for one, other in zip(ours.layers, theirs.layers, strict=True):
                assert vars(one).keys() == vars(other).keys()
                assert (one.dtype, one.device, one.is_initialized) == (other.dtype, other.device, True)
                torch.testing.assert_close((one.keys, one.values), (other.keys, other.values))
            assert ours.get_seq_length() == theirs.get_seq_length()
