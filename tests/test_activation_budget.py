"""activation_budget: what stages save for a backward by graphs, chosen within a budget; and that this is what lies in memory."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from cluster.graphs import Batches, _first_difference, _run
from cluster.matrix import RanksFailed, cut, on_ranks
from cluster.models import SUBJECTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from zoo.cuts import equal_ops

from stagecut import Balanced, BudgetError, Device, Driver, InputError, Pipe, Setting, SplitError, pipeline
from stagecut.backend.schedules import SCHEDULES, SINGLE, flights
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.memory import Span, shared, traced_stage
from stagecut.backend.stages.roles import RoleCode
from stagecut.backend.stages.run import results_of
from stagecut.ir.graph import Value
from stagecut.ir.ops import is_heavy
from stagecut.ir.roles import Budget, Flight, Saved
from stagecut.ir.run.flops import flops_of
from stagecut.ir.types import storage_bytes

# --- random blocks --------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One layer of a random block: a norm, a product, an activation, something that joins."""

    def __init__(self, kind: str, width: int, inner: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.norm(x))
        if self.kind == "gate":
            h = F.silu(h) * torch.sigmoid(h)
        elif self.kind == "softmax":
            h = torch.softmax(h.transpose(0, 1) * 2.0, -1).transpose(0, 1)
        elif self.kind == "chunk":
            left, right = h.chunk(2, -1)
            h = torch.cat([F.gelu(left), torch.tanh(right) * left], -1)
        elif self.kind == "dropout":
            h = F.dropout(h.relu(), 0.5)
        else:
            h = F.gelu(h)
        return x + self.down(h) if self.kind != "plain" else self.down(h)


KINDS = ("gate", "softmax", "chunk", "dropout", "plain")


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Pipe, torch.Tensor]:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    width, inner = draw(st.sampled_from([4, 6])), draw(st.sampled_from([4, 10]))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(1, 5)), width, requires_grad=draw(st.booleans()))
    model = nn.Sequential(*(Layer(kind, width, inner) for kind in kinds))
    return pipeline(model, (x,), split_policy=equal_ops(draw(st.integers(1, 2))), check=None), x


FLIGHTS = st.builds(
    lambda inputs, gradients, more: Flight(inputs, gradients, inputs + more), st.integers(1, 8), st.integers(1, 4), st.integers(0, 4)
)
SLOW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(pipe: Pipe, x: torch.Tensor, graphs: list[Graphs]) -> list[torch.Tensor | None]:
    """Outputs and gradients; by autograd without graphs."""
    pipe.zero_grad()
    torch.manual_seed(7)
    leaf = x.detach().clone().requires_grad_(x.requires_grad)
    values: dict[Value, Any] = dict(zip(pipe.program.inputs, [leaf], strict=True))
    for stage, block in zip(pipe.stages, pipe.program.stages, strict=True):
        inputs = [values[value] for value in block.inputs]
        if graphs:
            graphs[block.index].begin(stage)
            results = graphs[block.index].run(inputs)
            assert results is not None, graphs[block.index].note
        else:
            results = results_of(stage(*inputs), block)
        values |= zip(block.outputs, map(crossed, results), strict=True)
    outputs = [values[value] for value in pipe.program.outputs]
    sum(output.square().sum() for output in outputs).backward()
    for each in reversed(graphs):
        each.take_weights()()
    return [*outputs, leaf.grad, *(parameter.grad for parameter in pipe.parameters())]


def crossed(result: torch.Tensor) -> torch.Tensor:
    """A value as another stage gets it: no view, and its gradient lies as it does. Kernels round otherwise where elements lie apart."""
    whole = result.clone() if result._is_view() else result
    if whole.requires_grad:
        whole.register_hook(lambda grad: torch.empty_like(whole).copy_(grad))
    return whole


def same(mine: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@SLOW
@given(blocks(), FLIGHTS, st.integers(0, 10))
def test_what_is_chosen_fits_and_a_larger_budget_means_less_work(case: Any, flight: Flight, seed: int) -> None:
    pipe, _ = case
    for index in range(pipe.num_stages):
        traced = traced_stage(pipe, index, {})
        span = Span.of(traced, flight)
        assert span.least <= span.most
        limits = [span.least + (span.most - span.least) * part // 4 for part in range(5)]
        work = []
        for limit in limits:
            roles, _ = traced.roles(Budget(limit, flight))
            assert roles.memory.during(flight) <= limit
            work.append(work_again(roles))
        assert all(more >= less for more, less in pairwise(work))
        assert work[-1] == (0, 0)
        with pytest.raises(BudgetError, match=rf"at least {span.least:,} bytes"):
            traced.roles(Budget(span.least - 1, flight))


def work_again(roles: Any) -> tuple[int, int]:
    """The heavy ops and the bytes of the light ops that are done again in any part, each once."""
    again = dict.fromkeys(op.origin for block in (roles.backward_input, roles.backward_weight) for op in block.ops if op.origin)
    heavy = [op for op in again if is_heavy(op)]
    light = [op for op in again if not is_heavy(op) and not op.is_view]
    values = [value for op in light for value in (*op.operands, *op.results)]
    return sum(map(flops_of, heavy)), len(light) + sum(storage_bytes(value.type) for value in values)


@SLOW
@given(blocks(), FLIGHTS)
def test_gradients_are_the_same_within_every_budget(case: Any, flight: Flight) -> None:
    pipe, x = case
    expected = run(pipe, x, [])
    for part in (0.0, 0.3, 0.7, 1.0):
        graphs = [Graphs(pipe, index, RoleCode(), Budget(part, flight)) for index in range(pipe.num_stages)]
        assert same(run(pipe, x, graphs), expected)


def test_a_gradient_that_crosses_lies_as_its_value() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    pipe = pipeline(Layer("softmax", 4, 4), (x,), split_policy=equal_ops(2), check=None)
    graphs = [Graphs(pipe, index, RoleCode(), Budget(0.3, Flight(1, 1, 1))) for index in range(2)]
    assert pipe.program.stages[1].inputs[-1].type.strides == (1, 4)  # type: ignore[union-attr]
    assert same(run(pipe, x, graphs), run(pipe, x, []))


# --- what lies in memory --------------------------------------------------------------------------------


def bytes_of(tensors: Any, resident: Any) -> int:
    """The memory of some tensors, each storage once, without that of `resident`."""
    known = {tensor.untyped_storage()._cdata for tensor in resident}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(nbytes for storage, nbytes in storages.items() if storage not in known)


def alive(pipe: Pipe, flat: list[Any], recompute: bool | Budget) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """For each stage, the bytes that its forward saves, and those that are left to the weights: predicted, and in a run."""
    graphs = [Graphs(pipe, index, RoleCode(), recompute) for index in range(pipe.num_stages)]
    values: dict[Value, Any] = dict(zip(pipe.program.inputs, flat, strict=True))
    measured, predicted, nodes = [], [], []
    resident = [*pipe.parameters(), *(x for x in flat if isinstance(x, torch.Tensor))]
    for stage, block in zip(pipe.stages, pipe.program.stages, strict=True):
        own = graphs[block.index]
        own.begin(stage)
        # each stage is a rank of its own: what it is given lies in no other's memory
        inputs = [values[value] if value.owner is None else values[value].detach().clone() for value in block.inputs]
        for value, tensor in zip(block.inputs, inputs, strict=True):
            if isinstance(tensor, torch.Tensor) and value.owner is not None:
                tensor.requires_grad_(value.type.grad)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            results = own.run(inputs)
        assert results is not None, own.note
        # a buffer that is written is not the one that was saved
        buffers = [slot.tensor for slot in own._pure.slots if not slot.written]  # type: ignore[union-attr]
        measured.append(bytes_of(saved, [*resident, *buffers]))
        predicted.append(own.saved)
        nodes.append((own, results, buffers))
        values |= zip(block.outputs, results, strict=True)
    left = []
    for own, results, buffers in nodes:
        ends = [result for result in results if result.requires_grad]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        left.append(bytes_of(own.take_weights()._needed, [*resident, *buffers]))  # type: ignore[attr-defined]
    of_forward = [(saved.forward, nbytes) for saved, nbytes in zip(predicted, measured, strict=True)]  # type: ignore[union-attr]
    of_weights = [(saved.weights + saved.gradients, nbytes) for saved, nbytes in zip(predicted, left, strict=True)]  # type: ignore[union-attr]
    return of_forward, of_weights


TRUE_TYPES = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="a trace says that the sums of rows of attention in f64 are f32, and they are f64"
)
WAYS = [False, True, Budget(0.6, Flight(3, 2, 4)), Budget(0.0, Flight(1, 4, 4))]


@SLOW
@given(blocks(), st.sampled_from(WAYS))
def test_what_is_predicted_lies_in_memory(case: Any, recompute: bool | Budget) -> None:
    pipe, x = case
    for of_stages in alive(pipe, [x], recompute):
        assert [predicted for predicted, _ in of_stages] == [measured for _, measured in of_stages]


@cache
def _model_in_two(name: str) -> Pipe:
    return cut(SUBJECTS[name], 2)[1]


@pytest.mark.parametrize("recompute", WAYS, ids=str)
@pytest.mark.parametrize("name", [pytest.param("Llama", marks=TRUE_TYPES), "ResNet", "UNet", "two towers"])
def test_what_is_predicted_for_a_model_lies_in_memory(name: str, recompute: bool | Budget) -> None:
    pipe = _model_in_two(name)
    flat = pipe.flatten((), SUBJECTS[name].inputs(2))
    for of_stages in alive(pipe, flat, recompute):
        assert [predicted for predicted, _ in of_stages] == [measured for _, measured in of_stages]


class Counting(nn.Module):
    """Writes a buffer that its backward reads as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(6))
        self.lin = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x) * self.seen.exp()
        self.seen.mul_(0.5)
        return x * 2


@pytest.mark.parametrize("recompute", WAYS, ids=str)
def test_a_buffer_that_is_written_counts_for_each_micro_batch(recompute: bool | Budget) -> None:
    x = torch.randn(4, 6)
    pipe = pipeline(Counting(), (x,), stages=1, check=None)
    assert alive(pipe, [x], recompute)[0] == [(24, 24)]


# --- schedules and ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flights_are_those_of_the_order_of_steps(schedule: str) -> None:
    for count in (4, 8):
        stages = 2 if schedule in SINGLE else 4
        setting = Setting(schedule=schedule, n_microbatches=count, ranks=None if schedule in SINGLE else 2)
        assert setting.flights(stages) == flights(setting.orders(stages), stages)
    assert all(flight.weights >= flight.inputs >= 1 and flight.gradients >= 1 for flight in setting.flights(stages))


def test_a_zero_bubble_schedule_keeps_what_weights_need_longer() -> None:
    late = Setting(schedule="InterleavedZeroBubble", n_microbatches=8, ranks=4).flights(8)[3]
    assert late == Flight(inputs=5, gradients=4, weights=8)
    assert Saved(inputs=100, weights=10, gradients=1).during(late) == 100 * 5 + 10 * 8 + 1 * 4


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4), st.integers(0, 300))
def test_the_stages_of_a_rank_share_its_budget(sizes: list[tuple[int, int]], limit: int) -> None:
    spans = {index: Span(least + more, least, Flight()) for index, (least, more) in enumerate(sizes)}
    if sum(span.least for span in spans.values()) > limit:
        with pytest.raises(BudgetError, match="stage"):
            shared(spans, limit)
        return
    budgets = shared(spans, limit)
    assert sum(budget.limit for budget in budgets.values()) <= limit
    assert all(span.least <= budgets[index].limit <= span.most for index, span in spans.items())


def compare_budget(pipe: Pipe, loss: Any, batches: Batches, schedule: str, budget: int | float) -> tuple[str, list[tuple[int, int]]]:
    """'ok' where all is as by autograd, and for each stage the bytes that it keeps at most, and those that it would keep."""
    start = [deepcopy(stage.state_dict()) for stage in pipe.stages]
    expected = _run(pipe, start, Driver(pipe, schedule, 4, loss), batches)
    held = []
    for options in ({}, {"activation_budget": budget}):
        driver = Driver(pipe, schedule, 4, loss, backward="graph", **options)
        # an eval saves nothing, and must not decide what a step saves
        driver.eval(**batches[0][1])
        actual = _run(pipe, start, driver, batches)
        assert "saves" in str(driver)
        every = driver._saving._flights()
        held.append([graphs.saved.during(every[index]) for index, graphs in driver._graphs.items()])  # type: ignore[union-attr]
    return _first_difference(expected, actual) or "ok", [*zip(held[1], held[0], strict=True)]


@pytest.mark.parametrize(("schedule", "budget"), [("1F1B", 0.2), ("ZBVZeroBubble", 0.5), ("ZBVZeroBubble", 130_000)])
def test_ranks_train_within_a_budget(schedule: str, budget: int | float) -> None:
    subject = SUBJECTS["Llama"]
    _, pipe = cut(subject, 2 if schedule in SINGLE else 4)
    torch.manual_seed(5)
    batches: list[Any] = [((), subject.inputs(8)) for _ in range(2)]
    answers = on_ranks(2, compare_budget, pipe, subject.loss, batches, schedule, budget)
    assert [answer for answer, _ in answers] == ["ok"] * 2
    setting = Setting("CPU", schedule, 4, ranks=None if schedule in SINGLE else 2, backward="graph", activation_budget=budget)
    predicted = {stage.index: (stage.saved.chosen, stage.saved.everything) for stage in pipe.report(setting).stages if stage.saved}
    for rank, (_, held) in enumerate(answers):
        assert held == [predicted[index] for index, home in enumerate(setting.placement(pipe.num_stages)) if home == rank]
    assert any(kept < everything for _, held in answers for kept, everything in held)
    for _, held in answers:
        assert all(0 < kept <= everything for kept, everything in held)
        if isinstance(budget, int):
            assert sum(kept for kept, _ in held) <= budget


# --- predictions ----------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer("gate", 16, 32) for _ in range(8))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


X = torch.randn(64, 16)
GRAPH = Setting("CPU", "1F1B", 8, optimizer="sgd", backward="graph")


def _balanced(setting: Setting, **options: Any) -> Pipe:
    return pipeline(Blocks(), (X,), split_policy=Balanced(4, setting, inside="never", **options), check=None)


def test_the_report_shows_what_graphs_save_with_and_without_recomputation() -> None:
    pipe = _balanced(GRAPH)
    for recompute in (False, True):
        report = pipe.report(replace(GRAPH, recompute=recompute))
        for stage, flight in zip(report.stages, GRAPH.flights(4), strict=True):
            assert stage.saved is not None
            assert stage.saved.chosen == traced_stage(pipe, stage.index, {}).memory(recompute).during(flight)
            assert stage.memory["activations"] == stage.saved.chosen
            assert stage.saved.least <= stage.saved.light_again < stage.saved.everything
        assert "nothing again  recompute=True  at least" in str(report)
        assert '"light_again"' in report.to_json()
    assert pipe.report(replace(GRAPH, backward="autograd")).stages[0].saved is None


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"schedule": "ZBVZeroBubble", "ranks": 2}], ids=str)
def test_balanced_counts_what_the_report_counts(options: dict[str, Any]) -> None:
    pipe = _balanced(replace(GRAPH, **options))
    assert pipe.plan is not None
    reported = [sum(stage.memory.values()) for stage in pipe.report().stages]
    # the gradient of what the first stage hands on is not counted before the cut
    arriving = 64 * 16 * 4
    assert reported == [pipe.plan.memory[0] + arriving, *pipe.plan.memory[1:]]


def test_within_a_budget_blocks_are_counted_one_by_one_before_the_cut() -> None:
    pipe = _balanced(replace(GRAPH, activation_budget=0.5))
    assert pipe.plan is not None
    for stage, planned in zip(pipe.report().stages, pipe.plan.memory, strict=True):
        assert 0.6 * planned < sum(stage.memory.values()) <= planned


def test_cuts_that_do_not_fit_fit_within_a_budget() -> None:
    needs = [sum(stage.memory.values()) for stage in _balanced(GRAPH).report().stages]
    small = Device("small", 1e12, 1e11, 0.6 * max(needs), 1e10)
    with pytest.raises(SplitError, match="do not fit"):
        _balanced(replace(GRAPH, device=small), budget=1.0)
    fitting = _balanced(replace(GRAPH, device=small, activation_budget=0.1), budget=1.0)
    assert fitting.report().too_large == ()


def test_a_budget_that_no_stage_can_keep_is_refused_before_the_cut_and_after() -> None:
    with pytest.raises(SplitError, match="no cuts into 4 stages save as little as activation_budget=1,000 bytes"):
        _balanced(replace(GRAPH, activation_budget=1000))
    with pytest.raises(BudgetError, match=r"at: rank 0, stage 0"):
        _balanced(GRAPH).report(replace(GRAPH, activation_budget=1))


# --- errors ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def test_a_budget_below_the_least_is_an_error_that_says_where_and_what_to_do() -> None:
    with pytest.raises(RanksFailed) as raised:
        on_ranks(2, _too_small, _two_blocks(2), "1F1B")
    for part in ("rank 0 (stage 0) failed", "needs at least ", "the budget is 10", "a larger activation_budget=", "more stages"):
        assert part in str(raised.value)


def test_ranks_that_cannot_share_their_budgets_say_so_before_any_work() -> None:
    for rank, messages in enumerate(on_ranks(2, _too_small_twice, _two_blocks(4))):
        for message in messages:
            assert f"at: the stages {'0, 3' if rank == 0 else '1, 2'}" in message
            assert "the budget is 10" in message


def _two_blocks(stages: int) -> Pipe:
    model = nn.Sequential(Small(), Small())
    return pipeline(model, (torch.randn(4, 6),), split_policy=equal_ops(stages), check=None)


def _too_small(pipe: Pipe, schedule: str) -> None:
    driver = Driver(pipe, schedule, 4, F.mse_loss, backward="graph", activation_budget=10)
    driver.step(torch.ones(16, 6), target=torch.ones(16, 6))


def _too_small_twice(pipe: Pipe) -> list[str]:
    driver = Driver(pipe, "ZBVZeroBubble", 4, F.mse_loss, backward="graph", activation_budget=10)
    messages = []
    for _ in range(2):
        with pytest.raises(BudgetError) as raised:
            driver.step(torch.ones(16, 6), target=torch.ones(16, 6))
        messages.append(str(raised.value))
    return messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_budget": 100}, "chooses what backward='graph' saves"),
        ({"activation_budget": 0.5, "backward": "graph", "recompute": True}, "recompute=True saves as little"),
        ({"activation_budget": 1.5, "backward": "graph"}, "activation_budget=1.5 is neither bytes nor a part"),
        ({"activation_budget": True, "backward": "graph"}, "activation_budget=True is neither"),
    ],
)
def test_a_budget_that_says_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    pipe = pipeline(Small(), (torch.randn(4, 6),), stages=1, check=None)
    with pytest.raises(InputError, match=message):
        pipe.report(Setting(**options))
