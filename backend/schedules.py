"""The schedules of torch.distributed.pipelining by name, which rank has which stage under each, and the order
of the steps of every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

SPLITTING = ("InterleavedZeroBubble", *V)
"""A backward is done in two steps."""

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


def torch_schedule(schedule: str, stages: int, ranks: int, count: int) -> Any:
    """torch's schedule object. It computes the order in its constructor, which looks at numbers only. Raises
    StagecutError where it has none for these numbers.
    """
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
    return made


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


def parts_of(action: Any) -> tuple[Any, ...]:
    """The actions that an action of torch's consists of."""
    if action is None:
        return ()
    return getattr(action, "sub_actions", None) or (action,)


def is_step(action: Any) -> bool:
    """True for an action of torch's that computes."""
    return str(action.computation_type.value) in (FORWARD, BACKWARD, INPUT, WEIGHT)


def step_of(action: Any) -> Step:
    """An action of torch's that computes, as a step."""
    kind = str(action.computation_type.value)
    return Step(kind, action.stage_index, action.microbatch_index)
