"""Translation validation: every way in which stages can differ from the trace is found, and named."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers import load, rules_broken

from stagecut.ir.check import validator
from stagecut.ir.check.validator import Trace, validate
from stagecut.ir.errors import VerifyError
from stagecut.ir.graph import Context, Op, Program, StateEntry, Target, Value
from stagecut.ir.ops import FACTS
from stagecut.ir.text.parser import parse
from stagecut.ir.types import TensorType
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.runner import run_passes

SOURCE = """program @P phase=traced {
  input %x : f32[4]
  input %y : f32[4]
  state @w : param f32[4] grad tensor(0)
  state @v : param f32[4] grad tensor(0)
  state @buf : buffer f32[4] tensor(1)
  %a = aten.mul.Tensor(%x, @w) : f32[4] at net.py:1
  %top = aten.slice.Tensor(%a, 0, 0, 2) : f32[2] view(%a) at net.py:2
  %n = aten.dropout.default(%a, 0.5, True) : f32[4] random at net.py:3
  aten._assert_scalar.default(%n, "guard") effect
  %dead = aten.neg.default(%n) : f32[4]
  split
  aten.add_.Tensor(%top, 1) writes(%top) at net.py:5
  aten.add_.Tensor(@buf, %y) writes(@buf) at net.py:6
  %c = aten.mul.Tensor(%a, @v) : f32[4] at net.py:7
  split
  %zeros = aten.zeros.default([4], dtype=torch.float32) : f32[4] at net.py:8
  %d = extern.f([%c, {"k": %n}, nan], slice(0, %a, 2), one=1, zeros=%zeros) : f32[4] at net.py:9
  output (%d, %top, 2, %x, @buf)
}
"""


def compiled(source: str = SOURCE) -> tuple[Trace, Program]:
    """The trace of a program, and the program behind all passes."""
    program = parse(source)
    trace = Trace(program)
    run_passes(program, default_pipeline(), check=True)
    return trace, program


def at(program: Program, line: int) -> Op:
    """The op of that source line."""
    return next(op for op in program.all_ops() if op.loc and op.loc.line == line)


def violations(trace: Trace, program: Program) -> list[str]:
    """What differs."""
    try:
        validate(trace, program)
    except VerifyError as error:
        return error.violations
    return []


# --- what is right --------------------------------------------------------------------------------------


def test_a_correct_program_passes() -> None:
    trace, program = compiled()
    assert [len(stage.ops) for stage in program.stages] == [2, 4, 2]
    assert violations(trace, program) == []


@pytest.mark.parametrize("case", ["clean", "dead-code", "double-write", "last-write", "markers", "tied", "view-of-view", "writes"])
def test_the_cases_pass(case: str) -> None:
    program = load(case)
    trace = Trace(program)
    run_passes(program, default_pipeline())
    validate(trace, program)


def test_what_may_differ() -> None:
    """Gradient marks, names of values, and the stage an op is in as long as the order of ops stays."""
    trace, program = compiled()
    result = at(program, 1).results[0]
    assert isinstance(result.type, TensorType)
    result.type = replace(result.type, grad=not result.type.grad)
    result.hint = "other"
    program.stages[1].ops.insert(0, program.stages[0].ops.pop())
    assert violations(trace, program) == []


def test_a_pass_cannot_change_the_trace() -> None:
    """It was recorded: operands put back in place of others are found even where the op itself was rewritten."""
    program = parse(SOURCE)
    trace = Trace(program)
    for op in program.all_ops():
        op.replace_operand(program.inputs[0], program.inputs[1])
    run_passes(program, default_pipeline())
    assert any("other operands than traced: net.py:1" in v for v in violations(trace, program))


def test_guards_need_not_run() -> None:
    """Those that canonicalize drops are those the validator does not miss."""
    for target in [spelled for name, facts in FACTS.items() if facts.guard for spelled in (f"aten.{name}.default", f"torch.{name}")]:
        program = parse(f"program @P phase=traced {{\n input %x : f32[4]\n {target}(%x) effect\n output (%x)\n}}")
        trace = Trace(program)
        run_passes(program, default_pipeline())
        assert not program.stages[0].ops
        validate(trace, program)


# --- what is wrong --------------------------------------------------------------------------------------

Break = Callable[[Program], Any]


def _set(line: int, **fields: Any) -> Break:
    """The op of that line applies to other operands."""

    def apply(p: Program) -> None:
        op = at(p, line)
        op.set_operands(fields.get("args", op.args), fields.get("kwargs", op.kwargs))

    return apply


def _other_target(p: Program) -> None:
    at(p, 1).target = Target("aten.add.Tensor")


def _other_type(p: Program) -> None:
    at(p, 1).results[0].type = TensorType("f64", (4,))


def _one_result_more(p: Program) -> None:
    at(p, 1).add_result(TensorType("f32", (4,)))


def _operands_swapped(p: Program) -> None:
    op = at(p, 1)
    op.set_operands(op.args[::-1], {})


def _input_for_input(p: Program) -> None:
    at(p, 1).replace_operand(p.inputs[0], p.inputs[1])


def _state_for_state(p: Program) -> None:
    w, buf = (e.value for e in p.state)
    at(p, 7).replace_operand(w, buf)


def _value_for_literal(p: Program) -> None:
    at(p, 3).set_operands((at(p, 3).args[0], p.inputs[0], True), {})


def _in_list(change: Callable[[list[Any]], Any]) -> Break:
    def apply(p: Program) -> None:
        op = at(p, 9)
        op.set_operands((change(op.args[0]), op.args[1]), op.kwargs)

    return apply


def _slice_for_slice(p: Program) -> None:
    op = at(p, 9)
    op.set_operands((op.args[0], slice(1, op.args[1].stop, 2)), op.kwargs)


def _keyword(**changed: Any) -> Break:
    def apply(p: Program) -> None:
        op = at(p, 9)
        op.set_operands(op.args, {**op.kwargs, **changed})

    return apply


def _keyword_less(p: Program) -> None:
    op = at(p, 9)
    op.set_operands(op.args, {"zeros": op.kwargs["zeros"]})


def _swap_in_stage(p: Program) -> None:
    ops = p.stages[1].ops
    ops[1], ops[2] = ops[2], ops[1]


def _swap_stages(p: Program) -> None:
    p.stages.insert(1, p.stages.pop(0))


def _foreign_op(p: Program) -> None:
    op = Op("aten.neg.default", (p.inputs[0],), place=at(p, 1).place)
    op.add_result(TensorType("f32", (4,)))
    p.stages[1].ops.append(op)


def _copy_of_a_foreign_op(p: Program) -> None:
    stranger = Op("aten.neg.default", (p.inputs[0],))
    p.stages[1].ops.append(stranger.copy({}))


def _lose(line: int) -> Break:
    def apply(p: Program) -> None:
        op = at(p, line)
        for stage in p.stages:
            stage.ops = [o for o in stage.ops if o is not op]

    return apply


def _run_twice(line: int) -> Break:
    """As a copy, the way sources are."""

    def apply(p: Program) -> None:
        op = at(p, line)
        op.versions = {}
        p.stages[2].ops.append(op.copy({}))

    return apply


def _old_version_read(p: Program) -> None:
    a = at(p, 1).results[0]
    at(p, 7).replace_operand(at(p, 5).versions[a], a)


def _alias_not_renewed(p: Program) -> None:
    a = at(p, 1).results[0]
    new = at(p, 5).versions.pop(a)
    new.replace_uses(a)


def _context_changed(p: Program) -> None:
    at(p, 7).place = at(p, 7).place._replace(context=(Context("no_grad"),))


def _alias_returned(p: Program) -> None:
    _alias_not_renewed(p)
    p.set_outputs([at(p, 1).results[0], *p.outputs[1:]])


def _old_version_returned(p: Program) -> None:
    top = at(p, 2).results[0]
    p.set_outputs([p.outputs[0], top, *p.outputs[2:]])


def _outputs(change: Callable[[list[Any]], list[Any]]) -> Break:
    return lambda p: p.set_outputs(change(p.outputs))


def _rename(p: Program) -> None:
    p.state[1].names = ("other",)


def _name_lost(p: Program) -> None:
    p.state[0].names = p.state[0].names[:1]


def _untied(p: Program) -> None:
    """@v is a tensor of its own."""
    w = p.state[0]
    p.state.append(replace(w, names=("v",), tensor=9))
    w.names = ("w",)


def _foreign_state(p: Program) -> None:
    p.stages[2].state[StateEntry(("w",), "param", TensorType("f32", (4,)))] = ("w",)


def _inputs_swapped(p: Program) -> None:
    p.inputs.reverse()


def _input_more(p: Program) -> None:
    p.add_input(TensorType("f32", (4,)), "z")


ORDER = r"out of order: net\.py:{}, op .* runs behind an op it stood in front of"
OTHER = r"other operands than traced: net\.py:{}, op "
BROKEN: dict[str, tuple[Break, str]] = {
    "inputs swapped": (_inputs_swapped, "the user inputs are not those of the trace, or in another order"),
    "an input more": (_input_more, "the user inputs are not those of the trace"),
    "a foreign op": (_foreign_op, r"stage 1 runs an op that the trace does not have: net\.py:1, op aten\.neg"),
    "a copy of a foreign op": (_copy_of_a_foreign_op, r"stage 1 runs an op that the trace does not have: op aten\.neg"),
    "another target": (_other_target, r"another op or another result type than traced: net\.py:1, op aten\.add"),
    "another type": (_other_type, r"another op or another result type than traced: net\.py:1"),
    "a result more": (_one_result_more, r"another op or another result type than traced: net\.py:1"),
    "operands swapped": (_operands_swapped, OTHER.format(1)),
    "another input": (_input_for_input, OTHER.format(1)),
    "other state": (_state_for_state, OTHER.format(7)),
    "a value for a literal": (_value_for_literal, OTHER.format(3)),
    "an operand less": (_set(3, args=()), OTHER.format(3)),
    "True for 1": (_keyword(one=True), OTHER.format(9)),
    "1.0 for 1": (_keyword(one=1.0), OTHER.format(9)),
    "another keyword": (_keyword(two=2), OTHER.format(9)),
    "a keyword less": (_keyword_less, OTHER.format(9)),
    "another slice": (_slice_for_slice, OTHER.format(9)),
    "a tuple for a list": (_in_list(tuple), OTHER.format(9)),
    "a list in another order": (_in_list(lambda items: [items[1], items[0], items[2]]), OTHER.format(9)),
    "another key": (_in_list(lambda items: [items[0], {"l": items[1]["k"]}, items[2]]), OTHER.format(9)),
    "inf for nan": (_in_list(lambda items: [*items[:2], float("inf")]), OTHER.format(9)),
    "ops swapped": (_swap_in_stage, ORDER.format(5)),
    "stages swapped": (_swap_stages, ORDER.format(1)),
    "an op whose result is read is lost": (_lose(7), r"lost: net\.py:7, op aten\.mul"),
    "a write nobody reads is lost": (_lose(6), r"lost: net\.py:6, op aten\.add_"),
    "a draw that runs twice": (_run_twice(3), r"runs 2 times although it has an effect: net\.py:3, op aten\.dropout"),
    "a write that runs twice": (_run_twice(6), r"runs 2 times although it has an effect: net\.py:6"),
    "an old version read": (_old_version_read, r"%a is read after a newer version was written: net\.py:7"),
    "an alias that was not renewed": (_alias_not_renewed, r"%a shares storage with what net\.py:5, .* wrote, but is read as if unwritten"),
    "another context": (_context_changed, r"another context, scope or effect than traced: net\.py:7"),
    "a copy of what is written": (_run_twice(1), r"is made anew, although what shares its storage is written: net\.py:1"),
    "an alias returned that was not renewed": (_alias_returned, r"%a shares storage with what net\.py:5, .* wrote, but is returned"),
    "an old version returned": (_old_version_returned, "%top is returned after a newer version was written"),
    "outputs swapped": (_outputs(lambda out: [out[1], out[0], *out[2:]]), "the program returns other values than traced"),
    "an output dropped": (_outputs(lambda out: out[:-1]), "the program returns other values than traced"),
    "a constant output changed": (_outputs(lambda out: [*out[:2], 3, *out[3:]]), "the program returns other values than traced"),
    "a constant output of another type": (_outputs(lambda out: [*out[:2], 2.0, *out[3:]]), "the program returns other values than traced"),
    "a name changed": (_rename, r"state names differ from the model's: \['buf', 'other'\]"),
    "a name lost": (_name_lost, r"state names differ from the model's: \['v'\]"),
    "a tie lost": (_untied, "state names differ from the model's: ties differ"),
    "foreign state": (_foreign_state, "stage 2 holds state the program does not have"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str) -> None:
    breaking, message = BROKEN[name]
    trace, program = compiled()
    breaking(program)
    found = violations(trace, program)
    assert any(re.search(message, violation) for violation in found), found


def test_every_kind_of_violation_has_a_case() -> None:
    """As many as the validator has messages."""
    messages = re.findall(r'yield f?"([^"]+)"', inspect.getsource(validator))
    patterns = [re.sub(r"\\{[^{}]*(?:\\{[^{}]*\\}[^{}]*)*\\}", ".*", re.escape(message)) for message in messages]
    assert len(patterns) > 10
    unseen = set(patterns)
    for breaking, _ in BROKEN.values():
        trace, program = compiled()
        breaking(program)
        unseen -= {p for p in unseen for violation in violations(trace, program) if re.search(p, violation)}
    assert not unseen


def test_all_differences_are_listed() -> None:
    trace, program = compiled()
    _inputs_swapped(program)
    _lose(6)(program)
    _rename(program)
    with pytest.raises(VerifyError, match=r"the stages differ from the trace") as caught:
        validate(trace, program)
    assert len(caught.value.violations) >= 3


def test_what_the_verifier_cannot_see() -> None:
    """Valid IR of another program: only the comparison with the trace tells."""
    for name in ("another target", "operands swapped", "ops swapped", "a constant output changed"):
        trace, program = compiled()
        BROKEN[name][0](program)
        assert not rules_broken(program)
        assert violations(trace, program)


def test_a_value_of_nowhere_is_another_operand() -> None:
    trace, program = compiled()
    at(program, 7).replace_operand(at(program, 7).operands[0], Value(TensorType("f32", (4,)), "ghost"))
    assert any("other operands than traced: net.py:7" in v for v in violations(trace, program))
