"""What each rank does when: the order of steps that a schedule of torch's has, run through with the times of the stages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from stagecut.balance import Setting
from stagecut.ir.errors import StagecutError
from stagecut.schedules import SINGLE

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
"""Kinds of steps: a forward, a whole backward, a backward for the inputs only, one for the weights only."""


@dataclass(frozen=True)
class Step:
    """One step of a rank: what it does, for which stage and which micro-batch."""

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Event:
    """A step and when it runs, in seconds."""

    step: Step
    rank: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One training step of a pipeline."""

    events: tuple[Event, ...]
    ranks: int

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max((e.end for e in self.events), default=0.0)

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they wait."""
        busy = sum(e.end - e.start for e in self.events)
        return 1 - busy / (self.ranks * self.seconds) if self.seconds else 0.0

    def chrome_trace(self) -> dict[str, Any]:
        """The events in Chrome's trace format; microseconds."""
        events = [
            {
                "name": f"{e.step.kind}{e.step.microbatch} stage {e.step.stage}", "ph": "X", "pid": 0, "tid": e.rank,
                "ts": 1e6 * e.start, "dur": 1e6 * (e.end - e.start), "cat": e.step.kind,
            }
            for e in self.events
        ]  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def orders(setting: Setting, stages: int) -> list[list[Step]]:
    """The steps of every rank in order. Raises InputError when the stages do not fit the schedule."""
    placement = setting.placement(stages)
    ranks, count = max(placement) + 1, setting.n_microbatches
    if not setting.training:
        return [[Step(FORWARD, s, m) for m in range(count) for s, home in enumerate(placement) if home == rank] for rank in range(ranks)]
    if setting.schedule in SINGLE:
        ahead = [count if setting.schedule == "GPipe" else min(count, stages - s) for s in range(stages)]
        return [[*_one_ahead(s, count, ahead[s])] for s in range(stages)]
    order = _torch_order(setting.schedule, stages, ranks, count)
    return [[step for action in order[rank] for step in _steps(action)] for rank in range(ranks)]


def _one_ahead(stage: int, count: int, ahead: int) -> Iterator[Step]:
    """`ahead` forwards, then a backward and a forward in turn."""
    for i in range(count + ahead):
        if i >= ahead:
            yield Step(BACKWARD, stage, i - ahead)
        if i < count:
            yield Step(FORWARD, stage, i)


def _torch_order(schedule: str, stages: int, ranks: int, count: int) -> dict[int, list[Any]]:
    """The order that torch's schedule computes in its constructor; that looks at numbers only."""
    known = [SimpleNamespace(stage_index=i, group_size=ranks, group_rank=0, num_stages=stages, is_first=i == 0, is_last=i == stages - 1,
                             submod=nn.Identity(), device="cpu", has_backward=True) for i in range(stages // ranks)]  # fmt: skip
    logger = logging.getLogger("torch.distributed.pipelining.schedules")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        made = get_schedule_class(schedule)(known, count, loss_fn=lambda *_: None)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise StagecutError(f"{schedule} has no order for {stages} stages on {ranks} ranks and {count} micro-batches: {error}") from error
    finally:
        logger.setLevel(level)
    order: dict[int, list[Any]] = made.pipeline_order
    return order


def _steps(action: Any) -> Iterator[Step]:
    if action is None:
        return
    for part in getattr(action, "sub_actions", None) or (action,):
        kind = str(part.computation_type.value)
        if kind in (FORWARD, BACKWARD, INPUT, WEIGHT):
            yield Step(kind, part.stage_index, part.microbatch_index)


def simulate(setting: Setting, forward: Sequence[float], backward: Sequence[float], sent: Sequence[float] = ()) -> Timeline:
    """When every step runs, if stages take these seconds for a micro-batch, and what they send on that long to arrive, each way.

    A split backward takes half for its inputs and half for its weights. Each rank does its steps in order, as soon as what they
    need is there.
    """
    stages = len(forward)
    placement = setting.placement(stages)
    waiting = [[*steps] for steps in orders(setting, stages)]
    free = [0.0] * len(waiting)
    done: dict[Step, float] = {}
    events: list[Event] = []
    places = [0] * len(waiting)

    def ready(step: Step) -> float | None:
        """When what a step needs is there, None while that is not known."""
        s, m = step.stage, step.microbatch
        if step.kind == FORWARD:
            needs = [(Step(FORWARD, s - 1, m), _at(sent, s - 1))] if s else []
        elif step.kind == WEIGHT:
            needs = [(Step(INPUT, s, m), 0.0)]
        else:
            needs = [(Step(FORWARD, s, m), 0.0)]
            if s < stages - 1:
                later = next((k for k in (BACKWARD, INPUT) if Step(k, s + 1, m) in done), BACKWARD)
                needs.append((Step(later, s + 1, m), _at(sent, s)))
        times = [done[need] + (delay if placement[need.stage] != placement[s] else 0.0) for need, delay in needs if need in done]
        return max(times, default=0.0) if len(times) == len(needs) else None

    def length(step: Step) -> float:
        if step.kind == FORWARD:
            return forward[step.stage]
        return backward[step.stage] * (1.0 if step.kind == BACKWARD else 0.5)

    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(waiting):
            while places[rank] < len(steps) and (start := ready(steps[places[rank]])) is not None:
                step = steps[places[rank]]
                begin = max(start, free[rank])
                free[rank] = done[step] = begin + length(step)
                events.append(Event(step, rank, begin, free[rank]))
                places[rank] += 1
                moved = True
    if any(place < len(steps) for place, steps in zip(places, waiting, strict=True)):
        raise StagecutError(f"the order of {setting.schedule} waits for itself")
    return Timeline(tuple(sorted(events, key=lambda e: (e.start, e.rank))), len(waiting))


def _at(sent: Sequence[float], stage: int) -> float:
    return sent[stage] if stage < len(sent) else 0.0
