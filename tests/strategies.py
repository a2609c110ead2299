"""A hypothesis strategy of whole IR programs, each built from a drawn plan; that of models is `programs` in fuzz/judge.py.

A plan is plain data with a readable repr, so a failing example prints as something one can read and paste
back. Choices in a plan are small numbers taken modulo what there is, so every plan builds and shrinks well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from stagecut.ir.graph import SPLIT, Context, Effects, Frame, Loc, Op, Place, Program, Scope, StateEntry, Token, Value
from stagecut.ir.types import TensorType

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
