"""Capture leaves torch, the model and what lies around it as they were, whether it succeeds or not."""

from __future__ import annotations

import builtins
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stagecut import InputError, ModeError, SplitPoint, StagecutError, pipe_split, pipeline
from stagecut.frontend.capture.capture import capture
from stagecut.frontend.watch.attributes import attributes, fingerprint
from stagecut.ir.errors import CaptureError
from stagecut.programs import Programs

X = torch.randn(3, 4)
AROUND: list[Any] = []
CALLS = 0


def patched() -> list[Any]:
    """What a watch replaces while it is open."""
    export = __import__("torch.export._trace", fromlist=["_"])
    names = ("__setattr__", "training", "__getattr__", "__getattribute__", "__delattr__")
    return [
        *(vars(nn.Module).get(name) for name in names),
        *(vars(torch.Tensor).get(name) for name in ("register_hook", "register_post_accumulate_grad_hook")),
        torch.random.default_generator,
        *(getattr(torch.cuda, name) for name in torch.cuda.random.__all__),
        vars(torch.autograd.Function)["apply"],
        torch.nn.attention._sdpa_kernel,
        *(vars(cls)["__init__"] for cls in (torch.autograd.graph.saved_tensors_hooks, torch.autograd.graph.save_on_cpu)),
        os.urandom,
        builtins.print,
        torch.compile,
        torch.is_grad_enabled,
        export._detect_attribute_assignment,
        export.register_buffer_assignment_hook,
        len(torch.overrides._get_current_function_mode_stack()),
    ]


class Model(nn.Module):
    """Has state of many kinds; `does` is what its forward does to it."""

    def __init__(self, does: Any = None) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("b", torch.zeros(4))
        self.plain, self.held = torch.ones(4), [torch.ones(4), {"n": 1}]
        self.number, self.text, self.nothing = 1, "t", None
        self.does = does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if self.does is not None:
            self.does(self, x)
        pipe_split()
        return x * 2


def state(model: Any) -> Any:
    """All of the model: tensors by identity, version and value, attributes by content, flags, hooks."""
    tensors = {n: (id(t), t._version, t.tolist(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    plain = {key: fingerprint(value) for key, value in attributes(model)}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), m.training) for m in model.modules()]
    return tensors, plain, hooks, list(vars(model)), model.plain.tolist()


def fails(self: Any, x: torch.Tensor) -> None:
    """Cannot be traced."""
    if x.sum() > 0:
        self.number = 2


def grows(self: Any, x: torch.Tensor) -> None:
    """Changes everything a bit."""
    self.number += 1
    self.text += "t"
    self.held.append(x)
    self.held[1]["n"] = x
    self.nothing = x
    self.extra = x


def hooks(self: Any, x: torch.Tensor) -> None:
    """Registers a hook."""
    x.register_hook(lambda grad: grad)


def seeds(self: Any, x: torch.Tensor) -> None:
    """Seeds all generators."""
    random.seed(3)
    torch.manual_seed(3)


def reassigns(self: Any, x: torch.Tensor) -> None:
    """Gives a buffer another tensor, and writes a plain one."""
    self.b = self.b + x.detach().sum(0)
    self.plain.add_(1)
    self.held[0].add_(1)


def harmless(self: Any, x: torch.Tensor) -> None:
    """Sets attributes anew in every call."""
    self.number, self.text, self.nothing = 2, "u", x


@pytest.mark.parametrize("does", [None, fails, grows, hooks, seeds, reassigns, harmless])
def test_the_model_and_torch_are_as_they_were(does: Any) -> None:
    model = Model(does)
    before, was = state(model), patched()
    seen = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
    try:
        capture(model, (X,), {})
    except StagecutError:
        assert does in (fails, grows, hooks, seeds)
    assert patched() == was
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), seen[0])
    assert (random.getstate(), torch.is_grad_enabled()) == seen[1:]


def collects(module: nn.Module, args: Any, result: Any) -> None:
    """A forward hook that keeps what it sees."""
    AROUND.append(result)


def test_what_a_hook_collects_is_as_it_was_and_noted() -> None:
    model = Model()
    model.a.register_forward_hook(collects)
    pipe = pipeline(model, (X,), check=None)
    assert AROUND == []
    assert len(pipe.notes) == 1
    assert "'AROUND'" in pipe.notes[0]
    assert f"test_watch.py:{collects.__code__.co_firstlineno} in collects" in pipe.notes[0]


class Counting(nn.Module):
    """Changes a number of its own file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global CALLS  # noqa: PLW0603
        CALLS += 1
        return x * CALLS


def test_a_number_of_the_file_is_as_it_was() -> None:
    with pytest.raises(CaptureError, match="'CALLS'"):
        capture(Counting(), (X,), {})
    assert CALLS == 0


@lru_cache
def scale() -> torch.Tensor:
    """A constant that is made once."""
    return torch.arange(4.0)


class Caching(nn.Module):
    """Fills caches of all kinds outside of the instance, `where` says which."""

    HELD: Any = None
    NESTED: dict[str, dict[str, torch.Tensor]] = {"a": {}}

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def default(self, *, memo: list[torch.Tensor] = []) -> torch.Tensor:  # noqa: B006
        memo[:] = memo or [torch.arange(4.0)]
        return memo[0]

    def forward(self, x: torch.Tensor, fails: bool = False) -> torch.Tensor:
        if self.where == "cache":
            x = x * scale()
        if self.where == "class":
            Caching.HELD = torch.arange(4.0) if Caching.HELD is None else Caching.HELD
            x = x * Caching.HELD
        if self.where == "nested":
            x = x * self.NESTED["a"].setdefault("b", torch.arange(4.0))
        if self.where == "added":
            Caching.ADDED = torch.arange(4.0)  # type: ignore[attr-defined]
            x = x * Caching.ADDED  # type: ignore[attr-defined]
        if self.where == "default":
            x = x * self.default()
        if self.where == "helper":
            x = x * helper("h")
        if fails and x.sum() > 0:
            return x
        return x * 2


KNOWN: dict[str, torch.Tensor] = {}


def helper(name: str) -> torch.Tensor:
    """Keeps what it makes in the file."""
    if name not in KNOWN:
        KNOWN[name] = torch.arange(4.0)
    return KNOWN[name]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("where", ["cache", "class", "nested", "added", "default", "helper"])
def test_no_fake_tensor_stays_in_a_cache_outside_of_the_model(where: str, fails: bool) -> None:
    model = Caching(where)
    with pytest.raises(CaptureError) if fails or where != "cache" else nullcontext():
        pipeline(model, (X, fails), check=None)
    assert (scale.cache_info().currsize, Caching.HELD, Caching.NESTED, KNOWN) == (0, None, {"a": {}}, {})
    assert "ADDED" not in vars(Caching)
    assert Caching.default.__kwdefaults__ == {"memo": []}


DRAWS = random.Random(1)


def test_a_generator_is_as_it_was() -> None:
    state = DRAWS.getstate()
    with pytest.raises(CaptureError, match=r"random\.Random"):
        pipeline(Model(lambda _, x: x.mul_(DRAWS.random())), (X,))
    assert DRAWS.getstate() == state
    pipeline(Model(lambda *_: DRAWS.random()), (X,), check=None)
    assert DRAWS.getstate() == state


def test_who_traces_lines_goes_on_after_a_line_was_found() -> None:
    seen: list[str] = []

    def trace(frame: Any, event: str, arg: Any) -> Any:
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(CaptureError, match="'CALLS'"):
            capture(Counting(), (X,), {})
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


def test_capture_under_no_grad_is_that_under_grad() -> None:
    """The gradient of what the model computes outside of its own regions must not depend on where pipeline() is called."""
    with torch.no_grad():
        pipe = pipeline(Model(), (X,))
    assert pipe(X)[0].requires_grad


class Run(torch.autograd.Function):
    """Is given a module."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return None, *grad_outputs


def test_a_function_that_is_traced_through_is_noted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = Run.apply(self.a, x)
            pipe_split()
            return y * 2

    pipe = pipeline(Net(), (X,), check=None)
    assert len(pipe.notes) == 1
    assert "gradient of Run" in pipe.notes[0]
    assert "test_watch.py" in pipe.notes[0]


def chooses(self: Any, x: torch.Tensor) -> None:
    """Attention of a chosen kind, twice in one line of this file."""
    for _ in range(2):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            F.scaled_dot_product_attention(x, x, x)


def offloads(self: Any, x: torch.Tensor) -> None:
    """Asks for what backward needs to be moved."""
    with torch.autograd.graph.save_on_cpu():
        x.tanh()


@pytest.mark.parametrize(("does", "what"), [(chooses, "sdpa_kernel"), (offloads, "save_on_cpu")])
def test_what_is_lost_and_changes_no_result_is_noted_once(does: Any, what: str) -> None:
    (note,) = pipeline(Model(does), (X,)).notes
    assert f"{what}() is lost" in note
    assert "test_watch.py" in note


class Printing(nn.Module):
    """Prints what it computes, to standard error too, in each call or in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(4, 4), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.a(x))
        print("printed mean", x.mean())  # noqa: T201
        for _ in range(2):
            print("printed too", file=sys.stderr)  # noqa: T201
        if not self.training:
            print("printed in eval mode")  # noqa: T201
            x = x + 1
        return x


class Blocks(nn.Module):
    """Six blocks; `around` runs in the root's forward."""

    def __init__(self, around: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Printing() for _ in range(6))
        self.around = around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.around()
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("fold", [False, True])
def test_each_line_that_prints_is_noted_once_with_what_prints_in_each_call(fold: bool) -> None:
    pipe = pipeline(Blocks(), (X,), fold=fold, check=None)
    assert len(pipe.notes) == 3
    for note, line in zip(pipe.notes, ("printed mean", "printed too", "printed in eval mode"), strict=True):
        assert note.startswith("print() is called while forward of module 'blocks.0' is traced, and the stages do not print: ")
        assert "test_watch.py:" in note
        assert line in note
        assert "try: return the value as an output and print that; or leaf_modules=['blocks.0'] keeps that module whole" in note


def test_a_module_that_is_kept_whole_prints_in_each_call_and_is_not_noted(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline(Blocks(), (X,), leaf_modules=[f"blocks.{i}" for i in range(6)], check=None)
    assert pipe.notes == ()
    capsys.readouterr()
    pipe(X)
    pipe(X)
    assert capsys.readouterr().out.count("printed mean") == 12
    assert len(pipeline(Blocks(), (X,), leaf_modules=["blocks.0"], check=None).notes) == 3


def test_the_root_cannot_be_kept_whole_and_its_note_says_so() -> None:
    (note,) = pipeline(Model(lambda *_: print()), (X,), check=None).notes  # noqa: T201
    assert "while forward is traced" in note
    assert "move this line into a submodule that leaf_modules=[...] keeps whole" in note


def test_what_other_threads_and_branches_print_is_no_part_of_the_trace() -> None:
    def elsewhere() -> None:
        thread = threading.Thread(target=print)
        thread.start()
        thread.join()
        inner = threading.Thread(target=lambda: print())  # noqa: T201
        inner.start()
        inner.join()

    def branches(self: Any, x: torch.Tensor) -> None:
        def prints(x: torch.Tensor) -> torch.Tensor:
            print("in a branch")  # noqa: T201
            return x * 2

        torch.cond(x.sum() > 0, prints, lambda x: x * 3, (x.detach(),))

    for does in (lambda *_: elsewhere(), branches):
        assert pipeline(Model(does), (X,), check=None).notes == ()


@pytest.mark.parametrize(
    ("does", "hint"),
    [
        (lambda self, x: self.log.append(x.detach()), "try: return what it holds as outputs, and collect them outside of the model"),
        (lambda self, x: setattr(self, "number", self.number + 1), "try: make it a buffer"),
        (lambda self, x: x.detach().numpy(), "no numpy or other libraries on tensors"),
    ],
)
def test_what_leaves_the_trace_is_told_what_fits_it(does: Callable[..., Any], hint: str) -> None:
    model: Any = Model(does)
    model.log = []
    with pytest.raises(CaptureError) as raised:
        pipeline(model, (X,))
    assert hint in str(raised.value)
    assert "or keep the submodule that does it whole, leaf_modules=[...]" in str(raised.value)


class Checking(nn.Module):
    """Checks what it computes, by each statement that only raises; `by_branch` also chooses by it."""

    def __init__(self, by_branch: bool = False) -> None:
        super().__init__()
        self.a, self.by_branch = nn.Linear(4, 4), by_branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a(x)
        for _ in range(2):
            if torch.isnan(y).any():
                raise ValueError("nan")
        if not torch.isfinite(y).all():
            raise ValueError("not finite")
        if x.min() <= -100:
            raise ValueError("too small")
        if self.by_branch and x.sum() > 0:
            return y + 1
        if torch.zeros(2).sum() > 1:  # known, and no check of data
            raise ValueError("never")
        return y


class Checked(Blocks):
    """Six blocks that check."""

    def __init__(self, by_branch: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Checking(by_branch) for _ in range(6))


@pytest.mark.parametrize("fold", [False, True])
def test_each_check_that_the_stages_lose_is_noted_once(fold: bool) -> None:
    pipe = pipeline(Checked(), (X,), fold=fold, check=None)
    assert len(pipe.notes) == 3
    for note, line in zip(pipe.notes, ("isnan(y)", "isfinite(y)", "x.min() <= -100"), strict=True):
        assert note.startswith("forward of module 'blocks.0' checks data here and raises where the check fails; the stages do not check")
        assert "test_watch.py:" in note
        assert line in note
        assert "or leaf_modules=['blocks.0'] keeps that module whole, and it checks in each call" in note
    pipe(X * torch.nan)


@pytest.mark.parametrize("by_branch", [False, True])
def test_a_module_that_is_kept_whole_checks_in_each_call_and_is_not_noted(by_branch: bool) -> None:
    whole = [] if by_branch else [f"blocks.{i}" for i in range(6)]
    pipe = pipeline(Checked(by_branch), (X,), leaf_modules=whole, check=None)
    assert not [note for note in pipe.notes if "checks data" in note]
    with pytest.raises(Exception, match="nan"):
        pipe(X * torch.nan)


class Merging(nn.Module):
    """A train() that does more than set flags."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.merged = nn.Linear(4, 4), False

    def train(self, mode: bool = True) -> Merging:
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        pipe_split()
        return F.relu(x)


def test_a_train_of_the_users_that_does_more_is_an_error_at_the_switch() -> None:
    pipe = pipeline(Merging(), (X,))
    with pytest.raises(ModeError, match=r"test_watch\.py:\d+, Merging\.train"):
        pipe.eval()
    assert all(module.training for module in pipe.modules())


def test_a_follower_says_nothing_at_the_switch() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(
                x,
                0.5,
                training=self.training,
            )
            pipe_split()
            return x * 2

    pipe = pipeline(Net(), (X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.eval()
    assert torch.equal(pipe(X)[0], X * 2)


def test_looking_at_generators_is_no_part_of_the_trace() -> None:
    assert [entry.name for entry in pipeline(nn.Linear(4, 4), (X,)).program.state] == ["weight", "bias"]


class AsksGrad(nn.Module):
    """Goes another way where no gradients are computed."""

    def __init__(self, asks: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.asks = asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        return y * 2 if self.asks(y) else y * 3


ASKS: dict[str, Callable[[torch.Tensor], bool]] = {
    "requires_grad": lambda y: y.requires_grad,
    "grad_fn": lambda y: y.grad_fn is not None,
    "is_leaf": lambda y: not y.is_leaf,
    "is_grad_enabled": lambda y: torch.is_grad_enabled(),
}


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_a_note_says_where_the_model_asks_whether_gradients_are_on(asks: Callable[[torch.Tensor], bool]) -> None:
    pipe = pipeline(AsksGrad(asks), (torch.randn(2, 4),))
    (note,) = pipe.notes
    assert note.startswith("forward asks whether gradients are on, and the stages do what it does where they are on: ")
    assert f"{__file__}:{asks.__code__.co_firstlineno} in <lambda>" in note


def test_no_note_for_what_torch_asks_or_for_a_parameter() -> None:
    model = AsksGrad(lambda y: True)
    model.asks = lambda y: model.lin.weight.requires_grad
    assert pipeline(model, (torch.randn(2, 4),)).notes == ()
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert pipeline(layer.eval(), (torch.randn(2, 3, 8),)).notes == ()


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_a_program_that_generates_goes_the_way_without_gradients(asks: Callable[[torch.Tensor], bool]) -> None:
    model = nn.Sequential(AsksGrad(asks), AsksGrad(asks)).eval()
    call = {"input": torch.randn(2, 4)}
    fit = Programs(model, {"1": SplitPoint.BEGINNING}, None).fitting(call)
    with torch.no_grad():
        assert torch.equal(fit.run(call), model(**call))


def test_nothing_is_traced_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(InputError, match=r"torch\.inference_mode"):
        pipeline(nn.Linear(2, 2), (torch.randn(3, 2),))


def test_a_program_that_generates_is_made_in_inference_mode_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.inference_mode():
        call = {"input": torch.randn(2, 4)}
        fit = Programs(model, {"1": SplitPoint.BEGINNING}, None).fitting(call)
        assert torch.equal(fit.run(call), model(**call))
