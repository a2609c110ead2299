"""Properties of the whole compiler, on drawn programs and drawn models."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import Near, assert_same
from edge import HOW, PIPE, Case, check, t
from fuzz.check import boundaries, round_trip
from fuzz.judge import FAILED, judge, programs, reproducer
from fuzz.plans import ModelPlan, build, inputs, options
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from strategies import ProgramPlan, build_program, program_inputs, program_plans
from torch import nn
from torch.utils._pytree import tree_leaves

from stagecut import pipe_split
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import CaptureError, VerifyError
from stagecut.ir.graph import Program, Value
from stagecut.ir.run.interp import run
from stagecut.ir.text.printer import text
from stagecut.ir.types import TensorType, Type
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.pipeline import NAMES, PASSES, default_pipeline
from stagecut.passes.runner import run_passes
from stagecut.pipe import lower

Tensors = dict[str, torch.Tensor]
Outcome = tuple[list[Any], Tensors]


def interpret(program: Program, flat: list[torch.Tensor], tensors: Tensors) -> Outcome:
    """Outputs and state that the reference interpreter leaves behind, from a fixed random state."""
    torch.manual_seed(3)
    with torch.no_grad():
        outputs, after = run(program, flat, tensors)
    # state is followed by tensor: several names of one tensor show the same
    return [o.clone() if isinstance(o, torch.Tensor) else o for o in outputs], after


def plain(kind: Type | None) -> Type | None:
    """A type without its gradient mark, which infer-gradients exists to change."""
    return replace(kind, grad=False) if isinstance(kind, TensorType) else kind


def interface(program: Program) -> tuple[Any, ...]:
    """What no pass may change: inputs, outputs and state names."""
    inputs = [(v.hint, v.type) for v in program.inputs]
    outputs = [plain(leaf.type) if isinstance(leaf, Value) else leaf for leaf in program.outputs]
    return inputs, outputs, sorted(name for entry in program.state for name in entry.names)


# --- drawn programs -----------------------------------------------------------------------------------


@given(program_plans())
def test_a_drawn_program_is_valid_and_reads_back_at_every_phase(plan: ProgramPlan) -> None:
    """parse(text(p)) is p, in whatever state the pipeline leaves it."""
    program = build_program(plan)
    wrong = round_trip(program)
    run_passes(program, default_pipeline(), check=True, after=lambda record, p: wrong.extend(round_trip(p)))
    assert not wrong


@given(program_plans())
def test_no_pass_changes_what_a_program_means(plan: ProgramPlan) -> None:
    """Outputs, and state afterwards, are the same before and after every single pass."""
    flat, tensors = program_inputs(plan)
    program = build_program(plan)
    reference = interpret(program, flat, tensors)

    def check(record: Any, p: Program) -> None:
        assert_same(interpret(p, flat, tensors), reference, f"after {record.name}: ")

    run_passes(program, default_pipeline(), check=True, after=check)


@pytest.mark.parametrize("index", range(len(PASSES)), ids=NAMES)
@settings(suppress_health_check=list(HealthCheck))
@given(plan=program_plans())
def test_a_pass_is_idempotent_and_keeps_the_interface(index: int, plan: ProgramPlan) -> None:
    """Run again in its place, a pass does nothing and says so; what the program promises outside is unchanged."""
    program = build_program(plan)
    steps = default_pipeline()
    run_passes(program, steps[:index])
    before = interface(program)
    run_passes(program, [steps[index]], check=True)
    assert interface(program) == before
    once = text(program)
    assert run_passes(program, [steps[index]], check=True)[0].changed is False
    assert text(program) == once


@given(program_plans(), st.sets(st.integers(0, 30), max_size=4))
def test_splitting_anywhere_never_changes_the_meaning(plan: ProgramPlan, cuts: set[int]) -> None:
    """A policy may cut in front of any op."""
    flat, tensors = program_inputs(plan)
    program = build_program(plan)
    reference = interpret(program, flat, tensors)

    def policy(program: Program) -> list[int]:
        count = sum(not op.is_split for op in program.ops)
        return [c for c in cuts if c <= count]

    run_passes(program, default_pipeline(FindSplits(policy=policy)), check=True)
    assert_same(interpret(program, flat, tensors), reference, "cut: ")


def assert_needed(program: Program, values: list[Value]) -> None:
    """Without any one of `values`, a list of the program, the program is invalid."""
    for value in list(values):
        place = values.index(value)
        values.remove(value)
        with pytest.raises(VerifyError):
            verify(program)
        values.insert(place, value)


@given(program_plans())
def test_live_ins_and_live_outs_are_minimal(plan: ProgramPlan) -> None:
    """No stage lists an input or output that could be left out."""
    program = build_program(plan)
    run_passes(program, default_pipeline())
    for stage in program.stages:
        assert_needed(program, stage.inputs)
        assert_needed(program, stage.outputs)
    verify(program)


@given(program_plans())
def test_every_state_name_has_a_holder(plan: ProgramPlan) -> None:
    """The names held by the stages are those of the program, read or not."""
    program = build_program(plan)
    run_passes(program, default_pipeline())
    held = {name for stage in program.stages for names in stage.state.values() for name in names}
    assert held == {name for name, _ in plan.state}


# --- drawn models -------------------------------------------------------------------------------------


@given(programs(graphs=0.25))
def test_stages_do_what_the_model_does(plan: ModelPlan) -> None:
    """All that the fuzzer holds a pipe to: in one process and in several, in both modes, pass by pass, with ops in another order."""
    verdict = judge(plan, deep=True)
    assert verdict.kind != FAILED, reproducer(plan, verdict)


@given(programs())
def test_the_interpreter_computes_what_the_model_computes(plan: ModelPlan) -> None:
    """Of what is lowered, before any pass."""
    model, (args, kwargs) = build(plan), inputs(plan)
    try:
        program, bindings, _ = lower(model, args, kwargs, options(plan).get("dynamic_shapes"), plan.whole)
    except CaptureError:
        reject()
    torch.manual_seed(3)
    expected = tree_leaves(deepcopy(model)(*deepcopy(args), **deepcopy(kwargs)))
    flat = bindings.call.flatten(args, kwargs)
    torch.manual_seed(3)
    found, _ = run(program, flat, bindings.tensors, bindings)
    assert_same(found, expected, "output", Near(requires_grad=False))


# --- cases that a property found ----------------------------------------------------------------------


def norm_that_nobody_reads(self: Any, x: torch.Tensor) -> torch.Tensor:
    """batch_norm updates statistics, though its schema does not say so: it was removed as dead."""
    self.norm(x)
    y = x * 2
    pipe_split()
    return y + 1


def statistics_read_in_the_next_stage(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The reader waits for the writer: the statistics are a value that crosses."""
    x = self.norm(x)
    pipe_split()
    return x + self.norm.running_mean  # type: ignore[no-any-return]


def norm_in_two_stages(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Statistics that cross carry no gradient: a schedule would wait for one that never comes."""
    x = self.norm(x)
    pipe_split()
    return self.norm(x)  # type: ignore[no-any-return]


def write_through_a_view_that_crossed(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Both are in one storage before the cut, and must be after it."""
    whole = x.relu() * 2
    part = whole[:, :2]
    pipe_split()
    part.add_(x[:, 2:])
    return whole.relu()


@pytest.mark.parametrize(
    ("forward", "how"),
    [
        (norm_that_nobody_reads, HOW),
        (statistics_read_in_the_next_stage, HOW),
        (norm_in_two_stages, (PIPE,)),
        (write_through_a_view_that_crossed, HOW),
    ],
)
def test_cases_that_a_property_found(forward: Any, how: tuple[str, ...]) -> None:
    one = Case(forward.__name__, forward, (t(4, 4),), stages=2, has={"norm": lambda: nn.BatchNorm1d(4).double()}, how=how)
    check(one)
    assert not boundaries(one.cut(one.build()), *one.inputs(0))
