"""The public API: models cut by markers in their forward, by module names and by policies."""

from __future__ import annotations

import pickle
import warnings
from collections import UserDict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.distributed.pipelining import pipe_split as torch_split
from torch.utils import _pytree as pytree

from stagecut import Pipe, SplitPoint, StagecutError, parse, pipe_split, pipeline, text
from stagecut.backend.stages.modules import StageModule
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import CaptureError, InputError, SplitError
from stagecut.ir.graph import Program

Split = Callable[[], None]
splits = pytest.mark.parametrize("split", [pipe_split, torch_split], ids=["stagecut", "torch"])


class Skipping(nn.Module):
    """A square parameter multiplies in two stages, and the first sum skips over a stage."""

    def __init__(self, split: Split, d: int = 8) -> None:
        super().__init__()
        self.split = split
        self.square = nn.Parameter(torch.randn(d, d))
        self.other = nn.Parameter(torch.randn(d, d))
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.randn(d))
        self.inner = nn.Linear(d, d)
        self.outer = nn.Linear(d, d)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x @ self.square
        skip = x + y
        x = torch.relu(skip)
        self.split()
        x = x @ self.square + self.shift
        x = self.inner(x)
        self.split()
        x = torch.relu(x) @ self.other
        self.split()
        return self.outer(x) + skip  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with a relu between."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up = nn.Linear(d, 2 * d)
        self.down = nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class FourMlps(nn.Module):
    """Four MLPs in a row; the second input is first used in the last stage."""

    def __init__(self, split: Split = lambda: None, d: int = 8) -> None:
        super().__init__()
        self.split = split
        self.mlp0, self.mlp1, self.mlp2, self.mlp3 = Mlp(d), Mlp(d), Mlp(d), Mlp(d)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.mlp0(x)
        self.split()
        x = self.mlp1(x)
        self.split()
        x = self.mlp2(x)
        self.split()
        return self.mlp3(x) - y  # type: ignore[no-any-return]


class Aliased(nn.Module):
    """One parameter under two names, and one Linear under two names."""

    def __init__(self, split: Split, d: int = 8) -> None:
        super().__init__()
        self.split = split
        self.weight = self.weight_again = nn.Parameter(torch.randn(d, d))
        self.layer = self.layer_again = nn.Linear(d, d)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.layer(x @ self.weight) + y
        self.split()
        return self.layer_again(x @ self.weight_again)  # type: ignore[no-any-return]


SCENARIOS: list[tuple[type[nn.Module], int]] = [(Skipping, 4), (FourMlps, 4), (Aliased, 2)]
X, Y = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)


def assert_equal(found: Any, expected: Any) -> None:
    """Literals by ==, tensors bit for bit."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


def assert_does_the_same(model: nn.Module, pipe: Pipe, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Outputs bit for bit and gradients of all parameters agree between a copy of the model and the pipe."""
    twin = deepcopy(model)
    torch.manual_seed(0)
    expected = twin(*args, **(kwargs or {}))
    torch.manual_seed(0)
    (found,) = pipe(*args, **(kwargs or {}))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected.square().sum().backward()
    found.square().sum().backward()
    grads = {n: p.grad for n, p in twin.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-12, atol=1e-12, msg=f"gradient of {name}")


@splits
@pytest.mark.parametrize(("kind", "stages"), SCENARIOS, ids=lambda k: getattr(k, "__name__", str(k)))
def test_markers_in_the_forward(kind: Callable[[Split], nn.Module], stages: int, split: Split) -> None:
    """Ours and torch's markers cut; results, names and gradients are the model's."""
    model = kind(split).double()
    pipe = pipeline(model, (X, Y))
    assert pipe.num_stages == stages
    own = set(model.state_dict())
    held = [set(stage.state_dict()) for stage in pipe.stages]
    assert all(names <= own for names in held)
    assert set().union(*held) == own
    assert_does_the_same(model, pipe, (X, Y))


def test_the_second_input_goes_to_the_stage_that_reads_it() -> None:
    """No stage in between lists it."""
    pipe = pipeline(FourMlps(pipe_split).double(), (X, Y))
    assert pipe.stages[0].input_names == ("x",)
    assert "y" in pipe.stages[3].input_names
    assert not any("y" in stage.input_names for stage in pipe.stages[:3])


# --- where to split -----------------------------------------------------------------------------------


def held_modules(pipe: Pipe) -> list[set[str]]:
    """Per stage, the top-level modules that have state in it."""
    return [{name.partition(".")[0] for name in stage.state_dict()} for stage in pipe.stages]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"mlp1": SplitPoint.BEGINNING}, [{"mlp0"}, {"mlp1", "mlp2", "mlp3"}]),
        ({"mlp1": SplitPoint.END}, [{"mlp0", "mlp1"}, {"mlp2", "mlp3"}]),
        ({"mlp1": SplitPoint.BEGINNING, "mlp3": SplitPoint.BEGINNING}, [{"mlp0"}, {"mlp1", "mlp2"}, {"mlp3"}]),
        ({"mlp0": SplitPoint.END, "mlp1": SplitPoint.BEGINNING}, [{"mlp0"}, {"mlp1", "mlp2", "mlp3"}]),
        ({"mlp0": SplitPoint.BEGINNING}, [{"mlp0", "mlp1", "mlp2", "mlp3"}]),
        ({"mlp1.down": SplitPoint.BEGINNING}, [{"mlp0", "mlp1"}, {"mlp1", "mlp2", "mlp3"}]),
        ({}, [{"mlp0", "mlp1", "mlp2", "mlp3"}]),
    ],
)
def test_split_spec(spec: dict[str, SplitPoint], expected: list[set[str]]) -> None:
    """BEGINNING cuts before the module, END behind it; a cut with nothing before it is dropped."""
    model = FourMlps().double()
    pipe = pipeline(model, (X, Y), split_spec=spec)
    assert held_modules(pipe) == expected
    assert_does_the_same(model, pipe, (X, Y))


def test_split_spec_and_markers_add_up() -> None:
    """Both sources of cuts hold; one at the same place counts once."""
    pipe = pipeline(FourMlps(pipe_split).double(), (X, Y), split_spec={"mlp1": SplitPoint.BEGINNING, "mlp1.down": SplitPoint.BEGINNING})
    assert held_modules(pipe) == [{"mlp0"}, {"mlp1"}, {"mlp1"}, {"mlp2"}, {"mlp3"}]


def before_each_relu(module: fx.GraphModule) -> fx.GraphModule:
    """A policy as torch.distributed.pipelining has them: it edits the traced graph."""
    for node in module.graph.nodes:
        if node.op == "call_function" and "relu" in str(node.target):
            with module.graph.inserting_before(node):
                module.graph.call_function(torch_split)
    module.recompile()
    return module


def before_relus(program: Program) -> list[int]:
    """The same policy in our own form."""
    ops = [op for op in program.ops if not op.is_split]
    return [i for i, op in enumerate(ops) if "relu" in op.target]


@pytest.mark.parametrize("policy", [before_each_relu, before_relus])
def test_split_policy(policy: Callable[..., Any]) -> None:
    """Both forms of a policy cut at the same places."""
    model = FourMlps().double()
    pipe = pipeline(model, (X, Y), split_policy=policy)
    assert pipe.num_stages == 5
    assert all("relu" in block.ops[0].target for block in pipe.program.stages[1:])
    assert_does_the_same(model, pipe, (X, Y))


@pytest.mark.parametrize(
    "wishes",
    [
        {"split_spec": {"mlp1": SplitPoint.BEGINNING}, "split_policy": before_each_relu},
        {"split_spec": {}, "split_policy": before_relus},
        {"split_spec": {"mlp1": SplitPoint.BEGINNING}, "stages": 2},
        {"stages": 2, "split_policy": before_relus},
    ],
)
def test_only_one_argument_says_where_to_cut(wishes: dict[str, Any]) -> None:
    """One of two would be taken in silence."""
    with pytest.raises(InputError, match=r"= and split_\w+= both say where to cut"):
        pipeline(FourMlps().double(), (X, Y), **wishes)


def test_a_model_without_splits_is_one_stage() -> None:
    """Nothing to cut, nothing lost."""
    model = FourMlps().double()
    pipe = pipeline(model, (X, Y))
    assert pipe.num_stages == 1
    assert_does_the_same(model, pipe, (X, Y))


class Repeated(nn.Module):
    """One layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(self.layer(x)))  # type: ignore[no-any-return]


def test_a_split_point_means_every_call_of_the_module() -> None:
    """Three calls, three stages; the layer is held by each."""
    model = Repeated().double()
    pipe = pipeline(model, (X,), split_spec={"layer": SplitPoint.BEGINNING})
    assert pipe.num_stages == 3
    assert_does_the_same(model, pipe, (X,))


# --- calling ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight, a stage each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        pipe_split()
        return self.b(x)  # type: ignore[no-any-return]


class Keywords(nn.Module):
    """Arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: torch.Tensor | None = None, flag: bool = False
    ) -> torch.Tensor:
        x = self.layer(x)
        pipe_split()
        x = x if mask is None else x * mask
        x = x if scale is None else x * scale
        return -x if flag else x


@pytest.mark.parametrize(
    ("example", "calls"),
    [
        (((X, Y), {}), [((X, Y), {}), ((X,), {"mask": Y}), ((), {"x": X, "mask": Y}), ((), {"mask": Y, "x": X})]),
        (((), {"x": X, "mask": Y}), [((X, Y), {}), ((X,), {"mask": Y}), ((), {"mask": Y, "x": X}), ((X, Y), {"flag": False})]),
        (((X,), {"scale": Y}), [((X,), {"scale": Y}), ((), {"scale": Y, "x": X}), ((X, None), {"scale": Y})]),
        (((X,), {"scale": Y, "mask": Y}), [((X,), {"mask": Y, "scale": Y}), ((X, Y), {"scale": Y})]),
        (((X, None), {"flag": True}), [((X, None), {"flag": True})]),
    ],
)
def test_a_pipe_is_called_as_the_model_is(example: tuple[Any, Any], calls: list[tuple[Any, Any]]) -> None:
    """By position or by name, whichever way it was traced."""
    model = Keywords().double()
    pipe = pipeline(model, *example)
    for args, kwargs in calls:
        torch.testing.assert_close(pipe(*args, **kwargs)[0], model(*args, **kwargs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, Y, X), {}, "takes|given|positional"),
        ((X,), {}, "'mask'"),
        ((X, Y), {"mask": Y}, "'mask'"),
        ((X, Y), {"scale": Y}, "'scale'"),
        ((X, Y), {"maks": Y}, "'maks'"),
        ((X[:2], Y), {}, "'x'.*shape"),
        ((X, Y.float()), {}, "'mask'.*dtype|dtype.*'mask'"),
        ((X, 3), {}, "'mask'.*tensor"),
        ((X, (Y, Y)), {}, "'mask'"),
        ((X, Y), {"flag": True}, "'flag'"),
    ],
)
def test_a_call_that_does_not_fit_names_the_argument(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    """InputError, which is a TypeError, says which argument and why."""
    pipe = pipeline(Keywords().double(), (X, Y))
    with pytest.raises(InputError, match=message):
        pipe(*args, **kwargs)


@dataclass
class Output:
    """An output structure as Hugging Face models have: registered with pytree."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    loss: torch.Tensor | None = None


pytree.register_pytree_node(
    Output, lambda o: ([o.logits, o.hidden, o.loss], None), lambda leaves, _: Output(*leaves), serialized_type_name="tests.test_pipe.Output"
)


class Structured(nn.Module):
    """Returns whatever structure its `make` builds from two tensors."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.make = make
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        a = self.layer(x)
        pipe_split()
        return self.make(a, torch.relu(a))


STRUCTURES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "bare": lambda a, b: b,
    "tuple": lambda a, b: (a, b),
    "single": lambda a, b: (b,),
    "list": lambda a, b: [b, a],
    "dict": lambda a, b: {"b": b, "a": a},
    "nested": lambda a, b: {"t": (a, [b, None]), "n": None, "i": 3, "s": "text"},
    "dataclass": lambda a, b: Output(a, (b, a)),
    "with none": lambda a, b: (a, None, b),
    "doubled": lambda a, b: (b, b, a),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_module_keeps_the_output_structure(name: str) -> None:
    """pipe(x) is flat; pipe.module()(x) is what the model returns."""
    model = Structured(STRUCTURES[name]).double()
    pipe = pipeline(model, (X,))
    expected, found = model(X), pipe.module()(X)
    leaves, spec = pytree.tree_flatten(expected)
    assert type(found) is type(expected)
    assert pytree.tree_flatten(found)[1] == spec
    flat = pipe(X)
    assert type(flat) is tuple
    for one, other, again in zip(leaves, flat, pytree.tree_leaves(found), strict=True):
        assert_equal(other, one)
        assert_equal(again, one)


def test_dynamic_shapes() -> None:
    """A size declared to vary may vary."""
    model = FourMlps(pipe_split).double()
    batch = torch.export.Dim("batch")
    pipe = pipeline(model, (X, Y), dynamic_shapes={"x": {0: batch}, "y": {0: batch}})
    for size in (2, 4, 7):
        x, y = torch.randn(size, 8, dtype=torch.float64), torch.randn(size, 8, dtype=torch.float64)
        torch.testing.assert_close(pipe(x, y)[0], model(x, y), rtol=0, atol=0)
    with pytest.raises(InputError, match="shape"):
        pipe(X, Y[:2])


# --- state --------------------------------------------------------------------------------------------


def test_the_stages_hold_the_models_own_tensors() -> None:
    """No copy: an optimizer on the model trains the pipe, and the other way round."""
    model = Aliased(pipe_split).double()
    pipe = pipeline(model, (X, Y))
    own = dict(model.named_parameters(remove_duplicate=False))
    for stage in pipe.stages:
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            assert parameter is own[name]
    assert {id(p) for p in pipe.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", [Skipping, FourMlps, Aliased])
def test_the_state_dict_is_the_models(kind: Callable[[Split], nn.Module]) -> None:
    """Same names in the same order; it loads into the pipe and from the pipe."""
    model, other = kind(pipe_split).double(), kind(pipe_split).double()
    pipe = pipeline(model, (X, Y))
    assert list(pipe.state_dict()) == list(model.state_dict())
    assert list(pipe.module().state_dict()) == list(model.state_dict())
    pipe.load_state_dict(other.state_dict())
    torch.testing.assert_close(pipe(X, Y)[0], other(X, Y), rtol=0, atol=0)
    other.load_state_dict(pipe.state_dict())
    with pytest.raises(RuntimeError, match="missing"):
        pipe.load_state_dict({})
    missing, unexpected = pipe.load_state_dict({"extra": X}, strict=False)
    assert missing == list(model.state_dict())
    assert unexpected == ["extra"]


def test_a_pipe_moves_to_another_dtype() -> None:
    """to(dtype) reaches every stage; shared tensors stay shared."""
    model = Aliased(pipe_split).double()
    twin = deepcopy(model).float()
    pipe = pipeline(model.float(), (X.float(), Y.float()))
    pipe.to(torch.float32)
    torch.testing.assert_close(pipe(X.float(), Y.float())[0], twin(X.float(), Y.float()), rtol=0, atol=0)
    pipe.to(torch.float64)
    assert {p.dtype for p in pipe.parameters()} == {torch.float64}
    assert pipe.stages[0].get_parameter("weight") is pipe.stages[1].get_parameter("weight")


@pytest.mark.parametrize("copy", [deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"])
def test_a_pipe_can_be_copied(copy: Callable[[Pipe], Pipe]) -> None:
    """However deep it is; tied parameters of different stages stay tied, and calls are checked as before."""
    pipe = pipeline(nn.Sequential(*(nn.Linear(8, 8) for _ in range(300))).double(), (X,), split_spec={"100": SplitPoint.END})
    twin = copy(pipe)
    assert twin.ir() == pipe.ir()
    torch.testing.assert_close(twin(X)[0], pipe(X)[0], rtol=0, atol=0)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in pipe.parameters()}
    with pytest.raises(InputError, match="missing"):
        twin()
    tied = copy(pipeline(Tied().double(), (X,)))
    assert tied.stages[0].get_parameter("a.weight") is tied.stages[1].get_parameter("b.weight")


@pytest.mark.parametrize("copy", [deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_call_of_the_pipe_and_torch_warns_of_nothing(copy: Callable[[Pipe], Pipe]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pipe = pipeline(model, (torch.ones(2, 4),), stages=2)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error", FutureWarning)
        twin = copy(pipe)
    assert twin._call_spec == pipe._call_spec
    assert torch.equal(*twin(torch.ones(2, 4)), *pipe(torch.ones(2, 4)))


def test_getting_stages() -> None:
    """num_stages, get_stage_module and its error."""
    pipe = pipeline(FourMlps(pipe_split).double(), (X, Y))
    assert pipe.num_stages == len(pipe.stages) == 4
    assert pipe.get_stage_module(2) is pipe.stages[2]
    for index in (-1, 4):
        with pytest.raises(ValueError, match=f"{index}"):
            pipe.get_stage_module(index)


def test_stage_code_is_readable() -> None:
    """The listing has the user's source lines, and the module tree of the model."""
    stage = pipeline(FourMlps(pipe_split).double(), (X, Y)).get_stage_module(1)
    code = stage.code
    assert "def forward(self, " in code
    assert "self.mlp1(" in code
    assert "test_pipe.py" in code
    assert "self.down(torch.relu(self.up(x)))" in code
    assert [name for name, _ in stage.named_modules() if name] == ["mlp1", "mlp1.up", "mlp1.down"]


def test_identical_blocks_share_one_function() -> None:
    """The text of a block is compiled once, however many blocks there are."""
    pipe = pipeline(FourMlps(pipe_split).double(), (X, Y))
    blocks = [stage.get_submodule(f"mlp{i}") for i, stage in enumerate(pipe.stages)]
    functions = {block._forwards[0] for block in blocks if isinstance(block, StageModule)}
    assert len(functions) == 1


# --- what is left alone -------------------------------------------------------------------------------


class Busy(nn.Module):
    """Has everything that tracing could disturb: dropout, a counter, batch norm, a frozen and a half-trained part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.layer = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)  # type: ignore[operator]
        x = self.drop(self.norm(x))
        pipe_split()
        return self.frozen(self.layer(x))  # type: ignore[no-any-return]


def test_the_model_is_left_as_it_was() -> None:
    """State, gradients, training flags, hooks and the random state are what they were."""
    model = Busy().double()
    model.norm.eval()
    model(X).sum().backward()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    flags = {n: m.training for n, m in model.named_modules()}
    hooks = dict(model._forward_hooks)
    random = torch.get_rng_state()
    pipeline(model, (X,))
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(model._forward_hooks) == hooks
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: not n.startswith("frozen") for n in grads}


def test_buffers_are_updated_as_the_model_does() -> None:
    """Counters and running statistics after three steps."""
    model = Busy().double()
    twin = deepcopy(model)
    pipe = pipeline(model, (X,))
    for step in range(3):
        torch.manual_seed(step)
        expected = twin(X + step)
        torch.manual_seed(step)
        torch.testing.assert_close(pipe(X + step)[0], expected, rtol=0, atol=0)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(pipe.state_dict()[name], buffer, rtol=0, atol=0)


def test_one_model_can_be_cut_twice() -> None:
    """Two pipes of one model are independent but for the tensors."""
    model = FourMlps().double()
    one = pipeline(model, (X, Y), split_spec={"mlp1": SplitPoint.BEGINNING})
    two = pipeline(model, (X, Y), split_spec={"mlp2": SplitPoint.BEGINNING, "mlp3": SplitPoint.BEGINNING})
    assert (one.num_stages, two.num_stages) == (2, 3)
    torch.testing.assert_close(one(X, Y), two(X, Y), rtol=0, atol=0)


def test_a_model_on_meta_splits() -> None:
    """No data is needed to cut; the stages are on meta too, ready to be materialised."""
    with torch.device("meta"):
        model = FourMlps(pipe_split)
    pipe = pipeline(model, (torch.empty(4, 8, device="meta"), torch.empty(4, 8, device="meta")))
    assert pipe.num_stages == 4
    assert all(p.is_meta for stage in pipe.stages for p in stage.parameters())
    stage = pipe.stages[0].to_empty(device="cpu")
    assert stage(torch.randn(4, 8)).shape == (4, 8)


def test_an_exported_program_needs_no_example_inputs() -> None:
    """Its own example inputs were given when it was exported."""
    model = FourMlps(pipe_split).double()
    pipe = pipeline(torch.export.export(model, (X, Y), strict=False))
    assert pipe.num_stages == 4
    assert set(pipe.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(pipe(X, Y)[0], model(X, Y), rtol=0, atol=0)


def test_the_text_of_a_pipe_is_its_program() -> None:
    """pipe.ir() is the linked IR, which `parse` reads."""
    pipe = pipeline(FourMlps(pipe_split).double(), (X, Y))
    verify(pipe.program)
    assert pipe.ir().startswith("program @FourMlps phase=linked stages=4 {")
    assert text(parse(pipe.ir())) == pipe.ir()


# --- errors -------------------------------------------------------------------------------------------


def test_an_unknown_module_lists_the_nearest() -> None:
    """A split_spec with a typo."""
    with pytest.raises(SplitError, match="mpl1") as caught:
        pipeline(FourMlps(), (X.float(), Y.float()), split_spec={"mpl1": SplitPoint.END})
    assert "'mlp1'" in str(caught.value)


def test_a_split_spec_needs_split_points() -> None:
    """A string is no SplitPoint, and the error says what is."""
    with pytest.raises(SplitError, match=r"SplitPoint\.BEGINNING"):
        pipeline(FourMlps(), (X.float(), Y.float()), split_spec={"mlp1": "beginning"})  # type: ignore[dict-item]


class Idle(nn.Module):
    """Has a module that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)  # type: ignore[no-any-return]


def test_a_module_that_never_runs_cannot_be_split_at() -> None:
    """Rather than a silent single stage, an error."""
    with pytest.raises(SplitError, match="'idle'"):
        pipeline(Idle(), (X.float(),), split_spec={"idle": SplitPoint.BEGINNING})


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "'x'"),
        ((X, Y, X, Y), {}, "positional"),
        ((X,), {"y": Y}, "'y'"),
        (X, None, "mb_args must be a tuple"),
        ({"x": X}, None, "mb_args must be a tuple, not dict\n  try: mb_kwargs= takes arguments by name"),
        ((X,), [Y], r"mb_kwargs must be a dict, not list\n  try: mb_kwargs={.*; mb_args=\(x, y\)"),
        (X, Y, r"mb_args must be a tuple, not Tensor\n  try: mb_args=\(x, y\)"),
        ((X,), UserDict(y=Y), r"mb_kwargs must be a dict, not UserDict\n  try: mb_kwargs=dict\("),
    ],
)
def test_example_inputs_that_do_not_fit(args: Any, kwargs: Any, message: str) -> None:
    """The message names the argument and shows the signature."""
    with pytest.raises(InputError, match=message):
        pipeline(Keywords(), args, kwargs)


def test_a_module_needs_example_inputs() -> None:
    """Without any there is nothing to trace with."""
    with pytest.raises(InputError, match="example inputs"):
        pipeline(FourMlps())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: x, "not function\n  try: a class derived from nn.Module, whose forward calls it"),
        (FourMlps, r"not the class FourMlps\n  try: make the module first: FourMlps\(...\)"),
        ("folder", r"not str\n  try: from_pretrained\(FOLDER"),
        ([nn.Linear(4, 4)], r"not list\n  try: nn.Sequential\(\*layers\)"),
        ({"weight": X}, "not dict\n  try: the model itself"),
    ],
)
def test_what_is_no_model_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(given, (X,))


class Targets(nn.Module):
    """Has an argument that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None, more: bool = False) -> torch.Tensor:
        y = self.layer(x)
        return y if targets is None else y - targets


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"input 'targets' is missing, or None, .*with a tensor of shape \[2, 4\]\n  try: pass such a tensor"),
        ({"targets": 1.0}, "input 'targets' is a float, and the program"),
        ({"tragets": torch.ones(2, 4)}, "forward names no argument 'tragets', .*\n  try: did you mean 'targets'"),
        ({"targets": torch.ones(2, 4), "more": True}, "argument 'more' was not given in the example call, so"),
    ],
)
def test_calls_that_do_not_fit_the_example(given: dict[str, Any], message: str) -> None:
    x = torch.ones(2, 4)
    pipe = pipeline(Targets(), (x, x))
    for call in (pipe, pipe.verify):
        with pytest.raises(InputError, match=message):
            call(x, **given)


class Branching(nn.Module):
    """Branches on a value, which cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # this line is named
            return x
        return -x


def test_an_untraceable_model_names_the_source_line() -> None:
    """CaptureError points into the user's file, and says what to write instead."""
    with pytest.raises(CaptureError, match="this line is named") as caught:
        pipeline(Branching(), (X,))
    assert "test_pipe.py:" in str(caught.value)
    assert "torch.where" in str(caught.value)


class SplitInBranch(nn.Module):
    """Splits inside a branch of a conditional."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def yes(x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            pipe_split()
            return x.relu()

        found: torch.Tensor = torch.cond(x.sum() > 0, yes, lambda x: x - 1, (x,))
        return found + 1


def test_a_split_inside_a_branch_is_refused() -> None:
    """A branch runs as a whole: silence would be a stage less than asked for."""
    with pytest.raises(StagecutError, match=r"split point|pipe_split"):
        pipeline(SplitInBranch(), (X,))


class Conditional(nn.Module):
    """A conditional between two splits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        pipe_split()
        found: torch.Tensor = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))
        pipe_split()
        return self.layer(found)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_conditional_is_kept() -> None:
    """Both branches run as in the model, without gradient (torch compiles the backward of cond)."""
    model = Conditional().double()
    pipe = pipeline(model, (X,))
    assert pipe.num_stages == 3
    with torch.no_grad():
        for x in (X, -X, X + 5, X - 5):
            torch.testing.assert_close(pipe(x)[0], model(x), rtol=0, atol=0)


@pytest.mark.parametrize("cut", [-1, 1000, "relu"])
def test_a_policy_out_of_range_is_refused(cut: Any) -> None:
    """The message says which positions there are."""
    with pytest.raises(SplitError, match="positions are numbers from 0"):
        pipeline(FourMlps().double(), (X, Y), split_policy=lambda program: [cut])
