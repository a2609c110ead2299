"""Properties of the whole compiler, on drawn programs and drawn models."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import BlockPlan, Do, ModelPlan, ProgramPlan, build_model, build_program, model_plans, program_inputs, program_plans
from torch import nn
from torch.utils._pytree import tree_flatten

from stagecut import pipe_split
from stagecut.frontend.capture.capture import capture
from stagecut.frontend.lower.from_export import lower_export
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import VerifyError
from stagecut.ir.graph import Program, Value
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import run
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.ir.types import TensorType, Type
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.pipeline import NAMES, PASSES, default_pipeline
from stagecut.passes.runner import run_passes
from stagecut.passes.share_state import FEEDBACK
from stagecut.pipe import Pipe, pipeline

Tensors = dict[str, torch.Tensor]


def lower(plan: ModelPlan) -> tuple[Program, Bindings]:
    """The traced program of the model of `plan`."""
    model, args, kwargs = build_model(plan)
    return lower_export(capture(model, args, kwargs)[0], model)


def assert_round_trip(program: Program) -> None:
    """The program prints, reads back valid, and prints the same."""
    printed = text(program)
    again = parse(printed)
    verify(again)
    assert text(again) == printed


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit: literals by ==, tensors in dtype, shape and every element."""
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


def interpret(
    program: Program, inputs: list[torch.Tensor], tensors: Tensors, bindings: Bindings | None = None
) -> tuple[list[Any], Tensors]:
    """What the reference interpreter makes of the program, from a fixed random state."""
    torch.manual_seed(3)
    with torch.no_grad():
        outputs, after = run(program, inputs, tensors, bindings)
    # state is followed by tensor: several names of one tensor show the same
    return [o.clone() if isinstance(o, torch.Tensor) else o for o in outputs], after


def assert_means_the_same(before: tuple[list[Any], Tensors], after: tuple[list[Any], Tensors]) -> None:
    """Two runs of the interpreter gave equal outputs and left equal state."""
    assert len(before[0]) == len(after[0])
    for one, other in zip(before[0], after[0], strict=True):
        assert_same(one, other)
    assert before[1].keys() == after[1].keys()
    for name, tensor in before[1].items():
        assert_same(tensor, after[1][name])


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
    assert_round_trip(program)
    run_passes(program, default_pipeline(), check=True, after=lambda record, p: assert_round_trip(p))


@given(program_plans())
def test_no_pass_changes_what_a_program_means(plan: ProgramPlan) -> None:
    """Outputs, and state afterwards, are the same before and after every single pass."""
    inputs, tensors = program_inputs(plan)
    program = build_program(plan)
    reference = interpret(program, inputs, tensors)

    def check(record: Any, p: Program) -> None:
        assert_means_the_same(reference, interpret(p, inputs, tensors))

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
    inputs, tensors = program_inputs(plan)
    program = build_program(plan)
    reference = interpret(program, inputs, tensors)

    def policy(program: Program) -> list[int]:
        count = sum(not op.is_split for op in program.ops)
        return [c for c in cuts if c <= count]

    run_passes(program, default_pipeline(FindSplits(policy=policy)), check=True)
    assert_means_the_same(reference, interpret(program, inputs, tensors))


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


@dataclass
class Outcome:
    """What one call of a model did: outputs, gradients, buffers afterwards."""

    outputs: list[Any]
    grads: dict[str, torch.Tensor | None]
    buffers: Tensors


def call(model: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
    """Calls `run`, which computes with the tensors of `model`, and goes backward through all outputs."""
    torch.manual_seed(5)
    outputs = tree_flatten(run(*args, **kwargs))[0]
    losses = [(o * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    detached = [o.detach().clone() if isinstance(o, torch.Tensor) else o for o in outputs]
    grads = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    return Outcome(detached, grads, {n: b.clone() for n, b in model.named_buffers(remove_duplicate=False)})


def assert_same_outcome(one: Outcome, other: Outcome) -> None:
    """Outputs and buffers equal bit for bit; gradients up to the order in which uses of a tensor are summed."""
    assert len(one.outputs) == len(other.outputs)
    for a, b in zip(one.outputs, other.outputs, strict=True):
        assert_same(a, b)
    for name, buffer in one.buffers.items():
        assert_same(buffer, other.buffers[name])
    assert one.grads.keys() == other.grads.keys()
    for name, grad in one.grads.items():
        found = other.grads[name]
        assert (grad is None) == (found is None), f"gradient of {name}: {grad} and {found}"
        if grad is not None:
            torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-9, equal_nan=True)


def assert_names(model: nn.Module, pipe: Pipe) -> None:
    """State names: each stage's a subset of the model's, their union the model's, and the tensors the model's own."""
    own = model.state_dict(keep_vars=True)
    union: set[str] = set()
    for stage in pipe.stages:
        held = stage.state_dict(keep_vars=True)
        assert all(tensor is own[name] for name, tensor in held.items())
        union |= set(held)
    assert union == set(own)
    assert list(pipe.state_dict()) == list(own)
    assert dict(pipe.named_parameters(remove_duplicate=False)).keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert dict(pipe.named_buffers(remove_duplicate=False)).keys() == dict(model.named_buffers(remove_duplicate=False)).keys()


def watch_boundaries(pipe: Pipe) -> None:
    """From now on every value a stage returns is checked against its type in the IR."""
    for stage, block in zip(pipe.stages, pipe.program.stages, strict=True):

        def check(module: nn.Module, inputs: Any, result: Any, outputs: list[Value] = block.outputs) -> None:
            items = result if len(outputs) != 1 else (result,)
            for value, item in zip(outputs, items if outputs else (), strict=True):
                assert isinstance(value.type, TensorType)
                assert list(item.shape) == list(value.type.shape)
                assert value.type.strides is not None or item.is_contiguous()
                assert item.requires_grad == value.type.grad, f"{value!r} is {value.type}, but requires_grad is {item.requires_grad}"

        stage.register_forward_hook(check)


def check_model(plan: ModelPlan) -> None:
    """Stages of the model of `plan` do what the model does; the model is as it was after being cut."""
    model, args, kwargs = build_model(plan)
    twin = deepcopy(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pipe = pipeline(model, args, kwargs)
    assert {n: b.tolist() for n, b in model.state_dict().items()} == {n: b.tolist() for n, b in before.items()}
    assert_names(model, pipe)
    watch_boundaries(pipe)
    expected = call(twin, twin, args, kwargs)
    assert_same_outcome(expected, call(model, pipe.module(), args, kwargs))
    assert tree_flatten(pipe.module()(*args, **kwargs))[1] == tree_flatten(twin(*args, **kwargs))[1]


@given(model_plans())
def test_stages_compute_what_the_model_computes(plan: ModelPlan) -> None:
    """Outputs in their structure, gradients, buffers and names."""
    check_model(plan)


@given(model_plans())
def test_lowered_models_read_back_and_mean_the_same_at_every_phase(plan: ModelPlan) -> None:
    """The text form holds real traces; the interpreter computes what the model does, after every pass."""
    model, args, kwargs = build_model(plan)
    program, bindings = lower_export(capture(model, args, kwargs)[0], model)
    inputs = [*args, *kwargs.values()]
    reference = interpret(program, inputs, bindings.tensors, bindings)
    torch.manual_seed(3)
    twin = deepcopy(model)
    with torch.no_grad():
        expected = [o.clone() if isinstance(o, torch.Tensor) else o for o in tree_flatten(twin(*args, **kwargs))[0]]
    for one, other in zip(expected, reference[0], strict=True):
        assert_same(one, other)
    before = interface(program)

    def check(record: Any, p: Program) -> None:
        assert_round_trip(p)
        assert interface(p)[1:] == before[1:]
        assert_means_the_same(reference, interpret(p, inputs, bindings.tensors, bindings))

    assert_round_trip(program)
    run_passes(program, default_pipeline(), check=True, after=check)


@given(model_plans(), st.sets(st.integers(0, 30), max_size=4))
def test_splitting_a_model_anywhere_never_changes_results(plan: ModelPlan, cuts: set[int]) -> None:
    """A policy in the program's own terms may cut in front of any op, in any module and context."""
    model, args, kwargs = build_model(plan)
    twin = deepcopy(model)

    def policy(program: Program) -> list[int]:
        count = sum(not op.is_split for op in program.ops)
        return [c for c in cuts if c <= count]

    pipe = pipeline(model, args, kwargs, split_policy=policy)
    watch_boundaries(pipe)
    assert_names(model, pipe)
    assert_same_outcome(call(twin, twin, args, kwargs), call(model, pipe.module(), args, kwargs))


def copy_boundaries(pipe: Pipe) -> None:
    """From now on every stage gets copies of what it is given, as it would from another process."""
    for stage in pipe.stages:
        stage.register_forward_pre_hook(lambda module, args: tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args))


def check_copied(pipe: Pipe, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stages that get copies do what the model does."""
    twin = deepcopy(model)
    copy_boundaries(pipe)
    assert_same_outcome(call(twin, twin, args, kwargs), call(model, pipe.module(), args, kwargs))


def without(plan: Any, kind: str) -> Any:
    """The plan of a block, and of all blocks in it, without steps of that kind."""
    if not isinstance(plan, BlockPlan):
        return plan
    return replace(plan, children=tuple(without(c, kind) for c in plan.children), steps=tuple(s for s in plan.steps if s.kind != kind))


@given(model_plans())
def test_stages_share_nothing_but_what_they_are_given(plan: ModelPlan) -> None:
    """Results do not hang on two stages seeing one storage, which two processes do not: nothing but fed-back state does."""
    model, args, kwargs = build_model(replace(plan, root=without(plan.root, "inplace_view")))
    pipe = pipeline(model, args, kwargs)
    assume(not any(entry.share == FEEDBACK for entry in pipe.program.state))
    check_copied(pipe, model, args, kwargs)


# --- cases that a property found ----------------------------------------------------------------------

UNUSED_NORM = BlockPlan(children=("batch",), steps=(Do("call"),))
WRITE_THROUGH_VIEW = BlockPlan(steps=(Do("relu"), Do("inplace_view"), Do("relu")))


def test_running_statistics_are_kept_when_the_output_is_not_used() -> None:
    """batch_norm updates them, though its schema does not say so: it was removed as dead."""
    check_model(ModelPlan(root=UNUSED_NORM, outputs=(Do("value", 1),)))


def test_running_statistics_written_in_one_stage_are_read_in_the_next() -> None:
    """The reader waits for the writer: the statistics are a value that crosses."""

    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            pipe_split()
            return x + self.norm.running_mean  # type: ignore[operator]

    model, x = Statistics(), torch.randn(4, 4)
    pipe = pipeline(model, (x,))
    check_copied(pipe, model, (x,), {})
    assert not pipe.program.stages[1].state


def test_a_write_through_a_view_that_crossed_reaches_the_value() -> None:
    """Both are in one storage before the cut, and must be after it."""
    model, args, kwargs = build_model(ModelPlan(root=WRITE_THROUGH_VIEW))
    check_copied(pipeline(model, args, kwargs), model, args, kwargs)


SHARED_NORM = BlockPlan(children=("batch",), steps=(Do("call"), Do("split"), Do("call")))


def test_running_statistics_that_cross_carry_no_gradient() -> None:
    """A schedule would wait for a gradient of them that never comes."""
    check_model(ModelPlan(root=SHARED_NORM))
