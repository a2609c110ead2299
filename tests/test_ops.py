"""ops: what an op is called, however it is spelled."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stagecut.ir.graph import Op, Value
from stagecut.ir.ops import CUTTING, base_name, library_name, module_path, out_of_place, reads_around
from stagecut.ir.targets import name_of, resolve
from stagecut.ir.types import TensorType
from stagecut.passes.infer_gradients import _CONVERSIONS
from stagecut.passes.recompute import HEAVY

X = Value(TensorType("f32", (4,)), "x")
KNOWN = sorted({*CUTTING, *_CONVERSIONS, *HEAVY, "as_strided", "scaled_dot_product_attention", "rms_norm", "grouped_mm"})

SPELLINGS = {
    "aten.detach.default": "detach",
    "aten.detach": "detach",
    "torch.detach": "detach",
    "method.detach": "detach",
    "method.detach_": "detach_",
    "aten.data.default": "data",
    "torch.nn.functional.linear": "linear",
    "torch._C._nn.scaled_dot_product_attention": "scaled_dot_product_attention",
    "torch.linalg.matmul": "matmul",
    "operator.matmul": "matmul",
    "operator.pos": "positive",
    "builtins.len": "",
    "math.floor": "",
    "torch.ops.mine.detach.default": "",
    "module.detach": "",
    "module.enc.data": "",
    "module.aten.detach.default": "",
    "extern.detach": "",
    "stagecut.split": "",
}


@pytest.mark.parametrize("target", SPELLINGS)
def test_base_names(target: str) -> None:
    assert base_name(Op(target, (X,))) == SPELLINGS[target]


def test_an_attribute_goes_by_its_name() -> None:
    assert base_name(Op("builtins.getattr", (X, "data"))) == "data"
    assert base_name(Op("builtins.getattr", (X,))) == ""
    assert base_name(Op("builtins.getattr", (X, X))) == ""


@pytest.mark.parametrize("name", KNOWN)
def test_one_op_has_one_name_in_all_its_spellings(name: str) -> None:
    """As torch has them: of each function, method and packet of that name."""
    places = (torch, F, torch.nn.functional, torch._C._nn, torch.linalg, operator)
    found = [name_of(getattr(place, name)) for place in places if callable(getattr(place, name, None))]
    spelled = [target for target in found if target is not None]
    spelled += [f"method.{name}"] if hasattr(torch.Tensor, name) else []
    spelled += [
        f"aten.{name}.{overload}" for overload in (getattr(torch.ops.aten, name).overloads() if hasattr(torch.ops.aten, name) else ())
    ]
    assert spelled
    assert {base_name(Op(target, (X,))) for target in spelled} == {name}


@given(
    st.sampled_from(("module", "extern")), st.lists(st.sampled_from([*KNOWN, "aten", "default", "method", "torch"]), min_size=1, max_size=4)
)
def test_the_users_code_has_no_name(kind: str, parts: list[str]) -> None:
    op = Op(".".join([kind, *parts]), ((X,), {}, []))
    assert not base_name(op)
    assert not library_name(op)
    assert not reads_around(op)
    assert not out_of_place(op.target)
    assert module_path(op) == (".".join(parts) if kind == "module" else "")


def test_an_op_of_another_library() -> None:
    assert library_name(Op("torch.ops.transformers.grouped_mm_fallback.default", (X,))) == "grouped_mm_fallback"
    assert library_name(Op("torch.ops.broken", (X,))) == ""
    assert library_name(Op("aten.mm.default", (X,))) == ""


@pytest.mark.parametrize("target", ["aten.as_strided.default", "method.as_strided", "torch.as_strided", "aten.as_strided_scatter.default"])
def test_what_reads_around(target: str) -> None:
    assert reads_around(Op(target, (X,)))


OVERLOADS = [
    f"aten.{name}.{overload}"
    for name in ("t_", "transpose_", "swapaxes_", "swapdims_", "unsqueeze_", "squeeze_", "as_strided_", "detach_")
    for overload in getattr(torch.ops.aten, name).overloads()
    if overload != "dimname"
]


@pytest.mark.parametrize("target", OVERLOADS)
def test_the_view_for_a_reshape_in_place_takes_the_same_arguments(target: str) -> None:
    one, other = resolve(target)._schema, resolve(out_of_place(target))._schema  # type: ignore[attr-defined]
    assert [(a.name, str(a.type)) for a in one.arguments] == [(a.name, str(a.type)) for a in other.arguments]
    assert not any(a.alias_info is not None and a.alias_info.is_write for a in other.arguments)


def test_views_of_methods_and_functions() -> None:
    assert out_of_place("method.t_") == "method.t"
    assert out_of_place("torch.detach_") == "torch.detach"
    assert not out_of_place("method.add_")
    assert not out_of_place("aten.relu_.default")
