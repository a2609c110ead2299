"""The order in which every rank does its steps, by how long each of them takes: a list schedule (Graham,
1969) with the priorities of zero-bubble schedules (Qi et al., 2024), of all steps, or of the gradients of
weights alone among the other steps of torch's order.

The orders of torch's zero-bubble schedules have no gaps where a forward and both parts of a backward take
equally long. Attention has no weights, so that they do not, and neither are all stages alike.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

from stagecut.backend.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    RECV_B,
    RECV_F,
    SEND_B,
    SEND_F,
    WEIGHT,
    Orders,
    Step,
)

PATIENCE = (0.3, 0.0, 0.6, 0.9)
"""A rank that could do a step for weights waits for another one that can begin within this part of it."""

LEAST = 1e-9
"""Seconds that a step takes at least, so that no two of a rank are done at once."""

NEAR = 4
"""So many slots from the first one on are tried for each end of a message."""

MOST_STEPS = 40_000
"""Orders of more steps together are not made to be compared."""

_URGENCY = {INPUT: 0, FORWARD: 1, WEIGHT: 2}

_MESSAGES = {FORWARD: (SEND_F, RECV_F, 1), INPUT: (SEND_B, RECV_B, -1)}
"""Kind of step -> how its message is called at both ends, and how far it goes."""


@dataclass(frozen=True)
class Work:
    """What is to be ordered.

    homes: stage -> rank. count: micro-batches. seconds: of each kind of step of each stage. delays: by stage,
    the seconds in which what it sends on arrives, each way. most: by rank, the micro-batches of its stages
    that it may hold at once, from the forward to the gradients of weights. own: an order in which no rank
    holds more, that of the schedule.
    """

    homes: Sequence[int]
    count: int
    seconds: Mapping[tuple[str, int], float]
    delays: Sequence[float]
    most: Sequence[int]
    own: Orders = ()

    @property
    def stages(self) -> int:
        """Their number."""
        return len(self.homes)

    def orders(self) -> Iterator[Orders]:
        """Orders to choose from, in each of which no rank waits for itself or holds too much."""
        steps = len(_URGENCY) * self.stages * self.count
        for made in islice(self._lists(), max(1, MOST_STEPS // steps)):
            yield made.orders()

    def _lists(self) -> Iterator[_Listed]:
        if self.own:
            yield from (_Refilled(self, patience) for patience in PATIENCE)
        for patience, late_first in product(PATIENCE, (False, True)):
            yield _Listed(self, patience, late_first)


class _Listed:
    """A list schedule while it is made: the step that can begin first is next."""

    def __init__(self, work: Work, patience: float, late_first: bool) -> None:
        self._work = work
        self._patience = patience
        self._sign = -1 if late_first else 1
        ranks = max(work.homes) + 1
        self._stages: list[list[int]] = [[] for _ in range(ranks)]
        for stage, home in enumerate(work.homes):
            self._stages[home].append(stage)
        self._room = self._rooms()
        self._ends: dict[Step, float] = {}
        self._done = {kind: [0] * work.stages for kind in _URGENCY}
        self._held = [0] * ranks
        self._free = [0.0] * ranks
        self._orders: list[list[Step]] = [[] for _ in range(ranks)]

    def _rooms(self) -> list[int]:
        """By stage, how many micro-batches its rank may hold when it begins one there. A place is left for
        each of its later stages, so that the oldest micro-batch can always go on.
        """
        rooms = [0] * self._work.stages
        for rank, own in enumerate(self._stages):
            for behind, stage in enumerate(reversed(own)):
                rooms[stage] = max(1, self._work.most[rank] - behind)
        return rooms

    def orders(self) -> Orders:
        """The steps of every rank."""
        heap: list[tuple[float, int]] = []
        ranks = range(len(self._stages))
        following = {rank: self._following(rank) for rank in ranks}
        for rank, found in following.items():
            if found is not None:
                heapq.heappush(heap, (found[0], rank))
        while heap:
            start, rank = heapq.heappop(heap)
            found = following[rank]
            if found is None or found[0] != start:
                continue  # another step is next on that rank by now
            step = found[1]
            self._do(step, start)
            for touched in self._touched(step):
                following[touched] = self._following(touched)
                found = following[touched]
                if found is not None:
                    heapq.heappush(heap, (found[0], touched))
        return _Messages(self._work.homes, self._orders, self._ends).merged()

    def _do(self, step: Step, start: float) -> None:
        rank = self._work.homes[step.stage]
        end = start + max(LEAST, self._work.seconds[step.kind, step.stage])
        self._ends[step] = self._free[rank] = end
        self._done[step.kind][step.stage] += 1
        self._held[rank] += (step.kind == FORWARD) - (step.kind == WEIGHT)
        self._orders[rank].append(step)

    def _touched(self, step: Step) -> set[int]:
        """The ranks for which another step may be next, when this one is done."""
        beside = {FORWARD: step.stage + 1, INPUT: step.stage - 1}.get(step.kind, -1)
        ranks = {self._work.homes[step.stage]}
        if 0 <= beside < self._work.stages:
            ranks.add(self._work.homes[beside])
        return ranks

    def _following(self, rank: int) -> tuple[float, Step] | None:
        """When the next step of a rank begins, and which one it is; None while it has to wait for others."""
        ready: list[tuple[float, Step]] = []
        for step in self._next(rank):
            since = self._since(step)
            if since is not None:
                ready.append((max(since, self._free[rank]), step))
        if not ready:
            return None
        first = min(start for start, _ in ready)
        until = first
        now = [step for start, step in ready if start == first]
        if all(step.kind == WEIGHT for step in now):
            weights = self._work.seconds[WEIGHT, now[0].stage]
            until = first + self._patience * weights
        urgent = [
            (start, step)
            for start, step in ready
            if start == first or (start <= until and step.kind != WEIGHT)
        ]
        waits = first < until
        return min(urgent, key=lambda each: self._place(each[0], each[1], waits))

    def _next(self, rank: int) -> Iterable[Step]:
        """The steps of a rank that are next of their kind in their stage."""
        for stage, kind in product(self._stages[rank], _URGENCY):
            yield Step(kind, stage, self._done[kind][stage])

    def _place(self, start: float, step: Step, waits: bool) -> tuple[float, ...]:
        """Steps of lower places are next: gradients that others wait for before values, these before weights,
        and where a rank waits, the one that it waits for the least.
        """
        urgency = _URGENCY[step.kind]
        weights = step.kind == WEIGHT
        if waits:
            return weights, start, urgency, self._sign * step.stage
        return urgency, self._sign * step.stage

    def _since(self, step: Step) -> float | None:
        """From when on a step can be done; None where that is not known yet."""
        work = self._work
        stage, microbatch = step.stage, step.microbatch
        if microbatch == work.count:
            return None
        if step.kind == WEIGHT:
            return self._ends.get(Step(INPUT, stage, microbatch))
        if step.kind == FORWARD:
            if self._held[work.homes[stage]] >= self._room[stage]:
                return None
            return self._arrival(Step(FORWARD, stage - 1, microbatch), stage)
        own = self._ends.get(Step(FORWARD, stage, microbatch))
        arrived = self._arrival(Step(INPUT, stage + 1, microbatch), stage)
        if own is None or arrived is None:
            return None
        return max(own, arrived)

    def _arrival(self, before: Step, stage: int) -> float | None:
        """When there is what a step of a neighbour makes; 0 where there is no neighbour."""
        work = self._work
        if not 0 <= before.stage < work.stages:
            return 0.0
        end = self._ends.get(before)
        if end is None or work.homes[before.stage] == work.homes[stage]:
            return end
        return end + work.delays[min(before.stage, stage)]


class _Refilled(_Listed):
    """Forwards and gradients of inputs in the order of the schedule; those of weights where a rank waits."""

    def __init__(self, work: Work, patience: float) -> None:
        super().__init__(work, patience, late_first=False)
        self._left = [deque(_without_weights(order)) for order in work.own]

    def _rooms(self) -> list[int]:
        """By stage, what its rank may hold: by the schedule's order it is enough."""
        return [self._work.most[rank] for rank in self._work.homes]

    def _do(self, step: Step, start: float) -> None:
        super()._do(step, start)
        if step.kind != WEIGHT:
            self._left[self._work.homes[step.stage]].popleft()

    def _next(self, rank: int) -> Iterable[Step]:
        left = self._left[rank]
        if left:
            yield left[0]
        for stage in self._stages[rank]:
            yield Step(WEIGHT, stage, self._done[WEIGHT][stage])


def _without_weights(order: Iterable[Step]) -> Iterator[Step]:
    """Forwards and gradients of inputs, which are the first part of a backward that is not split."""
    for step in order:
        if step.kind == BACKWARD:
            yield replace(step, kind=INPUT)
        elif step.kind != WEIGHT:
            yield step


@dataclass(frozen=True, order=True)
class _Message:
    """A message, both ends of which have begun at a time. sent, received: the slots of its ends."""

    begun: float
    send: Step
    receive: Step
    sent: int
    received: int


class _Messages:
    """The messages between ranks that do their steps in these orders, with the end of each step.

    A slot is the place in front of a step, or behind the last one, where a rank begins its ends of messages.
    """

    def __init__(
        self,
        homes: Sequence[int],
        orders: Sequence[Sequence[Step]],
        ends: Mapping[Step, float],
    ) -> None:
        self._homes = homes
        self._orders = orders
        self._ends = [[ends[step] for step in order] for order in orders]
        self._places: dict[Step, int] = {}
        for order in orders:
            self._places.update(zip(order, range(len(order)), strict=True))

    def merged(self) -> Orders:
        """The steps, with the ends of messages among them. All ranks have their messages in one order, by
        when both ends have begun, so that none waits for ever.
        """
        steps = [step for order in self._orders for step in order]
        found = [self._message(step) for step in steps]
        slots: list[list[list[Step]]] = []
        for order in self._orders:
            slots.append([[] for _ in order])
            slots[-1].append([])
        last = [0] * len(slots)
        for message in sorted(filter(None, found)):
            ends = {message.send: message.sent, message.receive: message.received}
            for end, slot in ends.items():
                rank = self._homes[end.stage]
                last[rank] = max(last[rank], slot)
                slots[rank][last[rank]].append(end)
        merged = map(_merged, self._orders, slots)
        return tuple(map(tuple, merged))

    def _message(self, step: Step) -> _Message | None:
        """The message that follows a step; None where nothing leaves the rank."""
        if step.kind not in _MESSAGES:
            return None
        send, receive, by = _MESSAGES[step.kind]
        to = step.stage + by
        if not 0 <= to < len(self._homes):
            return None
        sender = self._homes[step.stage]
        receiver = self._homes[to]
        if sender == receiver:
            return None
        m = step.microbatch
        maker = self._places[step]
        reader = self._places[Step(step.kind, to, m)]
        there = self._ends[receiver]
        here = self._ends[sender]
        sent, received = _together(here, maker, there, reader)
        return _Message(
            max(_begin(here, sent), _begin(there, received)),
            Step(send, step.stage, m),
            Step(receive, to, m),
            sent,
            received,
        )


def _begin(ends: Sequence[float], slot: int) -> float:
    """When an end of a message begins that stands in front of the step at this place."""
    return ends[slot - 1] if slot else 0.0


def _together(
    sender: Sequence[float], maker: int, receiver: Sequence[float], reader: int
) -> tuple[int, int]:
    """The slots in which a message is sent, behind the step at `maker` that makes it, and received, at most
    in front of the `reader`. Of those near to each other in time they are the ones in which the rank that is
    first waits the least for the other: a kernel that waits takes room on its device.
    """
    ready = sender[maker]
    latest = _begin(receiver, reader)
    first = min(bisect_right(receiver, ready), reader)
    sending = [slot for slot in range(maker + 1, maker + NEAR) if slot <= len(sender)]
    ways = [
        (abs(_begin(sender, sent) - _begin(receiver, received)), sent, received)
        for sent in sending
        if sent == maker + 1 or _begin(sender, sent) <= latest
        for received in range(first, min(first + NEAR, reader + 1))
    ]
    return min(ways)[1:]


def _merged(steps: Sequence[Step], slots: Sequence[Sequence[Step]]) -> Iterator[Step]:
    """Steps, and in front of each, and behind the last, what is in its slot."""
    for place, slot in enumerate(slots):
        yield from slot
        yield from steps[place : place + 1]
