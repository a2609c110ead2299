"""The graph: use lists cannot go stale, removal is safe, the phase only rises, names are unique."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import defining, load, named, rules_broken

from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import (
    Frame,
    Loc,
    Namer,
    Op,
    Place,
    Program,
    StateEntry,
    Transfer,
    Value,
    closest_name,
    leaves,
    scope_fqn,
    substitute,
    transform,
)
from stagecut.ir.types import NONE, TensorType

F32 = TensorType("f32", (4,))


def values(count: int) -> list[Value]:
    """Fresh values that nothing uses."""
    return [Value(F32, f"v{i}") for i in range(count)]


def test_operands_are_found_in_nested_structures() -> None:
    a, b, c, d, e, f = values(6)
    op = Op("extern.f", (a, [b, (c, 1)], {"k": [d]}, slice(e, None, 2)), {"key": {"deep": (f, a)}})
    assert op.operands == [a, b, c, d, e, f, a]
    assert all(list(v.uses) == [op] for v in (a, b, c, d, e, f))


def test_set_operands_moves_uses() -> None:
    a, b, c = values(3)
    op = Op("extern.f", (a, b))
    op.set_operands((b,), {"k": [c]})
    assert op.operands == [b, c]
    assert [list(v.uses) for v in (a, b, c)] == [[], [op], [op]]


def test_replace_operand_everywhere() -> None:
    a, b = values(2)
    op = Op("extern.f", (a, [a]), {"k": {"x": a}})
    op.replace_operand(a, b)
    assert op.args == (b, [b])
    assert op.kwargs == {"k": {"x": b}}
    assert (list(a.uses), list(b.uses)) == ([], [op])


def test_replace_operand_of_a_written_value() -> None:
    a, b, other = values(3)
    op = Op("extern.f_", (a,))
    version, renewed = op.add_version(a, "a.1"), op.add_version(other, "other.1")
    op.replace_operand(a, b)
    assert op.versions == {b: version, other: renewed}
    assert op.reads == [b, other]
    assert [list(v.uses) for v in (a, b, other)] == [[], [op], [op]]


def test_replace_a_renewed_value_that_is_no_operand() -> None:
    a, b, other = values(3)
    op = Op("extern.f_", (a,))
    op.add_version(a, "a.1")
    version = op.add_version(other, "other.1")
    op.replace_operand(other, b)
    assert op.versions[b] is version
    assert [list(v.uses) for v in (a, b, other)] == [[op], [op], []]


def test_add_version_counts_as_a_read_and_a_definition() -> None:
    a, other = values(2)
    op = Op("extern.f_", (a,))
    result = op.add_result(F32, "r")
    version = op.add_version(other, "other.1")
    assert op.reads == [a, other]
    assert list(op.definitions()) == [result, version]
    assert version.owner is op
    assert version.type == other.type
    assert list(other.uses) == [op]


def test_replace_uses_where() -> None:
    a, b = values(2)
    first, second = Op("extern.f", (a,)), Op("extern.g", (a,))
    a.replace_uses(b, lambda op: op is second)
    assert (list(a.uses), list(b.uses)) == ([first], [second])
    a.replace_uses(b)
    assert (list(a.uses), set(b.uses)) == ([], {first, second})


def test_remove_ops_refuses_what_is_used_and_leaves_all_as_it_was() -> None:
    program = load("modules")
    unused = Op("extern.f", (program.inputs[0],))
    program.ops.append(unused)
    before = list(program.ops)
    with pytest.raises(StagecutError, match=r"aten\.neg\.default cannot be removed: its result is still used") as caught:
        program.remove_ops({unused, defining(program, "%c")})
    assert caught.value.where == "src/model.py:6, module 'layers.0.attn', op aten.neg.default"
    assert program.ops == before
    assert unused in program.inputs[0].uses


def test_remove_ops_refuses_a_used_version() -> None:
    program = load("linked")
    with pytest.raises(StagecutError, match="still used"):
        program.remove_ops({program.stages[1].ops[0]})


def test_remove_ops_takes_a_chain_out_of_its_stage() -> None:
    program = load("crossing")
    program.set_outputs([])
    program.remove_ops(set(program.stages[3].ops))
    assert program.stages[3].ops == []
    assert list(named(program, "%c").uses) == []
    assert rules_broken(program) == {"V10"}


def test_drop_forgets_operands_and_renewed_values() -> None:
    a, other = values(2)
    op = Op("extern.f_", (a,))
    op.add_version(other, "other.1")
    op.drop()
    assert [list(v.uses) for v in (a, other)] == [[], []]


def test_set_outputs_moves_uses() -> None:
    program = Program("P")
    a, b = program.add_input(F32, "a"), program.add_input(F32, "b")
    program.set_outputs([a, 1])
    program.set_outputs([b, None, b])
    assert program.outputs == [b, None, b]
    assert (list(a.uses), list(b.uses)) == ([], [program.output])


def test_phase_only_rises() -> None:
    program = Program("P")
    program.raise_phase("partitioned")
    program.raise_phase("partitioned")
    program.raise_phase("linked")
    with pytest.raises(StagecutError, match="only rises: it is 'linked', not yet 'partitioned'"):
        program.raise_phase("partitioned")
    assert program.phase == "linked"


@pytest.mark.parametrize(
    ("wishes", "names"),
    [
        ("a a a", "a a_1 a_2"),
        ("a a_1 a", "a a_1 a_2"),
        ("a a a_1 a_1", "a a_1 a_1_1 a_1_2"),
        ("x/y x-y", "x_y x_y_1"),
    ],
)
def test_namer(wishes: str, names: str) -> None:
    namer = Namer()
    assert [namer(wish) for wish in wishes.split()] == names.split()


def test_namer_default_and_taken() -> None:
    namer = Namer(["v", "w"])
    assert [namer(""), namer("", "op"), namer("w")] == ["v_1", "op", "w_1"]


def test_namer_never_repeats() -> None:
    namer = Namer()
    names = [namer(wish) for wish in ["a", "a_1", "a_1_1", "", "v", "a/1"] * 20]
    assert len(set(names)) == len(names)


def test_where_and_scope() -> None:
    scope = (Frame("layers.0"), Frame("attn", 1))
    op = Op("aten.add.Tensor", place=Place(scope, loc=Loc("m.py", 3)))
    assert op.where() == "m.py:3, module 'layers.0.attn', op aten.add.Tensor"
    assert Op("aten.add.Tensor").where() == "op aten.add.Tensor"
    assert scope_fqn(()) == ""


def test_transform_keeps_the_containers() -> None:
    tree: Any = (1, [2, {"k": (3,)}], slice(4, None, 5))
    assert transform(tree, lambda leaf: leaf and leaf * 10) == (10, [20, {"k": (30,)}], slice(40, None, 50))


def test_substitute_keeps_literals() -> None:
    a, b = values(2)
    assert substitute([a, 1, (a, "a")], {a: b}) == [b, 1, (b, "a")]
    assert list(leaves({"k": [b, 1]})) == [b]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("encoder.emb", "encoder.emb.weight"),
        ("decoder.head.proj", "decoder.head.weight"),
        ("other", "encoder.emb.weight"),
        ("", "encoder.emb.weight"),
    ],
)
def test_closest_name(path: str, name: str) -> None:
    assert closest_name(("encoder.emb.weight", "decoder.head.weight"), path) == name


def test_via() -> None:
    value = Value(NONE)
    assert Transfer(value, 1, 4, "relay").via == (2, 3)
    assert Transfer(value, 1, 4, "send").via == ()
    assert Transfer(value, None, 4, "feed").via == ()


def test_state_entry_value_is_its_own() -> None:
    entry = StateEntry(("a.weight", "b.weight"), "param", TensorType("f32", (2,), grad=True))
    assert entry.name == "a.weight"
    assert entry.value.owner is entry
    assert entry.requires_grad
    assert not StateEntry(("b",), "buffer", F32).requires_grad
