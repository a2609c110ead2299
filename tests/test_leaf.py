"""leaf: modules kept whole, because the user says so or because they cannot be traced."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy
import pytest
import torch
from compare import assert_same, snapshot
from edge import Case, buffer, check, linear, t, weight
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from stagecut import Pipe, SplitPoint, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.frontend.capture.whole import Leaves
from stagecut.ir.errors import CaptureError, SplitError, StagecutError
from stagecut.ir.graph import Op
from stagecut.ir.text.printer import text

X = t(4, 4)


@dataclass
class Whole(Case):
    """A case with modules kept whole."""

    leaves: tuple[str, ...] = ()

    def cut(self, model: nn.Module) -> Pipe:
        args, kwargs = self.inputs(0)
        return pipeline(model, args, kwargs, leaf_modules=self.leaves)


class Net(nn.Module):
    """A stage before, the module under test, a stage behind; both stages hold a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.behind = linear(), inner, linear()

    def forward(self, x: torch.Tensor) -> Any:
        x = self.before(x)
        pipe_split()
        y = self.inner(x)
        pipe_split()
        return y * self.behind(x)


def leaf_ops(pipe: Pipe) -> list[Op]:
    """The calls of modules kept whole."""
    return [op for op in pipe.program.all_ops() if op.target.startswith("module.")]


# --- what a module kept whole may do --------------------------------------------------------------------


class Branches(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the tracer stops here
            return self.layer(x)  # type: ignore[no-any-return]
        return -x


class Structured(nn.Module):
    """Takes keywords and numbers, returns a structure with literals in it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight()

    def forward(self, xs: list[torch.Tensor], *, scale: float, name: str) -> dict[str, Any]:
        return {"y": xs[0] @ self.w * scale, "rest": (xs[1], None, 3), "name": name}


class Norm(nn.Module):
    """Running statistics, dropout and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4).double(), nn.Dropout(0.5)
        self.steps = buffer(value=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.drop(self.norm(x)) * self.steps  # type: ignore[no-any-return]


class Writes(nn.Module):
    """Writes its argument in place and returns it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


class Views(nn.Module):
    """Returns a view of its argument."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[1:3]


class Scaled(torch.autograd.Function):
    """Gradients are scaled by three."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 3


class Custom(nn.Module):
    """Has a backward of its own, which a trace would lose."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Scaled.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class Outer(nn.Module):
    """Calls what it is given, in whatever way the test says."""

    def __init__(self, inner: nn.Module, call: Any) -> None:
        super().__init__()
        self.inner, self.call, self.behind = inner, call, linear()

    def forward(self, x: torch.Tensor) -> Any:
        x = x * 2
        pipe_split()
        y = self.call(self.inner, x)
        pipe_split()
        return self.behind(x), y


def outer(inner: Any, call: Any) -> type[nn.Module]:
    """The class of such models."""

    class Made(Outer):
        def __init__(self) -> None:
            super().__init__(inner(), call)

    return Made


WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "layer": (linear, lambda m, x: m(x), {}),
    "branch": (Branches, lambda m, x: m(x) + m(-x), {"leaves": ()}),
    "structure": (Structured, lambda m, x: m([x, x + 1], scale=0.5, name="n"), {}),
    "called twice": (Structured, lambda m, x: (m([x, x], scale=2, name="a"), m([x, x * 3], scale=1, name="b")), {}),
    "norm in either mode": (Norm, lambda m, x: m(x), {"modes": (True, False), "switch": True}),
    "writes": (Writes, lambda m, x: m(x.clone()) + 1, {}),
    "writes what others read": (Writes, lambda m, x: (m(x), x + 1), {}),
    "views": (Views, lambda m, x: (m(x), x.sum()), {}),
    "a view that is written": (Views, lambda m, x: (m(x).add_(1), x * 1), {}),
    "custom backward": (Custom, lambda m, x: m(x), {}),
    "frozen": (lambda: linear().requires_grad_(False), lambda m, x: m(x), {}),
    "under no_grad": (linear, lambda m, x: torch.no_grad()(m)(x), {}),
    "nothing used": (Norm, lambda m, x: (m(x), x)[1] * 1, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_stages_with_a_module_kept_whole_do_what_the_model_does(way: str) -> None:
    """In one process and across boundaries: outputs, gradients, buffers, random numbers."""
    inner, call, given = WAYS[way]
    options: dict[str, Any] = {"leaves": ("inner",)} | given
    check(Whole("Made", outer(inner, call), (X,), **options))


# --- which modules --------------------------------------------------------------------------------------


def test_the_stage_calls_the_users_own_module() -> None:
    """One op, held by its stage alone; its hooks fire."""
    model = Net(linear())
    pipe = pipeline(model, (X,), leaf_modules=["inner"])
    assert [op.target for op in leaf_ops(pipe)] == ["module.inner"]
    assert pipe.stages[1].get_submodule("inner") is model.inner
    assert set(pipe.stages[1].state_dict()) == {"inner.weight", "inner.bias"}
    assert pipe.notes == ()
    calls: list[int] = []
    model.inner.register_forward_hook(lambda *_: calls.append(1))
    pipe(X)
    assert calls == [1]


def test_an_unknown_path_names_the_nearest() -> None:
    with pytest.raises(SplitError, match="leaf_modules names module 'iner'") as caught:
        pipeline(Net(linear()), (X,), leaf_modules=["iner"])
    assert "'inner'" in caught.value.hint


def test_a_whole_module_has_no_whole_modules_inside() -> None:
    """Whichever is named first."""
    model = Net(nn.Sequential(linear(), nn.Sequential(linear())))
    for paths in (["inner.1.0", "inner.1", "inner"], ["inner", "inner.1"]):
        pipe = pipeline(model, (X,), leaf_modules=paths)
        assert [op.target for op in leaf_ops(pipe)] == ["module.inner"]


def test_what_cannot_be_traced_is_kept_whole_and_noted() -> None:
    """The smallest module around the failing line; the note says which line."""
    pipe = pipeline(Net(nn.Sequential(linear(), Branches())), (X,))
    assert [op.target for op in leaf_ops(pipe)] == ["module.inner.1"]
    (note,) = pipe.notes
    assert "'inner.1'" in note
    assert "the tracer stops here" in note


def test_all_modules_of_the_failing_class_are_kept_whole() -> None:
    """It is the code of the class that fails."""
    pipe = pipeline(Net(nn.Sequential(Branches(), linear(), Branches())), (X,))
    assert [op.target for op in leaf_ops(pipe)] == ["module.inner.0", "module.inner.2"]
    assert len(pipe.notes) == 1


class Root(nn.Module):
    """Branches itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if y.sum() > 0:
            return y * 1  # type: ignore[no-any-return]
        return -x


def test_the_model_itself_is_not_kept_whole() -> None:
    """There would be nothing to cut."""
    with pytest.raises(CaptureError, match="Root cannot be traced") as caught:
        pipeline(Root(), (X,))
    assert "move the code into a submodule, which is kept whole" in caught.value.hint


def test_a_model_without_data_cannot_be_recorded() -> None:
    """A leaf's outputs come from a real run."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4))
    assert not Leaves(model, ((X,), {})).can_run()
    assert Leaves(Net(linear()), ((X,), {})).can_run()


# --- what capture leaves alone --------------------------------------------------------------------------


def test_the_modules_are_as_before() -> None:
    """State, random state, and a forward set on the instance."""
    model = Net(Norm())
    mine = MethodType(lambda self, x: Norm.forward(self, x) * 2, model.inner)
    model.inner.forward = mine  # type: ignore[method-assign]
    before, random = snapshot(model), torch.get_rng_state()
    pipeline(model, (X,), leaf_modules=["inner", "before"], check=None)
    assert model.inner.forward is mine
    assert "forward" not in vars(model.before)
    assert_same(snapshot(model), before, "the model")
    assert torch.equal(torch.get_rng_state(), random)


def test_the_modules_are_as_before_when_capture_fails() -> None:
    model = Root()
    with pytest.raises(CaptureError):
        pipeline(model, (X,), leaf_modules=["inner"])
    assert "forward" not in vars(model.inner)
    assert model.inner(X).shape == X.shape


# --- what the IR says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "shown"),
    [
        (linear, ["@inner.weight", "effect"]),
        (Writes, ["writes(", "view"]),
        (Views, ["view(", "f64[2,4]"]),
        (Norm, ["random", "@inner.steps -> %inner.steps.1", "@inner.norm.running_mean -> "]),
    ],
)
def test_effects_are_those_of_a_real_run(inner: Any, shown: list[str]) -> None:
    """What it writes, which results are views, whether it draws. Buffers count as written."""
    pipe = pipeline(outer(inner, lambda m, x: m(x))(), (X,), leaf_modules=["inner"])
    (line,) = [line for line in text(pipe.program).splitlines() if "module.inner" in line]
    for part in shown:
        assert part in line


class Grows(nn.Module):
    """Puts what it computes into the dict it is given."""

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["x"] = x * 2
        return x


def test_a_whole_module_that_changes_a_container_it_is_given_is_refused() -> None:
    """Its stage would change another one."""

    def forward(inner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        cache: dict[str, torch.Tensor] = {}
        return inner(x, cache) + cache["x"]  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="'inner' is kept whole and changes a container") as caught:
        pipeline(outer(Grows, forward)(), (X,), leaf_modules=["inner"])
    assert "Grows.forward" in caught.value.where
    assert caught.value.hint


PYTHONS, NUMPYS = random.Random(0), numpy.random.default_rng(0)


class TooShort(nn.Module):
    """Leaves what it computes in a list, in the place that is its own."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        seen[self.place] = x
        return x + 1


class Short(nn.Module):
    """Gives its modules a list with one place too few."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(TooShort(place) for place in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[Any] = [None, None]
        for part in self.parts:
            x = part(x, seen)
        return x


def test_a_model_that_fails_is_not_refused_for_what_it_did_before() -> None:
    with pytest.raises(CaptureError, match="Short fails on the example inputs: IndexError") as raised:
        pipeline(Short(), (X,))
    assert "'parts.2'" in str(raised.value)


class Draws(nn.Module):
    """Draws with generators that are not torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (random.random() + PYTHONS.random() + NUMPYS.random() + float(numpy.random.rand()))


def test_a_whole_module_draws_what_it_draws_in_the_model() -> None:
    """The check gives both the same numbers, and the generators are as they were."""
    before = random.getstate(), PYTHONS.getstate(), NUMPYS.bit_generator.state
    model = Net(Draws())
    pipe = pipeline(model, (X,), leaf_modules=["inner"], check="auto")
    assert (random.getstate(), PYTHONS.getstate(), NUMPYS.bit_generator.state) == before
    assert pipe.verify(X).ok


# --- cuts in and around it ------------------------------------------------------------------------------


class Splits(nn.Module):
    """Splits inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        pipe_split()
        return self.layer(x)  # type: ignore[no-any-return]


def test_a_marker_inside_a_whole_module_is_refused() -> None:
    """It runs as a whole: silence would be a stage less than asked for."""
    with pytest.raises((SplitError, CaptureError), match="inner"):
        pipeline(Net(Splits()), (X,), leaf_modules=["inner"])


def test_a_split_point_inside_a_whole_module_is_refused() -> None:
    with pytest.raises(SplitError, match=r"'inner\.1'"):
        pipeline(Net(nn.Sequential(linear(), linear())), (X,), split_spec={"inner.1": SplitPoint.BEGINNING}, leaf_modules=["inner"])


@pytest.mark.parametrize(("point", "held"), [(SplitPoint.BEGINNING, ["0", "12"]), (SplitPoint.END, ["01", "2"])])
def test_a_whole_module_can_be_cut_before_and_behind(point: SplitPoint, held: list[str]) -> None:
    pipe = pipeline(nn.Sequential(linear(), linear(), linear()), (X,), split_spec={"1": point}, leaf_modules=["1"])
    assert ["".join(sorted({name[0] for name in stage.state_dict()})) for stage in pipe.stages] == held


# --- numbers that a module kept whole returns, and where it stops tracing ----------------------------------


class Counts(nn.Module):
    """Tensors, and numbers among them."""

    def forward(self, x: torch.Tensor) -> Any:
        return {"twice": x * 2, "size": x.shape[0], "mean": [x.mean().item(), None, "text"]}


class Reads(nn.Module):
    """Computes with a number that a submodule returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.behind = Counts(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.inner(x)
        pipe_split()
        return self.behind(made["twice"]) * made["mean"][0] + made["size"]


def test_a_number_that_a_whole_module_returns_is_that_of_the_trace_or_the_call_fails() -> None:
    x = torch.randn(3, 4)
    pipe = pipeline(Reads(), (x,), leaf_modules=["inner"], check=None)
    assert leaf_ops(pipe)[0].returned == ("['twice']", 3, x.mean().item(), "text")
    pipe(x)
    for run in (pipe, Mailbox(pipe.program, pipe.stages).forward):
        with pytest.raises(
            StagecutError, match=rf"'inner' returns {re.escape(repr((-x).mean().item()))} in this call; .* stands in the trace"
        ):
            run(*([-x] if run is pipe else [[-x]]))
    with pytest.raises(StagecutError, match=r"(?s)'inner' returns .* in the trace.*kept whole.*return tensors"):
        pipeline(Reads(), (x,), leaf_modules=["inner"])


class Keys(nn.Module):
    """As many tensors, in another order or another place."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: torch.Tensor) -> Any:
        if self.other:
            return {"a": x, "b": x * 2} if x.sum() > 0 else {"b": x * 2, "a": x}
        return (x, None) if x.sum() > 0 else (None, x)


class Takes(nn.Module):
    def __init__(self, other: bool) -> None:
        super().__init__()
        self.keys = Keys(other)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.keys(x)
        pipe_split()
        return made["a"] - made["b"] * 3 if isinstance(made, dict) else made[0] + 1


@pytest.mark.parametrize(("other", "then"), [(True, r"\['b'\] \['a'\]"), (False, r"\[1\]")])
def test_the_structure_that_a_whole_module_returns_is_that_of_the_trace_or_the_call_fails(other: bool, then: str) -> None:
    pipe = pipeline(Takes(other), (torch.ones(3),), leaf_modules=["keys"])
    pipe(torch.ones(3) * 2)
    with pytest.raises(StagecutError, match=f"'keys' returns .{then}. in this call"):
        pipe(-torch.ones(3))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.lin(x) * (2 if x.sum() > 0 else 3)


class MoreWhenTraced(nn.Module):
    """A layer that gives its part a mask only where it is traced, as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Masked()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x, x.abs() if torch._guards.detect_fake_mode() else None)


def test_where_a_module_is_called_otherwise_when_traced_the_one_around_it_is_kept_whole() -> None:
    model = nn.Sequential(MoreWhenTraced(), nn.Linear(4, 4))
    pipe = pipeline(model, (torch.randn(3, 4),))
    assert [op.target for op in leaf_ops(pipe)] == ["module.0"]
    assert "'0.part' is given 2 tensors in the trace, 1 in a real run" in pipe.notes[0]
    assert pipe.verify(torch.randn(3, 4)).ok


class Stack(nn.Module):
    """Its layers lie in a list, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Masked(), Masked()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, x.abs() if torch._guards.detect_fake_mode() else None)
        return x


def test_a_list_of_modules_is_not_kept_whole_for_what_lies_in_it() -> None:
    pipe = pipeline(nn.Sequential(Stack(), nn.Linear(4, 4)), (torch.randn(3, 4),))
    assert [op.target for op in leaf_ops(pipe)] == ["module.0"]
    with pytest.raises(
        CaptureError,
        match=r"'layers\.0' is given 2 .* 1 in a real run, or others; before that, in module 'layers\.0': what its code does depends",
    ):
        pipeline(Stack(), (torch.randn(3, 4),))


def test_a_list_of_modules_stands_for_each_of_them() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])])
    leaves = Leaves(model, ())
    leaves.add("layers")
    assert leaves.paths == ["layers.0", "layers.1.0", "layers.1.1"]


class Experts(nn.ModuleDict):
    """Sends rows to the experts that they hit, by a loop over data."""

    def __init__(self) -> None:
        super().__init__({str(i): nn.Linear(4, 4) for i in range(3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hit = x.argmax(1).remainder(3)
        result = torch.zeros_like(x)
        for expert in hit.unique():
            rows = torch.where(hit == expert)[0]
            result = result.index_add(0, rows, self[str(int(expert))](x[rows]))
        return result


def test_a_dict_of_modules_with_a_forward_is_kept_whole_itself() -> None:
    """The experts of SwitchTransformers are one."""
    model = nn.Sequential(nn.Linear(4, 4), Experts(), nn.Linear(4, 4))
    x = torch.randn(6, 4)
    pipe = pipeline(model, (x,), split_spec={"2": SplitPoint.BEGINNING})
    assert [op.target for op in leaf_ops(pipe)] == ["module.1"]
    assert pipe.verify(torch.randn(6, 4)).ok


class Twice(nn.Module):
    """Returns one tensor twice, and a part of it."""

    def forward(self, x: torch.Tensor) -> Any:
        y = x.tanh()
        return y, y, y[0]


class WritesTwin(nn.Module):
    def __init__(self, part: int) -> None:
        super().__init__()
        self.inner, self.part = Twice(), part

    def forward(self, x: torch.Tensor) -> Any:
        made = [*self.inner(x)]
        pipe_split()
        if self.part < 3:
            made[self.part][..., 0].add_(1)
        return made


def test_a_write_into_one_of_two_results_that_share_memory_is_refused() -> None:
    x = torch.randn(3, 4)
    for part in range(3):
        with pytest.raises(CaptureError, match=r"shares memory with something else that it returned\n  at: .*test_leaf"):
            pipeline(WritesTwin(part), (x,), leaf_modules=["inner"])
    model = WritesTwin(3)
    assert pipeline(model, (x,), leaf_modules=["inner"]).verify(x).ok


class Pads(nn.Module):
    """A size that only the run knows."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.lin = nn.Buffer(torch.tensor(3)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(self.lin(x), (self.count, 0))  # type: ignore[arg-type]


class Asks(nn.Module):
    """Branches on what a submodule returns, or on its size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        pipe_split()
        return x * 2 if (y.shape[1] if isinstance(y, torch.Tensor) and y.dim() else y) > 6 else x * 3


def test_what_makes_a_size_on_which_the_model_branches_is_kept_whole() -> None:
    pipe = pipeline(Asks(nn.Sequential(Pads(), nn.Identity())), (torch.randn(3, 4),))
    assert [op.target for op in leaf_ops(pipe)] == ["module.inner.0"]
    assert "module 'inner.0' and all of its class are kept whole: what its code does depends on the data in a tensor" in pipe.notes[0]


class Sums(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x.sum().item()


class Finds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.nonzero().t()


@pytest.mark.parametrize("inner", [Sums(), Finds()])
def test_a_branch_on_a_number_or_on_how_many_there_are_is_refused(inner: nn.Module) -> None:
    with pytest.raises(CaptureError, match=r"(?s)depends on the data.*return x \* 2 if .*torch\.where"):
        pipeline(Asks(inner), (torch.randn(3, 4),))


class WritesAndReturns(nn.Module):
    """Returns what it wrote in eval mode, and a tensor of its own in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.drop(x)
        x.sub_(1)
        return result


class WrittenAgain(nn.Module):
    """Reads the result of a module when its argument has been written again, in the next stage."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = WritesAndReturns()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        first = self.inner(x)
        second = self.inner(x)
        pipe_split()
        third = self.inner(first)
        return first * 2 + second + x.mul_(2) + third


class KeepInner(fx.Tracer):
    """Keeps the inner module whole."""

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return qualname == "inner"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_what_a_module_wrote_is_its_result_in_one_mode_only(training: bool, graph: bool) -> None:
    model: nn.Module = WrittenAgain().train(training)
    options: dict[str, Any] = {"leaf_modules": ["inner"]}
    if graph:
        model = fx.GraphModule(model, KeepInner().trace(model)).train(training)
        options = {"split_policy": lambda program: [3]}
    if graph or not training:
        with pytest.raises(SplitError, match="may or may not be the tensor it was given"):
            pipeline(model, (torch.randn(3, 4),), **options)
        return
    pipe = pipeline(model, (torch.randn(3, 4),), check=None, **options)
    x = torch.randn(3, 4)
    with torch.random.fork_rng():
        expected = model(x)
    assert torch.equal(pipe.module()(x), expected)
    pipe.eval()
    with pytest.raises(StagecutError, match="returns a part of argument 'x'"):
        pipe.module()(x)
