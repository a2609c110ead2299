"""Timeline -> an SVG picture: a row for each rank, a box for each step, and the waiting time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple, Protocol

from stagecut.backend.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Event
from stagecut.backend.tables import time_text

NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT: "backward for the inputs",
    WEIGHT: "backward for the weights",
}
COLORS = {
    FORWARD: ("#7ba3cf", "#b7cde5", "#d7e4f1"),
    BACKWARD: ("#7fb58a", "#b5d6bb", "#d8eadb"),
    INPUT: ("#52a3a0", "#9acdca", "#cae5e4"),
    WEIGHT: ("#dfb264", "#edd3a4", "#f6e8cf"),
}
"""Kind of step -> its colour for the first, the second and further stages of a rank."""
HOST = "#cfc6c2"
"""The colour of the time in which the host of a rank works and its device waits."""

LEFT = 74
RIGHT = 84
TOP = 62
ROW = 30
BOX = 24
BOTTOM = 30

LEAST = 640.0
MOST = 3600.0
"""The narrowest and the widest time axis."""

WIDE = 24.0
NARROW = 15.0
"""The width of a usual step's box where ranks have few steps, or many."""

MANY = 60
"""With more steps than this a rank has many."""


class Timeline(Protocol):
    """The data of the drawing: steps of ranks and when they run, with the seconds of all and the share in
    which ranks wait.
    """

    @property
    def events(self) -> Sequence[Event]:
        """The steps."""

    @property
    def ranks(self) -> int:
        """The number of ranks."""

    @property
    def title(self) -> str:
        """The title above the picture."""

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they wait."""

    def waits(self, rank: int) -> float:
        """The seconds in which a rank waits."""

    def host_until(self, rank: int) -> float:
        """Up to here the host of a rank works where its device does not."""


class Axis(NamedTuple):
    """The scale of the time axis: points for a second, the unit of its labels, and a tick each `step`
    seconds.
    """

    scale: float
    unit: str
    per_second: float
    step: float

    def at(self, seconds: float) -> float:
        """The position of a time."""
        return LEFT + seconds * self.scale

    def label(self, seconds: float) -> str:
        """A time as a short text with its unit."""
        return f"{seconds * self.per_second:.4g} {self.unit}"


def gantt(timeline: Timeline) -> str:
    """The timeline as an SVG picture; every box has its exact times as a tooltip."""
    axis = _axis(timeline)
    end = axis.at(timeline.seconds)
    wide = math.ceil(end) + RIGHT
    high = TOP + ROW * timeline.ranks + BOTTOM
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'width="{wide}" height="{high}" '
        f'viewBox="0 0 {wide} {high}" '
        'font-family="Helvetica,Arial,sans-serif" font-size="11" fill="#1d252c">',
        '<defs><pattern id="stagecut-bubble" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="5" height="5" fill="#f2f4f6"/>'
        '<rect width="1.2" height="5" fill="#dce1e5"/></pattern></defs>',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        *_head(timeline),
        *_ruler(timeline, axis),
    ]
    rows: list[list[Event]] = [[] for _ in range(timeline.ranks)]
    for event in timeline.events:
        rows[event.rank].append(event)
    for rank, events in enumerate(rows):
        lines += _row(timeline, axis, rank, events)
    return "\n".join([*lines, "</svg>\n"])


def _axis(timeline: Timeline) -> Axis:
    total = timeline.seconds or 1.0
    width = _width(timeline, total)
    width = max(width, LEAST)
    width = min(width, MOST)
    scale = width / total
    unit, per_second = _unit(total)
    step = _round(90 / scale)
    return Axis(scale, unit, per_second, step)


def _width(timeline: Timeline, total: float) -> float:
    """The width of the time axis on which the box of a usual step is as wide as it should be."""
    lengths: list[float] = []
    for event in timeline.events:
        length = _seconds(event)
        if length > 0:
            lengths.append(length)
    if not lengths:
        return LEAST
    lengths.sort()
    usual = lengths[len(lengths) // 2]
    room = WIDE
    if len(lengths) > MANY * timeline.ranks:
        room = NARROW
    return room / usual * total


def _seconds(event: Event) -> float:
    """The time that a step takes."""
    return event.end - event.start


def _unit(seconds: float) -> tuple[str, float]:
    """The largest unit of which a time is at least one, and how many of it are a second."""
    for unit, per_second in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * per_second >= 1:
            return unit, per_second
    return "ns", 1e9


def _round(seconds: float) -> float:
    """The next larger number of 1, 2 or 5 and a power of ten."""
    power = 10.0 ** math.floor(math.log10(seconds))
    least = seconds * 0.999
    for factor in (1, 2, 5):
        step = factor * power
        if step >= least:
            return step
    return 10 * power


def _head(timeline: Timeline) -> Iterator[str]:
    title = _title(timeline)
    yield f'<text x="12" y="20" font-size="14">{escape(title)}</text>'
    kinds: set[str] = set()
    rows: set[tuple[int, int]] = set()
    for event in timeline.events:
        kinds.add(event.step.kind)
        rows.add((event.rank, event.step.stage))
    x = 12.0
    shown = [(name, COLORS[kind][0]) for kind, name in NAMES.items() if kind in kinds]
    if any(map(timeline.host_until, range(timeline.ranks))):
        shown.append(("host alone", HOST))
    for name, color in shown:
        yield f'<rect x="{x:g}" y="31" width="13" height="13" rx="2" fill="{color}"/>'
        yield f'<text x="{x + 18:g}" y="42">{name}</text>'
        x += 34 + 5.6 * len(name)
    yield (
        f'<rect x="{x:g}" y="31" width="13" height="13" rx="2" '
        'fill="url(#stagecut-bubble)" stroke="#d0d6db"/>'
    )
    yield f'<text x="{x + 18:g}" y="42">bubble</text>'
    if len(rows) > timeline.ranks:
        yield (
            f'<text x="{x + 78:g}" y="42" fill="#66707a">'
            "lighter: further stages of a rank</text>"
        )


def _title(timeline: Timeline) -> str:
    bubble = 100 * timeline.bubble
    share = f"{time_text(timeline.seconds)}, bubble {bubble:.1f} %"
    if not timeline.title:
        return share
    return f"{timeline.title}: {share}"


def _ruler(timeline: Timeline, axis: Axis) -> Iterator[str]:
    bottom = TOP + ROW * timeline.ranks
    last = int(timeline.seconds / axis.step * 1.0001)
    for tick in range(last + 1):
        seconds = tick * axis.step
        x = axis.at(seconds)
        label = axis.label(seconds)
        yield f'<path d="M{x:.1f} {TOP - 4}V{bottom + 4}" stroke="#e1e5e8"/>'
        yield (
            f'<text x="{x:.1f}" y="{bottom + 18}" '
            'text-anchor="middle" fill="#66707a">'
            f"{label}</text>"
        )


def _row(
    timeline: Timeline, axis: Axis, rank: int, events: list[Event]
) -> Iterator[str]:
    """The row of a rank: the bubble in the background, its steps on top, and its share at the end."""
    top = TOP + ROW * rank + (ROW - BOX) / 2
    base = top + 16
    seconds = timeline.seconds
    waits = timeline.waits(rank)
    share = 0.0
    if seconds:
        share = 100 * waits / seconds
    yield f'<g id="rank-{rank}"><text x="12" y="{base:g}">rank {rank}</text>'
    yield (
        f"<g><title>rank {rank} waits {axis.label(waits)}, "
        f"{share:.1f} % of the step</title>"
    )
    wide = seconds * axis.scale
    yield (
        f'<rect x="{LEFT}" y="{top:g}" '
        f'width="{wide:.2f}" height="{BOX}" '
        'fill="url(#stagecut-bubble)"/></g>'
    )
    until = timeline.host_until(rank)
    if until:
        yield (
            f"<g><title>the host of rank {rank} starts what comes next</title>"
            f'<rect x="{LEFT}" y="{top:g}" '
            f'width="{until * axis.scale:.2f}" height="{BOX}" '
            f'fill="{HOST}"/></g>'
        )
    stages = sorted({event.step.stage for event in events})
    for event in events:
        yield from _box(axis, top, event, stages)
    right = axis.at(seconds) + 8
    yield (
        f'<text x="{right:.1f}" y="{base:g}" fill="#66707a">'
        f"{share:.1f} % idle</text></g>"
    )


def _box(axis: Axis, top: float, event: Event, stages: list[int]) -> Iterator[str]:
    """One step as a box, with as much text as there is room for: its micro-batch, its stage."""
    step = event.step
    x = axis.at(event.start)
    seconds = _seconds(event)
    wide = seconds * axis.scale
    shade = min(stages.index(step.stage), 2)
    color = COLORS[step.kind][shade]
    start = axis.label(event.start)
    end = axis.label(event.end)
    yield (
        f"<g><title>{NAMES[step.kind]} "
        f"of micro-batch {step.microbatch}, "
        f"stage {step.stage}, "
        f"rank {event.rank}\n"
        f"{start} to {end}, {axis.label(seconds)}</title>"
    )
    edge = ""
    if wide > 3:
        edge = ' stroke="white" stroke-width="0.6"'
    yield (
        f'<rect x="{x:.2f}" y="{top:g}" '
        f'width="{wide:.2f}" height="{BOX}" '
        f'fill="{color}"{edge}/>'
    )
    text = _text(step.microbatch, step.stage, wide, len(stages) > 1)
    if text:
        middle = x + wide / 2
        yield (
            f'<text x="{middle:.2f}" y="{top + 16:g}" '
            'text-anchor="middle" font-size="10">'
            f"{text}</text>"
        )
    yield "</g>"


def _text(microbatch: int, stage: int, wide: float, several: bool) -> str:
    """The text for a box of a width: `3`, followed by `s1` where there is room and the rank has several
    stages.
    """
    number = str(microbatch)
    digits = len(number)
    if wide < 6 * digits + 2:
        return ""
    with_stage = 5.6 * digits + 4.5 * len(str(stage)) + 10
    if not several or wide < with_stage:
        return number
    return f'{number}<tspan dx="2" fill="#46525c" font-size="8">s{stage}</tspan>'
