"""A model that fails on its own example inputs is refused, and one that fails for another reason is not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensor

from stagecut import CannotCompare, CaptureError, InputError, SplitPoint, pipeline
from stagecut.tools.dump_ir.main import main

Forward = Callable[..., torch.Tensor]


class Model(nn.Module):
    """Two layers around a function of two inputs, in the file of which the user's lines are."""

    def __init__(self, middle: Forward) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.middle = middle
        self.steps = nn.Buffer(torch.zeros(()))

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return self.last(self.middle(self.first(x), i))


X = torch.ones(4, 4)


def outcome(model: nn.Module, *inputs: Any) -> Exception | None:
    """The exception of a call of a copy of a model."""
    try:
        deepcopy(model)(*inputs)
    except Exception as error:
        return error
    return None


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 4), index=st.integers(0, 8), training=st.booleans())
def test_it_is_refused_exactly_when_it_fails(rows: int, index: int, training: bool) -> None:
    """Shapes are right whatever the index is, so the trace works."""
    model = Model(lambda x, i: x + F.embedding(i, x[:rows])).train(training)
    inputs = X, torch.full((4,), index)
    failure = outcome(model, *inputs)
    if failure is None:
        pipeline(model, inputs, stages=2)
        return
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        pipeline(model, inputs, stages=2)


def refuse(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """A check of the model's own, which no stage makes."""
    if i.sum() > 100:
        raise TooMany("so many are not there")
    return x


class TooMany(Exception):
    """An exception of the model's own."""


FAIL: dict[str, Forward] = {
    "an index": lambda x, i: x[i],
    "a table": lambda x, i: F.embedding(i, x),
    "gather": lambda x, i: x + torch.gather(x, 0, i[:, None]),
    "one hot": lambda x, i: x + F.one_hot(i, 4),
    "a class": lambda x, i: x + F.cross_entropy(x, i),
    "no inverse": lambda x, i: torch.linalg.inv(x * i.clamp(max=0)),
    "a checked value": lambda x, i: torch._assert_async((i < 4).all()) or x,
    "a check of its own": refuse,
    "no probability": lambda x, i: x + torch.multinomial(x - 100, 4),
}


@pytest.mark.parametrize("check", ["auto", "outputs", "gradients"])
@pytest.mark.parametrize("middle", FAIL.values(), ids=FAIL.keys())
def test_the_error_is_the_models_own(middle: Forward, check: str) -> None:
    """It names the class, the words and the line, and holds the exception; model and random state stay as they were."""
    model = Model(middle)
    inputs = X, torch.full((4,), 999)
    failure = outcome(model, *inputs)
    state, drawn = deepcopy(model.state_dict()), torch.random.get_rng_state()
    with pytest.raises(CaptureError) as caught:
        pipeline(model, inputs, stages=2, check=check)
    refusal = caught.value
    assert type(refusal.cause) is type(failure)
    assert str(failure).splitlines()[0] in refusal.what
    assert refusal.what.startswith(f"Model fails on the example inputs: {type(failure).__name__}: ")
    assert refusal.where.startswith(f"{__file__}:")
    assert "check=None" in refusal.hint
    assert refusal.__suppress_context__
    assert all(torch.equal(now, state[name]) for name, now in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_model_and_stages_draw_the_same() -> None:
    """The first number is no row, and the second is one."""
    seed = next(seed for seed in range(99) if _drawn(seed)[0] > 3 > _drawn(seed)[1])
    torch.manual_seed(seed)
    with pytest.raises(CaptureError, match="fails on the example inputs: IndexError"):
        pipeline(Model(lambda x, i: x[torch.randint(8, (1,))]), (X, X), stages=2)


def _drawn(seed: int) -> list[int]:
    torch.manual_seed(seed)
    return [int(torch.randint(8, (1,))) for _ in range(2)]


class Sorted(nn.Module):
    """Is kept whole, since it reads a value, and fails on some."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x * 2 if i[0].item() > 3 else x[i]


def test_a_module_that_is_kept_whole_fails_as_the_model_does() -> None:
    with pytest.raises(CaptureError, match=r"^Model fails on the example inputs: IndexError: index -9 is out of bounds"):
        pipeline(Model(Sorted()), (X, torch.full((4,), -9)), stages=2)


@pytest.mark.parametrize("middle", FAIL.values(), ids=FAIL.keys())
def test_inputs_that_are_only_sizes_are_taken_where_nothing_is_compared(middle: Forward) -> None:
    inputs = X, torch.full((4,), 999)
    assert pipeline(Model(middle), inputs, stages=2, check=None).num_stages == 2
    meta = X.to("meta"), inputs[1].to("meta")
    assert pipeline(Model(middle).to("meta"), meta, stages=2).num_stages == 2


def test_a_look_at_the_program_asks_for_no_values(tmp_path: Path) -> None:
    """dump-ir makes inputs of its own for some models, and shows a program without running it."""
    (tmp_path / "model.py").write_text("import torch\ndef make(): return torch.nn.Embedding(4, 4), (torch.full((2,), 9),), {}\n")
    assert main([f"{tmp_path}/model.py:make", "--no-cache", "-o", str(tmp_path / "out")]) == 0


class Two(nn.Module):
    """Two tables on one line."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(64, 4), nn.Embedding(8, 4)])
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return self.head(self.tables[0](x) + self.tables[1](position))


INDICES = torch.zeros(2, 9, dtype=torch.int64), torch.arange(9)


@pytest.mark.parametrize("leaves", [[], ["tables.1"]])
def test_the_module_and_its_inputs_are_named(leaves: list[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        pipeline(Two(), INDICES, leaf_modules=leaves)
    assert caught.value.where.startswith(f"module 'tables.1', which was given int64[9], {__file__}:")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((torch.ones(2, 4),), "a tuple of float32[2, 4]"),
        ([torch.ones(2, 4), 1], "a list of float32[2, 4] and an int"),
        ({"x": torch.ones(1), "more": ()}, "a dict of float32[1] and an empty tuple"),
        ((torch.ones(1),) * 6, "a tuple of float32[1] and float32[1] and float32[1] and float32[1] and 2 more"),
        (torch.ones(3), "float32[3]"),
    ],
)
def test_a_container_in_the_place_of_a_tensor_is_named(given: Any, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(CaptureError) as caught:
        pipeline(model, (given,))
    assert f"module '0', which was given {words}, " in caught.value.where
    if isinstance(given, torch.Tensor):
        return
    with pytest.raises(InputError) as refused:
        pipeline(model, (torch.ones(2, 4),), stages=2, check=None)(given)
    assert refused.value.what.endswith(f"argument 'input' has another structure: it is {words}")


@pytest.mark.parametrize("cuts", [{}, {"head": SplitPoint.BEGINNING}])
def test_a_call_of_stages_that_fails_tells_where_in_the_model(cuts: dict[str, SplitPoint]) -> None:
    """The exception is the model's, and names module, inputs and line."""
    line = inspect.getsourcelines(Two.forward)[1] + 1
    pipe = pipeline(Two(), INDICES, split_spec=cuts, check=None)
    for call in (pipe, pipe.module()):
        with pytest.raises(IndexError, match="out of range") as caught:
            call(*INDICES)
        told = f"  at: stage 0, module 'tables.1', which was given int64[9], test_failing_inputs.py:{line}"
        assert caught.value.__notes__ == [told]


# --- what other inputs would not cure is a note -------------------------------------------------------


class ByIdentity(nn.Module):
    """Knows its layer by its identity: no copy runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scales = {id(self.layer): 2.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scales[id(self.layer)]


class NoBackward(nn.Module):
    """Has no gradient of torch's: its backward fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Broken.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class Broken(torch.autograd.Function):
    """Its backward raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ValueError("no backward here")


@torch.library.custom_op("stagecut_tests::elsewhere", mutates_args=(), device_types="cuda")
def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """Has a kernel for another device only."""
    return x.clone()


@elsewhere.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Elsewhere(nn.Module):
    """Can be traced here, and run elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return elsewhere(x)


@torch.library.custom_op("stagecut_tests::large", mutates_args=())
def large(x: torch.Tensor) -> torch.Tensor:
    """Fails as an op does for which there is no memory."""
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to allocate 8")


@large.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("stagecut_tests::narrow", mutates_args=())
def narrow(x: torch.Tensor) -> torch.Tensor:
    """Can be differentiated for few values."""
    return x.clone()


@narrow.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    if not isinstance(inputs[0], FakeTensor):
        raise ValueError("there is no gradient for such values")


narrow.register_autograd(lambda ctx, grad: grad, setup_context=_keep)


class Narrow(nn.Module):
    """Fails where gradients are asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return narrow(x)


class Large(nn.Module):
    """Needs more memory than there is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return large(x)


@torch.library.custom_op("stagecut_tests::lacking", mutates_args=())
def lacking(x: torch.Tensor) -> torch.Tensor:
    """Needs a library that is not there."""
    raise ModuleNotFoundError("No module named 'kernels'")


@lacking.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Lacking(nn.Module):
    """Can be traced without a library, and not run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lacking(x)


class OnlyTrained(nn.Module):
    """Fails in eval mode, where it reads a row that is not there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.tensor([3 if self.training else 9])
        return x[index]


@pytest.mark.parametrize("model", [ByIdentity(), Narrow(), NoBackward(), Elsewhere(), Large(), Lacking(), OnlyTrained()])
def test_another_failure_is_a_note(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    notes = [note for note in pipeline(model, (x,)).notes if note.startswith("not compared with the model")]
    assert len(notes) == 1, notes
    assert f"{type(model).__name__} itself fails on these inputs" in notes[0]


def test_who_asked_for_the_comparison_is_told_of_another_failure() -> None:
    with pytest.raises(CannotCompare, match="Large itself fails on these inputs: RuntimeError"):
        pipeline(Large(), (X,), check="outputs")
