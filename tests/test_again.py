"""again: a call is recognised when it comes again, and only then."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stagecut.backend.serve.again import Again
from stagecut.backend.serve.caches import Caches


class State(SimpleNamespace):
    """An object with weak references, as objects of a class have them."""


def cache() -> State:
    layers = [SimpleNamespace(keys=torch.zeros(2, 3), length=0, names={"a": torch.ones(1)}) for _ in range(2)]
    return State(layers=layers, size=3)


def call(state: Any) -> dict[str, Any]:
    return {"x": torch.ones(1, 4), "mask": {"full": torch.ones(4)}, "cache": state, "use": True}


def known(again: Again[str], kwargs: dict[str, Any]) -> bool:
    return again.found(kwargs) is not None


def noted(kwargs: dict[str, Any]) -> Again[str]:
    again: Again[str] = Again()
    flat = [kwargs["x"], torch.zeros(0), kwargs["mask"]["full"]]
    again.note(kwargs, flat, "fits")
    return again


def test_a_call_on_the_same_objects_is_found_with_its_own_tensors() -> None:
    state = cache()
    again = noted(call(state))
    state.layers[0].keys.add_(1)  # written in place, and nothing is replaced
    other = call(state)
    fact, flat = again.found(other) or ("", [])
    assert fact == "fits"
    assert flat[0] is other["x"]
    assert flat[2] is other["mask"]["full"]


CHANGES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "tensor": lambda state, _: setattr(state.layers[1], "keys", torch.zeros(2, 3)),
    "number": lambda state, _: setattr(state.layers[1], "length", 1),
    "truth": lambda state, _: setattr(state.layers[0], "length", False),
    "more": lambda state, _: state.layers.append(cache()),
    "fewer": lambda state, _: state.layers.pop(),
    "order": lambda state, _: state.layers.reverse(),
    "attribute": lambda state, _: setattr(state, "new", 1),
    "key": lambda state, _: state.layers[0].names.update(b=state.layers[0].names.pop("a")),
    "size": lambda state, _: state.layers[0].keys.resize_(3, 3),
    "argument": lambda _, kwargs: kwargs.update(x=torch.ones(1, 5)),
    "dtype": lambda _, kwargs: kwargs.update(x=torch.ones(1, 4, dtype=torch.int64)),
    "strides": lambda _, kwargs: kwargs.update(x=torch.ones(1, 8)[:, ::2]),
    "inside": lambda _, kwargs: kwargs["mask"].update(full=torch.ones(5)),
    "value": lambda _, kwargs: kwargs.update(use=1),
    "name": lambda _, kwargs: kwargs.update(y=kwargs.pop("x")),
    "another": lambda _, kwargs: kwargs.update(cache=cache()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_is_another_one(change: str) -> None:
    state = cache()
    again = noted(call(state))
    later = call(state)
    CHANGES[change](state, later)
    assert not known(again, later)
    assert known(again, call(state)) == (change in ("argument", "dtype", "strides", "inside", "value", "name", "another"))


def test_what_may_change_unseen_is_never_found() -> None:
    state = cache()
    state.seen = {1, 2}
    assert not known(noted(call(state)), call(state))
    shared = call(cache())
    shared["cache"].x = shared["x"]
    assert not known(noted(shared), shared)
    assert not known(noted({**call(None)}), call(None))


def test_nothing_is_kept_of_an_object_that_is_gone() -> None:
    state = cache()
    again = noted(call(state))
    del state
    gc.collect()
    assert again._calls == {}


class Cache:
    def __init__(self) -> None:
        self.keys = torch.zeros(2)


def test_a_cache_serves_one_request_after_the_other() -> None:
    caches = Caches()
    one, other = (caches.take(3, Cache) for _ in range(2))
    assert one is not other
    caches.finish({"past_key_values": other})
    keys = one.keys
    new, another, longer = caches.take(3, Cache), caches.take(3, Cache), caches.take(4, Cache)
    new.keys += 1
    assert caches.used_before(longer) is longer
    assert caches.used_before(new) is one
    assert (one.keys is keys, keys.tolist()) == (True, [1, 1])
    assert caches.used_before(another) is another
    caches.forget()  # the request failed
    caches.finish(None)
    new = caches.take(3, Cache)
    assert caches.used_before(new) is new
