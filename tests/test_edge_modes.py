"""train() and eval() on stages and pipes, whatever mode the model was captured in."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from compare import Posted
from edge import PIPE, Case, Family, check, compare_call, linear, t
from torch import nn
from torch.nn import functional as F

from stagecut import ModeError, StagecutError, pipe_split, pipeline

case = Family()
X = t(4, 4)
BOTH = {"modes": (True, False), "switch": True}


def norm():
    return nn.BatchNorm1d(4).double()


@case(X, stages=2, has={"a": linear, "drop": nn.Dropout}, **BOTH)
def dropout(self, x):
    x = self.drop(self.a(x))
    pipe_split()
    return self.a(x)


@case(X, stages=2, has={"drop": nn.Dropout}, **BOTH)
def residual_around_dropout(self, x):
    x = x * 2
    y = self.drop(x)
    pipe_split()
    return x + y


@case(X, stages=2, has={"drop": nn.Dropout, "other": lambda: nn.Dropout(0.2)}, **BOTH)
def two_dropouts_of_one_value(self, x):
    x = x * 2
    y = self.drop(x)
    pipe_split()
    return self.other(x) - y


@case(X, stages=2, has={"drop": lambda: nn.Dropout(inplace=True)}, **BOTH)
def dropout_in_place(self, x):
    x = self.drop(x * 2)
    pipe_split()
    return self.drop(x + 1)


def dropped_in_place(kind, size):
    """A dropout of that kind in place, in front of a cut and behind it."""

    def forward(self, x):
        x = self.drop(x * 2)
        pipe_split()
        return self.drop(x + 1)

    forward.__name__ = f"{kind.__name__.lower()}_in_place"
    case(t(*size), stages=2, has={"drop": lambda: kind(0.5, inplace=True)}, **BOTH)(forward)


dropped_in_place(nn.Dropout1d, (4, 3, 4))
dropped_in_place(nn.Dropout2d, (4, 3, 2, 2))
dropped_in_place(nn.Dropout3d, (4, 3, 2, 2, 1))
dropped_in_place(nn.AlphaDropout, (4, 4))
dropped_in_place(nn.FeatureAlphaDropout, (4, 3, 2, 2))


@case(X, stages=2, **BOTH)
def dropouts_in_place_by_torchs_own_names(self, x):
    x = torch.dropout_(x * 2, 0.5, self.training)
    x = torch.feature_dropout_(x[..., None] * 2, 0.5, self.training)
    pipe_split()
    x = torch.feature_alpha_dropout_(x * 2, 0.5, train=self.training)
    return torch.alpha_dropout_(x * 2, 0.5, self.training)


@case(X, stages=2, **BOTH)
def dropouts_with_flags_of_their_own(self, x):
    x = torch.native_dropout(x, 0.5, True)[0]
    pipe_split()
    return torch.alpha_dropout_(x * 2, 0.5, True)


@case(X, stages=2, has={"drop": lambda: nn.Dropout(0.0)}, **BOTH)
def dropout_of_rate_zero(self, x):
    x = self.drop(x * 2)
    pipe_split()
    return x + 1


@case(X, stages=2, has={"a": norm, "b": norm}, **BOTH)
def batch_norm_in_both_stages(self, x):
    x = self.a(x)
    pipe_split()
    return self.b(x)


@case(X, stages=2, has={"a": lambda: nn.BatchNorm1d(4, track_running_stats=False).double()}, **BOTH)
def batch_norm_without_statistics(self, x):
    x = self.a(x)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"a": lambda: nn.BatchNorm1d(4, affine=False).double()}, **BOTH)
def batch_norm_without_parameters(self, x):
    x = self.a(x)
    pipe_split()
    return x * 2


@case(t(2, 3, 4, 4), stages=2, has={"a": lambda: nn.BatchNorm2d(3).double()}, **BOTH)
def batch_norm_of_images(self, x):
    x = self.a(x)
    pipe_split()
    return x * 2


@case(t(2, 3, 4), stages=2, has={"a": lambda: nn.InstanceNorm1d(3, track_running_stats=True).double()}, **BOTH)
def instance_norm(self, x):
    x = self.a(x)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"a": lambda: nn.LayerNorm(4).double(), "b": lambda: nn.GroupNorm(2, 4).double()}, **BOTH)
def norms_without_modes(self, x):
    x = self.a(x)
    pipe_split()
    return self.b(x)


@case(X, stages=2, **BOTH)
class FrozenNormInATrainingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = norm(), norm()

    def train(self, mode=True):
        super().train(mode)
        self.a.eval()
        return self

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return self.b(x)


@case(X, stages=2, has={"a": norm}, **BOTH)
def functional_batch_norm(self, x):
    x = F.batch_norm(x, self.a.running_mean, self.a.running_var, training=self.training)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"m": lambda: nn.Sequential(linear(), nn.Dropout(), nn.Sequential(nn.Dropout(0.1), norm()))}, **BOTH)
def nested_modules(self, x):
    x = self.m(x)
    pipe_split()
    return self.m[2][0](x)


@case(X, stages=2, has={"a": norm}, **BOTH)
def batch_norm_called_twice(self, x):
    x = self.a(self.a(x) * 2)
    pipe_split()
    return x + 1


@case(X, stages=2, **BOTH)
class NormWithTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = self.other = nn.ModuleList([norm()])

    def forward(self, x):
        x = self.one[0](x)
        pipe_split()
        return x + 1


@case(X, stages=2, has={"a": norm}, **BOTH)
def norm_frozen_in_forward(self, x):
    self.a.eval()
    x = self.a(x * 3)
    pipe_split()
    return x + 1


@case(X, stages=2, has={"drop": nn.Dropout}, **BOTH)
def dropout_kept_on_in_forward(self, x):
    self.drop.train()
    x = self.drop(x * 3)
    pipe_split()
    return x + 1


@case(X, stages=2, has={"a": norm}, **BOTH)
def flags_by_position_name_and_over_lines(self, x):
    x = F.dropout(F.dropout(x, 0.3, self.training), p=0.2, training=self.training)
    x = torch.nn.functional.batch_norm(
        x,
        self.a.running_mean,
        self.a.running_var,
        None,
        None,
        self.training,
    )
    pipe_split()
    return torch.dropout(x, 0.1, self.training)


@pytest.mark.parametrize("one", case.params())
def test_modes(one: Case) -> None:
    """A switch does to the stages what it does to the model, and back."""
    check(one)


def both(name: str, training: bool):
    """A case's model captured in one mode, a copy of it, and the pipe."""
    one = case.cases[name]
    model = one.build().train(training)
    return one, deepcopy(model), one.cut(model)


@pytest.mark.parametrize("training", [True, False])
def test_stages_are_switched_one_by_one(training: bool) -> None:
    """As the submodules of a model can be."""
    one, twin, pipe = both("batch_norm_in_both_stages", training)
    twin.b.train(not training)
    pipe.stages[1].train(not training)
    compare_call(one, 0, twin, pipe.module())
    compare_call(one, 1, twin, pipe.module())


@pytest.mark.parametrize("training", [True, False])
def test_a_module_inside_a_stage_is_switched(training: bool) -> None:
    """get_submodule(...).train() reaches the ops of that module only."""
    one, twin, pipe = both("nested_modules", training)
    twin.m[1].train(not training)
    pipe.stages[0].get_submodule("m.1").train(not training)
    compare_call(one, 0, twin, pipe.module())


@pytest.mark.parametrize("training", [True, False])
def test_a_switch_on_the_pipe_and_on_its_module(training: bool) -> None:
    """`training` is what was asked for, everywhere; pipe.module() is a view of the pipe."""
    _, _, pipe = both("batch_norm_in_both_stages", training)
    assert pipe.training is training
    pipe.module().train(not training)
    assert pipe.training is not training
    assert all(m.training is not training for m in pipe.modules())
    assert pipe.eval() is pipe
    assert not any(m.training for m in pipe.modules())


def branches(self, x):
    """Chooses by mode in Python."""
    x = x * 2
    pipe_split()
    if self.training:
        return x + 1
    return x - 1


def chooses(self, x):
    """Chooses by mode in an expression."""
    x = x * 2
    pipe_split()
    return x * (2 if self.training else 3)


def computes(self, x):
    """Computes with the mode."""
    x = x * 2
    pipe_split()
    return x * int(self.training)


def passes_on(self, x):
    """Gives the mode to a helper."""

    def helper(x, training):
        return x + 1 if training else x

    x = x * 2
    pipe_split()
    return helper(x, self.training)


def drops_attention(self, x):
    """A dropout rate that is a number in the trace."""
    x = x * 2
    pipe_split()
    x = x[None, None]
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


def turns_the_flag_round(self, x):
    """Drops where it does not train."""
    x = x * 2
    pipe_split()
    return F.dropout(x, 0.3, not self.training)


def joins_flags(self, x):
    """What the other mode does nobody knows."""
    x = x * 2
    pipe_split()
    return F.dropout(x, 0.3, self.training and x.dim() == 2)


def computes_the_rate(self, x):
    """The flag of the call is its default."""
    x = x * 2
    pipe_split()
    return F.dropout(x, 0.3 * self.training)


def looks_the_rate_up(self, x):
    """One flag is followed, one is a choice."""
    x = x * 2
    pipe_split()
    return F.dropout(x, [0.1, 0.3][self.training], training=self.training)


def asks_a_module_that_is_not_called(self, x):
    """No stage has the module."""
    x = x * 2
    pipe_split()
    return x * (2 if self.unused.training else 3)


def asks_all_of_several(self, x):
    """The reads are in a frame of their own."""
    x = x * 2
    pipe_split()
    return F.dropout(x, 0.3, any(m.training for m in self.several))


CHOOSING = [branches, chooses, computes, passes_on, drops_attention, turns_the_flag_round, joins_flags, computes_the_rate]
CHOOSING += [looks_the_rate_up, asks_a_module_that_is_not_called, asks_all_of_several]

SAID = pytest.mark.parametrize("training", [True, False])


@pytest.mark.parametrize("forward", CHOOSING)
def test_a_python_branch_is_followed(forward) -> None:
    """Whatever Python does with the mode: both modes are traced, and the stages hold both."""
    has = {"unused": nn.Dropout, "several": lambda: nn.ModuleList([nn.Dropout()])}
    check(Case(forward.__name__, forward, (X,), has=has, **BOTH))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        lambda: nn.MultiheadAttention(4, 2, dropout=0.5),
        lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
    ],
)
def test_a_branch_in_a_module_of_torch_is_followed(make) -> None:
    """Attention drops by a rate that Python computes from the mode."""

    def forward(self, x):
        x = (
            self.m(x)
            if isinstance(self.m, nn.TransformerEncoderLayer)
            else self.m(x, x, x)
            if self.m.batch_first is False
            else self.m(x, x)
        )
        x = x[0] if isinstance(x, tuple) else x
        pipe_split()
        return x * 2

    check(Case("m", forward, (X[None],), has={"m": lambda: make().double()}, rtol=1e-9, **BOTH))


def cumulative(self, x):
    """In train mode it reads how many batches there were, which no trace can."""
    x = self.a(x)
    pipe_split()
    return x * 2


def test_what_one_mode_has_to_keep_whole_is_an_error_at_the_switch_or_kept_whole_in_both() -> None:
    """The error says which module, and with that one in leaf_modules its own code runs in both modes."""
    one = Case("cumulative", cumulative, (X,), has={"a": lambda: nn.BatchNorm1d(4, momentum=None).double()})
    pipe = one.cut(one.build().eval())
    with pytest.raises(ModeError, match=r"leaf_modules=\['a'\]"):
        pipe.train()
    assert not any(module.training for module in pipe.modules())
    for training in (True, False):
        model, twin = one.build().train(training), one.build().train(not training)
        pipe = pipeline(model, (X,), leaf_modules=["a"]).train(not training)
        compare_call(one, 0, twin, pipe.module())
        compare_call(one, 1, twin.train(training), pipe.train(training).module())


class Frozen(nn.Module):
    """Sets the flag of a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Sequential(nn.Dropout())

    def forward(self, x):
        self.whole.eval()
        x = self.whole(x * 2)
        pipe_split()
        return x + 1


def test_a_flag_set_in_forward_on_a_module_kept_whole_is_said_at_the_switch() -> None:
    """Its own code runs in the stage, behind the switch."""
    pipe = pipeline(Frozen().eval(), (X,), leaf_modules=["whole"])
    with pytest.raises(ModeError, match=r"self\.whole\.eval\(\)"):
        pipe.train()
    assert not any(module.training for module in pipe.modules())


def test_a_flag_is_followed_in_code_without_a_source() -> None:
    """What the call reads last is taken for its flag."""
    space = {"F": F, "pipe_split": pipe_split, "__name__": __name__}
    exec("def forward(self, x):\n    x = F.dropout(x, 0.5, self.training)\n    pipe_split()\n    return x * 2", space)
    one = Case("sourceless", space["forward"], (X,), modes=(True, False), switch=True)
    check(one, (PIPE,))


def test_batch_norm_shared_by_stages_is_refused_across_processes_once_it_trains() -> None:
    """Captured in eval it runs as the model does; its statistics cannot follow a switch to training."""

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return self.a(x * 2)

    one = Case("shared", forward, (X,), has={"a": norm})
    pipe = one.cut(one.build().eval())
    posted = Posted(pipe)
    posted(X)
    posted.train(True)
    with pytest.raises(StagecutError, match=r"a\.running_mean"):
        posted(X)


def test_a_mode_is_kept_by_a_copy_of_the_pipe() -> None:
    """deepcopy of an evaluated pipe is evaluated."""
    one, twin, pipe = both("nested_modules", True)
    copied = deepcopy(pipe.eval())
    compare_call(one, 0, twin.eval(), copied.module())
    assert torch.equal(pipe(X)[0], copied(X)[0])
