"""Generated code calls torch's own bindings of hot ops, and each is the overload that the program names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from stagecut.backend.stages.spell import callee
from stagecut.ir.ops import FACTS
from stagecut.ir.run.targets import resolve
from stagecut.ir.text.parser import parse

T = torch.randn(2, 3, 4)
IMAGE = torch.randn(2, 4, 6, 6)
FOUR = torch.ones(4)
CALLS: dict[str, tuple[Any, ...]] = {
    "pow.Tensor_Scalar": (T, 2),
    "mean.dim": (T, [-1], True),
    "softmax.int": (T, -1, torch.float64),
    "dropout.default": (T, 0.5, True),
    "matmul.default": (T, T.mT),
    "mm.default": (T[0], T[0].T),
    "bmm.default": (T, T.mT),
    "embedding.default": (torch.randn(5, 2), torch.tensor([1, 4]), 1, True, False),
    "layer_norm.default": (T, [4], FOUR, FOUR, 1e-3, False),
    "rms_norm.default": (T, [4], FOUR, 1e-3),
    "group_norm.default": (IMAGE, 2, FOUR, FOUR, 1e-3, False),
    "batch_norm.default": (IMAGE, FOUR, FOUR, FOUR.clone(), FOUR.clone(), True, 0.2, 1e-3, False),
    "conv1d.default": (T, torch.randn(2, 3, 2), torch.zeros(2), [2], [1], [1], 1),
    "conv2d.default": (IMAGE, torch.randn(2, 2, 3, 3), torch.zeros(2), [2, 1], [1, 0], [1, 1], 2),
    "cat.default": ([T, T], -1),
    "stack.default": ([T, T], 1),
    "chunk.default": (T, 2, -1),
    "transpose.int": (T, 1, 2),
    "permute.default": (T, [2, 0, 1]),
    "unsqueeze.default": (T, 1),
    "squeeze.dim": (T, 0),
    "flatten.using_ints": (T, 1, 2),
    "unflatten.int": (T, -1, [2, 2]),
    "reshape.default": (T, [6, -1]),
    "t.default": (T[0],),
    "sum.dim_IntList": (T, [1], True),
    "addmm.default": (FOUR, T[0], torch.randn(4, 4)),
    "linear.default": (T, torch.randn(2, 4), torch.ones(2)),
    "gelu.default": (T,),
    "scaled_dot_product_attention.default": (T[None], T[None], T[None], torch.zeros(3, 3), 0.25, False),
    "view.default": (T, [6, -1]),
    "expand.default": (T[:1], [5, -1, -1]),
    "contiguous.default": (T.mT,),
    "add.Tensor": (T, T),
    "sub.Tensor": (T, T),
    "mul.Tensor": (T, T),
    "div.Tensor": (T, T),
}


BINDINGS = {f"aten.{name}.{overload}": binding for name, facts in FACTS.items() for overload, binding in facts.bindings.items()}


@pytest.mark.parametrize("target", BINDINGS)
def test_a_binding_is_its_overload_with_all_its_arguments(target: str) -> None:
    args = CALLS.get(target.removeprefix("aten."), (T,))
    overload = resolve(target)
    positional = [a for a in overload._schema.arguments if not a.kwarg_only]  # type: ignore[attr-defined]
    assert len(args) == len(positional) or target in ("aten.scaled_dot_product_attention.default", "aten.contiguous.default")
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def run(function: Any) -> list[tuple[Any, Any, Any]]:
        def call(*given: torch.Tensor) -> Any:
            rest = iter(given)
            return function(*(next(rest) if isinstance(a, torch.Tensor) else a for a in args))

        graph = make_fx(call, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors).graph
        return [(n.target, str(n.args), str(n.kwargs)) for n in graph.nodes if n.op == "call_function"]

    ran = run(resolve_binding(BINDINGS[target]))
    assert overload in [target for target, _, _ in ran]
    assert ran == run(overload)


def resolve_binding(name: str) -> Any:
    """What the text of generated code means by a name."""
    return eval(name, {"torch": torch})


@pytest.mark.parametrize(
    ("line", "called"),
    [
        ("aten.add.Tensor(%x, %x)", "torch.add"),
        ("aten.add.Tensor(%x, 2.0)", "aten.add.Tensor"),
        ("aten.add.Tensor(%x, %x, alpha=2)", "aten.add.Tensor"),
        ("aten.linear.default(%x, %x)", "torch.nn.functional.linear"),
        ("aten.linear.default(%x, %x, None)", "torch.nn.functional.linear"),
        ("aten.cosh.default(%x)", "aten.cosh.default"),
        ("torch.add(%x, 1)", "torch.add"),
    ],
)
def test_only_tensors_choose_a_binding(line: str, called: str) -> None:
    program = parse(f"program @P phase=traced {{\n  input %x : f32[2,2]\n  %y = {line} : f32[2,2]\n  output (%y,)\n}}\n")
    assert callee(program.ops[0]) == called


def test_bindings_compile_without_a_break() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.Tensor.view(torch.add(x, x), [-1]) + torch._C._nn.silu(x).sum()

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(T), run(T))
