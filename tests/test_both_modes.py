"""Models that do something else in each mode: the stages hold both, or refuse the switch before anything is switched."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from edge import PIPE, Case, Family, buffer, check, compare_call, linear, t, weight
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stagecut
from stagecut import ModeError, SplitPoint, StagecutError, parse, pipe_split, pipeline, text
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.frontend.capture.capture import capture
from stagecut.frontend.lower import both_modes
from stagecut.ir.graph import BY_MODE
from stagecut.ir.run import interp

case = Family()
X = t(4, 4)
BOTH = {"modes": (True, False), "switch": True}


class DropPath(nn.Module):
    """Drops whole rows in training, and returns what it is given in eval mode."""

    def forward(self, x):
        if not self.training:
            return x
        return x / 0.5 * torch.rand(x.shape[0], 1, dtype=x.dtype).add(0.5).floor_()


class Rate(nn.Module):
    """Attention that drops by a rate in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.a = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)[None, None]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.0 if not self.training else self.rate)


@case(X, stages=2, has={"a": linear, "one": DropPath, "other": DropPath}, **BOTH)
def paths_are_dropped(self, x):
    x = x + self.one(self.a(x))
    pipe_split()
    return x + self.other(self.a(x))


@case(X, stages=2, has={"a": linear, "drop": DropPath}, **BOTH)
def what_may_be_what_was_given_is_written(self, x):
    y = self.drop(self.a(x))
    y += x
    pipe_split()
    return y * 2


@case(X, stages=2, **BOTH)
def noise_in_place(self, x):
    x = x * 2
    if self.training:
        x *= torch.rand_like(x)
    pipe_split()
    return x + 1


@case(X, stages=2, **BOTH)
def noise_in_place_of_what_is_read_behind(self, x):
    y = x * 2
    v = y[1:]
    if self.training:
        y *= torch.rand_like(y)
    pipe_split()
    return y, v + 1, v


@case(X, stages=2, has={"steps": lambda: buffer(value=0.0)}, **BOTH)
def counts_in_training_only(self, x):
    if self.training:
        self.steps += 1
    x = x * self.steps
    pipe_split()
    return x + self.steps


@case(X, stages=2, **BOTH)
def other_ops_on_both_sides_of_a_cut(self, x):
    if self.training:
        x = x * 2
        pipe_split()
        return x.cos()
    x = x * 3
    pipe_split()
    return x.sin()


@case(X, stages=2, has={"a": linear, "b": linear}, **BOTH)
def another_layer_in_each_mode(self, x):
    x = self.a(x) if self.training else self.b(x).relu()
    pipe_split()
    return self.a(x)


@case(X, stages=2, has={"a": linear, "extra": linear}, **BOTH)
def a_layer_in_training_only(self, x):
    x = self.a(x)
    pipe_split()
    if self.training:
        x = x + self.extra(x)
    return x


@case(X, stages=2, has={"w": weight, "v": weight}, **BOTH)
def another_parameter_in_each_mode(self, x):
    x = x @ (self.w if self.training else self.v)
    pipe_split()
    return x * 2


@case(X, stages=2, **BOTH)
def another_result_in_each_mode(self, x):
    y = x * 2
    z = x * 3
    pipe_split()
    return (y + 1 if self.training else z + 1), (y if self.training else z)


@case(X, stages=2, **BOTH)
def another_constant_in_each_mode(self, x):
    x = x * torch.tensor([1.0, 2.0, 3.0, 4.0] if self.training else [4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    pipe_split()
    return x + torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64)


@case(X, stages=2, **BOTH)
def a_constant_in_eval_mode_only(self, x):
    x = x * 2
    if not self.training:
        x = x + torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    pipe_split()
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


@case(X, stages=2, has={"a": linear}, **BOTH)
def a_checkpoint_in_training_only(self, x):
    x = checkpoint(self.a, x, use_reentrant=False) if self.training else self.a(x)
    pipe_split()
    return self.a(x)


@case(X, stages=2, has={"a": linear, "drop": DropPath}, **BOTH)
def a_path_is_dropped_in_a_checkpoint(self, x):
    def block(x):
        return self.a(self.drop(self.a(x)))

    x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
    pipe_split()
    return self.a(x)


@case(X, stages=2, **BOTH)
def grad_modes_by_mode(self, x):
    x = x * 2
    with torch.set_grad_enabled(self.training):
        y = x * 3
    pipe_split()
    return x + y


class Double(torch.autograd.Function):
    """Twice what it is given, and half the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Triple(Double):
    """Three times what it is given."""

    @staticmethod
    def forward(ctx, x):
        return x * 3


@case(X, stages=2, **BOTH)
def another_function_in_each_mode(self, x):
    x = (Double if self.training else Triple).apply(x)
    pipe_split()
    return Double.apply(x)


@case(X, stages=2, **BOTH)
def a_vmap_in_training_only(self, x):
    x = x + 1
    if self.training:
        x = torch.vmap(lambda row: row * row.sum())(x)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"a": linear, "b": lambda: nn.Sequential(linear(), nn.Dropout(0.3), linear())}, **BOTH)
def modules_with_modes_in_a_branch(self, x):
    x = self.a(x)
    if self.training:
        x = x + self.b(x)
    pipe_split()
    return x + 1


@case(X, stages=2, has={"a": linear, "b": lambda: nn.BatchNorm1d(4).double()}, **BOTH)
def a_norm_in_training_only(self, x):
    x = self.a(x)
    x = self.b(x) if self.training else x
    pipe_split()
    return x + 1


@case(t(6, 4), stages=2, dynamic={"x": {0: torch.export.Dim("batch", min=2, max=64)}}, calls=((t(6, 4),), (t(3, 4),)), **BOTH)
def sizes_that_vary(self, x):
    x = x * (2 if self.training else 3)
    pipe_split()
    return x + (torch.rand_like(x) if self.training else x.flip(0))


@case(X, stages=2, has={"a": linear, "norm": lambda: nn.BatchNorm1d(4).double()}, **BOTH)
class FrozenPart(nn.Module):
    """Its own train() keeps a part in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.a = nn.BatchNorm1d(4).double(), DropPath(), linear()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        x = self.drop(self.norm(self.a(x)))
        pipe_split()
        return self.a(x) * (2 if self.training else 3)


@pytest.mark.parametrize("one", case.params())
def test_both_modes(one: Case) -> None:
    """Cut in either mode, switched to the other and back."""
    check(one)


@case(X, stages=2, **BOTH)
class TwoNames(nn.Module):
    """A module with two names, before which torch's tracer puts objects of its own."""

    def __init__(self):
        super().__init__()
        self.one = self.other = Rate(0.3)

    def forward(self, x):
        x = self.one(x)[0, 0] * (2 if self.training else 3)
        pipe_split()
        F.dropout(x, 0.5, self.training)
        return self.other(x)


@case(X[:1].expand(4, 4), stages=2, has={"drop": nn.Dropout}, grad=False, **BOTH)
def a_dropout_of_an_expanded_tensor(self, x):
    x = self.drop(x.exp()[:1].expand(4, 4))
    pipe_split()
    return x + 1


# --- what cannot be followed --------------------------------------------------------------------------

refused = Family()


@refused(X, stages=2, modes=(True, False))
def another_structure(self, x):
    x = x * 2
    pipe_split()
    return {"x": x + 1, "aux": x} if self.training else {"x": x + 1}


@refused(X, stages=2, modes=(True, False))
def another_size(self, x):
    x = x * 2
    pipe_split()
    return x + 1 if self.training else x[1:] + 1


@refused(X, stages=2, modes=(True, False))
def something_else_than_a_tensor(self, x):
    x = x * 2
    pipe_split()
    return x + 1, (1 if self.training else 2)


@refused(X, stages=2, modes=(True, False))
def a_cut_in_another_place(self, x):
    x = x - 1
    if self.training:
        pipe_split()
    x = x * 2
    if not self.training:
        pipe_split()
    return x + 1


@refused(X, stages=2, modes=(False,))
def untraceable_in_training(self, x):
    x = x * 2
    pipe_split()
    if self.training and x.sum() > 0:
        return x + 1
    return x - 1


@refused(X, stages=2, modes=(True, False), has={"drop": DropPath})
def what_may_be_what_was_given_is_written_and_read(self, x):
    x = x * 2
    y = self.drop(x)
    y += 1
    pipe_split()
    return x + y


@pytest.mark.parametrize("name", refused.cases)
def test_what_cannot_be_followed_is_an_error_at_the_switch(name: str) -> None:
    """It is right in the mode of the cut; the error names the line, says why, and what to do. Nothing has been switched."""
    one = refused.cases[name]
    for training in one.modes:
        check(one, (PIPE,))
        pipe = one.cut(one.build().train(training))
        assert pipe.train(training) is pipe
        for switch in (pipe.train, pipe.module().train, pipe.stages[0].train, pipe.stages[1].train):
            if switch in (pipe.stages[0].train, pipe.stages[1].train) and not any(m._facts.branch for m in switch.__self__.modules()):
                continue
            with pytest.raises(ModeError) as caught:
                switch(not training)
            assert any(line in str(caught.value) for line in (*one.lines(), "DropPath.forward")), caught.value
            assert "pipeline(model." in caught.value.hint
            assert {module.training for module in pipe.modules()} == {training}


def written_behind_a_dropout(self, x):
    """In eval mode the write shows in both."""
    x = self.a(x)
    y = self.drop(x)
    pipe_split()
    y = torch.relu_(y)
    return x + y


def test_a_cut_that_is_right_in_train_mode_only_is_made_and_the_switch_refused() -> None:
    """What the dropout returns is written in another stage than what it was given lives in: in eval mode both are one."""
    one = Case("written", written_behind_a_dropout, (X,), stages=2, has={"a": linear, "drop": nn.Dropout})
    check(one)
    pipe = one.cut(one.build())
    with pytest.raises(ModeError, match=r"both modes together cannot be cut so: stage 1 writes the result of aten\.dropout") as caught:
        pipe.eval()
    assert any(line in str(caught.value) for line in one.lines())
    with pytest.raises(StagecutError, match=r"stage 1 writes the result of aten\.dropout"):
        one.cut(one.build().eval())


class Merges(nn.Module):
    """Its train() does more than set flags."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> Merges:
        self.calls.append(mode)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        pipe_split()
        return x * (2 if self.training else 3)


def test_a_train_method_that_does_more_is_not_called() -> None:
    """It could not be undone."""
    model = Merges()
    pipe = pipeline(model, (X,))
    assert model.calls == []
    with pytest.raises(ModeError, match=r"Merges\.train"):
        pipe.eval()


# --- the model is left as it was, and traced once where that will do ----------------------------------


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The mode of the model in each capture."""
    seen: list[bool] = []

    def counting(module: nn.Module, *rest: Any) -> Any:
        seen.append(module.training)
        return capture(module, *rest)

    monkeypatch.setattr("stagecut.pipe.capture", counting)
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_a_second_trace_is_made_where_python_chooses_only(training: bool, traces: list[bool]) -> None:
    """Flags of ops are followed without one, and a choice between equal numbers is none."""
    pipeline(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)).double().train(training), (X,))
    assert traces == [training]
    pipeline(Rate(0.0).train(training), (X,))
    assert traces == [training] * 2
    pipeline(Rate(0.1).train(training), (X,))
    assert traces == [training] * 3 + [not training]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_all_flags_of_the_model_are_as_before(training: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed ones too, and where the second trace fails."""
    model = nn.ModuleDict({"a": Rate(0.1), "b": nn.Sequential(nn.Dropout(), nn.Linear(4, 4)), "c": Rate(0.1)}).train(training)
    model.b[0].train(not training)
    flags = {name: module.training for name, module in model.named_modules()}

    def broken(*_: Any) -> Any:
        raise RuntimeError("ours")

    if fails:
        monkeypatch.setattr(both_modes, "_merge", broken)
        monkeypatch.setattr(both_modes, "_traced", broken)
        with pytest.raises(RuntimeError, match="ours"):
            pipeline(model.a, (X,))
    else:
        pipeline(model.a, (X,))
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_an_error_of_our_own_in_the_second_trace_is_no_reason_to_refuse_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as what it is."""

    def broken(*_: Any) -> Any:
        raise TypeError("ours")

    monkeypatch.setattr(both_modes, "Alignment", broken)
    with pytest.raises(TypeError, match="ours"):
        pipeline(Rate(0.1), (X,))


# --- parts of a model switched by themselves ----------------------------------------------------------


class Two(nn.Module):
    """Two attentions, each with its own mode; a layer whose rate is given from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Rate(0.5), Rate(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)[0, 0]
        pipe_split()
        return self.other(x)[0, 0]


class Outer(nn.Module):
    """Gives a layer its factor."""

    def __init__(self) -> None:
        super().__init__()
        self.given = Given()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        pipe_split()
        return self.given(x, 2 if self.training else 3)


class Given(nn.Module):
    """Multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: torch.Tensor, by: int) -> torch.Tensor:
        return self.a(x) * by


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", ["one", "other"])
def test_a_module_that_chooses_by_its_own_flag_is_switched_alone(training: bool, path: str) -> None:
    """As in the model."""
    model = Two().train(training)
    twin = deepcopy(model)
    pipe = pipeline(model, (X,))
    for stage in pipe.stages:
        for name, part in stage.named_modules():
            if name == path:
                part.train(not training)
    twin.get_submodule(path).train(not training)
    compare_call(Case("two", Two, (X,)), 0, twin, pipe.module())


@pytest.mark.parametrize("training", [True, False])
def test_modules_whose_flags_decide_together_are_switched_together(training: bool) -> None:
    """The factor of one is chosen by the one around it: a switch of one alone is refused."""
    model = Outer().train(training)
    twin = deepcopy(model)
    pipe = pipeline(model, (X,))
    inner = pipe.stages[1].get_submodule("given")
    with pytest.raises(ModeError, match="'given'") as caught:
        inner.train(not training)
    assert "test_both_modes.py" in str(caught.value)
    assert {module.training for module in pipe.modules()} == {training}
    inner.train(training)
    one = Case("outer", Outer, (X,))
    compare_call(one, 0, twin.train(not training), pipe.train(not training).module())
    for stage in pipe.stages:
        stage.train(training)
    compare_call(one, 1, twin.train(training), pipe.module())


@pytest.mark.parametrize("training", [True, False])
def test_what_chose_by_another_flag_than_that_of_the_model_stays(training: bool) -> None:
    """A part with a mode of its own was traced in that one only: to go where it would change is an error."""
    model = Two().train(training)
    model.one.train(not training)
    pipe = pipeline(model, (X,))
    with pytest.raises(ModeError, match=r"Rate\.forward: its flag was not that of the model"):
        pipe.train(training)
    twin = deepcopy(model).train(not training)
    compare_call(Case("two", Two, (X,)), 0, twin, pipe.train(not training).module())


# --- text, copies, files ------------------------------------------------------------------------------


class Asks(nn.Module):
    """Its own path cannot be traced in training, so it takes the one for tracing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return x * 2
        return x + x if not self.training or x.sum() > 0 else 2 * x


class Asked(nn.Module):
    """Has two modes for another reason too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.asks, self.rate = linear(), Asks(), Rate(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rate(self.asks(self.a(x)))  # type: ignore[no-any-return]


def test_both_modes_are_traced_by_the_same_path() -> None:
    """One that is taken for tracing is taken in both, as it is for Beit and Wav2Vec2Conformer."""
    pipe = pipeline(Asked().train(), (X,))
    targets = [op.target for op in pipe.program.all_ops()]
    assert "aten.mul.Tensor" in targets
    assert "aten.add.Tensor" not in targets
    assert BY_MODE not in targets


def test_the_text_shows_both_ways_and_reads_back() -> None:
    """A literal that differs, and a run of ops that does."""

    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = DropPath()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.drop(x) * (2 if self.training else 3)
            pipe_split()
            return x + 1

    pipe = pipeline(M(), (X,))
    printed = pipe.ir()
    assert "mode(True, 2, 3)" in printed
    assert 'stagecut.by_mode(mode(True, True, False, ""), <0>, <1>, [%x])' in printed
    assert text(parse(printed)) == printed
    assert "(2 if self.training else 3)" in pipe.stages[0].code
    assert "(training if self.training else evaluation)(x0)" in pipe.stages[0].code


@pytest.mark.parametrize("training", [True, False])
def test_the_interpreter_runs_the_mode_of_the_trace(training: bool) -> None:
    one = case.cases["a_layer_in_training_only"]
    model = one.build().train(training)
    pipe = one.cut(model)
    outputs, _ = interp.run(pipe.program, [X], dict(model.state_dict()))
    assert torch.equal(outputs[0], model(X))
    assert [op.target for op in pipe.program.all_ops()].count(BY_MODE) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["paths_are_dropped", "a_layer_in_training_only", "another_constant_in_each_mode"])
def test_a_saved_pipe_holds_both_modes(name: str, training: bool, tmp_path: Path) -> None:
    """So do a copy and a pickle."""
    one = case.cases[name]
    model = one.build().train(training)
    pipe = one.cut(model)
    pipe.save(tmp_path / "pipe")
    for back in (stagecut.load(tmp_path / "pipe"), deepcopy(pipe)):
        assert back.training is training
        for mode in (training, not training, training):
            torch.manual_seed(0)
            expected = model.train(mode)(X)
            torch.manual_seed(0)
            assert torch.equal(back.train(mode).module()(X), expected)


def test_a_saved_pipe_refuses_the_switches_that_it_refused(tmp_path: Path) -> None:
    one = refused.cases["another_structure"]
    one.cut(one.build()).save(tmp_path / "pipe")
    with pytest.raises(ModeError, match="another structure"):
        stagecut.load(tmp_path / "pipe").eval()


def test_the_mode_of_a_pipe_is_seen() -> None:
    pipe = case.cases["paths_are_dropped"].cut(case.cases["paths_are_dropped"].build())
    assert repr(pipe).startswith("paths_are_dropped in 2 stages, train mode")
    assert repr(pipe.eval()).startswith("paths_are_dropped in 2 stages, eval mode")
    assert pipe.training is False


# --- cuts ---------------------------------------------------------------------------------------------


def test_a_cut_that_goes_through_a_branch_is_made_and_the_switch_refused() -> None:
    """The cut is what was asked for; the other mode is not worth more."""

    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                x = self.b(self.a(x))
            return x * 2

    for cut in ({"split_spec": {"b": SplitPoint.BEGINNING}}, {"split_policy": _behind_the_first_linear}):
        pipe = pipeline(M(), (X,), **cut)
        assert [len(stage.ops) for stage in pipe.program.stages] == [1, 2]
        with pytest.raises(ModeError, match=r"split point|split policy"):
            pipe.eval()


def _behind_the_first_linear(traced: torch.fx.GraphModule) -> torch.fx.GraphModule:
    node = next(node for node in traced.graph.nodes if "linear" in node.name)
    with traced.graph.inserting_after(node):
        traced.graph.call_function(pipe_split)
    return traced


def test_a_wrong_split_point_is_refused_as_ever() -> None:
    with pytest.raises(StagecutError, match="which the model does not have"):
        pipeline(Two(), (X,), split_spec={"nowhere": SplitPoint.BEGINNING})


@pytest.mark.parametrize("training", [True, False])
def test_stages_are_searched_in_a_model_with_two_modes(training: bool) -> None:
    pipe = pipeline(nn.Sequential(linear(), DropPath(), linear(), DropPath(), linear()), (X,), stages=2)
    assert pipe.num_stages == 2
    assert len(pipe.report().stages) == 2
    assert pipe.train(training).verify(X).ok


class Passes(nn.Module):
    """In train mode what it writes is what it was given, in eval mode a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=X.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        pipe_split()
        y = x if self.training else x * 0.5
        y.tanh_()
        return y * 2


@pytest.mark.parametrize("training", [True, False])
def test_what_a_mode_passes_through_and_the_stage_writes_is_the_stage_s_own(training: bool) -> None:
    torch.manual_seed(0)
    model = Passes().train(training)
    pipe = pipeline(model, (X,), check=None)
    assert pipe.num_stages == 2
    for mode in (training, not training):
        (out,) = Mailbox(pipe.program, pipe.train(mode).stages).forward([X])
        torch.testing.assert_close(out, model.train(mode)(X))
