"""The schedules of torch.distributed.pipelining by name, which rank has which stage under each, and the order
of the steps of every rank.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from stagecut.ir.errors import StagecutError
from stagecut.ir.roles import Flight

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


def flights(orders: Iterable[Order], stages: int) -> list[Flight]:
    """Stage -> the largest numbers of micro-batches in flight, when the ranks do their steps in these orders.
    A whole backward computes the gradients of the inputs first.
    """
    held = [Counter[str]() for _ in range(stages)]
    most = [Counter[str]() for _ in range(stages)]
    for step in (step for order in orders for step in order):
        count = held[step.stage]
        count.update(_BEGINS[step.kind])
        most[step.stage] |= count
        count.subtract(_ENDS[step.kind])
    return [Flight(m["inputs"], m["gradients"], m["weights"]) for m in most]


_BEGINS = {
    FORWARD: ("inputs", "weights"),
    BACKWARD: ("gradients",),
    INPUT: ("gradients",),
    WEIGHT: (),
}
_ENDS = {
    FORWARD: (),
    BACKWARD: ("inputs", "gradients", "weights"),
    INPUT: ("inputs",),
    WEIGHT: ("gradients", "weights"),
}
"""Kind of step -> the numbers of `Flight` for which a micro-batch counts from then on, and until then."""


def flights_of(schedule: str, stages: int, ranks: int, count: int) -> list[Flight]:
    """Stage -> the largest numbers of micro-batches in flight under a schedule with `count` of them. Raises
    StagecutError where it has no order for these numbers.
    """
    if schedule == "GPipe":
        return [Flight(count, 1, count)] * stages
    if schedule == "1F1B":
        ahead = [min(count, stages - stage) for stage in range(stages)]
        return [Flight(most, 1, most) for most in ahead]
    listed = torch_schedule(schedule, stages, ranks, count).pipeline_order_with_comms
    orders = [
        tuple(
            step_of(part)
            for action in own
            for part in parts_of(action)
            if is_step(part)
        )
        for own in listed.values()
    ]
    return flights(orders, stages)


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
