"""Emitted stages as nn.Modules: names, contexts, modes, copies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from stagecut import Pipe, pipe_split, pipeline
from stagecut.backend.stages.emit import emit
from stagecut.backend.stages.modules import Stage, StageModule
from stagecut.ir.errors import EmitError
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.text.parser import parse

X = torch.randn(4, 4)


class Talks(nn.Module):
    """Prints what it is told to."""

    def __init__(self, told: Callable[[], Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4, bias=False)
        self.told = told

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lin(x)
        return y

    def extra_repr(self) -> Any:
        return self.told()


def test_a_stage_prints_what_the_model_prints() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Talks(lambda: "one\ntwo"))
    pipe = pipeline(model, (torch.randn(2, 4),))
    assert str(pipe.get_stage_module(0)) == str(model)


@pytest.mark.parametrize("told", [lambda: 1 / 0, lambda: ""])
def test_a_stage_prints_where_the_models_own_text_fails(told: Callable[[], Any]) -> None:
    model = Talks(told)
    printed = "Talks(\n  (lin): Linear(in_features=4, out_features=4, bias=False)\n)"
    assert str(pipeline(model, (torch.randn(2, 4),)).get_stage_module(0)) == printed


def check(model: nn.Module, *args: Any, stages: int) -> Pipe:
    """The pipe of `model`, after it was shown to give the model's outputs and names in so many stages."""
    pipe = pipeline(model, args)
    assert pipe.num_stages == stages
    twin = deepcopy(model)
    torch.manual_seed(0)
    expected = twin(*args)
    torch.manual_seed(0)
    torch.testing.assert_close(pipe(*args)[0], expected, rtol=0, atol=0)
    assert list(pipe.state_dict()) == list(model.state_dict())
    return pipe


# --- names --------------------------------------------------------------------------------------------

OURS = [
    "code",
    "index",
    "input_names",
    "add_call",
    "function",
    "_title",
    "_path",
    "_code",
    "_here",
    "_texts",
    "_forwards",
    "_constants",
    "_call",
]
ODD = ["my-layer", "0", "10x", "class", "None", "größe", "a b", "x'y", "__dunder__", "torch", "aten", "self", "slice"]


class Named(nn.Module):
    """A layer, a parameter and a buffer under any name, and a layer of that name inside the layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name_ = name
        inner = nn.Module()
        inner._modules[name] = nn.Linear(4, 4)
        inner._parameters[name + "_"] = nn.Parameter(torch.randn(4))
        self._modules[name] = inner
        self.other = nn.Module()
        self.other._parameters[name] = nn.Parameter(torch.randn(4))
        self.another = nn.Module()
        self.another._buffers[name] = torch.randn(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: Any = self._modules[self.name_]
        x = inner._modules[self.name_](x) + inner._parameters[self.name_ + "_"]
        pipe_split()
        x = x * self.other._parameters[self.name_]  # type: ignore[operator]
        pipe_split()
        return x + self.another._buffers[self.name_]  # type: ignore[operator]


@pytest.mark.parametrize("name", [*OURS, *ODD])
def test_any_name_of_the_model_is_kept(name: str) -> None:
    """Names that hide an attribute of nn.Module or of ours, and names that are no identifiers."""
    pipe = check(Named(name), X, stages=3)
    assert pipe.stages[0].code
    pipe.stages[1].to(torch.float32)


class Arguments(nn.Module):
    """Arguments called like things generated code relies on."""

    def forward(self, torch: Any, aten: Any, slice: Any, getattr: Any, inf: Any) -> Any:
        a = torch[:, :2] + aten[:, 2:]
        pipe_split()
        b = a * float("inf") + slice[:, 1:3]
        b = b.masked_fill(b == float("-inf"), 1.0).masked_fill(b == float("inf"), 2.0)
        pipe_split()
        return b[:, None, ..., 1:] + getattr[:, :1, None] + inf[0, 0]


def test_argument_names_do_not_hide_globals() -> None:
    """A local called `torch` or `slice` would."""
    check(Arguments(), X, X, X, X, X, stages=3)


class Indexing(nn.Module):
    """Slices, and then an index that holds a slice."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        part = x[1:3]
        pipe_split()
        return part[:, i] + x[1:3, i]


def test_indexing() -> None:
    """Index tensors and slices together."""
    check(Indexing(), X, torch.tensor([0, 2]), stages=2)


# --- contexts -----------------------------------------------------------------------------------------


class NoGrad(nn.Module):
    """A context that a cut divides, in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Spanning()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * x  # type: ignore[no-any-return]


class Spanning(nn.Module):
    """no_grad over a cut, enable_grad inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.a(x)
            pipe_split()
            z = self.b(y)
            with torch.enable_grad():
                z = z + self.c(y)
                pipe_split()
                z = z + self.c(z)
        return z + y  # type: ignore[no-any-return]


def test_no_grad_over_a_cut() -> None:
    """Each part runs under the context; who gets gradient is who got it before."""
    model = NoGrad()
    twin = deepcopy(model)
    pipe = check(model, X, stages=3)
    assert all("torch.no_grad()" in stage.code for stage in pipe.stages[:2])
    pipe(X)[0].sum().backward()
    twin(X).sum().backward()
    for name, parameter in model.named_parameters():
        expected = twin.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None) == (name.split(".")[1] in "ab")
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected)


class Autocast(nn.Module):
    """autocast over a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            pipe_split()
            z = self.b(y)
            with torch.autocast("cpu", enabled=False):
                z = z.float() @ z.float()
        return z  # type: ignore[no-any-return]


def test_autocast_over_a_cut() -> None:
    """What crosses is bfloat16, as in the model."""
    pipe = check(Autocast(), X, stages=2)
    assert pipe.stages[0](X).dtype == torch.bfloat16
    assert all("torch.autocast(" in stage.code for stage in pipe.stages)


class SideEffect(nn.Module):
    """The last stage has only an effect; the first output is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        pipe_split()
        self.total.add_(y.sum(0))  # type: ignore[operator]
        return x


def test_a_stage_without_output() -> None:
    """It runs for its effect and returns nothing."""
    model = SideEffect()
    pipe = pipeline(model, (X,))
    assert pipe.stages[1](X.relu()) is None
    torch.testing.assert_close(model.total, X.relu().sum(0))
    assert pipe(X)[0] is X


# --- modes --------------------------------------------------------------------------------------------


class Modes(nn.Module):
    """Dropout as a module and as a function, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(x)
        pipe_split()
        return nn.functional.dropout(self.norm(x), 0.5, self.training)


@pytest.mark.parametrize("captured", [True, False])
def test_train_and_eval_switch_the_stages(captured: bool) -> None:
    """Whatever mode the model was captured in."""
    model = Modes().train(captured)
    pipe = pipeline(model, (X,))
    assert [s.training for s in pipe.stages] == [captured, captured]
    for mode in (False, True, False):
        model.train(mode)
        pipe.train(mode)
        twin = deepcopy(model)
        torch.manual_seed(1)
        expected = twin(X)
        torch.manual_seed(1)
        torch.testing.assert_close(pipe(X)[0], expected, rtol=0, atol=0)


def test_one_submodule_can_be_frozen_in_eval() -> None:
    """Flags are kept per module, and can be set per module by name."""
    model = Modes()
    model.norm.eval()
    pipe = pipeline(model, (X,))
    assert pipe.stages[1].get_submodule("norm").training is False
    assert pipe.stages[1].training is True
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]
    pipe(X)
    torch.testing.assert_close(model.norm.running_mean, before, rtol=0, atol=0)


# --- constants and devices ----------------------------------------------------------------------------


class Constants(nn.Module):
    """A tensor that is no state, made at run time and made before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(4.0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x) + self.table
        pipe_split()
        return x + torch.ones(4, device=x.device) + torch.arange(4, device=x.device)


def test_constants_are_no_state_and_devices_are_not_burned_in() -> None:
    """A constant moves with its stage; a device in the code follows the stage."""
    model = Constants()
    pipe = check(model, X, stages=2)
    assert list(pipe.state_dict()) == ["layer.weight", "layer.bias"]
    for stage in pipe.stages:
        stage.to("meta")
    assert pipe.stages[1](pipe.stages[0](X.to("meta"))).is_meta


# --- copies -------------------------------------------------------------------------------------------


class Tree(nn.Module):
    """Nested modules, one called twice in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.layer(x))
        pipe_split()
        return self.layer(self.norm(self.layer(x) + x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("copy", [deepcopy, lambda stage: pickle.loads(pickle.dumps(stage))], ids=["deepcopy", "pickle"])
def test_a_stage_can_be_copied(copy: Callable[[Stage], Stage]) -> None:
    """A copy computes the same with tensors of its own."""
    pipe = check(Tree(), X, stages=2)
    y = pipe.stages[0](X)
    for stage, given in zip(pipe.stages, (X, y), strict=True):
        twin = copy(stage)
        torch.testing.assert_close(twin(given), stage(given), rtol=0, atol=0)
        assert twin.state_dict().keys() == stage.state_dict().keys()
        assert twin.code == stage.code
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in stage.parameters()}


class Deep(nn.Module):
    """So many layers that recursion over the graph would fail."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i % 50 == 0:
                pipe_split()
        return x


def test_a_deep_model() -> None:
    """Hundreds of layers are no problem, nor is a copy of a stage."""
    pipe = check(Deep(400), torch.randn(2, 2), stages=9)
    deepcopy(pipe.stages[1])
    assert len({m._forwards[0] for _, m in pipe.named_modules() if isinstance(m, StageModule) and m._forwards and m._path}) == 1


# --- stages one by one --------------------------------------------------------------------------------


def test_a_stage_is_called_by_position_or_by_name() -> None:
    """Its parameters have the names of its inputs."""
    pipe = check(Tree(), X, stages=2)
    stage = pipe.stages[0]
    assert stage.input_names == ("x",)
    torch.testing.assert_close(stage(x=X), stage(X), rtol=0, atol=0)


def test_hooks_on_a_submodule_fire() -> None:
    """A module of a stage is called as a module, so hooks and wrappers on it work."""
    pipe = check(Tree(), X, stages=2)
    seen: list[str] = []
    pipe.stages[1].get_submodule("layer").register_forward_hook(lambda *_: seen.append("layer"))
    pipe(X)
    assert seen == ["layer", "layer"]


def test_only_linked_programs_are_emitted() -> None:
    """A program without stages cannot be."""
    program = parse("program @P phase=traced {\n  input %x : f32[4]\n  output (%x)\n}\n")
    with pytest.raises(EmitError, match="linked"):
        emit(program, Bindings())


LINKED = """program @P phase=linked stages=1 {{
  input %x : f32[4]
  stage 0 (%x) -> (%y) {{
    %y = {op} : f32[4]
  }}
  transfer %x : input -> 0 feed  # 16 B
  output (%y)
}}
"""


@pytest.mark.parametrize(
    "op",
    ["aten.no_such_op.default(%x)", "torch.load(%x)", "builtins.eval(%x)", "method.__class__(%x)", "extern.f(%x)", "os.system(%x)"],
)
def test_ir_text_reaches_no_other_callable(op: str) -> None:
    """An op that is unknown, not allowed, or not bound is an EmitError when emitted, and is not run."""
    program = parse(LINKED.format(op=op))
    with pytest.raises(EmitError):
        emit(program, Bindings())
