"""record: what real processes measure is what the schedule orders; the stages are as before; a failed step leaves no timeline."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks, stages_of
from torch import multiprocessing, nn
from torch.distributed.pipelining import ScheduleGPipe
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, StagecutError, pipeline
from stagecut.backend.costs.record import record
from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.timeline import Timeline
from stagecut.backend.schedules import BACKWARD, FORWARD, INPUT, SINGLE, WEIGHT

COUNT = 4


def _pipe(stages: int) -> Pipe:
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(16, 16), nn.Tanh())))
    pipe: Pipe = pipeline(model, (torch.randn(2, 16),), split_policy=equal_ops(stages), check=None)
    assert pipe.num_stages == stages
    return pipe


def _measure(pipe: Pipe, schedule: str) -> Timeline:
    driver = Driver(pipe, schedule, COUNT, lambda out: out.square().mean())
    x = torch.randn(2 * COUNT, 16)
    with record(driver) as recording:
        driver.step(x)
    ((_, stages),) = driver._schedules.values()
    assert not any(name in vars(part) for part in (driver, *stages) for name in ("_prepared", "forward_one_chunk", "backward_one_chunk"))
    with record(driver) as again:
        pass
    assert not again.timeline.events
    return recording.timeline


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_each_rank_s_measured_steps_are_those_of_the_schedule_in_its_order(schedule: str) -> None:
    stages = stages_of(schedule, 2)
    lines = on_ranks(2, _measure, _pipe(stages), schedule)
    assert lines[0] == lines[1]
    setting = Setting(schedule=schedule, n_microbatches=COUNT, ranks=None if schedule in SINGLE else 2)
    for rank, order in enumerate(setting.orders(stages)):
        assert [e.step for e in lines[0].events if e.rank == rank] == list(order)
    _check_times(lines[0])
    kinds = Counter(e.step.kind for e in lines[0].events)
    assert kinds[FORWARD] == COUNT * stages == kinds[BACKWARD] + kinds[INPUT]
    assert kinds[INPUT] == kinds[WEIGHT]
    assert lines[0].title == f"{schedule}, {stages} stages, {COUNT} micro-batches, measured"


def _check_times(line: Timeline) -> None:
    """Each rank does one thing after the other; a micro-batch's forward starts behind that of the stage before; it starts at 0."""
    assert line.events[0].start == 0.0
    assert 0 < line.bubble < 1
    for rank in range(line.ranks):
        mine = [e for e in line.events if e.rank == rank]
        assert all(a.start < a.end <= b.start for a, b in pairwise(mine))
    trace = line.chrome_trace()["traceEvents"]
    assert [e["ts"] for e in trace] == sorted(e["ts"] for e in trace)
    assert all(e["ph"] == "X" and e["ts"] >= 0 and e["dur"] > 0 and e["pid"] == 0 and e["tid"] in (0, 1) for e in trace)
    boxes = [e for e in ElementTree.fromstring(line.to_svg()).iter("{http://www.w3.org/2000/svg}title") if "micro-batch" in (e.text or "")]
    assert len(boxes) == len(line.events) == len(trace)


def test_stages_of_one_s_own_are_measured_on_a_common_clock() -> None:
    """Time is a number that all processes read, each from a zero of its own, and only the first stage's forward takes any: one second.

    So the first rank's micro-batch m takes from m to m + 1, the second's starts behind it, and all is over at COUNT, to the digit.
    """
    with multiprocessing.Manager() as shared:
        lines = on_ranks(2, _own_stages, _pipe(2), shared.Value("d", 0.0), shared.Event(), shared.Lock())
    assert lines[0] == lines[1]
    forwards = {(e.rank, e.step.microbatch): e for e in lines[0].events if e.step.kind == FORWARD}
    assert len(forwards) == 2 * COUNT
    for m in range(COUNT):
        assert (forwards[0, m].start, forwards[0, m].end) == (m, m + 1)
        assert m + 1 <= forwards[1, m].start <= forwards[1, m].end <= COUNT
    assert max(e.end for e in lines[0].events) == COUNT


def _own_stages(pipe: Pipe, now: Any, first_waits: Any, lock: Any) -> Timeline:
    """Rank 1 comes to the recording 100 seconds after rank 0, which waits for it: what is counted from before that would come out later."""
    rank = dist.get_rank()
    stage = pipe.build_stage(rank, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now.value + 1000 * rank)
        if rank == 0:
            patch.setattr(dist, "barrier", partial(_tell_and_meet, dist.barrier, first_waits))
            stage.submod.register_forward_hook(lambda *_: _pass(now, lock, 1))
        else:
            assert first_waits.wait(60)
            _pass(now, lock, 100)
        with record(stage) as recording:
            dist.all_reduce(torch.zeros(1))  # both have their zero before time goes on
            _step(ScheduleGPipe(stage, COUNT, loss_fn=_loss), rank)
    return recording.timeline


def _tell_and_meet(barrier: Callable[..., None], first_waits: Any, group: Any) -> None:
    first_waits.set()
    barrier(group)


def _pass(now: Any, lock: Any, seconds: float) -> None:
    with lock:
        now.value += seconds


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def _step(schedule: Any, rank: int) -> None:
    if rank == 0:
        schedule.step(torch.randn(2 * COUNT, 16))
    else:
        schedule.step(target=torch.randn(2 * COUNT, 16))


class Fake:
    """A stage that fails."""

    device, stage_index = torch.device("cpu"), 0

    def forward_one_chunk(self, chunk: int) -> int:
        """Fails for chunk 1."""
        if chunk:
            raise ValueError("no")
        return 7

    backward_one_chunk = backward_weight_one_chunk = forward_one_chunk


def test_a_failed_step_passes_on_its_error_and_leaves_no_timeline() -> None:
    stage: Any = Fake()
    kept: list[Any] = []
    with pytest.raises(ValueError, match="no"):
        _fails(stage, kept)
    assert not vars(stage)
    with pytest.raises(StagecutError, match="no timeline yet"):
        _ = kept[0].timeline


def _fails(stage: Any, kept: list[Any]) -> None:
    with record([stage]) as recording:
        kept.append(recording)
        assert stage.forward_one_chunk(0) == 7
        with pytest.raises(StagecutError, match="no timeline yet"):
            _ = recording.timeline
        stage.forward_one_chunk(1)


def test_one_process_alone_is_measured_too() -> None:
    stage: Any = Fake()
    with record([stage]) as outer, record([stage]) as inner:
        stage.forward_one_chunk(0)
        stage.backward_weight_one_chunk(0)
    assert [e.step.kind for e in outer.timeline.events] == [e.step.kind for e in inner.timeline.events] == [FORWARD, WEIGHT]
    assert outer.timeline.ranks == 1
