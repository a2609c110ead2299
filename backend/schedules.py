"""The schedules of torch.distributed.pipelining by name, which rank has which stage under each, and the order
of the steps of every rank.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _Action,
    _add_reduce_grad,
    _add_unshard_reshard,
    _ComputationType,
    get_schedule_class,
)

from stagecut.ir.errors import InputError, StagecutError
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

SEND_F, RECV_F, SEND_B, RECV_B = "SEND_F", "RECV_F", "SEND_B", "RECV_B"
"""Kinds of messages, as torch calls them: values and gradients, at the stage that sends or receives them."""


def homes(stages: int, ranks: int, mirrored: bool) -> list[int]:
    """Stage -> rank, in turn or there and back again."""
    if not mirrored:
        return [stage % ranks for stage in range(stages)]
    return [min(stage, 2 * ranks - 1 - stage) for stage in range(stages)]


@dataclass(frozen=True, order=True)
class Step:
    """One step of a rank, or one end of a message: what it does, for which stage and which micro-batch."""

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

Orders = tuple[Order, ...]
"""The steps of every rank."""


def most_held(order: Order) -> int:
    """The largest number of micro-batches of its stages that a rank holds at once, from the forward to the
    gradients of weights.
    """
    held = most = 0
    for step in order:
        held += step.kind == FORWARD
        most = max(most, held)
        held -= step.kind in (BACKWARD, WEIGHT)
    return most


def flights(orders: Iterable[Order], stages: int) -> list[Flight]:
    """Stage -> the largest numbers of micro-batches in flight, when the ranks do their steps in these orders.
    A whole backward computes the gradients of the inputs first.
    """
    held = [Counter[str]() for _ in range(stages)]
    most = [Counter[str]() for _ in range(stages)]
    for step in (step for order in orders for step in order if is_computed(step)):
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


def flights_of(
    schedule: str, stages: int, ranks: int, count: int, given: Orders | None = None
) -> list[Flight]:
    """Stage -> the largest numbers of micro-batches in flight under a schedule with `count` of them, in its
    own orders or in those that are `given`. Raises StagecutError where it has no order for these numbers.
    """
    if given is not None:
        return flights(given, stages)
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


@lru_cache(256)
def refuse_orders(
    given: Orders, schedule: str, homes: tuple[int, ...], count: int
) -> None:
    """Returns for orders of all steps of a split backward, each on the rank of its stage and behind what it
    needs, under a schedule that splits backwards. Raises InputError for others.
    """
    if schedule not in SPLITTING:
        raise InputError(
            f"order= under {schedule}, which does not split backwards",
            hint=f"one of {', '.join(SPLITTING)}, or leave order= away",
        )
    ranks = max(homes) + 1
    if len(given) != ranks:
        raise _unfit(f"it is for {len(given)} ranks, and there are {ranks}")
    for rank, order in enumerate(given):
        own = [stage for stage, home in enumerate(homes) if home == rank]
        wanted = set(product((FORWARD, INPUT, WEIGHT), own, range(count)))
        steps = [(s.kind, s.stage, s.microbatch) for s in order if is_computed(s)]
        if set(steps) != wanted or len(steps) != len(wanted):
            raise _unfit(
                f"rank {rank} has {len(steps)} steps in it, and they are not the {len(wanted)} of stages "
                f"{own} with {count} micro-batches"
            )
    _refuse_waiting(given, homes)


def _refuse_waiting(given: Orders, homes: Sequence[int]) -> None:
    """Returns where all ranks come to their ends, each doing one thing after the other, and no step comes
    before what it needs. Raises InputError otherwise.
    """
    last = len(homes) - 1
    places = [0] * len(given)
    done: set[Step] = set()
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(given):
            while places[rank] < len(order):
                step = order[places[rank]]
                if not all(need in done for need in _needs(step, homes, last)):
                    break
                done.add(step)
                places[rank] += 1
                moved = True
    waiting: list[str] = []
    for rank, order in enumerate(given):
        if places[rank] < len(order):
            step = order[places[rank]]
            where = (
                f"{step.kind} of micro-batch {step.microbatch} in stage {step.stage}"
            )
            waiting.append(f"rank {rank} waits for ever before {where}")
    if waiting:
        raise _unfit(", ".join(waiting))


def _needs(step: Step, homes: Sequence[int], last: int) -> Iterator[Step]:
    """What is done before a step, or before one end of a message."""
    kind, stage, m = step.kind, step.stage, step.microbatch
    if kind == WEIGHT:
        yield Step(INPUT, stage, m)
    if kind == INPUT:
        yield Step(FORWARD, stage, m)
    if kind == SEND_F:
        yield Step(FORWARD, stage, m)
    if kind == SEND_B:
        yield Step(INPUT, stage, m)
    if kind == RECV_F:
        yield Step(SEND_F, stage - 1, m)
    if kind == RECV_B:
        yield Step(SEND_B, stage + 1, m)
    if kind == FORWARD and stage > 0:
        apart = homes[stage - 1] != homes[stage]
        yield Step(RECV_F, stage, m) if apart else Step(FORWARD, stage - 1, m)
    if kind == INPUT and stage < last:
        apart = homes[stage + 1] != homes[stage]
        yield Step(RECV_B, stage, m) if apart else Step(INPUT, stage + 1, m)


def _unfit(why: str) -> InputError:
    return InputError(
        f"order= does not fit: {why}",
        hint="pipe.plan.order is for the schedule, the ranks and the micro-batches of the plan's setting",
    )


def order_name(
    given: Orders | None, kind: type, homes: Sequence[int], count: int
) -> str:
    """A short name that no other order has. Raises as `refuse_orders` for a schedule class of torch."""
    if given is None:
        return "own order"
    name = kind.__name__.removeprefix("Schedule")
    refuse_orders(given, name, tuple(homes), count)
    return f"order {digest_of(given)}"


def digest_of(given: Orders | None) -> str:
    """A few letters that differ for other orders, the same in every process."""
    return hashlib.sha256(repr(given).encode()).hexdigest()[:12]


def reorder(schedule: Any, given: Orders) -> None:
    """A schedule object of torch does the steps of all ranks, with their messages, in these orders from now
    on.
    """
    count = schedule._n_microbatches
    actions: dict[int, list[Any]] = {}
    for rank, order in enumerate(given):
        listed: dict[Step, Any] = {step: _action(step) for step in order}
        steps = [action for step, action in listed.items() if is_computed(step)]
        # with what shards of FSDP need around them
        sharded: Any = _add_unshard_reshard(steps)
        whole = _add_reduce_grad(sharded, count)
        actions[rank] = [*_with_messages(whole, listed)]
    schedule.pipeline_order = actions
    schedule._prepare_schedule_with_comms(actions, format="compute_comms")


def _action(step: Step) -> Any:
    """As torch has it."""
    return _Action(step.stage, _ComputationType(step.kind), step.microbatch)


def _with_messages(whole: Sequence[Any], listed: dict[Step, Any]) -> Iterator[Any]:
    """The actions of a rank, and its messages among them, in front of the steps that they are in front of in
    its order.
    """
    messages: dict[Any, list[Any]] = {}
    waiting: list[Any] = []
    for step, action in listed.items():
        if is_computed(step):
            messages[action] = waiting
            waiting = []
        else:
            waiting.append(action)
    for action in whole:
        yield from messages.get(action, ())
        yield action
    yield from waiting


def torch_schedule(
    schedule: str, stages: int, ranks: int, count: int, given: Orders | None = None
) -> Any:
    """torch's schedule object. It computes the order in its constructor, which looks at numbers only, or has
    the one that is `given`. Raises StagecutError where it has none for these numbers.
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
            made = kind(
                known[0] if issubclass(kind, PipelineScheduleSingle) else known,
                count,
                loss_fn=lambda *_: None,
            )
    except (ValueError, AssertionError, RuntimeError) as error:
        raise StagecutError(
            f"{schedule} has no order for {stages} stages on {ranks} ranks and {count} micro-batches: "
            f"{error}",
            hint=f'another number of micro-batches, Driver(pipe, "{schedule}", {2 * stages}, loss_fn), or '
            "another schedule",
        ) from error
    if given is not None:
        reorder(made, given)
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


def is_computed(step: Step) -> bool:
    """True for a step that computes, False for an end of a message."""
    return step.kind in (FORWARD, BACKWARD, INPUT, WEIGHT)


def is_step(action: Any) -> bool:
    """True for an action of torch's that computes."""
    return str(action.computation_type.value) in (FORWARD, BACKWARD, INPUT, WEIGHT)


def step_of(action: Any) -> Step:
    """An action of torch's that computes, as a step."""
    kind = str(action.computation_type.value)
    return Step(kind, action.stage_index, action.microbatch_index)
