"""The order of steps by their times: every step once, nothing waited for in vain, no more held than allowed, never longer than the
schedule's own; and ranks that run it train as one process."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, pipeline
from stagecut.backend.costs.balance import Balanced
from stagecut.backend.costs.runtime import Run
from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.timed import Work
from stagecut.backend.schedules import (
    FORWARD,
    INPUT,
    RECV_F,
    SEND_F,
    SPLITTING,
    WEIGHT,
    Orders,
    Step,
    homes,
    is_computed,
    most_held,
    refuse_orders,
)
from stagecut.backend.tables import time_text
from stagecut.ir.errors import InputError, StagecutError

V = "ZBVZeroBubble"
SECONDS = st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0, 7.0])


@st.composite
def works(draw: st.DrawFn) -> tuple[str, Work]:
    """A schedule that splits backwards, and work for its placement. Ranks may hold what they need at least, or more, or what the
    schedule's own order needs, or more."""
    schedule = draw(st.sampled_from(SPLITTING))
    ranks = draw(st.integers(1, 4))
    of_a_rank = draw(st.integers(1, 3)) if schedule == "InterleavedZeroBubble" else 2
    stages = ranks * of_a_rank
    seconds = {(kind, s): draw(SECONDS) for s in range(stages) for kind in (FORWARD, INPUT, WEIGHT)}
    most = [draw(st.integers(of_a_rank, 3 * stages)) for _ in range(ranks)]
    delays = [draw(st.sampled_from([0.0, 0.25, 2.0])) for _ in range(stages)]
    # numbers that torch's schedules take
    count = {"InterleavedZeroBubble": ranks * draw(st.integers(1, 3)), "DualPipeV": stages + draw(st.integers(0, 2))}.get(
        schedule, draw(st.integers(1, 6))
    )
    work = Work(homes(stages, ranks, schedule != "InterleavedZeroBubble"), count, seconds, delays, most)
    if draw(st.booleans()):
        own = tuple(Setting(schedule=schedule, ranks=ranks, n_microbatches=count).orders(stages))
        work = replace(work, most=[most_held(order) + draw(st.integers(0, 2)) for order in own], own=own)
    return schedule, work


@given(works())
@settings(max_examples=40, deadline=None)
def test_each_step_is_done_once_and_no_rank_holds_too_much_or_waits_for_ever(drawn: tuple[str, Work]) -> None:
    schedule, work = drawn
    ranks = max(work.homes) + 1
    for orders in work.orders():
        refuse_orders(orders, schedule, tuple(work.homes), work.count)
        assert all(most_held(order) <= most for order, most in zip(orders, work.most, strict=True))
        setting = Setting(schedule=schedule, ranks=ranks, n_microbatches=work.count, order=orders)
        computed = [tuple(step for step in order if is_computed(step)) for order in orders]
        assert [*setting.orders(work.stages)] == computed  # torch's runtime has the same steps
        run = Run(setting.actions(work.stages), lambda step: (work.seconds[step.kind, step.stage], 0.0), work.delays, 0.0, max)
        assert len(run.steps) == 3 * work.stages * work.count


class Block(nn.Module):
    """Attention, which has no weights of its own, takes a forward and gradients of inputs, and none for weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        after: torch.Tensor = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)).tanh()
        return after


class Tower(nn.Module):
    """Blocks of one width, and a head."""

    def __init__(self, blocks: int, width: int, out: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(width) for _ in range(blocks)]), nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def _searched(schedule: str, count: int, order: str) -> Pipe:
    with torch.device("meta"):
        model = Tower(16, 2048, 32_000)
        x = torch.empty(2, 2048, 2048)
    setting = Setting(schedule=schedule, ranks=4, n_microbatches=count)
    return pipeline(model, (x,), split_policy=Balanced(8, setting, order=order), check=None)


@pytest.mark.parametrize(("schedule", "part"), [("InterleavedZeroBubble", 0.99), (V, 0.97)])
def test_the_search_finds_shorter_steps_that_hold_no_more(schedule: str, part: float) -> None:
    own, timed = (_searched(schedule, 4, order).plan for order in ("schedule", "timed"))
    assert own is not None
    assert timed is not None
    assert own.order is None
    assert timed.order is not None
    assert timed.step < part * own.step
    for mine, theirs in zip(timed.setting.orders(8), own.setting.orders(8), strict=True):
        assert most_held(mine) <= most_held(theirs)
    assert timed.choice is not None
    assert timed.choice.own_order == own.choice.chosen  # type: ignore[union-attr]
    (row,) = [line for line in str(timed).splitlines() if line.startswith("by the schedule's own order  ")]
    assert row.split("  ")[1:] == [time_text(own.step), ", ".join(map(str, own.cuts))]
    assert "steps ordered by their times" in str(timed)
    assert "own order" not in str(own)


def test_where_no_shorter_order_is_found_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "orders", lambda work: iter(()))
    plan = _searched(V, 4, "timed").plan
    assert plan is not None
    assert plan.order is None
    assert "steps in the schedule's own order: no shorter one was found" in str(plan)


def test_a_report_has_the_order_of_its_setting() -> None:
    pipe = _searched(V, 4, "timed")
    assert pipe.plan is not None
    report = pipe.report(pipe.plan.setting)
    assert report.seconds == pytest.approx(pipe.plan.step, rel=0.02)
    assert report.seconds < pipe.report(replace(pipe.plan.setting, order=None)).seconds


def test_schedules_that_do_not_split_backwards_keep_their_order() -> None:
    plan = _searched("Interleaved1F1B", 8, "timed").plan
    assert plan is not None
    assert plan.order is None


def _good() -> Orders:
    work = Work(homes(4, 2, True), 2, {(k, s): 1.0 for k in (FORWARD, INPUT, WEIGHT) for s in range(4)}, [0.0] * 4, [4, 4])
    return next(work.orders())


def _without(orders: Orders, step: Step) -> Orders:
    return tuple(tuple(each for each in order if each != step) for order in orders)


def _swapped(orders: Orders, one: Step, other: Step) -> Orders:
    swap = {one: other, other: one}
    return tuple(tuple(swap.get(each, each) for each in order) for order in orders)


BAD: dict[str, tuple[Orders, str, int, str]] = {
    "a schedule that does not split": (_good(), "1F1B", 2, "order= under 1F1B"),
    "other ranks": (_good()[:1], V, 2, "for 1 ranks, and there are 2"),
    "other micro-batches": (_good(), V, 3, "not the 18 of stages"),
    "a step that is missing": (_without(_good(), Step(WEIGHT, 1, 1)), V, 2, "rank 1 has 11 steps"),
    "a step that is done twice": ((*_good()[:1], (*_good()[1], Step(WEIGHT, 1, 1))), V, 2, "rank 1 has 13 steps"),
    "weights before inputs": (
        _swapped(_good(), Step(WEIGHT, 2, 0), Step(INPUT, 2, 0)),
        V,
        2,
        "before W of micro-batch 0 in stage 2",
    ),
    "a message that is not sent": (_without(_good(), Step(SEND_F, 0, 1)), V, 2, "before RECV_F of micro-batch 1 in stage 1"),
    "a message that is not received": (_without(_good(), Step(RECV_F, 1, 1)), V, 2, "before F of micro-batch 1 in stage 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_order_that_does_not_fit_is_refused_in_words(name: str) -> None:
    orders, schedule, count, why = BAD[name]
    ranks = None if schedule == "1F1B" else 2
    setting = Setting(schedule=schedule, ranks=ranks, n_microbatches=count, order=orders)
    with pytest.raises(InputError, match=why):
        setting.flights(2 if ranks is None else 4)


TRAINED: list[tuple[str, dict[str, Any]]] = [("InterleavedZeroBubble", {}), ("DualPipeV", {}), (V, {}), (V, {"backward": "graph"})]


def test_ranks_that_do_their_steps_by_the_order_train_as_one_process() -> None:
    torch.manual_seed(1)
    model = Tower(3, 8, 4).double()
    pipe = pipeline(model, (torch.randn(2, 5, 8).double(),), split_policy=equal_ops(4), check=None)
    answers = on_ranks(2, _train_each, model, pipe)
    assert answers[0] == answers[1] == ["ok"] * 4 + ["other orders are refused", "another number is refused"]


def _train_each(model: nn.Module, pipe: Pipe) -> list[str]:
    start = deepcopy(model.state_dict())
    found: list[str] = []
    for schedule, options in TRAINED:
        model.load_state_dict(start)
        model.zero_grad()
        found.append(_train(model, pipe, schedule, _order(schedule, [1.0, 3.0, 0.5, 2.0]), options))
    return [*found, *_refusals(pipe)]


def _order(schedule: str, stages: Sequence[float]) -> Orders:
    seconds = {(kind, s): part * by for s, part in enumerate(stages) for kind, by in ((FORWARD, 1.0), (INPUT, 1.5), (WEIGHT, 0.4))}
    return next(Work(homes(4, 2, schedule != "InterleavedZeroBubble"), 6, seconds, [0.1] * 4, [5, 5]).orders())


def _train(model: nn.Module, pipe: Pipe, schedule: str, order: Orders, options: dict[str, Any]) -> str:
    reference = deepcopy(model)
    driver = Driver(pipe, schedule, 6, _loss, order=order, **options)
    assert "steps in the order that was given" in repr(driver)
    assert ("will run by graphs" in repr(driver)) is ("backward" in options)
    for step in range(2):
        torch.manual_seed(step)
        x = torch.randn(12, 5, 8).double()
        _, losses = driver.step(x)
        expected = torch.stack([_loss(reference(part)) for part in x.chunk(6)]).mean()
        expected.backward()
        torch.testing.assert_close(losses.batch, expected.detach())
        if not step:
            model.zero_grad()
            reference.zero_grad()
    wanted = dict(reference.named_parameters())
    for index in driver.stage_indices:
        for name, parameter in pipe.stages[index].named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad)
    done = next(iter(driver._schedules.values()))[0].pipeline_order_with_comms[dist.get_rank()]
    names = [f"{a.stage_index}{a.computation_type.value}{a.microbatch_index}" for a in done if a.computation_type.value in "FIW"]
    assert names == [f"{s.stage}{s.kind}{s.microbatch}" for s in order[dist.get_rank()] if is_computed(s)]
    return "ok"


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def _refusals(pipe: Pipe) -> list[str]:
    found = []
    order = _order(V, [1.0, 1.0 + 2 * dist.get_rank(), 1.0, 1.0])
    try:
        Driver(pipe, V, 6, _loss, order=order)
    except StagecutError as error:
        found.append("other orders are refused" if "order" in str(error) else str(error))
    try:
        Driver(pipe, V, 4, _loss, order=_order(V, [1.0] * 4))
    except InputError as error:
        found.append("another number is refused" if "micro-batches" in str(error) else str(error))
    return found


def test_a_search_in_an_order_is_not_taken_for_one_in_another() -> None:
    """Processes of a job share what one of them has searched for the same program and policy."""
    assert on_ranks(1, _plans) == [[True, True]]


def _plans() -> list[bool]:
    own = Setting(schedule=V, ranks=2, n_microbatches=6)
    given = replace(own, order=_order(V, [1.0, 3.0, 0.5, 2.0]))
    model, x = Tower(4, 8, 4), torch.randn(2, 5, 8)
    plans = [pipeline(model, (x,), split_policy=Balanced(4, setting), check=None).plan for setting in (own, given)]
    return [plan is not None and plan.order == setting.order for plan, setting in zip(plans, (own, given), strict=True)]
