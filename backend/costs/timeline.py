"""The work of each rank over time: predicted, from the order of steps of torch's schedules, or measured by
`record`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stagecut.backend.costs.runtime import KINDS, Parts, slowed_run
from stagecut.backend.costs.setting import Setting
from stagecut.backend.pictures.gantt import gantt
from stagecut.backend.schedules import Event, Step


@dataclass(frozen=True)
class Sent:
    """A message from stage `boundary` to the next for a micro-batch, or with `is_gradient` back from it;
    start and end in seconds.
    """

    boundary: int
    microbatch: int
    is_gradient: bool
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The work of the ranks of a pipeline over time: one training step, predicted or measured.

    events: each step of a rank with its start and its end, in seconds. ranks: their number. title: for the
    picture. sent: the messages between stages; hosts: for each rank the seconds in which its host starts the
    ops of its steps. Both are known of a predicted timeline only.
    """

    events: tuple[Event, ...]
    ranks: int
    title: str = ""
    sent: tuple[Sent, ...] = ()
    hosts: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """The time from the first start to the last end, in seconds."""
        return max((e.end for e in self.events), default=0.0)

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they wait, from 0 to 1."""
        if self.seconds:
            return sum(map(self.waits, range(self.ranks))) / (self.ranks * self.seconds)
        return 0.0

    def waits(self, rank: int) -> float:
        """The seconds in which a rank waits: all but those of its steps, or of its host where that has more
        to do.
        """
        return self.seconds - self._steps_of(rank) - self._host_alone(rank)

    def host_until(self, rank: int) -> float:
        """The second up to which the device of a rank, where it has no step to do, waits while its host
        starts what comes next. These times together are those by which the host has more to do.
        """
        left = self._host_alone(rank)
        reached = 0.0
        if not left:
            return reached
        steps = (e for e in self.events if e.rank == rank)
        for step in sorted(steps, key=lambda e: e.start):
            gap = step.start - reached
            if gap >= left:
                break
            left -= gap
            reached = step.end
        return reached + left

    def _steps_of(self, rank: int) -> float:
        return sum(e.end - e.start for e in self.events if e.rank == rank)

    def _host_alone(self, rank: int) -> float:
        """The seconds by which the host of a rank has more to do than its device."""
        if not self.hosts:
            return 0.0
        return max(self.hosts[rank] - self._steps_of(rank), 0.0)

    def chrome_trace(self) -> dict[str, Any]:
        """The events in Chrome's trace format, in order of their start; microseconds."""
        events = [
            {
                "name": f"{e.step.kind}{e.step.microbatch} stage {e.step.stage}",
                "ph": "X",
                "pid": 0,
                "tid": e.rank,
                "ts": 1e6 * e.start,
                "dur": 1e6 * (e.end - e.start),
                "cat": e.step.kind,
            }
            for e in sorted(self.events, key=lambda e: e.start)
        ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def to_svg(self) -> str:
        """A row for each rank with a box for each step, the bubble and its share, as an SVG picture. Where
        the host is the limit, it is told from the bubble.
        """
        return gantt(self)


def simulate(
    setting: Setting,
    forward: Sequence[float],
    backward: Sequence[float],
    sent: Sequence[float] = (),
    split: Sequence[tuple[float, float]] | None = None,
    host: Sequence[Parts[float]] | None = None,
) -> Timeline:
    """The time of every step, when stages take these seconds for a micro-batch, and the values they send on
    take those seconds to arrive, each way.

    `split` has the seconds for the inputs and for the weights where a backward is split; by default, half of
    it each. `host` are the seconds in which the host starts all of it. Ranks compute, send and wait as
    torch's runtime does (backend/costs/runtime.py).
    """
    stages = len(forward)
    parts = split or [(b / 2, b / 2) for b in backward]
    zip_of_stages = zip(forward, backward, parts, strict=True)
    device = [Parts(f, b, inputs, weights) for f, b, (inputs, weights) in zip_of_stages]
    starting = host or [Parts(0.0, 0.0, 0.0, 0.0)] * stages

    def seconds(step: Step) -> tuple[float, float]:
        kind = KINDS.index(step.kind)
        return device[step.stage][kind], starting[step.stage][kind]

    delays = [*sent, *[0.0] * (stages - len(sent))]
    where = setting.devices(stages)[0]
    limits = (where.posting, where.slowed) if host else (0.0, 0.0)
    run = slowed_run(setting.actions(stages), seconds, delays, 0.0, max, *limits)
    events = [Event(done.step, done.rank, done.start, done.end) for done in run.steps]
    ranks = max(setting.placement(stages)) + 1
    hosts = [0.0] * ranks
    for event in events:
        _, on_host = seconds(event.step)
        hosts[event.rank] += on_host
    title = (
        f"{setting.schedule}, {stages} stages, {setting.n_microbatches} micro-batches"
    )
    return Timeline(
        tuple(sorted(events, key=lambda e: (e.start, e.rank))),
        ranks,
        title,
        tuple(
            Sent(sent.boundary, sent.microbatch, sent.is_gradient, start, end)
            for sent, start, end in run.messages
        ),
        tuple(hosts),
    )
