"""ops: what is known of single ops is what torch says of them, however they are spelled, and stands in one table."""

from __future__ import annotations

import ast
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from stagecut.ir.graph import Kind, Mode, Op, Target, Value
from stagecut.ir.ops import FACTS, NOTHING, base_name, facts, flag, is_heavy, library_name, module_path, out_of_place
from stagecut.ir.run.targets import name_of, resolve
from stagecut.ir.types import TensorType

ROOT = Path(__file__).parent.parent
X = Value(TensorType("f32", (4,)), "x")
SCHEMAS = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")]
NAMES = {schema.name.removeprefix("aten::") for schema in SCHEMAS}
KNOWN = sorted(name for name in FACTS if "." not in name)


def having(fact: str) -> list[str]:
    """The ops of torch of which a fact is known."""
    return [name for name in KNOWN if getattr(FACTS[name], fact)]


# --- names --------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("text", "kind", "name", "overload"),
    [
        ("aten.add.Tensor", Kind.ATEN, "add", "Tensor"),
        ("aten.add", Kind.ATEN, "add", ""),
        ("torch.nn.functional.linear", Kind.TORCH, "linear", ""),
        ("torch.ops.mine.scale.default", Kind.LIBRARY, "scale", "default"),
        ("torch.ops.higher_order.cond", Kind.LIBRARY, "cond", ""),
        ("torch.ops.broken", Kind.LIBRARY, "", ""),
        ("method.view", Kind.METHOD, "view", ""),
        ("operator.add", Kind.PYTHON, "add", ""),
        ("module.layers.0.mlp", Kind.MODULE, "layers.0.mlp", ""),
        ("extern.f", Kind.EXTERN, "f", ""),
        ("stagecut.split", Kind.OWN, "split", ""),
    ],
)
def test_a_target_has_parts(text: str, kind: Kind, name: str, overload: str) -> None:
    target = Op(text).target
    assert (target, target.kind, target.name, target.overload) == (text, kind, name, overload)


def test_an_attribute_goes_by_its_name() -> None:
    assert base_name(Op("builtins.getattr", (X, "data"))) == "data"
    assert base_name(Op("builtins.getattr", (X,))) == ""
    assert base_name(Op("builtins.getattr", (X, X))) == ""


@pytest.mark.parametrize("name", KNOWN)
def test_one_op_has_one_name_in_all_its_spellings(name: str) -> None:
    """As torch has them: of each function, method and packet of that name. A name that torch does not have is a mistake in the table."""
    places = (torch, F, torch._C._nn, torch.linalg, operator)
    found = [name_of(getattr(place, name)) for place in places if callable(getattr(place, name, None))]
    spelled = [target for target in found if target is not None]
    spelled += [f"method.{name}"] if hasattr(torch.Tensor, name) else []
    spelled += [f"aten.{name}.{overload}" for overload in (getattr(torch.ops.aten, name).overloads() if name in NAMES else ())]
    assert spelled
    ops = [Op(target, (X,)) for target in spelled]
    assert {base_name(op) for op in ops} == {name}
    assert all(facts(op) is FACTS[name] for op in ops)


@given(
    st.sampled_from(("module", "extern")), st.lists(st.sampled_from([*KNOWN, "aten", "default", "method", "torch"]), min_size=1, max_size=4)
)
def test_of_the_users_code_nothing_is_known(kind: str, parts: list[str]) -> None:
    op = Op(".".join([kind, *parts]), ((X,), {}, []))
    assert not base_name(op)
    assert not library_name(op)
    assert facts(op) is NOTHING
    assert flag(op) is None
    assert not out_of_place(op.target)
    assert module_path(op) == (".".join(parts) if kind == "module" else "")


def test_an_op_of_another_library() -> None:
    op = Op("torch.ops.transformers.grouped_mm_fallback.default", (X,))
    assert library_name(op) == "transformers.grouped_mm_fallback"
    assert facts(op).grouped_product
    assert library_name(Op("torch.ops.broken", (X,))) == ""
    assert library_name(Op("aten.mm.default", (X,))) == ""
    assert facts(Op("torch.ops.mine.detach.default", (X,))) is NOTHING
    assert is_heavy(Op("torch.ops.mine.detach.default", (X,)))


# --- facts, held to torch -------------------------------------------------------------------------------

FLAGS = ("train", "training", "use_input_stats")
NEVER_TRACED = ("_backward", "_functional", "_impl_index", "_no_training", "_with_noise", "_legit", "_state")
"""What torch calls by itself, below the place where a trace is made."""
BACKENDS = ("mkldnn", "mps", "quantized")


def test_training_flags_are_those_of_the_schemas() -> None:
    """An op that is missing would not switch, without a word; so would one with another position."""
    found: dict[str, dict[str, int]] = {}
    for schema in SCHEMAS:
        name = schema.name.removeprefix("aten::")
        if "out" in schema.overload_name or any(word in name for word in (*NEVER_TRACED, *BACKENDS)):
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.name in FLAGS:
                assert str(argument.type) in ("bool", "Optional[bool]")
                found.setdefault(name, {})[schema.overload_name or "default"] = position
    assert found == {name: FACTS[name].training for name in having("training")}
    assert len(found) > 20


def test_a_flag_is_that_of_the_overload() -> None:
    assert flag(Op("aten.dropout.default", (X, 0.5, Mode(True)))) == Mode(True)
    assert flag(Op("aten.lstm.data", (X, X, [X], [X], True, 1, 0.0, False))) is False
    assert flag(Op("aten.dropout.default", (X, 0.5))) is None
    assert flag(Op("aten.add.Tensor", (X, X, True))) is None


@pytest.mark.parametrize("name", having("off_is_operand"))
def test_what_is_off_returns_its_operand(name: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    position = FACTS[name].training["default"]
    assert getattr(torch.ops.aten, name).default(x, *[0.5] * (position - 1), False).data_ptr() == x.data_ptr()


NORM = {
    "input": torch.randn(3, 2, 4),
    "running_mean": torch.zeros(2),
    "running_var": torch.ones(2),
    "cudnn_enabled": False,
    "momentum": 0.1,
    "eps": 1e-5,
    "weight": None,
    "bias": None,
}


def test_statistics_are_written_though_no_schema_says_so() -> None:
    """As CPU can run them; the rest has the same arguments."""
    for name in having("statistics"):
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        places = FACTS[name].statistics
        assert [arguments[place].name for place in places] == ["running_mean", "running_var"]
        assert not any(arguments[place].alias_info and arguments[place].alias_info.is_write for place in places)
        if "cudnn_" in name or "miopen" in name:
            continue
        given = [NORM.get(argument.name, True) for argument in arguments]
        before = [given[place].clone() for place in places]
        getattr(torch.ops.aten, name).default(*given)
        assert not any(torch.equal(given[place], old) for place, old in zip(places, before, strict=True))


def test_what_is_made_like_another_cuts_gradient() -> None:
    alike = {name for name in NAMES if name.endswith("_like") or name.startswith("new_")}
    assert alike | {"data", "detach", "detach_", "new_tensor"} == set(having("cuts_gradient"))


@pytest.mark.parametrize("name", having("cuts_gradient"))
def test_what_cuts_gradient_has_none(name: str) -> None:
    x = torch.randn(2, 3, requires_grad=True) * 1
    args: dict[str, tuple[Any, ...]] = {"full_like": (2.0,), "randint_like": (5,), "new_full": ((2,), 1.0), "new_tensor": ([1.0],)}
    args |= dict.fromkeys(("new_zeros", "new_ones", "new_empty"), ((2,),)) | {"new_empty_strided": ((2,), (1,))}
    function = getattr(torch, name, None) or getattr(torch.Tensor, name)
    made = x.data if name == "data" else function(x, *args.get(name, ()))
    assert not made.requires_grad


@pytest.mark.parametrize("name", having("returns_operand"))
def test_what_has_nothing_to_do_returns_its_operand(name: str) -> None:
    kinds = {"double": "float64", "half": "float16", "bfloat16": "bfloat16", "int": "int32", "long": "int64", "bool": "bool"}
    x = torch.zeros(2, 3, 4, dtype=getattr(torch, kinds.get(name, "float32")))
    args: dict[str, tuple[Any, ...]] = {"to": (x.dtype,), "type_as": (x,)} | dict.fromkeys(having("off_is_operand"), (0.5, False))
    if name == "cuda":
        return  # there may be none
    x = x.reshape(-1) if name == "flatten" else x
    made = getattr(torch.Tensor, name, None) or getattr(torch, name, None) or getattr(torch.ops.aten, name)
    result = made.__get__(x) if name == "real" else made(x, *args.get(name, ()))  # type: ignore[attr-defined]
    assert (result[0] if isinstance(result, (tuple, list)) else result) is x


@pytest.mark.parametrize("name", having("copies"))
def test_a_copy_has_storage_of_its_own(name: str) -> None:
    x = torch.randn(3)
    assert getattr(torch.ops.aten, name).default(x).data_ptr() != x.data_ptr()


def test_guards_return_nothing() -> None:
    assert len(having("guard")) == 4
    assert not any(schema.returns for schema in SCHEMAS if schema.name.removeprefix("aten::") in having("guard"))


def test_what_torch_counts_the_operations_of_is_heavy() -> None:
    counted = {str(op).removeprefix("aten.") for op in flop_registry}
    assert {name for name in counted if not FACTS.get(name, FACTS.get(f"higher_order.{name}", NOTHING)).heavy} == set()


def test_what_reads_around() -> None:
    assert {name for name in NAMES if name.startswith("as_strided")} == set(having("reads_around"))


def test_what_is_uninitialised() -> None:
    assert {name for name in NAMES if "empty" in name} == set(having("uninitialised"))


RESHAPED = [f"aten.{name}.{o}" for name in having("reshapes") for o in getattr(torch.ops.aten, name).overloads() if o != "dimname"]


@pytest.mark.parametrize("target", RESHAPED)
def test_the_view_for_a_reshape_in_place_takes_the_same_arguments(target: str) -> None:
    one, other = resolve(target)._schema, resolve(out_of_place(Target(target)))._schema  # type: ignore[attr-defined]
    assert [(a.name, str(a.type)) for a in one.arguments] == [(a.name, str(a.type)) for a in other.arguments]
    assert not any(a.alias_info is not None and a.alias_info.is_write for a in other.arguments)


@pytest.mark.parametrize("name", having("needs_layout"))
def test_what_needs_a_layout_is_a_reshape_where_there_is_one(name: str) -> None:
    x, view = torch.arange(12.0).view(3, 4), getattr(torch.ops.aten, name).default
    assert torch.equal(view(x, [12]), torch.ops.aten.reshape.default(x, [12]))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        view(x.t(), [12])


def test_views_of_methods_and_functions() -> None:
    assert out_of_place(Target("method.t_")) == "method.t"
    assert out_of_place(Target("torch.detach_")) == "torch.detach"
    assert not out_of_place(Target("method.add_"))
    assert not out_of_place(Target("aten.relu_.default"))
    assert not out_of_place(Target("operator.t_"))


@pytest.mark.parametrize("name", having("rearranges"))
def test_what_rearranges_has_all_elements_of_its_operand(name: str) -> None:
    x = torch.randn(2, 3, 1)[:, :, 0] if name == "t" else torch.randn(2, 3, 1)
    args: dict[str, tuple[Any, ...]] = {"transpose": (0, 1), "permute": ((2, 0, 1),), "unsqueeze": (0,)}
    args |= dict.fromkeys(("view", "_unsafe_view"), ((3, 2),))
    result = getattr(torch.ops.aten, name)(x, *args.get(name, ()))
    assert result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert result.storage_offset() == x.storage_offset()
    assert sorted(result.flatten().tolist()) == sorted(x.flatten().tolist())


@pytest.mark.parametrize("name", having("takes"))
def test_what_takes_a_piece_has_the_dim_and_the_places_next(name: str) -> None:
    x = torch.arange(24).view(4, 6)
    piece = getattr(torch.ops.aten, name)(x, 1, 2, *[5][: FACTS[name].takes == "range"])
    end = {"place": 3, "range": 5}[FACTS[name].takes]
    assert sorted(piece.flatten().tolist()) == sorted(x[:, 2:end].flatten().tolist())
    assert piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", having("divides"))
def test_what_divides_makes_pieces_without_a_common_element(name: str) -> None:
    x = torch.arange(24).view(4, 6)
    how: dict[str, tuple[Any, ...]] = {"unbind": (), "split_with_sizes": ([1, 3],)}
    pieces = getattr(torch.ops.aten, name)(x, *how.get(name, (2,)), 0)
    assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), x.flatten())
    assert all(piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for piece in pieces)


def test_iterations_are_what_python_unpacks() -> None:
    """Held to its tensors in test_calls."""
    assert having("iteration") == ["unbind"]


# --- one table -------------------------------------------------------------------------------------------

PRODUCT = ("ir", "passes", "frontend", "backend", "stagecut", "tools")
BY_CHANCE = {"ir/text/parser.py", "ir/sizes.py", "tests/fuzz/draw.py", "tests/fuzz/plans.py", "tests/fuzz/text.py"}
"""Files with words of our text, of sizes and of random models, some of which are names of ops too."""


def op_lists(source: str) -> list[tuple[int, list[str]]]:
    """Where a text of Python has a tuple, list, set or dict of op names, or compares or searches a target or a name of an op."""
    found: list[tuple[int, list[str]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
        elif isinstance(node, ast.Dict):
            words = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        elif isinstance(node, ast.Compare):
            asked = ast.unparse(node)
            names = any(word in asked for word in ("target", "base_name", "_opname", "__name__"))
            words = [part.value for part in (node.left, *node.comparators) if isinstance(part, ast.Constant)] * 2 if names else []
        else:
            continue
        known = [word for word in words if isinstance(word, str) and _is_op(word)]
        if len(known) > 1:
            found.append((node.lineno, known))
    return found


def _is_op(word: str) -> bool:
    return word.startswith("aten.") or (word in OF_TENSORS and word not in WORDS)


WORDS = ("data", "view", "copy", "cpu", "cuda", "dict", "complex")
"""What has other meanings in Python, in pages and among devices."""
OF_TENSORS = {schema.name.removeprefix("aten::") for schema in SCHEMAS if any("Tensor" in str(a.type) for a in schema.arguments)}


def test_there_is_no_other_list_of_ops() -> None:
    """What is known of an op stands in ir/ops.py, where all that ask for it find it."""
    found = {}
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            inside = folder == "stagecut" and len(path.relative_to(ROOT / folder).parts) > 1  # a link to another folder
            if name != "ir/ops.py" and name not in BY_CHANCE and not inside and (lists := op_lists(path.read_text())):
                found[name] = lists
    assert found == {}


@pytest.mark.parametrize("source", ["x = ('detach', 'clone')", "if op.target == 'aten.add.Tensor': pass", "x = {'relu': 1, 'gelu': 2}"])
def test_a_list_of_ops_is_seen(source: str) -> None:
    assert op_lists(source)
