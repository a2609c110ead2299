"""fx.GraphModules as models: traced symbolically or made by hand, with every kind of node."""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from compare import Near
from fuzz.check import mailbox
from torch import fx, nn
from torch.distributed.pipelining import pipe_split as torch_split
from torch.utils._pytree import tree_leaves

from stagecut import Pipe, SplitPoint, pipe_split, pipeline
from stagecut.frontend.lower.from_fx import lower_graph_module
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import CaptureError, InputError, SplitError
from stagecut.ir.graph import Op, Program
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text

X = torch.randn(4, 4)
fx.wrap("user_function")


def user_function(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    """A function of the user's that fx leaves as it is."""
    return x * by if bool(x.shape[0] > 1) else x


def check(module: fx.GraphModule, *args: Any, stages: int, **options: Any) -> Pipe:
    """The pipe of `module`, after it did what the module does: outputs, gradients, state and names; in one process, and in boxes."""
    twin = copied(module)
    pipe = pipeline(module, args, **options)
    assert pipe.num_stages == stages
    assert list(pipe.state_dict()) == list(module.state_dict())
    check_in_boxes(twin, pipe, args)
    torch.manual_seed(0)
    expected = tree_leaves(twin(*args))
    torch.manual_seed(0)
    found = pipe(*args)
    for one, other in zip(expected, found, strict=True):
        assert_equal(other, one)
    for outputs in (expected, found):
        losses = [o.sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        assert_equal(module.get_parameter(name).grad, parameter.grad)
    for name, tensor in pipe.state_dict().items():
        assert_equal(tensor, twin.state_dict()[name])
    printed = text(pipe.program)
    assert text(parse(printed)) == printed
    return pipe


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy. A plain attribute stays one: fx would make a buffer of it."""
    twin = deepcopy(module)
    for name in [name for name in twin._buffers if name not in module._buffers]:
        twin.__dict__[name] = twin._buffers.pop(name)
    return twin


def check_in_boxes(module: fx.GraphModule, pipe: Pipe, args: tuple[Any, ...]) -> None:
    """Stages that share nothing but what is sent do what the module does."""
    wrong = mailbox(copied(module), pipe, (deepcopy(args), {}), (deepcopy(args), {}), Near(1e-6))
    assert not wrong, "\n".join(wrong)


def assert_equal(found: Any, expected: Any) -> None:
    """Literals by ==, tensors bit for bit."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


def by_hand(owner: nn.Module, build: Callable[[fx.Graph], Any]) -> fx.GraphModule:
    """A GraphModule whose graph `build` makes; it returns what the graph returns."""
    graph = fx.Graph()
    graph.output(build(graph))
    return fx.GraphModule(owner, graph)


class Plain(nn.Module):
    """Leaf modules, functions, methods and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.randn(4))
        self.drop = nn.Dropout(0.5)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.layer(x))
        y = torch.relu(y).mul(self.scale) + x
        return user_function(self.drop(self.inner(y)), by=3.0)


def cut_before(module: fx.GraphModule, *names: str, split: Callable[[], None] = pipe_split) -> fx.GraphModule:
    """`module` with a split call in front of each named node: a symbolic trace keeps no call without operands."""
    for node in module.graph.nodes:
        if node.name in names:
            with module.graph.inserting_before(node):
                module.graph.call_function(split)
    module.recompile()
    return module


SPLITS = [pipe_split, torch_split, torch.ops.stagecut.pipe_split, torch.ops.stagecut.pipe_split.default]


@pytest.mark.parametrize("split", SPLITS, ids=["ours", "torch", "packet", "overload"])
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(training: bool, split: Callable[[], None]) -> None:
    """BatchNorm writes its buffers, dropout draws, the user's own function runs."""
    check(cut_before(fx.symbolic_trace(Plain().train(training)), "relu", "drop", split=split), X, stages=3)


def test_split_spec_on_leaf_modules() -> None:
    """A leaf module is a module like any other; so is one with children."""
    spec = {"norm": SplitPoint.BEGINNING, "inner.1": SplitPoint.BEGINNING, "inner.2": SplitPoint.END}
    check(fx.symbolic_trace(Plain()), X, stages=4, split_spec=spec)
    with pytest.raises(SplitError, match="'norms'"):
        pipeline(fx.symbolic_trace(Plain()), (X,), split_spec={"norms": SplitPoint.END})


def test_all_six_kinds_of_node() -> None:
    """placeholder, get_attr, call_function, call_method, call_module, output."""
    owner = nn.Module()
    owner.layer = nn.Linear(4, 4)
    owner.weight = nn.Parameter(torch.randn(4, 4))
    owner.register_buffer("count", torch.zeros(()))
    owner.register_buffer("constant", torch.randn(4))

    def build(g: fx.Graph) -> Any:
        x = g.placeholder("x")
        weight, count, constant = g.get_attr("weight"), g.get_attr("count"), g.get_attr("constant")
        y = g.call_function(torch.matmul, (x, weight))
        g.call_function(pipe_split)
        z = g.call_module("layer", (y,))
        g.call_method("add_", (count, 1))
        s = g.call_function(operator.add, (z, constant))
        g.call_function(pipe_split)
        t = g.call_method("transpose", (s, 0, 1))
        return {"t": t, "rest": [count, (x, 3, None)], "s": s}

    module = by_hand(owner, build)
    module.__dict__["constant"] = module._buffers.pop("constant")  # a plain attribute, which fx made a buffer of
    pipe = check(module, X, stages=3)
    assert "constant" not in pipe.state_dict()
    found = pipe.module()(X)
    assert list(found) == ["t", "rest", "s"]
    assert found["rest"][1][1:] == (3, None)


def op_of(program: Program, target: str) -> Op:
    """The one op of that target."""
    (op,) = [op for op in program.all_ops() if op.target == target]
    return op


def test_effects_are_seen_by_running() -> None:
    """fx says nothing about writes and random numbers; one run on fake tensors does."""
    owner = nn.Module()
    owner.norm = nn.BatchNorm1d(4)
    owner.drop = nn.Dropout(0.5)

    def build(g: fx.Graph) -> Any:
        x = g.placeholder("x")
        y = g.call_module("norm", (x,))
        z = g.call_method("clone", (y,))
        view = g.call_method("view", (z, 16))
        g.call_method("mul_", (view, 2.0))
        return g.call_module("drop", (z,))

    module = by_hand(owner, build)
    program, _ = lower_graph_module(module, (X,), {})
    verify(program)
    norm = op_of(program, "module.norm")
    written = {value.hint for value in norm.effects.writes}
    assert written == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert op_of(program, "module.drop").effects.random
    for name in ("method.view", "method.mul_"):
        op = op_of(program, name)
        assert op.effects.views == (op.operands[0],)
    assert op_of(program, "method.mul_").effects.writes == op.effects.views
    assert not op_of(program, "method.clone").has_effect
    assert torch.equal(module.norm.running_mean, torch.zeros(4))  # type: ignore[union-attr, arg-type]
    check(module, X, stages=1)


def test_writes_in_place_across_a_cut() -> None:
    """The write is in a later stage than the view it goes through."""

    def build(g: fx.Graph) -> Any:
        x = g.placeholder("x")
        y = g.call_method("clone", (x,))
        part = g.call_function(operator.getitem, (y, (slice(None), slice(0, 2))))
        g.call_function(pipe_split)
        g.call_method("add_", (part, 1.0))
        other = g.call_function(operator.iadd, (y, y))
        g.call_function(pipe_split)
        g.call_function(operator.setitem, (other, (0, slice(1, None)), 7.0))
        return (y, part)

    check(by_hand(nn.Module(), build), X, stages=3)


def test_a_local_named_slice_does_not_hide_the_builtin() -> None:
    """The input `slice` and the literal slice(...) stand in one function."""

    def build(g: fx.Graph) -> Any:
        x, y = g.placeholder("slice"), g.placeholder("getattr")
        return g.call_function(operator.getitem, (g.call_function(torch.add, (x, y)), slice(0, 2)))

    pipe = pipeline(by_hand(nn.Module(), build), (X, X))
    torch.testing.assert_close(pipe(X, X)[0], (X + X)[:2], rtol=0, atol=0)


def test_nested_containers() -> None:
    """Operands and results in lists, tuples and dicts, some of them crossing a cut."""

    def build(g: fx.Graph) -> Any:
        x = g.placeholder("x")
        parts = g.call_method("chunk", (x, 2))
        first, second = g.call_function(operator.getitem, (parts, 0)), g.call_function(operator.getitem, (parts, 1))
        g.call_function(pipe_split)
        both = g.call_function(torch.cat, ([second, first],), {"dim": 0})
        top = g.call_function(torch.topk, (both, 2))
        values = g.call_function(operator.getitem, (top, 0))
        shape = g.call_function(getattr, (values, "shape"))
        return [both, (values, {"first": first}), g.call_function(operator.getitem, (shape, 1))]

    check(by_hand(nn.Module(), build), X, stages=2)


def two_results(x: torch.Tensor) -> dict[str, Any]:
    """A user function with a nested result."""
    return {"a": x + 1, "rest": [x * 2, (x - 1, 5)]}


def test_a_user_function_with_a_nested_result() -> None:
    """Its parts are values of their own, whatever the nesting."""

    def build(g: fx.Graph) -> Any:
        x = g.placeholder("x")
        found = g.call_function(two_results, (x,))
        a = g.call_function(operator.getitem, (found, "a"))
        rest = g.call_function(operator.getitem, (found, "rest"))
        g.call_function(pipe_split)
        last = g.call_function(operator.getitem, (rest, 1))
        return (g.call_method("relu", (a,)), g.call_function(operator.getitem, (last, 0)), g.call_function(operator.getitem, (rest, 0)))

    check(by_hand(nn.Module(), build), X, stages=2)


class Tied(nn.Module):
    """A leaf module called twice and under two names, with a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x))
        return self.c(torch.relu(x)) + self.a(x)  # type: ignore[no-any-return]


def test_shared_leaf_modules() -> None:
    """Each stage that calls a module holds it."""
    check(cut_before(fx.symbolic_trace(Tied()), "relu"), X, stages=2)


def test_default_arguments_and_keywords() -> None:
    """A placeholder's default serves when nothing is given."""

    class Defaults(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 2.0, shift: Any = None) -> torch.Tensor:
            return x * scale

    module = fx.symbolic_trace(Defaults(), concrete_args={"shift": None})
    for kwargs in ({}, {"scale": 3.0}):
        pipe = pipeline(module, (X,), kwargs)
        torch.testing.assert_close(pipe(X, **kwargs)[0], module(X, **kwargs), rtol=0, atol=0)
    with pytest.raises(InputError, match="'scales'"):
        pipeline(module, (X,), {"scales": 3.0})
    with pytest.raises(InputError, match="'x"):
        pipeline(module, ())


# --- names that would be code -------------------------------------------------------------------------

EVIL = ["x=print(1)", "x, y", "x):\n    raise SystemExit\ndef f(", "not", "1x", ""]


@pytest.mark.parametrize("name", EVIL)
def test_an_argument_name_that_is_no_identifier_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name becomes Python code: this one must not run."""
    module = by_hand(nn.Module(), lambda g: g.placeholder("x"))
    next(iter(module.graph.nodes)).target = name
    with pytest.raises(CaptureError, match="no identifier"):
        pipeline(module, (X,))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["relu().exit", "__class__", "a b"])
def test_a_method_name_that_is_no_identifier_is_refused(name: str) -> None:
    """Nor may a method be reached that is none of a tensor's."""
    module = by_hand(nn.Module(), lambda g: g.call_method("relu", (g.placeholder("x"),)))
    [n for n in module.graph.nodes if n.op == "call_method"][0].target = name  # noqa: RUF015
    with pytest.raises(Exception, match=r"identifier|may be called|fails"):
        pipeline(module, (X,))


def test_keyword_names_are_checked() -> None:
    """A keyword of a call becomes code, too."""
    module = by_hand(nn.Module(), lambda g: g.call_function(torch.relu, (g.placeholder("x"),)))
    [n for n in module.graph.nodes if n.op == "call_function"][0].kwargs = {"a=1, b": 2}  # noqa: RUF015
    with pytest.raises(CaptureError, match="no identifier"):
        pipeline(module, (X,))


def test_a_node_that_fails_is_named() -> None:
    """The graph is run once on fakes: what cannot run is an error with the node's name."""
    module = by_hand(nn.Module(), lambda g: g.call_function(torch.matmul, (g.placeholder("x"), 3), name="product"))
    with pytest.raises(CaptureError, match="product"):
        pipeline(module, (X,))


def test_the_graph_module_is_left_as_it_was() -> None:
    """Its graph, code, state and buffers."""
    module = fx.symbolic_trace(Plain())
    code, state = module.code, {n: t.clone() for n, t in module.state_dict().items()}
    pipeline(module, (X,))
    assert module.code == code
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())


def before_relu(program: Program) -> list[int]:
    """A policy in our own form."""
    return [i for i, op in enumerate(op for op in program.ops if not op.is_split) if "relu" in op.target]


def test_a_policy_in_our_own_form() -> None:
    """It needs no exported program."""
    check(cut_before(fx.symbolic_trace(Plain()), "drop"), X, stages=3, split_policy=before_relu)


class TwoNames(nn.Module):
    """A norm under two names, in a module that is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(4)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_module_kept_whole_writes_one_tensor_under_two_names(training: bool) -> None:
    """The validator counts the write once, as the program does when its two names have become one."""
    owner = nn.Module()
    owner.inner = TwoNames()
    module = by_hand(owner, lambda g: g.call_module("inner", (g.placeholder("x"),))).train(training)
    pipe = pipeline(module, (X,), split_policy=lambda program: [])
    (op,) = pipe.program.all_ops()
    assert [value.hint for value in op.effects.writes] == [
        "inner.first.running_mean",
        "inner.first.running_var",
        "inner.first.num_batches_tracked",
    ]
