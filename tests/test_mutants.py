"""Known bugs of splitters, seeded one at a time: would the suite notice?

A mutant changes one decision of the compiler. Each net looks alone, with the others off, at a small model the mutant
breaks; the table says which nets see it. Every model passes every net when nothing is mutated.

verifier: `verify` behind every pass.  validator: `validate` behind the last.  verify: `pipe.verify`.
pipe, mailbox: the checks of the edge-case tests, in one process and across boundaries.
calls: calls the model takes give its result, others are refused.  golden: the blessed diffs of the pass tests.
ports: order and routes, which matter to whoever binds by position and to nobody here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import test_canonicalize
import test_infer_gradients
import test_liveness
import test_partition
import test_rebase_views
import test_recompute
import test_resolve_aliases
import test_route
import test_share_state
import test_version_mutations
import torch
from compare import assert_same
from edge import MAILBOX, PIPE, Case, buffer, check, linear, t, weight
from helpers import CASES
from torch import nn

from stagecut import Pipe, pipe_split, pipeline
from stagecut.backend.stages import emit
from stagecut.backend.stages.modules import StageModule
from stagecut.frontend.lower import lower
from stagecut.ir import gradients
from stagecut.ir.check.validator import Trace, validate
from stagecut.ir.errors import InputError
from stagecut.ir.graph import PURE, Mode, Op, Program, Stage, StateEntry, Value
from stagecut.ir.outline import Positions
from stagecut.ir.run.call import CallSpec
from stagecut.ir.types import TensorType
from stagecut.passes import canonicalize, liveness, recompute, route, share_state, version_mutations
from stagecut.passes.liveness import Liveness
from stagecut.passes.partition import Partition
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.rebase_views import RebaseViews
from stagecut.passes.resolve_aliases import ResolveAliases
from stagecut.passes.runner import run_passes
from stagecut.passes.version_mutations import VersionMutations
from stagecut.pipe import lower as lowered

Patch = pytest.MonkeyPatch
Call = tuple[tuple[Any, ...], dict[str, Any]]
X, Y = t(4, 4), t(4, 4) + 1


@dataclass
class Model(Case):
    """A case whose pipe no check has looked at. `takes` and `refuses` are further calls."""

    takes: tuple[Call, ...] = ()
    refuses: tuple[Call, ...] = ()

    def cut(self, model: nn.Module) -> Pipe:
        with pytest.MonkeyPatch.context() as off:
            for place in ("stagecut.pipe.validate", "stagecut.backend.stages.staged.verify"):
                off.setattr(place, lambda *_: None)
            args, kwargs = self.inputs(0)
            return pipeline(model, args, kwargs, check=None)

    def program(self) -> Program:
        """As the frontend hands it to the passes."""
        return lowered(self.build().train(self.modes[0]), *self.inputs(0))[0]


MODELS: dict[str, Model] = {}


def model(*args: Any, **options: Any) -> Callable[[Any], Model]:
    """Adds the decorated class or forward function to the models."""

    def add(make: Any) -> Model:
        made = MODELS[make.__name__] = Model(make.__name__, make, args, **options)
        return made

    return add


# --- nets -----------------------------------------------------------------------------------------------


def see_verifier(case: Model) -> None:
    """Every pass leaves a valid program, and says whether it changed it."""
    run_passes(case.program(), default_pipeline(), check=True)


def see_validator(case: Model) -> None:
    """The staged program is the traced one."""
    program = case.program()
    trace = Trace(program)
    run_passes(program, default_pipeline())
    validate(trace, program)


def see_verify(case: Model) -> None:
    """The report of `pipe.verify` is empty."""
    whole = case.build().train(case.modes[0])
    args, kwargs = case.inputs(0)
    report = case.cut(whole).verify(*args, **kwargs)
    assert report.ok, report


def see_calls(case: Model) -> None:
    """By keyword in any order as by position; nothing else than traced."""
    whole = case.build()
    pipe = case.cut(whole)
    for args, kwargs in case.takes:
        assert_same(pipe.module()(*args, **kwargs), whole(*args, **kwargs), "another call")
    for args, kwargs in case.refuses:
        with pytest.raises(InputError):
            pipe(*args, **kwargs)


PASS_TESTS = (
    test_canonicalize, test_infer_gradients, test_liveness, test_partition, test_rebase_views, test_recompute, test_resolve_aliases,
    test_route, test_share_state, test_version_mutations,
)  # fmt: skip


def see_golden(_: Model) -> None:
    """The pass tests that compare with a blessed diff pass."""

    def bless(name: str, actual: str) -> None:
        assert (CASES.parent / "golden" / name).read_text(encoding="utf-8") == actual

    for module in PASS_TESTS:
        for name, function in vars(module).items():
            if name.startswith("test_") and list(inspect.signature(function).parameters) == ["bless"]:
                function(bless)


def see_ports(case: Model) -> None:
    """User inputs in the order of the signature, received values in the order they are sent, results in the order they are returned."""
    program = case.cut(case.build()).program
    for stage in program.stages:
        sources = [program.inputs, *(source.outputs for source in program.stages[: stage.index])]
        for sent in sources:
            assert [v for v in stage.inputs if v in sent] == [v for v in sent if v in stage.inputs]
    last = program.stages[-1].outputs
    assert last == [v for v in dict.fromkeys(program.output.operands) if v in last]
    for transfer in program.transfers:
        near = transfer.target - 1 == transfer.source
        if transfer.recomputed is None:
            assert transfer.route == ("feed" if transfer.source is None else "send" if near else "relay")


NETS: dict[str, Callable[[Model], None]] = {
    "verifier": see_verifier,
    "validator": see_validator,
    "verify": see_verify,
    "pipe": lambda case: check(case, (PIPE,)),
    "mailbox": lambda case: check(case, (MAILBOX,)),
    "calls": see_calls,
    "golden": see_golden,
    "ports": see_ports,
}


def seen_by(case: Model) -> dict[str, str]:
    """Net -> what it says, for all nets that do not let `case` pass."""
    found: dict[str, str] = {}
    for name, see in NETS.items():
        try:
            see(case)
        except (Exception, pytest.fail.Exception) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# --- mutants --------------------------------------------------------------------------------------------

Mutation = Callable[[Patch], None]
MUTANTS: dict[str, tuple[Mutation, Model, str]] = {}


def mutant(case: Model, nets: str) -> Callable[[Mutation], Mutation]:
    """Adds the decorated mutation to the table: what it breaks, and the nets that see it."""

    def add(mutate: Mutation) -> Mutation:
        MUTANTS[mutate.__name__] = (mutate, case, nets)
        return mutate

    return add


def wrap(patch: Patch, owner: Any, name: str, after: Callable[..., Any]) -> None:
    """`owner.name` returns what `after` makes of its result: after(result, *arguments)."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *args: after(real(*args), *args))


# --- (1) inputs bound in order of use -------------------------------------------------------------------


@model(X, Y, stages=2)
def two_inputs(self, x, y):
    a = y - 1
    b = x * 2 - y
    pipe_split()
    return a * 3, b - a  # what is read first is computed first


def other_ports(block: Stage, inputs: list[Value], outputs: list[Value]) -> Stage:
    """The stage with other inputs and outputs."""
    twin = Stage(block.index, block.ops)
    twin.inputs, twin.state = inputs, block.state
    twin.set_outputs(outputs)
    return twin


@mutant(two_inputs, "verify pipe mailbox calls")
def inputs_bound_in_order_of_use(patch: Patch) -> None:
    real = emit._Emitter.stage

    def stage(self: Any, block: Stage) -> Any:
        used = [v for v in self.where.live_ins(block.ops) if v in block.inputs]
        return real(self, other_ports(block, used, block.outputs))

    patch.setattr(emit._Emitter, "stage", stage)


two_inputs.takes = (((), {"y": Y, "x": X}), ((X,), {"y": Y}))


@model(stages=2, kw={"x": X, "y": Y}, takes=(((), {"x": X, "y": Y}), ((), {"y": Y, "x": X})))
def two_keywords(self, *, x, y):
    z = x * 2 - y
    pipe_split()
    return z * 3


@mutant(two_keywords, "calls")
def keywords_bound_in_the_order_given(patch: Patch) -> None:
    real = CallSpec.flatten
    patch.setattr(CallSpec, "flatten", lambda self, args, kwargs: real(self, args, dict(zip(self.keywords, kwargs.values(), strict=True))))


@mutant(two_inputs, "verifier ports")
def inputs_listed_in_order_of_use(patch: Patch) -> None:
    def in_order(listed: list[Value], live: list[Value], order: Any) -> list[Value]:
        return [v for v in live if v.owner is None] + [v for v in listed if v.owner is not None]

    wrap(patch, liveness, "_in_order", in_order)


@model(X, X, stages=2, takes=(((X, Y), {}),))
def one_tensor_twice(self, x, y):
    z = x - y
    pipe_split()
    return z * y


@mutant(one_tensor_twice, "verify calls")
def one_tensor_given_twice_taken_for_one_input(patch: Patch) -> None:
    patch.setattr("stagecut.frontend.capture.capture.distinct_tensors", lambda tree: tree)


# --- (2) stages numbered by first use -------------------------------------------------------------------


@model(X, stages=3)
def two_branches(self, x):
    a = x + torch.rand_like(x)
    pipe_split()
    b = x * torch.rand_like(x)
    pipe_split()
    return b * 2, a


@mutant(two_branches, "validator verify pipe mailbox golden")
def stages_numbered_by_first_use(patch: Patch) -> None:
    def renumber(changed: bool, _: Partition, program: Program) -> bool:
        at = {op: index for index, op in enumerate(program.all_ops())}

        def first_use(stage: Stage) -> int:
            users = [at[user] for op in stage.ops for v in op.results for user in v.uses if user in at and user not in stage.ops]
            return min(users, default=len(at))

        program.stages.sort(key=first_use)
        for index, stage in enumerate(program.stages):
            stage.index = index
        return changed

    wrap(patch, Partition, "run", renumber)


# --- (3) one pair, two orders ---------------------------------------------------------------------------


@mutant(two_inputs, "verify pipe mailbox calls")
def sent_in_another_order_than_received(patch: Patch) -> None:
    real = emit._Emitter.stage
    patch.setattr(emit._Emitter, "stage", lambda self, block: real(self, other_ports(block, block.inputs, block.outputs[::-1])))


@mutant(two_inputs, "verifier golden ports")
def received_in_another_order_than_sent(patch: Patch) -> None:
    wrap(patch, liveness, "_in_order", lambda values, live, order: values[::-1])


# --- (4) outputs dropped --------------------------------------------------------------------------------


@model(X, stages=3, has={"b": lambda: buffer(4)})
def many_outputs(self, x):
    early = x * 2
    pipe_split()
    y = early + self.b
    pipe_split()
    return y * 2, early, None, y, early, 3, x, self.b


@mutant(many_outputs, "verifier verify pipe mailbox golden")
def early_outputs_dropped(patch: Patch) -> None:
    patch.setattr(liveness, "positions", lambda program: Positions(program.all_ops(), Op("output", ([],))))


@mutant(many_outputs, "verify pipe mailbox golden")
def duplicated_outputs_dropped(patch: Patch) -> None:
    real = Program.set_outputs
    patch.setattr(Program, "set_outputs", lambda self, outputs: real(self, list(dict.fromkeys(outputs))))


@mutant(many_outputs, "validator verify pipe mailbox golden")
def constant_outputs_dropped(patch: Patch) -> None:
    def drop(changed: bool, _: Liveness, program: Program) -> bool:
        program.set_outputs([leaf for leaf in program.outputs if isinstance(leaf, Value)])
        return changed

    wrap(patch, Liveness, "run", drop)


@mutant(many_outputs, "verifier verify pipe mailbox golden")
def returned_state_dropped(patch: Patch) -> None:
    def drop(_: None, program: Program) -> None:
        last = program.stages[-1]
        last.set_outputs([v for v in last.outputs if not isinstance(v.owner, StateEntry)])

    wrap(patch, liveness, "_returned_last", drop)


@mutant(many_outputs, "verifier golden ports")
def last_stage_returns_in_order_of_definition(patch: Patch) -> None:
    def reorder(_: None, program: Program) -> None:
        last = program.stages[-1]
        last.set_outputs(sorted(last.outputs, key=lambda v: isinstance(v.owner, StateEntry), reverse=True))

    wrap(patch, liveness, "_returned_last", reorder)


# --- (5) replicas never summed --------------------------------------------------------------------------


@model(X, stages=2)
class Tied(nn.Module):
    """One weight under two names, a stage each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        pipe_split()
        return self.b(x)  # type: ignore[no-any-return]


@mutant(Tied, "mailbox golden")
def ties_not_seen(patch: Patch) -> None:
    patch.setattr(ResolveAliases, "run", lambda self, program: False)


@mutant(Tied, "verifier mailbox golden")
def replicas_not_summed(patch: Patch) -> None:
    def first_only(_: None, program: Program, entry: StateEntry, readers: Any) -> None:
        entry.stages = entry.stages[:1]

    wrap(patch, share_state, "_hold", first_only)


# --- (6) stale copies -----------------------------------------------------------------------------------


@model(X, stages=2, has={"b": lambda: buffer(4, value=0.0)}, feedback="next step would read a stale copy")
def read_early_written_late(self, x):
    y = x + self.b
    pipe_split()
    self.b.add_(y.detach().sum(0))
    return y * 2


@mutant(read_early_written_late, "mailbox golden")
def writers_of_shared_state_ignored(patch: Patch) -> None:
    replicate = share_state.REPLICATE
    patch.setattr(share_state, "_policy", lambda entry, home, readers: replicate if readers > 1 else None)


@model(X, stages=3)
def view_of_what_is_written(self, x):
    x = x * 2
    v = x[0]
    pipe_split()
    y = x + 1
    x.mul_(3)
    pipe_split()
    return v + y


@mutant(view_of_what_is_written, "validator mailbox golden")
def writes_make_no_version(patch: Patch) -> None:
    patch.setattr(VersionMutations, "run", lambda self, program: False)


@model(X, stages=2)
def view_returned(self, x):
    x = x * 2
    v = x[0]
    pipe_split()
    x.add_(1)
    return x * 3, v


@mutant(view_returned, "validator mailbox golden")
def returning_is_no_reading(patch: Patch) -> None:
    patch.setattr(version_mutations, "positions", lambda program: Positions(program.all_ops(), Op("output", ([],))))


class Norm(nn.Module):
    """Its running statistics are written in one stage and read in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        pipe_split()
        return x * self.norm.running_mean - self.norm.running_var * x  # type: ignore[operator]


NORM = model(X, stages=2)(Norm)


@mutant(NORM, "mailbox")
def writes_a_schema_hides_not_seen(patch: Patch) -> None:
    patch.setattr(lower, "undeclared_writes", lambda target, args: [])


@mutant(NORM, "validator verify pipe mailbox golden")
def versions_of_one_write_swapped(patch: Patch) -> None:
    def swap(changed: bool, _: VersionMutations, program: Program) -> bool:
        for op in program.all_ops():
            op.versions = dict(zip(op.versions, reversed(op.versions.values()), strict=True))
            for old, new in op.versions.items():
                new.version_of = old
        return changed

    wrap(patch, VersionMutations, "run", swap)


# --- (7) a view and its base sent as two tensors --------------------------------------------------------


@model(X, stages=2)
def view_and_base(self, x):
    x = x * 2
    v = x[0]
    pipe_split()
    v.add_(1)
    return x * 3, v * 4


@mutant(view_and_base, "mailbox golden")
def view_and_base_sent_as_two_tensors(patch: Patch) -> None:
    patch.setattr(RebaseViews, "run", lambda self, program: False)


@mutant(view_and_base, "mailbox")
def views_not_seen(patch: Patch) -> None:
    patch.setattr(lower.Lowering, "_views", lambda self, op, writes: ())


@model(X, stages=2)
def written_source(self, x):
    z = torch.zeros(4, dtype=torch.float64)
    v = z[:2]
    y = x * 2
    pipe_split()
    z.add_(1)
    return y[:, :2] * v


@mutant(written_source, "validator golden")
def sources_copied_although_written(patch: Patch) -> None:
    patch.setattr(recompute.Aliases, "is_written", lambda self, value: False)


# --- (8) mode burned in ---------------------------------------------------------------------------------


@model(X, stages=2, modes=(True, False), switch=True)
def drops(self, x):
    x = nn.functional.dropout(x, 0.5, self.training)
    pipe_split()
    return nn.functional.dropout(x * 2, 0.5, self.training)


@mutant(drops, "pipe mailbox")
def mode_burned_in(patch: Patch) -> None:
    real = emit._Function._literal_code
    patch.setattr(
        emit._Function, "_literal_code", lambda self, item, op: repr(item.captured) if isinstance(item, Mode) else real(self, item, op)
    )


@mutant(drops, "pipe mailbox")
def training_flags_not_set(patch: Patch) -> None:
    patch.setattr(emit, "_set_training", lambda root, bindings, unseen: None)


# --- (9) numbers burned in ------------------------------------------------------------------------------


@model(X, 2, "relu", True, None, stages=2, refuses=tuple(((X, *rest), {}) for rest in (
    (3, "relu", True, None), (2.0, "relu", True, None), (2, "tanh", True, None), (2, "relu", False, None), (2, "relu", True, 1),
)))  # fmt: skip
def numbers(self, x, n, name, flag, nothing):
    y = getattr(torch, name)(x) * n
    pipe_split()
    return y * 2 if flag and nothing is None else -y


@mutant(numbers, "calls")
def numbers_burned_in_without_a_guard(patch: Patch) -> None:
    patch.setattr("stagecut.backend.stages.staged.check_inputs", lambda *_: None)


# --- what crosses, and how ------------------------------------------------------------------------------


@model(X, stages=4, has={"w": weight})
def skips(self, x):
    a = x @ self.w
    s = a.detach()
    pipe_split()
    b = a * 2
    pipe_split()
    c = b.relu()
    pipe_split()
    return c + a, s * 3


@mutant(skips, "verifier golden")
def relays_dropped(patch: Patch) -> None:
    def neighbours(changed: bool, _: Liveness, program: Program) -> bool:
        program.transfers = [x for x in program.transfers if x.source is None or x.target == x.source + 1]
        return changed

    wrap(patch, Liveness, "run", neighbours)


@mutant(skips, "verifier golden ports")
def relays_called_sends(patch: Patch) -> None:
    wrap(patch, route, "_route", lambda found, *_: "send" if found == "relay" else found)


@mutant(skips, "verify pipe")
def released_too_early(patch: Patch) -> None:
    def plan(program: Program) -> list[list[Value]]:
        return [[v for v in stage.outputs if v not in program.output.operands] for stage in program.stages]

    patch.setattr("stagecut.backend.stages.staged.release_plan", plan)


@mutant(skips, "mailbox golden")
def nothing_carries_gradient(patch: Patch) -> None:
    patch.setattr(gradients, "grad_enabled", lambda context: False)


@mutant(skips, "mailbox golden")
def everything_carries_gradient(patch: Patch) -> None:
    def mark(values: Any, grads: Any) -> bool:
        marked = False
        for value in values:
            if isinstance(value.type, TensorType) and value.type.differentiable and not value.type.grad:
                value.type, marked = replace(value.type, grad=True), True
        return marked

    patch.setattr(gradients, "_mark", mark)


# --- effects, order and contexts ------------------------------------------------------------------------


@model(X, stages=2)
def two_draws(self, x):
    noise = torch.rand(4, dtype=torch.float64)
    x = nn.functional.dropout(x, 0.5, True)
    pipe_split()
    return x + noise


@mutant(two_draws, "validator verify pipe mailbox golden")
def random_sources_moved(patch: Patch) -> None:
    def any_source(self: Any, op: Op) -> bool:
        return not op.operands and not op.regions and len(op.results) == 1

    patch.setattr(recompute._Work, "_is_source", any_source)
    patch.setattr(recompute._Work, "_is_repeatable", lambda self, value, op: any_source(self, op))


@model(X, stages=2, has={"steps": lambda: buffer(value=0.0)})
def counts(self, x):
    y = x * 2
    self.steps.add_(1)
    pipe_split()
    return y + 1


@mutant(counts, "validator verify pipe mailbox golden")
def effects_without_readers_dropped(patch: Patch) -> None:
    def dead(found: set[Op], ops: list[Op]) -> set[Op]:
        return found | {op for op in ops if not op.is_split and not any(v.uses for v in op.definitions())}

    wrap(patch, canonicalize, "_dead_ops", dead)


@model(X, stages=2, has={"w": weight})
def without_gradient(self, x):
    with torch.no_grad():
        a = x @ self.w
        pipe_split()
        b = a @ self.w
    return x * b


@mutant(without_gradient, "verify pipe mailbox")
def contexts_not_emitted(patch: Patch) -> None:
    patch.setattr(emit, "_common_context", lambda run: ())


def forget(change: Callable[[Op], None]) -> Callable[..., bool]:
    """A pass that forgets something of every op."""

    def after(changed: bool, _: Any, program: Program) -> bool:
        for op in program.all_ops():
            change(op)
        return changed

    return after


@mutant(without_gradient, "validator verify pipe mailbox")
def contexts_lost_by_a_pass(patch: Patch) -> None:
    wrap(patch, Partition, "run", forget(lambda op: setattr(op, "place", op.place._replace(context=()))))


@mutant(view_of_what_is_written, "verifier validator mailbox golden")
def effects_lost_by_a_pass(patch: Patch) -> None:
    wrap(patch, Partition, "run", forget(lambda op: setattr(op, "effects", PURE)))


# --- modules and names ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """Adds once more when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor, more: bool) -> torch.Tensor:
        return self.layer(x) + x if more else self.layer(x)  # type: ignore[no-any-return]


@model(X, stages=2, has={"inner": Twice})
def called_in_two_ways(self, x):
    x = self.inner(self.inner(x, False), True)
    pipe_split()
    return x * 2


@mutant(called_in_two_ways, "verify pipe mailbox")
def calls_of_one_module_share_a_function(patch: Patch) -> None:
    wrap(patch, StageModule, "add_call", lambda number, *_: 0)


@model(X, stages=2, has={"kept": lambda: buffer(4), "scratch": lambda: buffer(4, persistent=False), "w": weight})
def holds(self, x):
    y = x @ self.w + self.kept
    pipe_split()
    return y * self.scratch


@mutant(holds, "verify pipe mailbox")
def transient_buffers_saved(patch: Patch) -> None:
    real = emit._register
    patch.setattr(emit, "_register", lambda owner, full, tensor, entry: real(owner, full, tensor, replace(entry, transient=frozenset())))


@mutant(holds, "pipe mailbox")
def stages_hold_copies(patch: Patch) -> None:
    real = emit._register

    def register(owner: Any, full: str, tensor: torch.Tensor, entry: StateEntry) -> None:
        copied = tensor.detach().clone()
        real(owner, full, nn.Parameter(copied) if entry.kind == "param" else copied, entry)

    patch.setattr(emit, "_register", register)


# --- tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_seen_without_a_mutant(name: str) -> None:
    """The nets let what is right pass."""
    assert seen_by(MODELS[name]) == {}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(name: str, monkeypatch: Patch) -> None:
    """By exactly the nets that the table names, and by one at least."""
    mutate, case, nets = MUTANTS[name]
    mutate(monkeypatch)
    found = seen_by(case)
    assert found.keys() == set(nets.split()), found
    assert found
