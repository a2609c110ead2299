"""Parameters, buffers and constants: who holds them, under which names."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import FunctionType

import pytest
import torch
from edge import Case, Family, buffer, check, linear, t, weight
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from stagecut import SplitPoint, StagecutError, pipe_split

case = Family()
X = t(4, 4)
GLOBAL = t(4)


# --- shared -------------------------------------------------------------------------------------------


@case(X, stages=4)
class TiedInFourStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(4))
        for layer in self.layers:
            layer.weight = self.layers[0].weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            pipe_split()
        return x


@case(torch.tensor([1, 2, 3]), stages=3)
class TiedEmbeddingAndHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4).double(), nn.Linear(4, 8, bias=False).double()
        self.head.weight, self.norm = self.embed.weight, nn.LayerNorm(4).double()

    def forward(self, i):
        x = self.embed(i)
        pipe_split()
        x = self.norm(x)
        pipe_split()
        return self.head(x)


@case(X, stages=2)
class TiedButUsedOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()
        self.b.weight = self.a.weight

    def forward(self, x):
        x = x.tanh()
        pipe_split()
        return self.b(x)


@case(X, stages=2)
class OneModuleUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = linear()

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return self.b(x)


@case(X, stages=2)
class OneModuleInTwoParents(nn.Module):
    def __init__(self):
        super().__init__()
        shared = linear()
        self.p, self.q = nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.ReLU(), shared)

    def forward(self, x):
        x = self.p(x)
        pipe_split()
        return self.q(x)


@case(X, stages=3, has={"a": linear})
def module_called_in_three_stages(self, x):
    x = self.a(x)
    pipe_split()
    x = self.a(x)
    pipe_split()
    return self.a(x)


@case(X, stages=2, has={"a": linear})
def module_called_in_two_grad_modes(self, x):
    with torch.no_grad():
        y = self.a(x)
    pipe_split()
    return self.a(x) + y


@case(X, stages=3, has={"w": weight})
def root_parameter_in_every_stage(self, x):
    x = x @ self.w
    pipe_split()
    x = x @ self.w
    pipe_split()
    return x @ self.w.t()


@case(X, stages=2)
class ParentsParameterReadInChildren(nn.Module):
    class Child(nn.Module):
        def __init__(self, owner):
            super().__init__()
            self.owner = [owner]

        def forward(self, x):
            return x @ self.owner[0].w

    def __init__(self):
        super().__init__()
        self.w = weight()
        self.a, self.b = self.Child(self), self.Child(self)

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return self.b(x)


@case(X, stages=2)
class SharingStorage(nn.Module):
    def __init__(self):
        super().__init__()
        data = torch.randn(4, 4, dtype=torch.float64)
        self.a, self.b = nn.Parameter(data), nn.Parameter(data.t())

    def forward(self, x):
        x = x @ self.a
        pipe_split()
        return x @ self.b


@case(X, stages=2, feedback="")
class ParameterAndItsViewAsABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = weight()
        self.register_buffer("row", self.w.detach()[0])

    def forward(self, x):
        x = x @ self.w
        pipe_split()
        return x + self.row


@case(X, stages=2)
class AliasedBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        shift = torch.randn(4, dtype=torch.float64)
        self.register_buffer("one", shift)
        self.register_buffer("two", shift)

    def forward(self, x):
        x = x + self.one
        pipe_split()
        return x * self.two


@case(X, stages=2)
class OneTensorPersistentAndNot(nn.Module):
    def __init__(self):
        super().__init__()
        shift = torch.randn(4, dtype=torch.float64)
        self.register_buffer("one", shift)
        self.register_buffer("two", shift, persistent=False)

    def forward(self, x):
        x = x + self.two
        pipe_split()
        return x * self.one


# --- containers ---------------------------------------------------------------------------------------


@case(X, stages=3, has={"ws": lambda: nn.ParameterList([weight() for _ in range(3)])})
def parameter_list(self, x):
    for w in self.ws:
        x = x @ w
        pipe_split()
    return x


@case(X, stages=2, has={"ws": lambda: nn.ParameterDict({"a": weight(), "b-c": weight()})})
def parameter_dict(self, x):
    x = x @ self.ws["b-c"]
    pipe_split()
    return x @ self.ws["a"]


@case(X, stages=2, has={"ms": lambda: nn.ModuleDict({"first": linear(), "second": linear(), "keys_": linear()})})
def module_dict(self, x):
    x = self.ms["second"](x)
    pipe_split()
    return self.ms["first"](x)


@case(X, stages=2, has={"ms": lambda: nn.ModuleList([linear(), nn.ModuleList([linear(), linear()])])})
def nested_module_lists(self, x):
    x = self.ms[0](x)
    pipe_split()
    return self.ms[1][1](x)


# --- not read -----------------------------------------------------------------------------------------


@case(X, stages=2, has={"a": linear, "b": linear, "idle": lambda: nn.Sequential(linear(), nn.BatchNorm1d(4)), "w": weight})
def unused_parameters_and_submodules(self, x):
    x = self.a(x)
    pipe_split()
    return self.b(x)


@case(X, stages=2)
class UnusedInsideAUsedModule(nn.Module):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.idle, self.w = linear(), linear(), weight()

        def forward(self, x):
            return self.a(x)

    def __init__(self):
        super().__init__()
        self.p, self.q = self.Block(), self.Block()

    def forward(self, x):
        x = self.p(x)
        pipe_split()
        return self.q(x)


@case(X, stages=2, has={"w": weight, "b": lambda: buffer(4)})
def only_unused_state(self, x):
    x = x.relu()
    pipe_split()
    return x + 1


@case(X, stages=2, has={"frozen": lambda: linear().requires_grad_(False), "a": linear})
def frozen_parameters(self, x):
    x = self.frozen(x)
    pipe_split()
    return self.a(x)


@case(X, stages=2, grad=False, has={"frozen": lambda: linear().requires_grad_(False)})
def all_parameters_frozen(self, x):
    x = self.frozen(x)
    pipe_split()
    return self.frozen(x)


# --- buffers and constants ----------------------------------------------------------------------------


@case(X, stages=2, has={"b": lambda: buffer(4, persistent=False)})
def non_persistent_buffer_in_two_stages(self, x):
    x = x + self.b
    pipe_split()
    return x * self.b


@case(X, stages=2, has={"b": lambda: buffer(4, persistent=False), "c": lambda: buffer(4)})
def unused_non_persistent_buffer(self, x):
    x = x + self.c
    pipe_split()
    return x * 2


@case(X, stages=2)
class NoneBufferAndParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("b", None)
        self.register_parameter("w", None)
        self.a = nn.Linear(4, 4, bias=False).double()

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return x * 2 if self.b is None else x + self.b


@case(X, stages=2, has={"shift": lambda: t(4)})
def plain_tensor_attribute(self, x):
    x = x + self.shift
    pipe_split()
    return x * self.shift


@case(X, stages=2)
class PlainTensorAttributeOfASubmodule(nn.Module):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = t(4)

        def forward(self, x):
            return x + self.shift

    def __init__(self):
        super().__init__()
        self.p, self.q = self.Block(), self.Block()

    def forward(self, x):
        x = self.p(x)
        pipe_split()
        return self.q(x)


@case(X, stages=2, has={"shifts": lambda: [t(4), t(4) + 1]})
def list_of_plain_tensors(self, x):
    x = x + self.shifts[0]
    pipe_split()
    return x * self.shifts[1]


@case(X, stages=2)
def constant_made_in_the_forward(self, x):
    x = x + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    pipe_split()
    return x * torch.tensor(2.0)


@case(X, stages=2)
def global_tensor(self, x):
    x = x + GLOBAL
    pipe_split()
    return x * GLOBAL


@case(X, stages=2)
class PlainTensorThatIsAlsoABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("b", t(4))
        self.plain = [self.b]

    def forward(self, x):
        x = x + self.plain[0]
        pipe_split()
        return x * self.b


@case(X, stages=2)
class PlainViewOfAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = weight()
        self.row = self.w.detach()[0]

    def forward(self, x):
        x = x + self.row
        pipe_split()
        return x @ self.w


@case(X, stages=2, has={"a": linear, "w": lambda: t(4).requires_grad_()})
def plain_tensor_that_requires_grad(self, x):
    x = self.a(x) + self.w
    pipe_split()
    return x * 2


@case(X, stages=2, has={"w": weight})
def parameter_returned(self, x):
    x = x @ self.w
    pipe_split()
    return x * 2, self.w


@case(X, stages=2, has={"b": lambda: buffer(4), "w": weight})
def buffer_returned_and_unused_otherwise(self, x):
    x = x.relu()
    pipe_split()
    return x + 1, self.b, self.w


@case(X, stages=1, has={"w": weight, "b": lambda: buffer(4)})
def only_state_returned(self, x):
    return self.w, self.b


@case(X, stages=2, has={"w": weight})
def view_of_a_parameter_crosses(self, x):
    row = self.w[0]
    x = x * 2
    pipe_split()
    return x + row


@case(X, stages=2, has={"b": lambda: buffer(4, 4)})
def view_of_a_buffer_returned(self, x):
    row = self.b[1]
    x = x * 2
    pipe_split()
    return x + row, row


@case(X, stages=3, has={"w": weight})
def parameter_detached_in_one_stage(self, x):
    w = self.w.detach()
    x = x @ self.w
    pipe_split()
    x = x * 2
    pipe_split()
    return x @ w


@case(X, stages=2, has={"c": lambda: nn.Parameter(t(4, 4, dtype=torch.complex128)), "i": lambda: nn.Buffer(torch.arange(4))})
def complex_parameter_and_int_buffer(self, x):
    z = x.to(torch.complex128) @ self.c
    pipe_split()
    return z[self.i].abs()


@case(X, stages=2, has={"s": lambda: weight(1).sum().detach().requires_grad_(), "w": lambda: nn.Parameter(t())})
def zero_dim_parameter(self, x):
    x = x * self.w
    pipe_split()
    return x + self.w


@case(X, stages=2, has={"w": lambda: nn.Parameter(t(4, 4).t())})
def transposed_parameter(self, x):
    x = x @ self.w
    pipe_split()
    return x * self.w, self.w * 2


# --- names --------------------------------------------------------------------------------------------


def named(*names):
    """A chain of layers under these names."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                self.add_module(name, linear())

        def forward(self, x):
            for name in names:
                x = self._modules[name](x)
                pipe_split()
            return x

    return Named


@case(X, stages=6)
class NamesThatAreOurs(named("stages", "program", "code", "index", "input_names", "stage_0")):
    pass


@case(X, stages=7)
class NamesOfOurAttributes(named("_code", "_texts", "_forwards", "_constants", "_here", "_title", "_path")):
    pass


@case(X, stages=4)
class NamesThatMangleAlike(named("a_b", "a-b", "a b", "ab")):
    pass


@case(X, stages=5)
class NamesOfPython(named("class", "def", "torch", "aten", "import")):
    pass


@case(X, stages=4)
class NamesWithDigitsAndUnderscores(named("0", "1_", "_", "__a")):
    pass


@case(X, stages=3)
class NamesNotInAscii(named("größe", "层", "é")):
    pass


@case(X, stages=3)
class NamesOfAModule(named("forward_", "add_call", "extra_repr_")):
    pass


@case(X, stages=2)
class ModuleAndItsPathMangleAlike(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b": linear()})
        self.a_b = linear()

    def forward(self, x):
        x = self.a["b"](x)
        pipe_split()
        return self.a_b(x)


@case(X, stages=2)
class ParametersThatMangleAlike(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Module()
        self.a.w, self.a_w, self.p_a_w = weight(), weight(), weight()

    def forward(self, x):
        x = x @ self.a.w
        pipe_split()
        return x @ self.a_w + x @ self.p_a_w


@case(X, stages=2)
class StateNamedAsOurs(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("code", "index", "input_names", "_here", "x", "self"):
            self.register_parameter(name, weight())

    def forward(self, x):
        x = x @ self._parameters["code"] @ self._parameters["_here"] @ self._parameters["x"]
        pipe_split()
        return x @ self._parameters["index"] @ self._parameters["input_names"] @ self._parameters["self"]


@case(X, stages=2)
class BufferNamedAsAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Module()
        self.block.register_buffer("block", t(4))
        self.block.inner = linear()

    def forward(self, x):
        x = x + self.block.block
        pipe_split()
        return self.block.inner(x) + self.block.block


@case(t(4, 4), stages=2)
class InputNamedAsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = weight()

    def forward(self, weight):
        x = weight @ self.weight
        pipe_split()
        return x @ self.weight - weight


@case(X, stages=2)
class ConstantNamedAsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("lifted_tensor_0", t(4))

    def forward(self, x):
        x = x + self.lifted_tensor_0 + torch.tensor(2.0)
        pipe_split()
        return x * torch.tensor(3.0) + self.lifted_tensor_0


# --- parametrisations ---------------------------------------------------------------------------------


@case(X, stages=2, has={"a": lambda: parametrizations.weight_norm(linear()), "b": linear})
def weight_norm(self, x):
    x = self.a(x)
    pipe_split()
    return self.b(x)


@case(X, stages=2, has={"a": lambda: parametrizations.weight_norm(linear())})
def weight_norm_in_two_stages(self, x):
    x = self.a(x)
    pipe_split()
    return self.a(x)


@case(X, stages=2, modes=(True, False), has={"a": lambda: parametrizations.spectral_norm(linear()), "b": linear})
def spectral_norm(self, x):
    x = self.a(x)
    pipe_split()
    return self.b(x)


@case(X, stages=2, modes=(False,), has={"a": lambda: parametrizations.spectral_norm(linear())})
def spectral_norm_in_two_stages_in_eval(self, x):
    x = self.a(x)
    pipe_split()
    return self.a(x)


@case(
    X,
    stages=2,
    has={"a": lambda: parametrizations.spectral_norm(linear())},
    feedback="weight",
)
def spectral_norm_in_two_stages_in_train(self, x):
    x = self.a(x)
    pipe_split()
    return self.a(x)


@case(X, stages=2, has={"a": lambda: parametrizations.orthogonal(linear()), "b": linear})
def orthogonal(self, x):
    x = self.a(x)
    pipe_split()
    return self.b(x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", ["weight_norm", "spectral_norm"])
def test_old_norms(old: str) -> None:
    """The hooks of torch.nn.utils that came before parametrisations set a plain attribute before each call."""

    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = getattr(nn.utils, old)(linear()), linear()

        def forward(self, x):
            x = self.a(x)
            pipe_split()
            return self.b(x)

    check(Case(old, Old, (X,), stages=2))


@case(X, stages=2, spec={"m.parametrizations": SplitPoint.END}, has={"m": lambda: parametrizations.weight_norm(linear())}, refused="m.par")
def split_at_a_container_that_never_runs(self, x):
    return self.m(x)


@case(X, stages=2, has={"a": lambda: nn.Linear(4, 4, dtype=torch.float64), "b": nn.Identity, "c": nn.Dropout})
def modules_without_state(self, x):
    x = self.c(self.b(self.a(x)))
    pipe_split()
    return self.b(x) + 1


# --- wrapped before the cut -----------------------------------------------------------------------------


def wrapped(self, x):
    x = self.a(self.c(x))
    pipe_split()
    return self.b(x) * self.c(x)


for name, wrap in {
    "a_compiled_module": lambda: torch.compile(linear(), backend="eager"),
    "a_checkpointed_module": lambda: checkpoint_wrapper(linear()),
    "checkpointed_modules_in_each_other": lambda: checkpoint_wrapper(nn.Sequential(linear(), checkpoint_wrapper(linear()))),
    "a_compiled_module_in_a_checkpointed_one": lambda: checkpoint_wrapper(torch.compile(linear(), backend="eager")),
    "a_scripted_module": lambda: torch.jit.script(nn.Sequential(linear())),
}.items():
    case(X, stages=2, has={"a": linear, "b": linear, "c": wrap})(FunctionType(wrapped.__code__, globals(), name))


class Counting(nn.Linear):
    """Has extra state, as modules of 8-bit training do."""

    def __init__(self):
        super().__init__(4, 4, dtype=torch.float64)
        self.inner, self.steps = linear(), {"steps": torch.tensor(3)}

    def get_extra_state(self):
        return self.steps

    def set_extra_state(self, state):
        self.steps = state


@case(X, stages=2, has={"a": Counting, "b": Counting, "idle": Counting})
def extra_state(self, x):
    x = self.a.inner(self.a(x))
    pipe_split()
    return self.b(x)


def test_extra_state_is_loaded_when_it_is_that_of_the_cut() -> None:
    """Another one might make forward compute otherwise."""
    one = case.cases["extra_state"]
    model = one.build()
    pipe = one.cut(model)
    assert "the stages keep the extra state that module 'a' has at the cut" in pipe.notes
    state = deepcopy(model.state_dict())
    assert pipe.state_dict()["idle._extra_state"] == {"steps": torch.tensor(3)}
    assert not any(pipe.load_state_dict(state))
    state["a._extra_state"]["steps"].add_(1)
    with pytest.raises(StagecutError, match=r"'a._extra_state' is another one") as caught:
        pipe.load_state_dict(state)
    assert caught.value.where.endswith("Counting.get_extra_state")
    del state["a._extra_state"]
    assert pipe.load_state_dict(state, strict=False).missing_keys == ["a._extra_state"]


def test_no_file_holds_extra_state(tmp_path: Path) -> None:
    """It would be lost."""
    one = case.cases["extra_state"]
    with pytest.raises(StagecutError, match="it would be lost") as caught:
        one.cut(one.build()).save(tmp_path / "saved")
    assert "pipe.state_dict()" in caught.value.hint


@pytest.mark.parametrize("one", case.params())
def test_state(one: Case) -> None:
    """State is held where it is read, under the model's names, and nothing else is state."""
    check(one)
