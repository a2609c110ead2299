"""Types: what they print, weigh and carry."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stagecut.ir.types import DTYPES, NONE, Dim, ScalarType, TensorType, Type, carries_grad, contiguous_strides, dtype_bytes


@pytest.mark.parametrize(
    ("kind", "printed"),
    [
        (TensorType("f32", (2, "s0")), "f32[2,s0]"),
        (TensorType("i64", ()), "i64[]"),
        (TensorType("bf16", (2, 3), (1, 2), "cuda:0", True), "bf16[2,3]{1,2}@cuda:0 grad"),
        (ScalarType("int"), "int"),
        (ScalarType("int", "2*s0"), "int(2*s0)"),
        (NONE, "none"),
    ],
)
def test_text(kind: Type, printed: str) -> None:
    assert str(kind) == printed


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("f32", (2, 3), 24),
        ("bf16", (5,), 10),
        ("b8", (7,), 7),
        ("c128", (), 16),
        ("i64", (0, 9), 0),
        ("f8e5m2", (3,), 3),
        ("f32", ("s0", 2), None),
    ],
)
def test_bytes(dtype: str, shape: tuple[Dim, ...], size: int | None) -> None:
    assert TensorType(dtype, shape).nbytes() == size


@pytest.mark.parametrize("short", DTYPES)
def test_dtypes_agree_with_torch(short: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, DTYPES[short], None)
    if dtype is None:
        pytest.skip(f"this torch has no {DTYPES[short]}")
    assert dtype_bytes(short) == dtype.itemsize
    assert TensorType(short, ()).differentiable == (dtype.is_floating_point or dtype.is_complex)


@pytest.mark.parametrize(("shape", "strides"), [((), ()), ((4,), (1,)), ((2, 3, 4), (12, 4, 1)), ((2, 0, 3), (3, 3, 1))])
def test_contiguous_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    assert contiguous_strides(shape) == strides


def test_last_element_is_where_the_strides_say() -> None:
    shape = (3, 5, 7)
    last = sum((size - 1) * step for size, step in zip(shape, contiguous_strides(shape), strict=True))
    assert last == math.prod(shape) - 1


def test_carries_grad() -> None:
    assert carries_grad(TensorType("f32", (), grad=True))
    assert not carries_grad(TensorType("f32", ()))
    assert not carries_grad(ScalarType("float"))


def test_a_tensor_of_open_sizes_states_its_strides_where_it_is_not_contiguous() -> None:
    torch = pytest.importorskip("torch")
    from stagecut.frontend.lower.types import tensor_type

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return x * 2, x.transpose(1, 2), x[:, ::2], x.flatten(1), x.expand(3, *x.shape), torch.cat([x, x])[:, 1:]

    dims = torch.export.Dim.AUTO
    graph = torch.export.export(Model(), (torch.ones(3, 8, 4),), dynamic_shapes=({0: dims, 1: dims},)).graph
    types = [tensor_type(node.meta["val"]) for node in graph.output_node().args[0]]
    assert [kind.strides is None for kind in types] == [True, False, False, True, False, False]
    assert types[1].strides is not None
    assert types[1].strides[1:] == (1, 4)
