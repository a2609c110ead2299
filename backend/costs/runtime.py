"""A step as torch's runtime executes it: what each rank computes, sends and waits for, in which order.

On a GPU a rank computes on one stream, and has a stream of messages for each of its neighbours, and one for
batches of sends and receives with both. What is posted starts when all before it on its stream is done and
when all that was computed before it was posted is done. It ends when both ends of each message have started
and the bytes are over. What waits for it starts then. So a receive that is posted early holds up what is sent
to the same neighbour behind it. A step takes longer while messages of its rank are under way.

No time depends on the order in which ranks are looked at: each is reckoned from others, known by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from typing import Any, Generic, NamedTuple, TypeVar

from stagecut.backend.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Orders,
    Step,
    V,
    homes,
    is_step,
    parts_of,
    step_of,
    torch_schedule,
)
from stagecut.ir.errors import StagecutError


@dataclass(frozen=True)
class Message:
    """What crosses between stage `boundary` and the next for a micro-batch: values, or their gradients."""

    boundary: int
    microbatch: int
    is_gradient: bool


@dataclass(frozen=True)
class Post:
    """Messages that a rank begins to send or to receive together, on its stream for `peer`, a neighbour, or
    on that for batches.
    """

    number: int
    messages: tuple[Message, ...]
    peer: int = -1


@dataclass(frozen=True)
class Await:
    """What follows waits for the end of a post of the same rank."""

    number: int


Action = Step | Post | Await
Actions = tuple[tuple[Action, ...], ...]
"""The actions of every rank, in their order."""


@lru_cache(256)
def actions(
    schedule: str,
    stages: int,
    ranks: int,
    count: int,
    training: bool,
    given: Orders | None = None,
) -> Actions:
    """The actions of every rank in a step with `count` micro-batches, by the schedule's own orders or by
    those that are `given`. Raises StagecutError where the schedule has no order for these numbers.
    """
    placement = homes(stages, ranks, schedule in V)
    if not training:
        return tuple(tuple(_forward_only(placement, r, count)) for r in range(ranks))
    if schedule == "GPipe":
        return tuple(tuple(_gpipe(s, stages, count)) for s in range(stages))
    if schedule == "1F1B":
        return tuple(tuple(_one_ahead(s, stages, count)) for s in range(stages))
    made = torch_schedule(schedule, stages, ranks, count, given)
    return tuple(
        tuple(_of_runtime(made.pipeline_order_with_comms[rank], placement))
        for rank in range(ranks)
    )


@dataclass
class _Script:
    """The actions of one rank while they are written."""

    actions: list[Action] = field(default_factory=list)

    def post(self, *messages: Message, peer: int = -1) -> Iterable[Await]:
        """The messages are posted. Returns what waits for them, nothing where there are none."""
        if not messages:
            return ()
        number = len(self.actions)
        self.actions.append(Post(number, messages, peer))
        return (Await(number),)

    def run(self, kind: str, stage: int, microbatch: int) -> None:
        """A step is done."""
        self.actions.append(Step(kind, stage, microbatch))

    def wait(self, posts: Iterable[Await]) -> None:
        """What follows waits for these."""
        self.actions += posts


def _values(
    boundary: int, microbatch: int, stages: int, is_gradient: bool = False
) -> tuple[Message, ...]:
    """What crosses behind stage `boundary`: nothing where no two stages meet."""
    if not 0 <= boundary < stages - 1:
        return ()
    return (Message(boundary, microbatch, is_gradient),)


_gradients = partial(_values, is_gradient=True)


def _gpipe(stage: int, stages: int, count: int) -> list[Action]:
    script = _Script()
    sent: list[Await] = []
    for i in range(count):
        script.wait(script.post(*_values(stage - 1, i, stages)))
        script.run(FORWARD, stage, i)
        sent += script.post(*_values(stage, i, stages))
    script.wait(sent)
    sent = []
    for i in range(count):
        script.wait(script.post(*_gradients(stage, i, stages)))
        script.run(BACKWARD, stage, i)
        sent += script.post(*_gradients(stage - 1, i, stages))
    script.wait(sent)
    return script.actions


def _one_ahead(stage: int, stages: int, count: int) -> list[Action]:
    script = _Script()
    ahead = min(count, stages - stage)
    sent: Iterable[Await] = ()
    for i in range(ahead):
        script.wait(script.post(*_values(stage - 1, i, stages)))
        script.run(FORWARD, stage, i)
        script.wait(sent)
        if i < ahead - 1:
            sent = script.post(*_values(stage, i, stages))
    # the last value of the warm-up goes together with the first gradient
    values = _values(stage, ahead - 1, stages)
    for i in range(count):
        script.wait(script.post(*values, *_gradients(stage, i, stages)))
        script.run(BACKWARD, stage, i)
        gradients = _gradients(stage - 1, i, stages)
        forward = i + ahead
        if forward >= count:
            values = ()
            script.wait(sent)
            sent = script.post(*gradients)
            continue
        script.wait(script.post(*gradients, *_values(stage - 1, forward, stages)))
        script.run(FORWARD, stage, forward)
        values = _values(stage, forward, stages)
    script.wait(sent)
    return script.actions


def _forward_only(placement: Sequence[int], rank: int, count: int) -> list[Action]:
    script = _Script()
    stages = len(placement)
    sent: list[Await] = []
    for i in range(count):
        for stage in (s for s in range(stages) if placement[s] == rank):
            if stage and placement[stage - 1] != rank:
                before = placement[stage - 1]
                script.wait(script.post(*_values(stage - 1, i, stages), peer=before))
            script.run(FORWARD, stage, i)
            if stage < stages - 1 and placement[stage + 1] != rank:
                behind = placement[stage + 1]
                sent += script.post(*_values(stage, i, stages), peer=behind)
    script.wait(sent)
    return script.actions


def _of_runtime(listed: Iterable[Any], placement: Sequence[int]) -> Iterator[Action]:
    """The actions that torch's runtime executes for a list with communication."""
    script = _Script()
    sent: list[Await] = []
    received: dict[Message, Iterable[Await]] = {}
    for action in (part for listed_one in listed for part in parts_of(listed_one)):
        name = str(action.computation_type.value)
        stage = action.stage_index
        microbatch = action.microbatch_index
        if is_step(action):
            step = step_of(action)
            is_gradient = step.kind != FORWARD
            boundary = stage if is_gradient else stage - 1
            if step.kind in (FORWARD, BACKWARD, INPUT):
                arrived = Message(boundary, microbatch, is_gradient)
                script.wait(received.pop(arrived, ()))
            script.actions.append(step)
        elif name.startswith(("SEND", "RECV")):
            is_gradient = name.endswith("B")
            sends = name.startswith("SEND")
            boundary = stage if sends != is_gradient else stage - 1
            message = Message(boundary, microbatch, is_gradient)
            other = boundary + 1 if stage == boundary else boundary
            posted = script.post(message, peer=placement[other])
            if sends:
                sent += posted
            else:
                received[message] = posted
    script.wait(reversed(sent))
    yield from script.actions


T = TypeVar("T")

KINDS = (FORWARD, BACKWARD, INPUT, WEIGHT)
"""The kinds of steps, in the order of `Parts`."""


class Parts(NamedTuple, Generic[T]):
    """The seconds of a stage, or of each of some ops, for one micro-batch. inputs, weights: those of a
    backward that is split.
    """

    forward: T
    backward: T
    inputs: T
    weights: T


class Timing(NamedTuple, Generic[T]):
    """The seconds for which a device computes, and those in which the host starts what it computes."""

    device: Parts[T]
    host: Parts[T]

    def over(self, count: int) -> Timing[Any]:
        """Those of one of so many."""
        parts: list[Any] = [*self]
        return Timing(*(Parts(*(each / count for each in part)) for part in parts))


def as_run(seconds: Parts[T], stage: int, splits: bool) -> Parts[T]:
    """The seconds as torch's runtime spends them in a stage. All of the backward of the first stage is done
    in the step for the weights, by autograd and by graphs. None is taken apart that is wrapped.
    """
    forward, backward, inputs, weights = seconds
    none: Any = 0.0 * backward  # type: ignore[operator]
    if stage == 0:
        inputs, weights = none, backward
    elif not splits:
        inputs, weights = backward, none
    return Parts(forward, backward, inputs, weights)


@dataclass
class _Stream(Generic[T]):
    """What is posted on a stream of a rank and not known to end, and when it was. sent: when the posts that
    are known to end have ended; begun: the number of the post that has begun last; last: of that posted last.
    """

    sent: T
    begun: int = -1
    last: int = -1
    posted: deque[tuple[Post, T]] = field(default_factory=deque)


@dataclass
class _Rank(Generic[T]):
    """A rank while its actions run. computed: when all that it has computed is done; started: when the host
    has started all of it; streams: those of its messages, by neighbour; ends: of the posts that are known to
    end.
    """

    number: int
    actions: deque[Action]
    computed: T
    started: T
    streams: dict[int, _Stream[T]] = field(default_factory=dict)
    ends: dict[int, T] = field(default_factory=dict)


class Done(NamedTuple, Generic[T]):
    """A step that a rank has done, when it started and when it was over. posted: the numbers of the posts
    that were the last ones on their streams.
    """

    step: Step
    rank: int
    start: T
    end: T
    posted: tuple[int, ...]


class Run(Generic[T]):
    """Actions and when they run. A time is a float, or a tensor with a number for each of many cuts.

    seconds: of each step, on the device and on the host. delays: of a message, by the stage that it leaves or
    comes to. posting: seconds in which the host starts a post. longer: the seconds by which the device takes
    longer for a step than these.
    """

    def __init__(
        self,
        listed: Actions,
        seconds: Callable[[Step], tuple[T, T]],
        delays: Sequence[T],
        zero: T,
        larger: Callable[[T, T], T],
        posting: float = 0.0,
        longer: Mapping[Step, T] | None = None,
    ) -> None:
        self._seconds = seconds
        self._delays = delays
        self._zero = zero
        self._larger = larger
        self._posting = posting
        self._longer = longer or {}
        self._begun: dict[Message, list[T]] = {}
        self.steps: list[Done[T]] = []
        self._ranks = [
            _Rank(number, deque(own), zero, zero) for number, own in enumerate(listed)
        ]
        while sum(map(self._go_as_far_as_it_can, self._ranks)):
            pass
        if any(rank.actions for rank in self._ranks):
            raise StagecutError("the order of the schedule waits for itself")

    def _go_as_far_as_it_can(self, rank: _Rank[T]) -> bool:
        """A rank runs actions until it waits for another one; False where it did so already."""
        moved = False
        while self._advance(rank):
            moved = True
        return moved

    @property
    def end(self) -> T:
        """When the last rank is done."""
        ends = [self._larger(rank.computed, rank.started) for rank in self._ranks]
        return reduce(self._larger, ends)

    @property
    def messages(self) -> Iterator[tuple[Message, T, T]]:
        """What is sent, from when both ends have begun until it is over."""
        for message, begun in self._begun.items():
            yield message, self._larger(*begun), self._end_of(message)

    def _advance(self, rank: _Rank[T]) -> bool:
        """Runs the next action, or where it has to wait, does what others wait for; False for nothing."""
        settled = self._settle(rank)
        if not rank.actions:
            return settled
        action = rank.actions[0]
        if isinstance(action, Await):
            if action.number not in rank.ends:
                return settled
            rank.computed = self._larger(rank.computed, rank.ends[action.number])
        elif isinstance(action, Post):
            started: Any = rank.started
            rank.started = started + self._posting
            ready = self._larger(rank.computed, rank.started)
            stream = rank.streams.setdefault(action.peer, _Stream(self._zero))
            stream.posted.append((action, ready))
            stream.last = action.number
            self._settle(rank)
        else:
            self._run(rank, action)
        rank.actions.popleft()
        return True

    def _run(self, rank: _Rank[T], step: Step) -> None:
        device, host = self._seconds(step)
        start: Any = self._larger(rank.computed, rank.started)
        started: Any = rank.started
        rank.started = started + host
        end: Any = start
        end = end + device
        if step in self._longer:
            end = end + self._longer[step]
        # the last kernel runs when it is started
        rank.computed = self._larger(end, rank.started)
        posted = tuple(stream.last for stream in rank.streams.values())
        self.steps.append(Done(step, rank.number, start, rank.computed, posted))

    def under_way(self) -> Iterator[tuple[Step, T]]:
        """The steps that begin while messages of their rank are under way, and for how many seconds of what
        the device computes these still are.
        """
        for done in self.steps:
            if not done.posted:
                continue
            ends = self._ranks[done.rank].ends
            sent: Any = reduce(self._larger, (ends[number] for number in done.posted))
            device: Any = self._seconds(done.step)[0]
            beyond: Any = self._larger(sent - done.start, 0.0 * device)
            # the smaller of the two
            yield done.step, device - self._larger(device - beyond, 0.0 * device)

    def _settle(self, rank: _Rank[T]) -> bool:
        """Posts begin and end, in the order of their stream, as far as the other ends of their messages have
        begun; False where none does.
        """
        moved = False
        for stream in rank.streams.values():
            moved |= self._go_on(rank, stream)
        return moved

    def _go_on(self, rank: _Rank[T], stream: _Stream[T]) -> bool:
        moved = False
        while stream.posted:
            post, ready = stream.posted[0]
            if stream.begun != post.number:
                stream.begun = post.number
                stream.sent = self._larger(ready, stream.sent)
                for message in post.messages:
                    self._begun.setdefault(message, []).append(stream.sent)
                moved = True
            if any(len(self._begun[message]) < 2 for message in post.messages):
                return moved
            ends = [self._end_of(message) for message in post.messages]
            stream.sent = reduce(self._larger, ends, stream.sent)
            rank.ends[post.number] = stream.sent
            stream.posted.popleft()
            moved = True
        return moved

    def _end_of(self, message: Message) -> Any:
        """When a message is over, both ends of which have begun."""
        delay: Any = self._delays[message.boundary]
        return delay + self._larger(*self._begun[message])


def slowed_run(
    listed: Actions,
    seconds: Callable[[Step], tuple[T, T]],
    delays: Sequence[T],
    zero: T,
    larger: Callable[[T, T], T],
    posting: float,
    slowed: float,
) -> Run[T]:
    """The run of steps that take longer by the part `slowed` while messages are under way, because their
    kernels take room on the device. For how long they are is known from a run in which they slow nothing.
    """
    run = Run(listed, seconds, delays, zero, larger, posting)
    if not slowed:
        return run
    times: Iterator[tuple[Step, Any]] = run.under_way()
    longer = {step: slowed * time for step, time in times}
    return Run(listed, seconds, delays, zero, larger, posting, longer)
