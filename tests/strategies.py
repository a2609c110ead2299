"""Hypothesis strategies: whole IR programs and whole random models, each built from a drawn plan.

A plan is plain data with a readable repr, so a failing example prints as something one can read and paste
back. Choices in a plan are small numbers taken modulo what there is, so every plan builds and shrinks well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import nn

from stagecut import pipe_split
from stagecut.ir.graph import SPLIT, Context, Effects, Frame, Loc, Op, Place, Program, Scope, StateEntry, Token, Value
from stagecut.ir.types import TensorType

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=_QUIET, database=None)
settings.register_profile("deep", max_examples=1000, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_small = st.integers(0, 7)


# --- IR programs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One op, `split`, or a block: `call` of a module or `no_grad`, around the steps of `body`."""

    kind: str
    a: int = 0
    b: int = 0
    body: tuple[Step, ...] = ()

    def __repr__(self) -> str:
        inner = [repr(self.kind), *([f"{self.a}, {self.b}"] if self.a or self.b or self.body else [])]
        return f"Step({', '.join([*inner, *([repr(self.body)] if self.body else [])])})"


@dataclass(frozen=True)
class ProgramPlan:
    """A traced program: how many inputs, which state (name, tensor number), which steps, which outputs."""

    inputs: int
    state: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]


_PURE = {"add": "aten.add.Tensor", "mul": "aten.mul.Tensor", "mm": "aten.mm.default"}
_UNARY = {"relu": "aten.relu.default", "tanh": "aten.tanh.default", "rand": "aten.rand_like.default"}
_VIEWS = {"transpose": ("aten.transpose.int", 0, 1), "top": ("aten.slice.Tensor", 0, 0, 2), "left": ("aten.slice.Tensor", 1, 0, 2)}
_WRITES = {"add_": "aten.add_.Tensor", "mul_": "aten.mul_.Tensor", "copy_": "aten.copy_.default"}
_SOURCES = {"ones": ("aten.ones.default", ([4, 4],)), "arange": ("aten.arange.default", (4,))}
_OPS = ("split", *_PURE, *_UNARY, *_VIEWS, *_WRITES, *_SOURCES, "relu_", "rows", "halves", "write_state")

_flat_steps = st.builds(Step, st.sampled_from(_OPS), _small, _small)
_blocks = st.sampled_from(["call", "call", "no_grad"])
_steps = st.recursive(
    st.lists(_flat_steps, max_size=6).map(tuple),
    lambda inner: st.lists(_flat_steps | st.builds(Step, _blocks, _small, st.just(0), inner), max_size=5).map(tuple),
    max_leaves=4,
)
_names = ("w", "b", "m0.w", "m0.b", "m1.w", "m0.m1.w", "m2.unread", "m1.0.w-x")
_outputs = st.lists(st.tuples(st.sampled_from(["last", "value", "input", "state", "none", "int"]), _small), min_size=1, max_size=4)


def program_plans() -> st.SearchStrategy[ProgramPlan]:
    """Traced programs of the pure IR that run on 4x4 tensors and views of them, on the interpreter as they are."""
    names = st.lists(st.sampled_from(_names), unique=True, max_size=4)
    state = names.flatmap(lambda ns: st.tuples(*[st.tuples(st.just(n), st.integers(0, 2)) for n in ns]))
    return st.builds(ProgramPlan, st.integers(1, 3), state, _steps, _outputs.map(tuple))


def build_program(plan: ProgramPlan) -> Program:
    """A fresh traced program of `plan`."""
    return _ProgramBuilder(plan).build()


def program_inputs(plan: ProgramPlan) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and state tensors for `plan`; names with one tensor number share a tensor."""
    rng = torch.Generator().manual_seed(7)
    distinct = [torch.randn(4, 4, generator=rng) for _ in range(3)]
    return [torch.randn(4, 4, generator=rng) for _ in range(plan.inputs)], {n: distinct[t] for n, t in plan.state}


class _ProgramBuilder:
    def __init__(self, plan: ProgramPlan) -> None:
        self._plan = plan
        self._program = Program("Drawn")
        self._calls: dict[str, int] = {}
        self._values: list[Value] = []
        self._roots: dict[Value, int] = {}
        self._shapes: dict[Value, tuple[int, ...]] = {}
        self._line = 0

    def build(self) -> Program:
        for i in range(self._plan.inputs):
            self._define(self._program.add_input(_tensor(4, 4), "xyz"[i]), (4, 4))
        for name, tensor in self._plan.state:
            grad = name.endswith("w")
            entry = StateEntry((name,), "param" if grad else "buffer", _tensor(4, 4, grad=grad), tensor=tensor, storage=tensor)
            self._program.state.append(entry)
            self._define(entry.value, (4, 4), 100 + tensor)
        self._run(self._plan.steps, (), ())
        self._program.set_outputs([self._output(kind, i) for kind, i in self._plan.outputs])
        return self._program

    def _define(self, value: Value, shape: tuple[int, ...], root: int | None = None) -> None:
        self._values.append(value)
        self._shapes[value] = shape
        self._roots[value] = len(self._values) + 1000 if root is None else root

    def _output(self, kind: str, i: int) -> Any:
        state = [e.value for e in self._program.state]
        pool: dict[str, Sequence[Any]] = {
            "last": self._values[-1:],
            "input": self._program.inputs,
            "state": state or self._values,
            "none": [None],
            "int": [i],
        }
        found = pool.get(kind, self._values)
        return found[i % len(found)]

    def _run(self, steps: tuple[Step, ...], scope: Scope, context: tuple[Context, ...]) -> None:
        for step in steps:
            if step.kind == "call":
                name = f"m{step.a % 3}"
                path = ".".join([*(f.name for f in scope), name])
                number = self._calls[path] = self._calls.get(path, -1) + 1
                self._run(step.body, (*scope, Frame(name, number)), context)
            elif step.kind == "no_grad":
                self._run(step.body, scope, (*context, Context("no_grad")))
            else:
                self._line += 1
                self._op(step, scope, context)

    def _append(self, target: str, args: tuple[Any, ...], effects: Effects, where: tuple[Scope, tuple[Context, ...]], **kwargs: Any) -> Op:
        op = Op(target, args, kwargs, effects=effects, place=Place(*where, Loc("/drawn/model.py", self._line)))
        self._program.ops.append(op)
        return op

    def _result(self, op: Op, hint: str, shape: tuple[int, ...], root: int | None = None) -> None:
        self._define(op.add_result(_tensor(*shape), hint), shape, root)

    def _op(self, step: Step, *where: Any) -> None:
        kind = step.kind
        a = self._values[-1 - step.a % len(self._values)]
        if kind == "split":
            self._append(SPLIT, (), Effects(), where)
        elif kind in _SOURCES:
            target, args = _SOURCES[kind]
            self._result(
                self._append(target, args, Effects(), where, dtype=Token("torch.float32")), kind, (4, 4) if kind == "ones" else (4,)
            )
        elif kind in _PURE:
            self._binary(kind, a, step.b, where)
        elif kind in _UNARY:
            effects = Effects(random=kind == "rand")
            self._result(self._append(_UNARY[kind], (a,), effects, where), kind, self._shapes[a])
        elif kind in _VIEWS or kind in ("rows", "halves"):
            self._view(kind, a, where)
        else:
            self._write(kind, a, step.b, where)

    def _binary(self, kind: str, a: Value, b: int, where: Any) -> None:
        fits = [v for v in self._values if self._shapes[v] == self._shapes[a]]
        if kind == "mm" and self._shapes[a] != (4, 4):
            kind = "add"
        self._result(self._append(_PURE[kind], (a, fits[-1 - b % len(fits)]), Effects(), where), kind, self._shapes[a])

    def _view(self, kind: str, a: Value, where: Any) -> None:
        shape = self._shapes[a]
        if shape != (4, 4):
            self._result(self._append("aten.alias.default", (a,), Effects(views=(a,)), where), "alias", shape, self._roots[a])
        elif kind == "rows":
            op = self._append("aten.unbind.int", (a,), Effects(views=(a,) * 4), where)
            for i in range(4):
                self._result(op, f"row{i}", (4,), self._roots[a])
        elif kind == "halves":
            op = self._append("aten.split.Tensor", (a, 2), Effects(views=(a, a)), where)
            self._result(op, "upper", (2, 4), self._roots[a])
            self._result(op, "lower", (2, 4), self._roots[a])
        else:
            target, *args = _VIEWS[kind]
            op = self._append(str(target), (a, *args), Effects(views=(a,)), where)
            self._result(op, kind, {"top": (2, 4), "left": (4, 2)}.get(kind, shape), self._roots[a])

    def _write(self, kind: str, a: Value, b: int, where: Any) -> None:
        """An op in place; its source never overlaps the target, which torch leaves undefined."""
        state = [e.value for e in self._program.state]
        if kind == "write_state" and state:
            a, kind = state[b % len(state)], "add_"
        fits = [v for v in self._values if self._shapes[v] == self._shapes[a] and self._roots[v] != self._roots[a]]
        effects = Effects(writes=(a,), views=(a,))
        if kind not in _WRITES or not fits:
            op = self._append("aten.tanh_.default", (a,), effects, where)
        else:
            op = self._append(_WRITES[kind], (a, fits[-1 - b % len(fits)]), effects, where)
        self._result(op, kind, self._shapes[a], self._roots[a])


def _tensor(*shape: int, grad: bool = False) -> TensorType:
    return TensorType("f32", shape, grad=grad)


# --- models -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Do:
    """One step of a module's forward. `a` and `b` pick values, parameters, buffers or children, modulo how many there are."""

    kind: str
    a: int = 0
    b: int = 0

    def __repr__(self) -> str:
        return f"Do({self.kind!r}, {self.a}, {self.b})" if self.a or self.b else f"Do({self.kind!r})"


@dataclass(frozen=True)
class BlockPlan:
    """A module: its own parameters and buffers, its children and the steps of its forward.

    A parameter is `own`, `listed` (in a ParameterList), `tied` (to one made earlier) or `unused`. A child is
    the name of a layer, a nested plan, or `shared`: a module made earlier, under a second name.
    """

    params: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    children: tuple[str | BlockPlan, ...] = ()
    steps: tuple[Do, ...] = ()


@dataclass(frozen=True)
class ModelPlan:
    """A whole model with its call: inputs by position and by keyword, the root module, the outputs, train or eval."""

    inputs: int = 1
    keywords: int = 0
    root: BlockPlan = field(default_factory=BlockPlan)
    outputs: tuple[Any, ...] = (Do("value"),)
    training: bool = True


_STEPS = (
    "call", "call", "call", "split", "split", "add", "mul", "mm", "relu", "param", "buffer", "write", "count", "no_grad", "split_no_grad",
    "argmax", "use_int", "view", "inplace", "inplace_view", "dropout", "detach", "arange", "write_param_view",
)  # fmt: skip
_LAYERS = ("linear", "linear", "norm", "batch", "dropout", "shared", "shared")
_dos = st.builds(Do, st.sampled_from(_STEPS), _small, _small)


def _block_plans(children: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[BlockPlan]:
    return st.builds(
        BlockPlan,
        st.lists(st.sampled_from(["own", "own", "listed", "tied", "unused"]), max_size=3).map(tuple),
        st.lists(st.sampled_from(["count", "mean", "transient"]), unique=True, max_size=2).map(tuple),
        st.lists(children, max_size=3).map(tuple),
        st.lists(_dos, max_size=most).map(tuple),
    )


_leaf_values = st.builds(Do, st.sampled_from(["value", "value", "value", "input", "param", "buffer", "none", "int"]), _small)
_trees = st.recursive(
    _leaf_values,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(tuple) | st.dictionaries(st.sampled_from("pqr"), inner, min_size=1, max_size=3)
    ),
    max_leaves=4,
)


def model_plans() -> st.SearchStrategy[ModelPlan]:
    """Whole models: skip connections, shared modules, tied parameters, buffers read and written, nested outputs, split points."""
    layers = st.sampled_from(_LAYERS)
    blocks = st.recursive(_block_plans(layers, 4), lambda inner: _block_plans(layers | inner, 5), max_leaves=3)
    root = _block_plans(layers | blocks, 10)
    outputs = st.lists(_trees, min_size=1, max_size=3).map(tuple)
    return st.builds(ModelPlan, st.integers(1, 3), st.integers(0, 2), root, outputs, st.booleans())


def build_model(plan: ModelPlan) -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """The model of `plan` in double precision, with example arguments by position and by keyword."""
    torch.manual_seed(11)
    made = _Made()
    model = DrawnModel(plan, made)
    args = tuple(torch.randn(4, 4, dtype=torch.float64) for _ in range(plan.inputs))
    kwargs = {f"k{i}": torch.randn(4, 4, dtype=torch.float64) for i in range(plan.keywords)}
    return model.double().train(plan.training), args, kwargs


class _Made:
    """What was made so far, for later parts of a model to share."""

    def __init__(self) -> None:
        self.params: list[nn.Parameter] = []
        self.modules: list[nn.Module] = []


def _layer(kind: str, made: _Made) -> nn.Module:
    if kind == "shared" and made.modules:
        return made.modules[-1]
    makers: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: nn.LayerNorm(4),
        "batch": lambda: nn.BatchNorm1d(4),
        "dropout": lambda: nn.Dropout(0.5),
    }
    return makers.get(kind, lambda: nn.Linear(4, 4))()


class DrawnBlock(nn.Module):
    """A module that interprets a BlockPlan: it works on a list of values, to which each step adds one."""

    def __init__(self, plan: BlockPlan, made: _Made) -> None:
        super().__init__()
        self._plan = plan
        self._own: list[str] = []
        self.listed = nn.ParameterList()
        for i, kind in enumerate(plan.params):
            self._add_param(i, kind, made)
        for kind in plan.buffers:
            value = torch.zeros((), dtype=torch.int64) if kind == "count" else torch.zeros(4)
            self.register_buffer(kind, value, persistent=kind != "transient")
        for i, child in enumerate(plan.children):
            module = DrawnBlock(child, made) if isinstance(child, BlockPlan) else _layer(child, made)
            self.add_module(f"c{i}", module)
            made.modules.append(module)

    def _add_param(self, i: int, kind: str, made: _Made) -> None:
        param = made.params[0] if kind == "tied" and made.params else nn.Parameter(torch.randn(4, 4) / 4)
        made.params.append(param)
        if kind == "listed":
            self.listed.append(param)
        else:
            self.register_parameter(f"p{i}", param)
            if kind != "unused":
                self._own.append(f"p{i}")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._steps([x, y])[-1]

    def _steps(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        ints: list[torch.Tensor] = []
        for do in self._plan.steps:
            a, b = values[-1 - do.a % len(values)], values[-1 - do.b % len(values)]
            self._step(do, a, b, values, ints)
        return values

    def _params(self) -> list[torch.Tensor]:
        return [*(getattr(self, n) for n in self._own), *self.listed]

    def _step(self, do: Do, a: torch.Tensor, b: torch.Tensor, values: list[torch.Tensor], ints: list[torch.Tensor]) -> None:
        kind = do.kind
        if kind == "split":
            pipe_split()
        elif kind == "call" and self._plan.children:
            child = getattr(self, f"c{do.a % len(self._plan.children)}")
            values.append(child(values[-1], b) if isinstance(child, DrawnBlock) else child(b))
        elif kind == "argmax":
            ints.append(a.argmax(-1))
        elif kind == "use_int" and ints:
            values.append(a + ints[do.b % len(ints)].unsqueeze(-1) / 4)
        elif kind in ("count", "write", "buffer"):
            self._buffer_step(kind, a, values)
        elif kind in ("param", "write_param_view") and self._params():
            self._param_step(kind, do.b, a, values)
        elif kind in _TENSOR_STEPS:
            values.append(_TENSOR_STEPS[kind](a, b, self.training))

    def _buffer_step(self, kind: str, a: torch.Tensor, values: list[torch.Tensor]) -> None:
        if kind == "count" and "count" in self._plan.buffers:
            self.count.add_(1)  # type: ignore[operator]
        names = [n for n in self._plan.buffers if n != "count"]
        if kind == "write" and names:
            getattr(self, names[0]).mul_(0.5).add_(a.detach().mean(0))
        elif kind == "buffer" and self._plan.buffers:
            values.append(a + torch.tanh(getattr(self, self._plan.buffers[-1])))

    def _param_step(self, kind: str, pick: int, a: torch.Tensor, values: list[torch.Tensor]) -> None:
        param = self._params()[pick % len(self._params())]
        values.append(a * param if kind == "param" else a + param.t())


def _in_place(a: torch.Tensor, b: torch.Tensor, training: bool) -> torch.Tensor:
    return a.mul(0.5).add_(b)


def _in_place_view(a: torch.Tensor, b: torch.Tensor, training: bool) -> torch.Tensor:
    whole = a * 2
    part = whole[:, :2]
    pipe_split()
    part.add_(b[:, 2:])
    return whole


def _without_grad(a: torch.Tensor, b: torch.Tensor, training: bool) -> torch.Tensor:
    with torch.no_grad():
        return a * b.relu()


def _split_without_grad(a: torch.Tensor, b: torch.Tensor, training: bool) -> torch.Tensor:
    with torch.no_grad():
        c = a.relu()
        pipe_split()
        c = c + 1
    return c + b


_TENSOR_STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]] = {
    "add": lambda a, b, training: a + b,
    "mul": lambda a, b, training: a.tanh() * b,
    "mm": lambda a, b, training: (a @ b).tanh(),
    "relu": lambda a, b, training: a.relu(),
    "no_grad": _without_grad,
    "split_no_grad": _split_without_grad,
    "view": lambda a, b, training: a.t(),
    "inplace": _in_place,
    "inplace_view": _in_place_view,
    "dropout": lambda a, b, training: nn.functional.dropout(a, 0.5, training),
    "detach": lambda a, b, training: a.detach() + b,
    "arange": lambda a, b, training: a + torch.arange(4, dtype=a.dtype),
}


class DrawnModel(DrawnBlock):
    """The root module of a plan: arguments by position and by keyword, outputs in the drawn structure."""

    def __init__(self, plan: ModelPlan, made: _Made) -> None:
        super().__init__(plan.root, made)
        self._outputs = plan.outputs

    def forward(
        self,
        x0: torch.Tensor,
        x1: torch.Tensor | None = None,
        x2: torch.Tensor | None = None,
        *,
        k0: torch.Tensor | None = None,
        k1: torch.Tensor | None = None,
    ) -> Any:
        inputs = [x for x in (x0, x1, x2, k0, k1) if x is not None]
        values = self._steps(list(inputs))
        return tuple(_outputs_of(tree, values, inputs, self) for tree in self._outputs)


def _outputs_of(tree: Any, values: list[torch.Tensor], inputs: Sequence[torch.Tensor], block: DrawnBlock) -> Any:
    if isinstance(tree, dict):
        return {k: _outputs_of(v, values, inputs, block) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_outputs_of(v, values, inputs, block) for v in tree)
    params, buffers = block._params(), list(block._buffers.values())
    pools: dict[str, Sequence[Any]] = {"input": inputs, "param": params, "buffer": buffers, "none": [None], "int": [tree.a]}
    pool = pools.get(tree.kind) or values
    return pool[-1 - tree.a % len(pool)]
