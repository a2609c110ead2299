"""promises: what a module kept whole did not do in the trace, and must not do in a call where another stage relies on it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import fx, nn

from stagecut import Pipe, SplitPoint, StagecutError, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox

UP, DOWN = torch.linspace(0.5, 1, 12).view(3, 4), torch.linspace(-1, -0.5, 12).view(3, 4)
"""An input for which a branch is taken, and one for which it is not."""


class Writes(nn.Module):
    """Writes what it is given, in some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        tensor = given["deep"][0] if isinstance(given, dict) else given
        if x.sum() > 0:
            tensor.mul_(2)
        return self.inner(x) + tensor


class Around(nn.Module):
    """A module kept whole between two cuts. What it is given is read on both sides."""

    def __init__(self, inner: nn.Module, cut: bool = True, nested: bool = False) -> None:
        super().__init__()
        self.inner, self.last, self.cut, self.nested = inner, nn.Linear(4, 4), cut, nested

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 3
        if self.cut:
            pipe_split()
        y = self.inner(x, {"deep": [made]} if self.nested else made)
        pipe_split()
        return self.last(made if self.cut else x) + y  # type: ignore[no-any-return]


def whole(model: nn.Module, x: torch.Tensor, **options: Any) -> Pipe:
    """The pipe of a model whose part `inner` is kept whole."""
    return pipeline(model, (x,), leaf_modules=["inner"], **options)


def test_a_write_that_the_trace_did_not_have_is_refused() -> None:
    """The model's third stage reads what the module writes; across processes it would read another tensor."""
    model = Around(Writes())
    pipe = whole(model, DOWN)
    box = Mailbox(pipe.program, pipe.stages)
    assert torch.equal(box.forward([DOWN])[0], model(DOWN))
    for run in (pipe, lambda x: box.forward([x])):
        with pytest.raises(
            StagecutError, match=r"module 'inner' writes argument 'given' in this call, which the trace does not show"
        ) as caught:
            run(UP)
        assert caught.value.where == "module 'inner', which is kept whole"
        assert "clone" in caught.value.hint


def test_a_write_that_the_trace_had_is_right_in_calls_without_it() -> None:
    model = Around(Writes())
    pipe = whole(model, UP)
    for x in (UP, DOWN):
        assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([x])[0], model(x))


def test_the_argument_is_named_by_its_place_in_a_structure() -> None:
    pipe = whole(Around(Writes(), nested=True), DOWN)
    with pytest.raises(StagecutError, match=r"writes argument 'given'\['deep'\]\[0\]"):
        pipe(UP)


class GivesBoth(nn.Module):
    """A module that a graph keeps whole writes a tensor, and is given a part of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Doubles()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 3
        y = self.inner(made, made[0])
        return made + y


class Doubles(Writes):
    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        x.add_(x)
        return self.inner(x)  # type: ignore[no-any-return]


def test_a_part_of_what_is_written_is_written_too() -> None:
    """The trace says so, without naming the part."""
    model = GivesBoth()
    module = fx.GraphModule(model, KeepsWrites().trace(model))
    pipe = pipeline(module, (UP,), split_spec={"inner": SplitPoint.END})
    assert pipe.num_stages == 2
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([UP])[0], model(UP))


def test_what_no_other_stage_has_may_be_written() -> None:
    """Nothing is watched there, and nothing costs."""
    model = Around(Writes(), cut=False)
    pipe = whole(model, DOWN)
    assert "{\"argument 'x'\": x}" in pipe.stages[0].code
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([UP])[0], model(UP))


def test_one_stage_watches_nothing() -> None:
    pipe = pipeline(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (UP,), leaf_modules=["0"])
    assert "reads_only" not in pipe.stages[0].code


class Gives(nn.Module):
    """Returns a part of what it is given, in some calls."""

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        part = given[:1] if x.sum() > 0 else given[:1] * 1
        return part.expand(3, 4) if self.training else part


class Reads(nn.Module):
    """Writes into what a module kept whole returned, behind a cut, and reads what that was given."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.inner, self.last, self.write = Gives().eval(), nn.Linear(4, 4), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 3
        part = self.inner(x, made)
        pipe_split()
        if self.write:
            part.add_(1)
        return self.last(made) + part  # type: ignore[no-any-return]


def test_a_view_that_the_trace_did_not_have_is_refused_where_it_is_written() -> None:
    pipe = whole(Reads(True), DOWN)
    with pytest.raises(
        StagecutError, match=r"module 'inner' returns a part of argument 'given' in this call, which the trace does not show"
    ):
        pipe(UP)


def test_a_view_that_nobody_writes_is_as_good_as_a_copy() -> None:
    model = Reads(False)
    pipe = whole(model, DOWN)
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([UP])[0], model(UP))


LIMIT = {"rows": 7}


class Switched(torch.autograd.Function):
    """A function that looks at what no trace sees."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        if LIMIT["rows"] < 3:
            made.mul_(2)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2, None


class Switches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 2
        y = Switched.apply(x, made)
        pipe_split()
        return self.last(made) + y  # type: ignore[no-any-return]


def test_an_autograd_function_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(Switches(), (UP,))
    monkeypatch.setitem(LIMIT, "rows", 1)
    with pytest.raises(StagecutError, match=r"function 'Switched' writes argument 1 in this call, which the trace does not show"):
        pipe(UP)


class Hidden(torch.autograd.Function):
    """A write that moves no version counter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        made.data.mul_(2)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2, None


class Hides(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.zeros_like(x) + 1
        y = Hidden.apply(x, made)
        pipe_split()
        return made + y, made


def test_a_write_through_data_inside_an_autograd_function_is_seen() -> None:
    pipe = pipeline(Hides(), (UP,))
    (op,) = [op for op in pipe.program.all_ops() if op.is_users]
    assert op.effects.writes == (op.operands[1],)
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([UP])[1], Hides()(UP)[1])


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Writes(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 3
        y = self.inner(x, made)
        return self.last(made) + y  # type: ignore[no-any-return]


class KeepsWrites(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Writes) or super().is_leaf_module(m, module_qualified_name)


class Quiet(Writes):
    """Nothing is written on fakes: no branch looks at values."""

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        if LIMIT["rows"] < 3:
            given.mul_(2)
        return self.inner(x) + given  # type: ignore[no-any-return]


def test_a_module_that_a_graph_keeps_whole_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Graph()
    model.inner = Quiet()
    module = fx.GraphModule(model, KeepsWrites().trace(model))
    pipe = pipeline(module, (UP,), split_spec={"inner": SplitPoint.END})
    assert "reads_only(self.last" not in pipe.stages[1].code
    monkeypatch.setitem(LIMIT, "rows", 1)
    with pytest.raises(StagecutError, match=r"module 'inner' writes argument 'given' in this call"):
        pipe(UP)


class Shared(nn.Module):
    """A buffer of the model's, given to a module kept whole and read in another stage."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Writes()
        self.register_buffer("table", torch.ones(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x, self.table)
        pipe_split()
        return y * self.table


def test_state_that_two_stages_hold_is_watched() -> None:
    """The buffer would be written in one process only."""
    pipe = whole(Shared(), DOWN)
    with pytest.raises(StagecutError, match=r"writes argument 'given' in this call"):
        pipe(UP)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Decays(), nn.Linear(4, 4)
        self.last.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        pipe_split()
        return self.last(y)  # type: ignore[no-any-return]


class Decays(nn.Linear):
    """Writes its own parameter, in some calls."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            with torch.no_grad():
                self.weight.mul_(0.5)
        return super().forward(x)


def test_a_tied_parameter_of_its_own_is_watched() -> None:
    pipe = whole(Tied(), DOWN)
    with pytest.raises(StagecutError, match=r"writes its own 'inner\.weight' in this call"):
        pipe(UP)


def test_inference_tensors_have_no_versions() -> None:
    """Nothing is watched under inference_mode, and nothing fails."""
    model = Around(Writes())
    pipe = whole(model, DOWN)
    with torch.inference_mode():
        assert torch.equal(pipe(DOWN.clone())[0], model(DOWN.clone()))


class Holds(nn.Module):
    """Returns a buffer of its own."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.inner, self.write = Table(), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table, y = self.inner(x)
        pipe_split()
        if self.write:
            table.add_(1)
        return y + table  # type: ignore[no-any-return]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table, x * self.table


def test_a_buffer_of_its_own_may_be_returned_and_not_be_written_elsewhere() -> None:
    """As a rotary embedding returns its cache. A write behind the cut would be lost to the next step."""
    model = Holds(False)
    pipe = whole(model, UP)
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([UP])[0], model(UP))
    with pytest.raises(StagecutError, match=r"module 'inner' returns a part of its own 'inner\.table' in this call"):
        whole(Holds(True), UP)


# --- gradients of what is written -----------------------------------------------------------------------


class Fills(nn.Module):
    """Writes what it is given, and returns something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, given: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        given.copy_(self.inner(x))
        return x * 1.0


class Filled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fill, self.last = Fills(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(3, 4)
        y = self.fill(made, x)
        pipe_split()
        return self.last(made) + y  # type: ignore[no-any-return]


def test_what_a_module_writes_beside_what_it_returns_carries_gradient() -> None:
    model = Filled()
    pipe = pipeline(model, (UP,), leaf_modules=["fill"])
    twin = deepcopy(model)
    twin(UP).sum().backward()
    box = Mailbox(pipe.program, pipe.stages)
    box.forward([UP])[0].sum().backward()
    box.backward()
    found = box.gradients()
    for name, parameter in twin.named_parameters():
        gradient = found[name]
        assert gradient is not None, name
        assert torch.equal(gradient, parameter.grad)  # type: ignore[arg-type]


class Counts(Fills):
    """Writes a buffer of its own: statistics carry none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, given: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.mean.copy_(x.detach().mean(0))
        return super().forward(given, x)


def test_statistics_of_a_module_carry_none() -> None:
    model = Filled()
    model.fill = Counts()
    pipe = pipeline(model, (UP,), leaf_modules=["fill"])
    (op,) = [op for op in pipe.program.all_ops() if op.is_users]
    grads = {old.hint: getattr(new.type, "grad", None) for old, new in op.versions.items()}
    assert grads["zeros"] is True
    assert grads["fill.mean"] is False


class Chooses(nn.Module):
    """Returns a part of what it is given, or what its parameters make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)[:2] if x.sum() > 0 else x[:2]  # type: ignore[no-any-return]


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Chooses(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        pipe_split()
        return self.last(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", [UP, DOWN], ids=["with parameters", "a view"])
def test_what_a_module_returns_carries_gradient_in_either_branch(example: torch.Tensor) -> None:
    """In the example it may be a view of an input that carries none."""
    model = Chosen()
    pipe = whole(model, example)
    box = Mailbox(pipe.program, pipe.stages)
    for x in (DOWN, UP):
        box.forward([x])[0].sum().backward()
        box.backward()
    model(UP).sum().backward()
    gradient = box.gradients()["inner.lin.weight"]
    assert gradient is not None
    assert torch.equal(gradient, model.inner.lin.weight.grad)  # type: ignore[arg-type]
