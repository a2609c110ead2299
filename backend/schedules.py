"""The schedules of torch.distributed.pipelining by name, which rank has which stage under each, and the order
of the steps of every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from stagecut.ir.errors import StagecutError

SINGLE = ("GPipe", "1F1B")
"""One stage a rank."""

LOOPED = ("LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
"""Several stages a rank, in turn."""

V = ("ZBVZeroBubble", "DualPipeV")
"""Two stages a rank, there and back again."""

SCHEDULES = (*SINGLE, *LOOPED, *V)

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
"""Kinds of steps: a forward, a whole backward, a backward for the inputs only, one for the weights only."""


def homes(stages: int, ranks: int, mirrored: bool) -> list[int]:
    """Stage -> rank, in turn or there and back again."""
    if not mirrored:
        return [stage % ranks for stage in range(stages)]
    return [min(stage, 2 * ranks - 1 - stage) for stage in range(stages)]


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


Order = tuple[Step, ...]
"""The steps of a rank, in their order."""


@cache
def orders(schedule: str, stages: int, ranks: int, count: int) -> tuple[Order, ...]:
    """The steps of every rank in a training step with `count` micro-batches. Raises StagecutError where the
    schedule has no order for these numbers.
    """
    if schedule in SINGLE:
        # torch runs these by code: what it lists for 1F1B lacks the first forward of the last stage
        ahead = [count if schedule == "GPipe" else stages - s for s in range(stages)]
        return tuple(tuple(_one_ahead(s, count, ahead[s])) for s in range(stages))
    actions = _torch_order(schedule, stages, ranks, count)
    return tuple(
        tuple(step for action in actions[rank] for step in _steps(action))
        for rank in range(ranks)
    )


def in_flight(ranks: Sequence[Order], stages: int) -> list[int]:
    """Stage -> the largest number of micro-batches of which it holds activations at a time. A backward frees
    them, and where it is split, its half for the weights.
    """
    held, most = [0] * stages, [0] * stages
    for step in (step for order in ranks for step in order):
        if step.kind == FORWARD:
            held[step.stage] += 1
            most[step.stage] = max(most[step.stage], held[step.stage])
        elif step.kind in (BACKWARD, WEIGHT):
            held[step.stage] -= 1
    return most


def _one_ahead(stage: int, count: int, ahead: int) -> Iterator[Step]:
    """`ahead` forwards, or all, then a backward and a forward in turn."""
    ahead = min(ahead, count)
    for i in range(count + ahead):
        if i >= ahead:
            yield Step(BACKWARD, stage, i - ahead)
        if i < count:
            yield Step(FORWARD, stage, i)


def _torch_order(
    schedule: str, stages: int, ranks: int, count: int
) -> dict[int, list[Any]]:
    """The order that torch's schedule computes in its constructor, which looks at numbers only."""
    known = [
        SimpleNamespace(
            stage_index=i,
            group_size=ranks,
            group_rank=0,
            num_stages=stages,
            is_first=i == 0,
            is_last=i == stages - 1,
            submod=nn.Identity(),
            device="cpu",
            has_backward=True,
        )
        for i in range(stages // ranks)
    ]
    kind: Any = get_schedule_class(schedule)
    try:
        with _quiet():
            made = kind(known, count, loss_fn=lambda *_: None)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise StagecutError(
            f"{schedule} has no order for {stages} stages on {ranks} ranks and {count} micro-batches: {error}"
        ) from error
    order: dict[int, list[Any]] = made.pipeline_order
    return order


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch's schedules log nothing below an error."""
    logger = logging.getLogger("torch.distributed.pipelining.schedules")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _steps(action: Any) -> Iterator[Step]:
    if action is None:
        return
    for part in getattr(action, "sub_actions", None) or (action,):
        kind = str(part.computation_type.value)
        if kind in (FORWARD, BACKWARD, INPUT, WEIGHT):
            yield Step(kind, part.stage_index, part.microbatch_index)
