"""check: what is compared with the model, when, and how near it must be."""

from __future__ import annotations

import gc
import re
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from compare import assert_same, snapshot
from edge import buffer, linear, t, weight
from torch import nn
from torch._subclasses import FakeTensorMode

from stagecut import Pipe, StagecutError, check, pipe_split, pipeline
from stagecut.backend.stages import emit
from stagecut.check import CannotCompare, CheckError, Report, is_cheap
from stagecut.ir.errors import InputError

X = t(4, 4)


class Plain(nn.Module):
    """Dropout, a counter, a tied weight and an idle one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = linear(), linear(), linear()
        self.b.weight = self.a.weight
        self.steps = buffer(value=0.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.steps.add_(1)
        x = nn.functional.dropout(self.a(x), 0.5, self.training)
        pipe_split()
        return self.b(x), x


class WithoutGradient(nn.Module):
    """Part of it records no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x @ self.w
        pipe_split()
        return x @ self.w + y


class Uncopyable(Plain):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("only one of me")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The comparisons made: for each, whether it was of gradients too."""
    seen: list[bool] = []
    real = check.compare

    def compare(*args: Any, gradients: bool = True, switched: bool = False) -> Report:
        seen.append(gradients)
        return real(*args, gradients=gradients, switched=switched)

    monkeypatch.setattr("stagecut.pipe.compare", compare)
    return seen


# --- when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "made"), [("auto", [True]), ("gradients", [True]), ("outputs", [False]), (None, [])])
def test_what_check_compares(how: str | None, made: list[bool], counted: list[bool]) -> None:
    """'auto' is 'gradients' for a small real model."""
    assert pipeline(Plain(), (X,), check=how).notes == ()
    assert counted == made


def test_check_is_auto_by_default(counted: list[bool]) -> None:
    pipeline(Plain(), (X,))
    assert counted == [True]


def test_an_unknown_check_is_refused_before_anything_is_traced() -> None:
    with pytest.raises(InputError, match="check='gradient' is not known") as caught:
        pipeline(nn.Module(), (X,), check="gradient")
    assert "'gradients'" in caught.value.hint


def test_auto_leaves_large_models_alone(counted: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """State and inputs count; asked for, it is done all the same."""
    size = sum(x.nbytes for x in (*Plain().parameters(), *Plain().buffers(), X))
    monkeypatch.setattr(check, "CHECK_BYTES", size)
    pipeline(Plain(), (X,))
    assert counted == [True]
    monkeypatch.setattr(check, "CHECK_BYTES", size - 1)
    pipeline(Plain(), (X,))
    assert counted == [True]
    pipeline(Plain(), (X,), check="outputs")
    assert counted == [True, False]


def test_only_real_tensors_are_cheap() -> None:
    """Neither meta nor fake ones can be run; tied parameters count once."""
    model = Plain()
    assert is_cheap(model, ((X,), {}))
    assert not is_cheap(model, ((X.to("meta"),), {}))
    assert not is_cheap(deepcopy(model).to("meta"), ((X,), {}))
    with FakeTensorMode():
        fake = torch.empty(4, 4)
    assert not is_cheap(model, ((), {"x": [fake]}))
    assert is_cheap(nn.Module(), ((3, "text", None), {}))


def test_an_exported_program_has_no_model_to_compare_with(counted: list[bool]) -> None:
    exported = torch.export.export(Plain(), (X,), strict=False)
    pipe = pipeline(exported)
    assert counted == []
    with pytest.raises(StagecutError, match="no model to compare with"):
        pipe.verify(X)


def test_what_cannot_be_compared_is_noted_or_refused() -> None:
    """'auto' notes it; who asked for it is told."""
    assert "not compared with the model: Uncopyable cannot be copied" in pipeline(Uncopyable(), (X,)).notes[0]
    with pytest.raises(CannotCompare, match="only one of me"):
        pipeline(Uncopyable(), (X,), check="outputs")


class Breaks(nn.Module):
    """Fails where an index is out of range."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        x = x * 2
        pipe_split()
        return x[i]


def test_inputs_on_which_the_model_fails_cannot_be_compared() -> None:
    """The error says that it was the model, and where."""
    pipe = pipeline(Breaks(), (X, torch.tensor([3])))
    with pytest.raises(CannotCompare, match=r"Breaks itself fails on these inputs: IndexError: .*\n  at: .*:\d+ in forward") as caught:
        pipe.verify(X, torch.tensor([9]))
    assert isinstance(caught.value.cause, IndexError)


# --- what it finds --------------------------------------------------------------------------------------


def test_what_outputs_do_not_show_is_found_in_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that forget `no_grad` return the same."""
    monkeypatch.setattr(emit, "_common_context", lambda run: ())
    pipeline(WithoutGradient(), (X,), check="outputs")
    for how in ("auto", "gradients"):
        with pytest.raises(CheckError, match="gradient of 'w': differs by up to") as caught:
            pipeline(WithoutGradient(), (X.clone().requires_grad_(),), check=how)
        assert "2 difference(s) in one run" in caught.value.where
        assert "leaf_modules" in caught.value.hint
        assert "verify" in caught.value.hint
    model = WithoutGradient()
    report = pipeline(model, (X,), check=None).verify(X)
    assert [d.partition(":")[0] for d in report.differences] == ["gradient of 'w'"]


class Tally:
    """A number in an object of the user's, where no watch on attributes sees it change."""

    count = 0


class Counts(nn.Module):
    """Returns another value with every call of one instance."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        pipe_split()
        if not torch._guards.detect_fake_mode():
            self.tally.count += 1
        return y * max(self.tally.count, 1)


def test_state_outside_of_buffers_is_found_by_the_second_call() -> None:
    """The first call of the pipe is as the model's."""
    model = Counts()
    report = pipeline(model, (X,), check=None).verify(X)
    assert {d.partition(":")[0] for d in report.differences} == {"an output of a second call"}


class Averages(nn.Module):
    """Returns the tensor that it gives its buffer; its next call writes into that one before it makes another."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = buffer(4, value=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.5)
        self.mean = self.mean * 0.5 + x.detach().mean(0)
        pipe_split()
        return self.mean


def test_outputs_are_compared_before_the_second_call_can_write_them() -> None:
    """An assigned buffer of a stage keeps its tensor, so what the stage returned stays as it was."""
    twin, pipe = Averages(), pipeline(Averages(), (X,), check="gradients")
    theirs, (ours,) = twin(X), pipe(X)
    first = ours.clone()
    assert torch.equal(theirs, first)
    twin(X), pipe(X)
    assert torch.equal(ours, first)
    assert not torch.equal(theirs, first)
    assert torch.equal(pipe.get_buffer("mean"), twin.mean)


class Iterates(nn.Module):
    """Reads a number that no watch on attributes sees change."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(1, 99))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(self.numbers)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.behind = nn.Linear(4, 4), Iterates(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.before(x))
        pipe_split()
        return self.behind(x)


def test_the_module_that_computes_something_else_in_each_call_is_named() -> None:
    with pytest.raises(CheckError, match="computes something else in each call") as caught:
        pipeline(Around(), (torch.randn(3, 4),))
    assert "Iterates.forward, module 'inner'" in caught.value.where
    assert "buffer" in caught.value.hint


class Choosy(nn.Module):
    """Takes only some values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch._guards.detect_fake_mode() and x.max() < 1:
            raise ValueError("too small")
        y = x * 2
        pipe_split()
        return y + 1


def test_a_model_that_takes_only_some_values_is_compared_on_the_first_call() -> None:
    model = Choosy()
    report = pipeline(model, (torch.ones(3),)).verify(torch.ones(3))
    assert report.ok
    assert report.compared["outputs"] == 1
    assert "outputs of a second call" not in report.compared


def verified(change: Any) -> Report:
    """The report on a pipe of which `change` changed the stages."""
    model = Plain()
    pipe = pipeline(model, (X,))
    change(pipe)
    return pipe.verify(X.clone().requires_grad_())


def _other_weight(pipe: Pipe) -> None:
    pipe.stages[1].get_submodule("b").weight = weight(4, 4)


def _other_buffer(pipe: Pipe) -> None:
    pipe.stages[0]._buffers["steps"] = torch.full((), 5.0, dtype=torch.float64)


def _name_lost(pipe: Pipe) -> None:
    stage = next(s for s in pipe.stages if "idle.bias" in s.state_dict())
    del stage.get_submodule("idle")._parameters["bias"]


def _frozen(pipe: Pipe) -> None:
    pipe.stages[0].get_submodule("a")._parameters["bias"] = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)


def _other_rate(pipe: Pipe) -> None:
    (text,) = pipe.stages[0]._texts
    pipe.stages[0]._texts[:] = [text.replace("0.5", "0.25")]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_other_weight, ["output 0 (stage 1, ", "gradient of 'b.weight'", "gradient of input 0", "state 'b.weight' afterwards"]),
        (_other_buffer, ["state 'steps' afterwards: differs by up to 5, where the largest element is 1"]),
        (_name_lost, ["state names differ: ['idle.bias']", "state 'idle.bias' afterwards"]),
        (_frozen, ["gradient of 'a.bias': torch.float64[4] in the model, None in the pipe"]),
        (_other_rate, ["output 1 (stage 0, ", "an output of a second call"]),
    ],
)
def test_verify_lists_what_differs(change: Any, found: list[str]) -> None:
    report = verified(change)
    assert not report.ok
    assert str(report).startswith("DIFFERENT: compared ")
    for text in found:
        assert any(difference.startswith(text) for difference in report.differences), report.differences


def test_verify_counts_what_it_compared() -> None:
    report = verified(lambda pipe: None)
    assert report.ok
    names = 7  # a and b with their tied weight under both names, idle, steps
    assert report.compared == {
        "outputs of a second call": 2, "outputs": 2, "state": names, "gradients": names - 1, "input gradients": 1, "names": names,
    }  # fmt: skip
    assert str(report) == "equal: compared " + ", ".join(f"{n} {kind}" for kind, n in report.compared.items())


def test_a_report_prints_the_first_differences_and_counts_the_others() -> None:
    report = Report({"state": 30}, [f"state {number}" for number in range(30)])
    lines = str(report).splitlines()
    assert lines[1:] == [*report.differences[:20], "10 more in report.differences"]
    assert str(Report({"state": 30}, report.differences[:20])).splitlines()[1:] == report.differences[:20]


def test_inputs_without_gradient_have_none_to_compare() -> None:
    """Neither integers, nor floats that need none; a tensor keeps its number among all."""
    model = nn.Embedding(4, 4)
    assert "input gradients" not in pipeline(model, (torch.tensor([3]),)).verify(torch.tensor([2])).compared
    pipe = pipeline(Breaks(), (X, torch.tensor([3])))
    assert "input gradients" not in pipe.verify(X, torch.tensor([2])).compared
    assert pipe.verify(X.clone().requires_grad_(), torch.tensor([2])).compared["input gradients"] == 1


def test_outputs_alone_compare_no_gradients() -> None:
    model = Plain()
    report = check.compare(model, pipeline(model, (X,), check=None), (X,), {}, gradients=False)
    assert report.ok
    assert report.compared.keys() == {"outputs of a second call", "outputs", "state", "names"}


# --- what it leaves alone -------------------------------------------------------------------------------


def test_nothing_changes() -> None:
    """Neither the model, the pipe, the inputs nor the random state."""
    model = Plain()
    pipe = pipeline(model, (X,), check=None)
    x = X.clone().requires_grad_()
    before, random = snapshot(model), torch.get_rng_state()
    assert pipe.verify(x).ok
    assert_same(snapshot(model), before, "the model")
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    assert all(p.grad is None for p in (*model.parameters(), *pipe.parameters()))


def test_verify_under_no_grad_compares_gradients() -> None:
    """It switches them on for itself."""
    model = Plain()
    pipe = pipeline(model, (X,), check=None)
    with torch.no_grad():
        assert pipe.verify(X).compared["gradients"] == 6
        assert not torch.is_grad_enabled()


def test_verify_needs_the_model() -> None:
    """The pipe does not keep it alive."""
    model = Plain()
    pipe = pipeline(model, (X,))
    copied = deepcopy(pipe)
    assert pipe.verify(X).ok
    with pytest.raises(StagecutError, match="no model to compare with"):
        copied.verify(X)
    del model
    gc.collect()
    with pytest.raises(StagecutError, match="keep the model alive"):
        pipe.verify(X)


def test_verify_takes_what_the_pipe_takes() -> None:
    model = Plain()
    pipe = pipeline(model, (X,))
    with pytest.raises(InputError, match="shape"):
        pipe.verify(X[:2])


# --- how near -------------------------------------------------------------------------------------------

ONE = torch.tensor([1.0, 100.0])


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (ONE, ONE.clone(), None),
        (ONE, ONE + torch.tensor([9e-4, 0.0]), None),  # 1e-5 of the largest element
        (ONE, ONE + torch.tensor([2e-3, 0.0]), "differs by up to 0.002, where the largest element is 100"),
        (ONE.double(), ONE.double() + 9e-8, None),
        (ONE.double(), ONE.double() + 2e-7, "differs by up to 2e-07"),
        (ONE.bfloat16(), ONE.bfloat16() + 1, None),
        (ONE.bfloat16(), ONE.bfloat16() + 8, "differs by up to 8"),
        (ONE.to(torch.complex64), ONE + 0.1j, "differs by up to 0.1"),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), None),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0]), "differs"),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), None),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([1.0, 1.0]), "differs"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs by up to 1, where the largest element is 2"),
        (torch.tensor([True]), torch.tensor([False]), "differs by up to 1"),
        (ONE.to(torch.float8_e4m3fn), (ONE * 2).to(torch.float8_e4m3fn), "differs by up to"),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), None),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse() * 2, "differs by up to 1"),
        (ONE, ONE.double(), r"torch\.float32\[2\] in the model, torch\.float64\[2\] in the pipe"),
        (ONE, ONE[:1], r"torch\.float32\[2\] in the model, torch\.float32\[1\] in the pipe"),
        (ONE, ONE.clone().requires_grad_(), "requires_grad is False in the model, True in the pipe"),
        (ONE, None, r"torch\.float32\[2\] in the model, None in the pipe"),
        (None, None, None),
        (3, 3, None),
        (3, 3.0, "3 in the model, 3.0 in the pipe"),
        (True, 1, "True in the model, 1 in the pipe"),
        ("a", "b", "'a' in the model, 'b' in the pipe"),
    ],
)
def test_how_near(one: Any, other: Any, difference: str | None) -> None:
    """Relative to the largest element for floating point, exact for everything else."""
    found = check.difference("it", one, other)
    if difference is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("it: ")
        assert re.search(difference, found)


def test_gradients_of_a_program_in_half_precision_may_differ_more() -> None:
    """Their sums pass through its least precise dtype."""

    class Half(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.a, self.dtype = linear().float(), dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).to(self.dtype)
            pipe_split()
            return y * 2

    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-2), (torch.float64, 0.0)):
        assert check._program_tolerance(pipeline(Half(dtype), (X.float(),)).program) == tolerance


def test_a_report_counts_by_kind() -> None:
    report = Report()
    report.note("outputs", None)
    assert report.ok
    report.note("outputs", "it differs")
    report.note("state", None)
    assert str(report) == "DIFFERENT: compared 2 outputs, 1 state\nit differs"


def test_outputs_in_float8_are_compared() -> None:
    class Narrow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).to(torch.float8_e4m3fn)

    pipe = pipeline(Narrow(4, 4), (torch.ones(2, 4),))
    assert pipe.notes == ()
    assert pipe.verify(torch.ones(2, 4)).compared["gradients"] == 2


@pytest.mark.parametrize("training", [True, False])
def test_verify_compares_in_the_mode_that_the_pipe_is_in(training: bool) -> None:
    """Whatever mode the model is in, and with what was switched by itself."""
    model = Chosen().train(training)
    pipe = pipeline(model, (X,))
    assert pipe.train(not training).verify(X).ok
    assert model.training is training
    pipe.stages[1].get_submodule("drop").train(training)
    assert pipe.verify(X).ok
    model.train(not training)
    assert pipe.train(training).verify(X).ok


class Chosen(nn.Module):
    """Does something else in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        pipe_split()
        return self.drop(x) * (2 if self.training else 3)


@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_compared_where_both_were_traced(training: bool, counted: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the mode that the model is not in shows at the cut."""
    pipeline(Chosen().train(training), (X,))
    assert counted == [True, True]
    monkeypatch.setattr(emit._Function, "_mode", lambda self, item, op: "self.training" if item.is_flag else repr(item.in_trace))
    with pytest.raises(CheckError, match=f"does not compute what the model computes in {'eval' if training else 'train'} mode: output 0"):
        pipeline(Chosen().train(training), (X,))


class Rounding(nn.Module):
    """A layer and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 3


def inexact(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """A backend of torch.compile whose results are a hundredth off."""
    return lambda *args: [out * 1.01 for out in graph(*args)]


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()", "a submodule"])
def test_a_compiled_model_is_compared_as_it_was_written(how: str) -> None:
    """What torch.compile makes of it rounds otherwise, and is no reason to refuse the stages."""
    model: Any = Rounding()
    if how == "torch.compile(model)":
        model = torch.compile(model, backend=inexact)
    elif how == "model.compile()":
        model.compile(backend=inexact)
    else:
        model.layer = torch.compile(model.layer, backend=inexact)
    x = torch.randn(2, 4)
    compiled = model(x)
    pipe = pipeline(model, (x,), check="outputs")
    assert pipe.verify(x).ok
    assert not torch.allclose(pipe(x)[0], compiled, rtol=1e-3, atol=0)
    assert torch.equal(model(x), compiled)  # it stays compiled


def test_each_run_begins_from_random_numbers_that_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN draws anew for the dropout of an RNN where a state was set since, and else goes on in a state of its own."""
    events: list[str] = []
    module = sys.modules["stagecut.check"]
    random_state = module.random_state  # type: ignore[attr-defined]

    def told(*args: Any) -> Any:
        restore = random_state(*args)
        return lambda: (events.append("set"), restore())

    def ran(run: Any) -> Any:
        return lambda *args: (events.append("run"), run(*args))[1]

    pipe = pipeline(Plain(), (X,), check=None)
    monkeypatch.setattr(module, "random_state", told)
    for name in ("outcome_of", "run_stages"):
        monkeypatch.setattr(module, name, ran(getattr(module, name)))
    assert pipe.verify(X).ok
    before = [events[place - 1] for place, event in enumerate(events) if event == "run"]
    assert before == ["set"] * 4
