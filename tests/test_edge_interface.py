"""The model's signature: what goes in and what comes out, in every structure."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from edge import Case, Family, check, linear, t
from torch.utils import _pytree as pytree

from stagecut import StagecutError, pipe_split, pipeline
from stagecut.ir.errors import InputError

case = Family()
X, Y = t(4, 4), t(4, 4) + 1
A = {"a": linear}
BATCH = torch.export.Dim("batch", min=2, max=64)


class Pair(NamedTuple):
    first: Any
    second: Any


class Color(Enum):
    RED = 1


Old = namedtuple("Old", "x y")


@dataclass
class Result:
    logits: Any
    hidden: Any = None
    loss: Any = None


@dataclass
class Unknown:
    logits: Any


pytree.register_dataclass(Result, serialized_type_name="tests.test_edge_interface.Result")


# --- outputs ------------------------------------------------------------------------------------------


def returns(make, **options):
    """A case whose model returns what `make` builds of two tensors made in different stages."""

    def forward(self, x):
        a = self.a(x)
        pipe_split()
        return make(a, a.relu(), x)

    forward.__name__ = make.__name__
    forward.__code__ = forward.__code__.replace(co_name="forward")
    case(X, stages=2, has=A, **options)(forward)


for build in (
    lambda a, b, x: (b,),
    lambda a, b, x: [b, a],
    lambda a, b, x: {"b": b, "a": a},
    lambda a, b, x: OrderedDict(z=b, a=a),
    lambda a, b, x: Pair(a, b),
    lambda a, b, x: Old(b, a),
    lambda a, b, x: Result(b, (a, b)),
    lambda a, b, x: (b, None),
    lambda a, b, x: {"i": 3, "s": "text", "f": 0.5, "t": True, "b": b},
    lambda a, b, x: (b, b, {"again": b}),
    lambda a, b, x: (b, x),
    lambda a, b, x: (x, b, x),
    lambda a, b, x: {"deep": [{"er": (a, [b, Pair(x, None)])}], 5: b},
    lambda a, b, x: (b, (), [], {}),
    lambda a, b, x: (b, b.view(-1), b[0]),
    lambda a, b, x: (b, a.shape, b.dtype == torch.float64),
    lambda a, b, x: (b + 1, a.detach()),
):
    NAMES = (
        "single_tuple a_list a_dict ordered_dict named_tuple old_named_tuple registered_dataclass with_none scalars_and_text doubled "
        "input_returned input_returned_twice deeply_nested empty_containers views_of_one_output sizes_and_bools detached_output"
    ).split()
    build.__name__ = "returns_" + NAMES[len(case.cases)]
    returns(build)


class Layer:
    """A part of a cache: tensors beside what is none."""

    def __init__(self, keys: Any, values: Any) -> None:
        self.keys, self.values, self.kind, self.seen = keys, values, keys.dtype, keys.shape[-2]


class Cache:
    """As decoders return it: an object that holds objects."""

    def __init__(self, *layers: Layer) -> None:
        self.layers, self.updated, self.spare = list(layers), {0: True}, []


class Ring:
    """An object that holds itself."""

    def __init__(self, value: Any) -> None:
        self.value, self.me = value, self


@case(X, stages=2, has=A)
def returns_an_unregistered_dataclass(self, x):
    a = self.a(x)
    pipe_split()
    return Unknown({"a": [a, 3], "b": a.relu()})


@case(X, stages=2, has=A)
def returns_a_cache_of_objects(self, x):
    a = self.a(x)
    first = Layer(a, a * 2)
    pipe_split()
    return {"logits": a.sum(), "cache": Cache(first, Layer(a.relu(), x))}


@case(X, stages=2, has=A, dynamic={"x": {0: BATCH}}, calls=((t(6, 4),), (t(3, 4),)))
def returns_an_object_that_holds_a_size(self, x):
    a = self.a(x)
    pipe_split()
    return Layer(a, a.relu())


@case(X, stages=2, has=A)
def returns_an_enum(self, x):
    a = self.a(x)
    pipe_split()
    return {"color": Color.RED, "relu": a.relu()}


@case(X, stages=2, has=A)
def returns_what_never_changes(self, x):
    a = self.a(x)
    pipe_split()
    return a.relu(), a.dtype, 1j, b"ab", range(3), {1, "b"}


@case(X, stages=2, has=A)
def returns_a_namespace(self, x):
    a = self.a(x)
    pipe_split()
    return SimpleNamespace(relu=a.relu(), color=Color.RED, rest=(None, x.shape), mixed=[a, a.dtype])


@case(X, has=A, refused="returns a set, which is neither a tensor nor plain data")
def returns_a_set_of_tensors(self, x):
    a = self.a(x)
    pipe_split()
    return {a.relu()}


@case(X, has=A, refused="returns a torch.device, which is neither a tensor nor plain data")
def returns_a_device(self, x):
    a = self.a(x)
    pipe_split()
    return a.relu(), a.device


@case(X, has=A, refused="Ring|pytree")
def returns_an_object_that_holds_itself(self, x):
    a = self.a(x)
    pipe_split()
    return Ring(a.relu())


@case(X, stages=2, has=A)
def returns_an_in_place_result(self, x):
    x = self.a(x)
    pipe_split()
    return x.relu_(), x


@case(X, stages=1)
def returns_nothing(self, x):
    x.relu()


@case(X, stages=1, has=A)
def returns_a_literal_only(self, x):
    self.a(x)
    return 7


# --- inputs -------------------------------------------------------------------------------------------


@case(X, Y, stages=2, has=A)
def star_args(self, *xs):
    x = self.a(xs[0])
    pipe_split()
    return x + xs[1]


@case(X, Y, t(4, 4) + 2, stages=2, has=A)
def named_and_star_args(self, x, *rest):
    x = self.a(x)
    pipe_split()
    return x + rest[1] - rest[0]


@case(X, stages=2, has=A, kw={"b": Y, "a": t(4, 4) + 2})
def star_kwargs(self, x, **more):
    x = self.a(x)
    pipe_split()
    return x * more["a"] - more["b"]


@case(X, stages=2, has=A, kw={"y": Y, "z": X})
def keyword_only(self, x, *, z, y, w=None):
    x = self.a(x)
    pipe_split()
    return x * y - z if w is None else w


@case(stages=2, has=A, kw={"y": Y, "x": X})
def all_by_keyword_in_another_order(self, x, y):
    x = self.a(x)
    pipe_split()
    return x - y


@case({"a": X, "more": [Y, (t(4),)]}, stages=2, has=A)
def nested_input(self, d):
    x = self.a(d["a"])
    pipe_split()
    return x * d["more"][0] + d["more"][1][0]


@case(Pair(X, Y), stages=2, has=A)
def named_tuple_input(self, p):
    x = self.a(p.second)
    pipe_split()
    return x * p.first


@case(X, X.shape, {"more": [torch.Size([2, 8])]}, stages=2, has=A)
def torch_size_input(self, x, size, nested):
    x = self.a(x).view(size.numel()).view(nested["more"][0])
    pipe_split()
    return x * size[0], isinstance(nested["more"][0], torch.Size)


@case(X, slice(0, 2), has=A, refused=r"(?s)Unsupported input type .*slice.*give __init__ what is none of these")
def slice_input(self, x, part):
    x = self.a(x)
    pipe_split()
    return x[part]


@case(X, torch.float32, has=A, refused=r"(?s)Unsupported input type .*dtype.*give __init__ what is none of these")
def dtype_input(self, x, dtype):
    x = self.a(x)
    pipe_split()
    return x.to(dtype)


@case(Result(X, (Y,)), stages=2, has=A)
def dataclass_input(self, r):
    x = self.a(r.logits)
    pipe_split()
    return x * r.hidden[0]


@case(X, None, Y, stages=2, has=A)
def none_between_tensors(self, x, mask, y):
    x = self.a(x)
    pipe_split()
    return x * y if mask is None else x


@case(X, stages=2, has=A)
def optional_input_left_out(self, x, mask=None, scale=2.0):
    x = self.a(x)
    pipe_split()
    return x * scale if mask is None else x * mask


@case(X, 3, True, "tanh", 0.5, stages=2, has=A)
def python_scalars(self, x, n, flag, name, rate):
    x = self.a(x) * n
    pipe_split()
    return getattr(torch, name)(x) * rate if flag else x


@case(X, [], {}, (), stages=2, has=A)
def empty_containers_in(self, x, a, b, c):
    x = self.a(x)
    pipe_split()
    return x * (len(a) + 1)


@case(X, stages=2, has=A, dynamic={"x": {0: BATCH}}, calls=((t(2, 4),), (t(9, 4),)))
def another_batch_size(self, x):
    x = self.a(x)
    pipe_split()
    return x.view(x.shape[0], 2, 2).sum(-1)


@case(X, Y, stages=2, has=A, dynamic={"x": {0: BATCH}, "y": {0: BATCH}}, calls=((t(2, 4), t(2, 4)), (t(9, 4), t(9, 4))))
def another_batch_size_of_two_inputs(self, x, y):
    x = self.a(x)
    pipe_split()
    return torch.cat([x, y])


@case(X, t(4, 3), stages=2, dynamic={"x": {0: BATCH}, "y": {0: BATCH}}, has=A, calls=((t(2, 4), t(2, 3)),))
def dynamic_first_of_two(self, x, y):
    x = self.a(x)
    pipe_split()
    return x.sum(1, keepdim=True) + y


@case(X, has=A, dynamic={"x": {0: BATCH}}, refused=r"(?s)batch .*specialized it to be a constant \(4\).*torch suggests batch = 4")
def dynamic_size_that_the_model_fixes(self, x):
    x = self.a(x)
    pipe_split()
    return x.view(4, 2, 2)


@case(X, has=A, dynamic={"x": {0: BATCH}}, refused=r"(?s)generated guard .*; torch suggests .* batch = 2\*_batch")
def dynamic_size_that_a_slice_restricts(self, x):
    x = self.a(x)
    pipe_split()
    return x[: x.shape[0] // 2 + 1]


@case(X, 2, stages=2, has=A, dynamic={"x": None, "n": torch.export.Dim.DYNAMIC}, calls=((X, 3), (X, 4)))
def dynamic_python_int(self, x, n):
    x = self.a(x)
    pipe_split()
    return x * n


@case(X.requires_grad_(False), Y, stages=2, has=A, grad=False)
def inputs_named_as_python(self, self_, input):
    x = self.a(self_)
    pipe_split()
    return x + input


# --- containers that are given --------------------------------------------------------------------------


@case(X, {"h": Y, "n": 1}, stages=2, has=A)
def given_dict_read(self, x, cache):
    cache["n"] = 1
    x = self.a(x) + cache["h"]
    pipe_split()
    return x * cache.get("g", cache["h"])


@case(X, {"h": Y}, stages=2, has=A)
def given_dict_holds_another_tensor(self, x, cache):
    x = self.a(x)
    cache["h"] = cache["h"] + x
    pipe_split()
    return x * cache["h"]


@case(X, {"h": Y}, stages=2, has=A)
def given_dict_that_grows(self, x, cache):
    cache["k"] = x = self.a(x)
    pipe_split()
    return x + cache["h"]


@case(X, [Y, X], stages=2)
def given_list_popped(self, x, given):
    x = x + given.pop()
    pipe_split()
    return x * given[0]


@case(X, {"all": (Y, [Y])}, stages=1)
def given_list_inside_appended(self, x, given):
    given["all"][1].append(x)
    pipe_split()  # no op is before it
    return x * 2


@case(X, {"all": (Y, [Y])}, stages=2, has=A)
def given_list_inside_appended_in_two_stages(self, x, given):
    given["all"][1].append(x)
    x = self.a(x)
    given["all"][1].append(x)
    pipe_split()
    given["all"][1].append(x * 2)
    return x * 3


@case(X, stages=2, kw={"result": Result(Y)})
def given_object_changed(self, x, *, result):
    result.hidden = x * 2
    pipe_split()
    return x * result.logits


@pytest.mark.filterwarnings("ignore:.*Dim.*:UserWarning")
@pytest.mark.parametrize("one", case.params())
def test_interface(one: Case) -> None:
    """Called as the model is; returns what the model returns, in its structure."""
    check(one)


MISFITS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "another_int": ("python_scalars", (X, 4, True, "tanh", 0.5), {}, "'n'"),
    "another_bool": ("python_scalars", (X, 3, False, "tanh", 0.5), {}, "'flag'"),
    "an_int_for_a_bool": ("python_scalars", (X, 3, 1, "tanh", 0.5), {}, "'flag'"),
    "another_text": ("python_scalars", (X, 3, True, "exp", 0.5), {}, "'name'"),
    "another_float": ("python_scalars", (X, 3, True, "tanh", 0.25), {}, "'rate'"),
    "a_tensor_for_a_scalar": ("python_scalars", (X, torch.tensor(3), True, "tanh", 0.5), {}, "'n'"),
    "another_default": ("optional_input_left_out", (X,), {"scale": 3.0}, "'scale'"),
    "a_tensor_for_none": ("none_between_tensors", (X, X, Y), {}, "'mask'"),
    "none_for_a_tensor": ("none_between_tensors", (None, None, Y), {}, "'x'"),
    "another_batch_size": ("star_args", (X[:2], Y[:2]), {}, "dynamic_shapes"),
    "another_rank": ("star_args", (X[0], Y), {}, "shape"),
    "another_dtype": ("star_args", (X.float(), Y), {}, "dtype"),
    "another_size_of_a_fixed_dim": ("another_batch_size", (t(4, 5),), {}, "shape"),
    "two_sizes_for_one_symbol": ("another_batch_size_of_two_inputs", (t(4, 4), t(5, 4)), {}, "shape"),
    "a_size_out_of_range": ("another_batch_size", (t(100, 4),), {}, "64"),
    "a_size_below_the_range": ("another_batch_size", (t(1, 4),), {}, "2"),
    "one_argument_less": ("star_args", (X,), {}, "missing|nested|structure"),
    "one_argument_more": ("star_args", (X, Y, Y), {}, "positional"),
    "another_nesting": ("nested_input", ({"a": X, "more": (Y, (t(4),))},), {}, "'d'"),
    "another_key": ("nested_input", ({"b": X, "more": [Y, (t(4),)]},), {}, "'d'"),
    "another_torch_size": ("torch_size_input", (X, torch.Size([2, 8]), {"more": [torch.Size([2, 8])]}), {}, "'size"),
    "an_unknown_keyword": ("star_kwargs", (X,), {"b": Y, "c": Y}, "'a'|'c'"),
}


@pytest.mark.filterwarnings("ignore:.*Dim.*:UserWarning")
@pytest.mark.parametrize("name", MISFITS)
def test_a_call_that_does_not_fit(name: str) -> None:
    """An InputError at the call, naming the argument; nothing has run."""
    base, args, kwargs, message = MISFITS[name]
    one = case.cases[base]
    pipe = one.cut(one.build())
    for run in (pipe, pipe.module()):
        with pytest.raises(InputError, match=message) as caught:
            run(*args, **kwargs)
        assert caught.value.hint or "takes" in str(caught.value)


def test_a_pipe_takes_no_grad_and_autocast_around_it() -> None:
    """Modes around the call reach all stages, as they reach the model."""
    one = case.cases["star_args"]
    pipe = one.cut(one.build())
    with torch.no_grad():
        assert not pipe(X, Y)[0].requires_grad
    with torch.inference_mode():
        assert pipe(X, Y)[0].is_inference()
    assert pipe(X, Y)[0].requires_grad


def test_a_model_of_no_arguments_gets_some() -> None:
    """One positional argument too many is an InputError at the cut too."""
    with pytest.raises(StagecutError, match="positional"):
        pipeline(case.cases["keyword_only"].build(), (X, Y), {"y": Y, "z": X})
