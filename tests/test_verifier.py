"""Every invariant has a test that breaks only it; the rule id stands on the bad line where the text can say it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from helpers import defining, load, named, rules_broken

from stagecut.ir.check.verifier import __doc__ as INVARIANTS
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import VerifyError
from stagecut.ir.graph import ROLES, SPLIT, Block, Effects, Op, Program, StateEntry, Transfer, Value
from stagecut.ir.text.parser import parse
from stagecut.ir.types import NONE, Batch, TensorType
from stagecut.passes.liveness import Liveness
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.runner import run_passes

F32 = TensorType("f32", (4,))
VALID = ("everything", "shared", "crossing", "linked", "differentiated")

TRACED = "program @P phase=traced {{\n  input %x : f32[4]\n  state @w : param f32[4]\n{}\n  output (%x)\n}}"
STAGED = "program @P phase=partitioned {{\n  input %x : f32[4]\n{}\n  output (%x)\n}}"
LINKED = "program @P phase=linked {{\n  input %x : f32[4]\n  state @w : param f32[4] names(@v) stages(0)\n{}\n}}"

_BY_MODE = """
  %a = stagecut.by_mode({}, <0>, <1>, {}) : f32[4] {{  # error: V18
    region training (%p : f32[4]) {{
      yield %p
    }}
    region evaluation (%q : f32[4]) {{
      yield {}
    }}
  }}"""

_CALL = """program @P phase=traced {{
  function f (%a : f32[4]) {{
    %b = torch.neg(%a) : f32[4]
    yield %b
  }}
  input %x : f32[4]
  %y = call {}  : f32[4]  # error: V27
  output (%y,)
}}"""

_LANES = """program @P phase=linked {{
  input %x : f32[4]
  input %y : f32[4]
  {}  # error: {}
  stage 0 (%x) -> (%a) {{
    %a = torch.neg(%x) : f32[4]
  }}
  stage 1 (%a) -> (%b) {{
    %b = torch.neg(%a) : f32[4]
  }}
  transfer %x : input -> 0 feed
  transfer %a : 0 -> 1 send
  output (%b, 3, %y)
}}"""

IN_TEXT = {
    "call with too many operands": _CALL.format("f(%x, %x)"),
    "call with too few operands": _CALL.format("f()"),
    "lane that is no input": _LANES.format("lane %x\n  lane %x", "V25"),
    "lane that ends in a number": _LANES.format("lane %x -> output 1", "V25"),
    "lane that ends nowhere": _LANES.format("lane %x -> output 9", "V25"),
    "two lanes that end in one output": _LANES.format("lane %x -> output 0\n  lane %y -> output 0", "V25"),
    "lane in other stages": _LANES.format("lane %x -> output 0 stages(0)", "V26"),
    "region value read outside": TRACED.format("""
  extern.f(<0>) {
    region r (%p : f32[4]) {
      yield (%p)
    }
  }
  %a = aten.neg.default(%p) : f32[4]  # error: V1"""),
    "view slots and results differ in number": TRACED.format("  %a = aten.neg.default(%x) : f32[4] views(%x, -)  # error: V5"),
    "new version without a write": TRACED.format("  %a = aten.neg.default(%x) : f32[4] renews(@w -> %w.1)  # error: V5"),
    "region reads from outside": TRACED.format("""
  extern.f(<0>) {
    region r () {
      %b = aten.neg.default(%x) : f32[4]  # error: V6
      yield (%b)
    }
  }"""),
    "region yields from outside": TRACED.format("""
  extern.f(<0>) {
    region r () {
      yield (@w)  # error: V6
    }
  }"""),
    "region that is not there": TRACED.format("  %a = extern.f([{1: <0>}]) : f32[4]  # error: V6"),
    "the output names a region": "program @P phase=traced {\n  output (<0>)  # error: V6\n}",
    "region yields a region": TRACED.format("""
  extern.f(<0>) {
    region r () {
      yield (<0>)  # error: V6
    }
  }"""),
    "form without a result": TRACED.format("""
  %a, %b = extern.f(%x) : f32[4], f32[4] form({"a": 0})  # error: V17"""),
    "form with a result that is not there": TRACED.format("  %a = extern.f(%x) : f32[4] form((7,))  # error: V17"),
    "form of text": TRACED.format('  %a = extern.f(%x) : f32[4] form("a")  # error: V17'),
    "form of an inner op": TRACED.format("""
  extern.f(<0>) {
    region r (%p : f32[4]) {
      %a = extern.f(%p) : f32[4] form([0, 0])  # error: V17
      yield (%a)
    }
  }"""),
    "old version read by an op": TRACED.format("""
  aten.relu_.default(@w) writes(@w -> %w.1)
  %a = aten.neg.default(@w) : f32[4]  # error: V7"""),
    "old version read by the output": TRACED.format("  aten.relu_.default(%x) writes(%x -> %x.1)  # error: V7"),
    "old version written": TRACED.format("""
  aten.relu_.default(@w) writes(@w -> %w.1)
  aten.relu_.default(@w) writes(@w -> %w.2)  # error: V7"""),
    "another way in each mode, of one region": TRACED.format("""
  %a = stagecut.by_mode(mode(True), <0>, <0>, [%x]) : f32[4] {  # error: V18
    region training (%p : f32[4]) {
      yield %p
    }
  }"""),
    "another way in each mode, without a flag": TRACED.format(_BY_MODE.format("mode(True, 1, 2)", "[%x]", "%q")),
    "another way in each mode, of more operands than parameters": TRACED.format(_BY_MODE.format("mode(True)", "[%x, @w]", "%q")),
    "another way in each mode, that yields a tuple": TRACED.format(_BY_MODE.format("mode(True)", "[%x]", "(%q,)")),
    "another way in each mode, that yields a number": TRACED.format(_BY_MODE.format("mode(True)", "[%x]", "1")),
    "another way in each mode, inside a region": TRACED.format(
        "  extern.f(<0>) {\n    region r (%y : f32[4]) {" + _BY_MODE.format("False", "[%y]", "%q") + "\n  yield (%a)\n}\n}"
    ),
    "transfer in a traced program": TRACED.format("  transfer %x : input -> 0 feed  # error: V8"),
    "marker in a stage": STAGED.format("""
  stage 0 {
    %a = aten.neg.default(%x) : f32[4]
    split  # error: V9
  }"""),
    "stages out of order": STAGED.format("""
  stage 1 {  # error: V10
    %a = aten.neg.default(%x) : f32[4]
  }"""),
    "empty stage": STAGED.format("""
  stage 0 {
    %a = aten.neg.default(%x) : f32[4]
  }
  stage 1 {  # error: V10
  }"""),
    "reads what it does not receive": LINKED.format("""
  stage 0 () -> () {
    holds @w, @v
    %a = aten.mul.Tensor(%x, @w) : f32[4]  # error: V11
  }
  output ()"""),
    "reads state it does not hold": LINKED.format("""
  stage 0 () -> () {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 () -> () {
    %b = aten.neg.default(@w) : f32[4]  # error: V11
  }
  output ()"""),
    "lists an input it does not read": LINKED.format("""
  stage 0 (%x) -> () {  # error: V11
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  transfer %x : input -> 0 feed
  output ()"""),
    "lists an input twice": LINKED.format("""
  stage 0 (%x, %x) -> () {  # error: V11
    holds @w, @v
    %a = aten.mul.Tensor(%x, @w) : f32[4]
  }
  transfer %x : input -> 0 feed
  output ()"""),
    "outputs what nothing needs": LINKED.format("""
  stage 0 () -> (%a) {  # error: V12
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  output ()"""),
    "outputs the same twice": LINKED.format("""
  stage 0 () -> (%a, %a) {  # error: V12
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  output (%a)"""),
    "outputs what another stage defines": LINKED.format("""
  stage 0 () -> (%a) {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 (%a) -> (%a, %b) {  # error: V12
    %b = aten.neg.default(%a) : f32[4]
  }
  transfer %a : 0 -> 1 send
  output (%a, %b)"""),
    "input without a transfer": LINKED.format("""
  stage 0 (%x) -> () {  # error: V13
    holds @w, @v
    %a = aten.mul.Tensor(%x, @w) : f32[4]
  }
  output ()"""),
    "transfer without a route": LINKED.format("""
  stage 0 (%x) -> () {
    holds @w, @v
    %a = aten.mul.Tensor(%x, @w) : f32[4]
  }
  transfer %x : input -> 0  # error: V13
  output ()"""),
    "transfer given twice": LINKED.format("""
  stage 0 (%x) -> () {
    holds @w, @v
    %a = aten.mul.Tensor(%x, @w) : f32[4]
  }
  transfer %x : input -> 0 feed
  transfer %x : input -> 0 feed  # error: V13
  output ()"""),
    "transfer nobody asked for": LINKED.format("""
  stage 0 () -> () {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  transfer %x : input -> 0 feed  # error: V13
  output ()"""),
    "user input sent": LINKED.format("""
  stage 0 (%x) -> () {
    holds @w, @v
    %a = aten.mul.Tensor(%x, @w) : f32[4]
  }
  transfer %x : input -> 0 send  # error: V13
  output ()"""),
    "value fed": LINKED.format("""
  stage 0 () -> (%a) {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 (%a) -> () {
    %b = aten.neg.default(%a) : f32[4]
  }
  transfer %a : input -> 1 feed  # error: V13
  output ()"""),
    "sent from a stage that is not there": LINKED.format("""
  stage 0 (%x) -> () {
    holds @w, @v
    %a = aten.mul.Tensor(%x, @w) : f32[4]
  }
  transfer %x : 7 -> 9 relay(8)  # error: V13
  transfer %x : input -> 0 feed
  output ()"""),
    "sent from the stage it goes to": LINKED.format("""
  stage 0 () -> (%a) {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 (%a) -> () {
    %b = aten.neg.default(%a) : f32[4]
  }
  transfer %a : 1 -> 1 send  # error: V13
  output ()"""),
    "name held by no stage": LINKED.format("""
  stage 0 () -> () {
    holds @w  # error: V14
    %a = aten.neg.default(@w) : f32[4]
  }
  output ()"""),
    "owner that does not hold": LINKED.replace("stages(0)", "stages(0, 1)  # error: V14").format("""
  stage 0 () -> () {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 () -> () {
    extern.f()
  }
  output ()"""),
    "holder that is no owner": LINKED.replace("stages(0)", "stages(0)  # error: V14").format("""
  stage 0 () -> () {
    holds @w
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 () -> () {
    holds @v
    extern.f()
  }
  output ()"""),
    "sent by relay to the next stage": LINKED.format("""
  stage 0 () -> (%a) {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 (%a) -> () {
    %b = aten.neg.default(%a) : f32[4]
  }
  transfer %a : 0 -> 1 relay()  # error: V13
  output ()"""),
    "received in another order than sent": LINKED.format("""
  stage 0 () -> (%a, %b) {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
    %b = aten.neg.default(@w) : f32[4]
  }
  stage 1 (%b, %a) -> () {  # error: V16
    %c = aten.add.Tensor(%a, %b) : f32[4]
  }
  transfer %b : 0 -> 1 send
  transfer %a : 0 -> 1 send
  output ()"""),
    "received before the user's input": LINKED.format("""
  stage 0 () -> (%a) {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  stage 1 (%a, %x) -> () {  # error: V16
    %c = aten.add.Tensor(%a, %x) : f32[4]
  }
  transfer %a : 0 -> 1 send
  transfer %x : input -> 1 feed
  output ()"""),
    "returned in another order": LINKED.format("""
  stage 0 () -> (%a, %b) {  # error: V16
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
    %b = aten.neg.default(@w) : f32[4]
  }
  output (%b, %a)"""),
    "returned by no stage": LINKED.format("""
  stage 0 () -> () {
    holds @w, @v
    %a = aten.neg.default(@w) : f32[4]
  }
  output (%a)  # error: V15"""),
}


@pytest.mark.parametrize("source", IN_TEXT.values(), ids=IN_TEXT)
def test_only_the_marked_rule_is_broken(source: str) -> None:
    marks = re.findall(r"# error: (V\d+)", source)
    assert len(marks) == 1
    assert rules_broken(parse(source)) == set(marks)


def _undefined_operand(p: Program) -> None:
    defining(p, "%b").set_operands((Value(NONE, "ghost"),), {})


def _undefined_output(p: Program) -> None:
    p.set_outputs([Value(NONE, "ghost")])


def _read_before_definition(p: Program) -> None:
    p.ops.reverse()


def _use_missing(p: Program) -> None:
    named(p, "%x").uses.clear()


def _use_left_over(p: Program) -> None:
    named(p, "%b").uses[p.ops[0]] = None


def _output_use_missing(p: Program) -> None:
    del named(p, "%b").uses[p.output]


def _defined_twice(p: Program) -> None:
    p.ops[2].results.append(named(p, "%a"))


def _wrong_owner(p: Program) -> None:
    named(p, "%b").owner = p.ops[0]


def _input_twice(p: Program) -> None:
    p.inputs.append(p.inputs[0])


def _input_with_owner(p: Program) -> None:
    p.inputs[0].owner = p.ops[0]


def _name_of_two_entries(p: Program) -> None:
    p.state.append(StateEntry(("other", "w"), "param", F32))


def _name_twice_in_an_entry(p: Program) -> None:
    p.state[0].names = ("w", "w")


def _write_to_no_operand(p: Program) -> None:
    p.ops[0].effects = Effects(writes=(Value(F32, "other"),))


def _view_of_no_operand(p: Program) -> None:
    p.ops[0].effects = Effects(views=(Value(F32, "other"),))


def _samples_along_no_dim(p: Program) -> None:
    p.inputs[0].type = replace(p.inputs[0].type, batch=Batch(len(p.inputs[0].type.shape)))  # type: ignore[type-var, union-attr]


def _traced_with_stages(p: Program) -> None:
    staged = parse(STAGED.format("  stage 0 {\n  }"))
    p.stages = staged.stages


MUTATED: list[tuple[str, Callable[[Program], None]]] = [
    ("V1", _undefined_operand),
    ("V1", _undefined_output),
    ("V1", _read_before_definition),
    ("V2", _use_missing),
    ("V2", _use_left_over),
    ("V2", _output_use_missing),
    ("V3", _defined_twice),
    ("V3", _wrong_owner),
    ("V3", _input_twice),
    ("V3", _input_with_owner),
    ("V19", _samples_along_no_dim),
    ("V4", _name_of_two_entries),
    ("V4", _name_twice_in_an_entry),
    ("V5", _write_to_no_operand),
    ("V5", _view_of_no_operand),
    ("V8", _traced_with_stages),
]


@pytest.mark.parametrize(("rule", "mutate"), MUTATED)
def test_only_one_rule_is_broken_by(rule: str, mutate: Callable[[Program], None]) -> None:
    program = load("clean")
    mutate(program)
    assert rules_broken(program) == {rule}


def test_v2_inside_regions() -> None:
    program = load("everything")
    inner = defining(program, "%choice").regions[0].ops[0]
    inner.operands[0].uses.clear()
    assert rules_broken(program) == {"V2"}


def test_v3_inside_regions() -> None:
    program = load("everything")
    region = defining(program, "%choice").regions[0]
    region.ops[0].results[0].owner = None
    assert rules_broken(program) == {"V3"}


def test_v9_op_outside_all_stages() -> None:
    program = load("shared")
    program.ops.append(Op("extern.f"))
    assert rules_broken(program) == {"V9"}


def test_v9_op_in_two_stages() -> None:
    program = load("shared")
    op = Op("extern.f")
    program.stages[0].ops.append(op)
    program.stages[2].ops.append(op)
    assert rules_broken(program) == {"V9"}


def test_v13_stage_does_not_output_what_it_sends() -> None:
    program = load("linked")
    skip = next(t for t in program.transfers if t.route == "relay")
    skip.source = 1
    assert rules_broken(program) == {"V13"}


def test_v14_foreign_name() -> None:
    program = load("linked")
    entry = program.name_owners()["buf"]
    program.stages[1].state[entry] = ("buf", "lifted")
    assert rules_broken(program) == {"V14"}


def _block_too_many(program: Program) -> None:
    program.stages[0].backward.append(Block("backward_weight"))


def _lists_what_it_does_not_read(program: Program) -> None:
    program.stages[0].backward[1].inputs.append(program.cotangents[0])


def _reads_what_it_does_not_list(program: Program) -> None:
    program.stages[2].backward[0].inputs.clear()


def _saves_twice(program: Program) -> None:
    program.stages[0].saved.append(program.stages[0].saved[0])


def _saves_what_is_not_read(program: Program) -> None:
    program.stages[0].saved.append(program.stages[0].ops[0].results[0])


def _gradient_of_another_type(program: Program) -> None:
    program.stages[0].backward[1].outputs[0].type = F32


def _gradient_of_a_foreign_weight(program: Program) -> None:
    program.stages[0].backward[1].outputs[0].gradient_of = program.name_owners()["lin.bias"].value


def _gradient_by_another_route(program: Program) -> None:
    program.backward_transfers[-1].route = "relay"


IN_BACKWARD = [
    ("V20", _block_too_many),
    ("V21", _reads_what_it_does_not_list),
    ("V21", _lists_what_it_does_not_read),
    ("V22", _saves_twice),
    ("V22", _saves_what_is_not_read),
    ("V23", _gradient_of_another_type),
    ("V23", _gradient_of_a_foreign_weight),
    ("V24", _gradient_by_another_route),
]


@pytest.mark.parametrize(("rule", "mutate"), IN_BACKWARD)
def test_only_one_rule_of_a_backward_is_broken_by(rule: str, mutate: Callable[[Program], None]) -> None:
    program = load("differentiated")
    mutate(program)
    assert rules_broken(program) == {rule}


def test_no_backward_stands_in_a_linked_program() -> None:
    program = load("linked")
    program.stages[0].backward = [Block(name) for name in ROLES[1:]]
    assert rules_broken(program) == {"V20"}


def test_a_gradient_arrives_once() -> None:
    program = load("differentiated")
    program.backward_transfers.append(program.backward_transfers[0])
    assert rules_broken(program) == {"V24"}


def test_a_gradient_that_does_not_arrive_is_missed() -> None:
    program = load("differentiated")
    program.backward_transfers.pop()
    assert rules_broken(program) == {"V21", "V24"}


def test_a_cotangent_is_that_of_an_output() -> None:
    program = load("differentiated")
    program.cotangents[0].gradient_of = program.inputs[0]
    assert rules_broken(program) == {"V21", "V23"}


@pytest.mark.parametrize("case", VALID)
def test_valid_in_every_phase(case: str) -> None:
    assert rules_broken(load(case)) == set()


def test_valid_programs_cover_every_phase() -> None:
    assert {load(case).phase for case in VALID} == {"traced", "partitioned", "linked", "differentiated"}


def test_program_without_ops_is_valid() -> None:
    program = parse("program @Echo phase=traced {\n  input %x : f32[4]\n  output (%x)\n}")
    run_passes(program, default_pipeline(), check=True)
    assert [stage.ops for stage in program.stages] == [[]]


def test_every_listed_invariant_has_a_test() -> None:
    listed = set(re.findall(r"^  (V\d+) ", INVARIANTS or "", re.MULTILINE))
    in_text = {rule for source in IN_TEXT.values() for rule in re.findall(r"# error: (V\d+)", source)}
    assert listed == {f"V{n}" for n in range(1, 28)}
    assert listed == in_text | {rule for rule, _ in MUTATED + IN_BACKWARD}


def test_all_violations_are_reported() -> None:
    program = load("clean")
    _use_missing(program)
    _name_twice_in_an_entry(program)
    _write_to_no_operand(program)
    with pytest.raises(VerifyError) as caught:
        verify(program, after="some-pass")
    assert [v.partition(":")[0] for v in caught.value.violations] == ["V5", "V2", "V4"]
    assert str(caught.value).startswith("invalid program after pass 'some-pass': 3 violation(s)\n  V5: ")


def test_violation_names_line_and_source() -> None:
    program = load("modules")
    defining(program, "%c").set_operands((Value(NONE, "ghost"),), {})
    with pytest.raises(VerifyError) as caught:
        verify(program)
    assert "`%c = aten.neg.default(%<undefined ghost>)" in str(caught.value)
    assert "src/model.py:6, module 'layers.0.attn'" in str(caught.value)


def test_a_transfer_too_much_does_not_end_in_a_traceback() -> None:
    program = load("crossing", Liveness())
    program.raise_phase("linked")
    program.transfers = [Transfer(t.value, 90, t.target, "send") for t in program.transfers]
    assert rules_broken(program) == {"V13"}


def test_split_target_is_what_the_verifier_looks_for() -> None:
    program = load("shared")
    program.stages[1].ops.append(Op(SPLIT))
    assert rules_broken(program) == {"V9"}
