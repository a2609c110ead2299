"""timeline: the steps of every schedule, each once, in an order that waits for nothing in vain; known bubbles."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from stagecut.backend.costs.runtime import Await, Message, Parts, Post, Run, slowed_run
from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.timeline import Timeline, simulate
from stagecut.backend.schedules import BACKWARD, FORWARD, INPUT, SCHEDULES, SINGLE, WEIGHT, Step
from stagecut.ir.errors import StagecutError


def _setting(schedule: str, count: int = 8, training: bool = True) -> tuple[Setting, int]:
    single = schedule in SINGLE
    return Setting(schedule=schedule, n_microbatches=count, training=training, ranks=None if single else 4), 4 if single else 8


def _run(schedule: str, count: int = 8) -> Timeline:
    setting, stages = _setting(schedule, count)
    return simulate(setting, [1.0] * stages, [2.0] * stages)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [8, 16])
def test_every_step_runs_once_and_behind_what_it_needs(schedule: str, count: int) -> None:
    setting, stages = _setting(schedule, count)
    line = simulate(setting, [1.0] * stages, [2.0] * stages, [0.5] * (stages - 1))
    kinds = Counter((e.step.kind, e.step.stage, e.step.microbatch) for e in line.events)
    assert set(kinds.values()) == {1}
    ends = {(e.step.kind, e.step.stage, e.step.microbatch): e.end for e in line.events}
    for s in range(stages):
        for m in range(count):
            assert (FORWARD, s, m) in ends
            assert ((BACKWARD, s, m) in ends) != ((INPUT, s, m) in ends)
            assert ((INPUT, s, m) in ends) == ((WEIGHT, s, m) in ends)
    for e in line.events:
        s, m = e.step.stage, e.step.microbatch
        if e.step.kind == FORWARD and s:
            assert e.start >= ends[FORWARD, s - 1, m]
        if e.step.kind in (BACKWARD, INPUT) and s < stages - 1:
            assert e.start >= ends.get((BACKWARD, s + 1, m), ends.get((INPUT, s + 1, m), 0.0))
    for rank in range(line.ranks):
        mine = sorted((e.start, e.end) for e in line.events if e.rank == rank)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(mine))


@pytest.mark.parametrize("schedule", SINGLE)
def test_the_bubble_of_equal_stages_is_the_known_one(schedule: str) -> None:
    line = _run(schedule, 16)
    assert line.bubble == pytest.approx(3 / 19)
    assert line.seconds == pytest.approx(19 * 3)


def test_a_split_backward_makes_it_smaller() -> None:
    bubbles = [_run(s, 16).bubble for s in ("1F1B", "ZBVZeroBubble")]
    assert bubbles == sorted(bubbles, reverse=True)


def test_a_neighbour_that_is_late_holds_up_no_message_to_another_one() -> None:
    """A rank has a stream of messages for each neighbour. With one for all, as torch up to 2.12 has it, this bubble is 0.24."""
    setting, stages = _setting("Interleaved1F1B", 16)
    assert simulate(setting, [0.5] * stages, [1.0] * stages).bubble == pytest.approx(3 / (2 * 16 + 3))


@pytest.mark.parametrize("ahead", [0, 1])
def test_messages_of_one_pair_keep_their_order(ahead: int) -> None:
    """Rank 0 posts, before it computes, a receive that rank 1 answers late; what it sends to rank 1 waits for it, to rank 2 not."""
    late, out = Message(0, 0, True), Message(1 - ahead, 0, False)
    peer = 1 if ahead else 2
    first = (Post(0, (late,), 1), Step(FORWARD, 0, 0), Post(2, (out,), peer), Await(0), Await(2))
    answers = [(Step(FORWARD, 1, 0), Step(FORWARD, 1, 1), Post(2, (late,), 0))]
    ends = (Post(3, (out,), 0), Await(3), Step(BACKWARD, 1, 0)) if ahead else ()
    listed = [first, (*answers[0], *ends), () if ahead else (Post(0, (out,), 0), Await(0), Step(BACKWARD, 1, 0))]
    run = Run(tuple(listed), lambda step: (1.0, 0.0), [0.25, 0.25], 0.0, max)
    starts = {done.step.kind: done.start for done in run.steps}
    assert starts[BACKWARD] == (2.5 if ahead else 1.25)


def test_the_host_starts_what_the_device_computes() -> None:
    setting, stages = _setting("GPipe", 4)
    slow = Parts(3.0, 4.0, 2.0, 2.0)
    line = simulate(setting, [1.0] * stages, [2.0] * stages, host=[slow] * stages)
    # hosts wait for nobody: each starts four forwards and four backwards
    assert 4 * (3.0 + 4.0) <= line.seconds < simulate(setting, [3.0] * stages, [4.0] * stages).seconds
    fast = Parts(0.1, 0.1, 0.1, 0.1)
    alone = simulate(setting, [1.0] * stages, [2.0] * stages)
    assert simulate(setting, [1.0] * stages, [2.0] * stages, host=[fast] * stages).seconds >= alone.seconds


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_cuts_are_simulated_as_each_is_alone(schedule: str) -> None:
    """Also where messages that are under way slow steps, whichever cuts are simulated together."""
    setting, stages = _setting(schedule)
    generator = torch.Generator().manual_seed(0)
    seconds = torch.rand(stages, 4, 5, generator=generator, dtype=torch.float64)
    delays = torch.rand(stages, 5, generator=generator, dtype=torch.float64)

    def end(at: Any, zero: Any, larger: Any, slowed: float = 0.1) -> Any:
        def of(step: Step) -> Any:
            return at(seconds[step.stage]["FBIW".index(step.kind)]), at(delays[step.stage] / 2)

        return slowed_run(setting.actions(stages), of, [at(d) for d in delays], zero, larger, 0.01, slowed).end

    alone = [end(lambda t, i=i: float(t[i]), 0.0, max) for i in range(5)]
    zero = torch.zeros(5, dtype=torch.float64)
    together = end(lambda t: t, zero, torch.maximum).tolist()
    assert together == pytest.approx(alone, rel=1e-12)
    in_vain = end(lambda t: t, zero, torch.maximum, 0.0).tolist()
    assert all(least <= slow <= 1.1 * least for least, slow in zip(in_vain, together, strict=True))
    assert schedule in SINGLE or sum(in_vain) < sum(together)


def test_a_step_is_slowed_for_as_long_as_messages_are_under_way() -> None:
    """Rank 0 posts a receive before steps of 1 s each; rank 1 computes for 1.5 s, sends, and what it sends takes 0.25 s."""
    late = Message(0, 0, True)
    first = (Post(0, (late,), 1), *(Step(FORWARD, 0, i) for i in range(3)), Await(0))
    listed = (first, (Step(FORWARD, 1, 0), Post(1, (late,), 0), Await(1)))
    run = slowed_run(listed, lambda step: (1.5 if step.stage else 1.0, 0.0), [0.25], 0.0, max, 0.0, 0.1)
    spent = [done.end - done.start for done in run.steps if done.rank == 0]
    assert spent == pytest.approx([1.1, 1.075, 1.0])


def test_forward_only() -> None:
    setting, stages = _setting("1F1B", training=False)
    line = simulate(setting, [1.0] * stages, [2.0] * stages)
    assert {e.step.kind for e in line.events} == {FORWARD}
    assert line.seconds == 8 + 3


def test_sending_delays() -> None:
    setting, _ = _setting("GPipe", 1)
    assert simulate(setting, [1.0] * 4, [2.0] * 4, [0.5] * 3).seconds == 12 + 6 * 0.5


def test_chrome_trace() -> None:
    line = _run("1F1B", 2)
    events = json.loads(json.dumps(line.chrome_trace()))["traceEvents"]
    assert len(events) == len(line.events)
    assert {"name", "ph", "ts", "dur", "pid", "tid"} <= events[0].keys()


def test_an_order_that_torch_refuses_is_refused_in_words() -> None:
    with pytest.raises(StagecutError, match="has no order for 8 stages on 4 ranks and 6 micro-batches"):
        Setting(schedule="DualPipeV", n_microbatches=6, ranks=4).orders(8)


@pytest.mark.parametrize(
    ("schedule", "flights"),
    [
        ("GPipe", [8, 8, 8, 8]),
        ("1F1B", [4, 3, 2, 1]),
        ("LoopedBFS", [8] * 8),
        ("Interleaved1F1B", [8, 8, 7, 5, 4, 4, 3, 1]),
        ("InterleavedZeroBubble", [8, 8, 8, 8, 4, 4, 4, 4]),
        ("ZBVZeroBubble", [8, 7, 6, 5, 4, 3, 2, 1]),
        ("DualPipeV", [8, 7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_micro_batches_in_flight_are_counted_in_the_order(schedule: str, flights: list[int]) -> None:
    """The first stage of a rank holds more than its last one. One formula for all stages of a rank gave their mean."""
    setting, stages = _setting(schedule)
    assert setting.in_flight(stages) == flights
    assert replace(setting, training=False).in_flight(stages) == [1] * stages


def test_fewer_micro_batches_than_stages_are_in_flight() -> None:
    assert Setting(n_microbatches=2).in_flight(4) == [2, 2, 2, 1]
