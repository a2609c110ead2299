"""Timeline -> an SVG picture: a row for each rank, a box for each step, and the waiting time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple, Protocol

from stagecut.backend.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Event

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

LEFT, RIGHT, TOP, ROW, BOX = 74, 84, 62, 30, 24
LEAST, MOST, ROOMS = 640.0, 3600.0, (24.0, 15.0)
"""The narrowest and the widest time axis, and the width of a usual step's box where ranks have few steps, or
many.
"""


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
    wide = math.ceil(axis.at(timeline.seconds)) + RIGHT
    high = TOP + ROW * timeline.ranks + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        'font-family="Helvetica,Arial,sans-serif" font-size="11" fill="#1d252c">',
        '<defs><pattern id="stagecut-bubble" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="5" height="5" fill="#f2f4f6"/>'
        '<rect width="1.2" height="5" fill="#dce1e5"/></pattern></defs>',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        *_head(timeline, axis),
        *_ruler(timeline, axis),
    ]
    rows: list[list[Event]] = [[] for _ in range(timeline.ranks)]
    for event in timeline.events:
        rows[event.rank].append(event)
    for rank, events in enumerate(rows):
        lines += _row(timeline, axis, rank, events)
    return "\n".join([*lines, "</svg>\n"])


def _axis(timeline: Timeline) -> Axis:
    spans = [event.end - event.start for event in timeline.events]
    lengths = sorted(length for length in spans if length > 0)
    total = timeline.seconds or 1.0
    few, many = ROOMS
    room = many if len(lengths) > 60 * timeline.ranks else few
    width = room / lengths[len(lengths) // 2] * total if lengths else LEAST
    scale = min(max(width, LEAST), MOST) / total
    unit, per_second = _unit(total)
    return Axis(scale, unit, per_second, _round(90 / scale))


def _unit(seconds: float) -> tuple[str, float]:
    """The largest unit of which a time is at least one, and how many of it are a second."""
    for unit, per_second in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * per_second >= 1:
            return unit, per_second
    return "ns", 1e9


def _round(seconds: float) -> float:
    """The next larger number of 1, 2 or 5 and a power of ten."""
    power = 10.0 ** math.floor(math.log10(seconds))
    steps = (factor * power for factor in (1, 2, 5, 10))
    return next(step for step in steps if step >= seconds * 0.999)


def _head(timeline: Timeline, axis: Axis) -> Iterator[str]:
    share = f"{axis.label(timeline.seconds)}, bubble {100 * timeline.bubble:.1f} %"
    title = f"{timeline.title}: {share}" if timeline.title else share
    yield f'<text x="12" y="20" font-size="14">{escape(title)}</text>'
    x = 12.0
    kinds = {event.step.kind for event in timeline.events}
    for kind in (kind for kind in NAMES if kind in kinds):
        yield f'<rect x="{x:g}" y="31" width="13" height="13" rx="2" fill="{COLORS[kind][0]}"/>'
        yield f'<text x="{x + 18:g}" y="42">{NAMES[kind]}</text>'
        x += 34 + 5.6 * len(NAMES[kind])
    yield (
        f'<rect x="{x:g}" y="31" width="13" height="13" rx="2" fill="url(#stagecut-bubble)" '
        'stroke="#d0d6db"/>'
    )
    yield f'<text x="{x + 18:g}" y="42">bubble</text>'
    rows = {(event.rank, event.step.stage) for event in timeline.events}
    if len(rows) > timeline.ranks:
        yield f'<text x="{x + 78:g}" y="42" fill="#66707a">lighter: further stages of a rank</text>'


def _ruler(timeline: Timeline, axis: Axis) -> Iterator[str]:
    bottom = TOP + ROW * timeline.ranks
    for tick in range(int(timeline.seconds / axis.step * 1.0001) + 1):
        x = axis.at(tick * axis.step)
        yield f'<path d="M{x:.1f} {TOP - 4}V{bottom + 4}" stroke="#e1e5e8"/>'
        label = axis.label(tick * axis.step)
        yield (
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#66707a">{label}</text>'
        )


def _row(
    timeline: Timeline, axis: Axis, rank: int, events: list[Event]
) -> Iterator[str]:
    """The row of a rank: the bubble in the background, its steps on top, and its share at the end."""
    top = TOP + ROW * rank + (ROW - BOX) / 2
    busy = sum(event.end - event.start for event in events)
    waits = timeline.seconds - busy
    share = 100 * waits / timeline.seconds if timeline.seconds else 0.0
    yield f'<g id="rank-{rank}"><text x="12" y="{top + 16:g}">rank {rank}</text>'
    yield f"<g><title>rank {rank} waits {axis.label(waits)}, {share:.1f} % of the step</title>"
    yield (
        f'<rect x="{LEFT}" y="{top:g}" width="{timeline.seconds * axis.scale:.2f}" height="{BOX}" '
        'fill="url(#stagecut-bubble)"/></g>'
    )
    stages = sorted({event.step.stage for event in events})
    for event in events:
        yield from _box(axis, top, event, stages)
    yield (
        f'<text x="{axis.at(timeline.seconds) + 8:.1f}" y="{top + 16:g}" fill="#66707a">'
        f"{share:.1f} % idle</text></g>"
    )


def _box(axis: Axis, top: float, event: Event, stages: list[int]) -> Iterator[str]:
    """One step as a box, with as much text as there is room for: its micro-batch, its stage."""
    step = event.step
    x = axis.at(event.start)
    wide = (event.end - event.start) * axis.scale
    color = COLORS[step.kind][min(stages.index(step.stage), 2)]
    times = f"{axis.label(event.start)} to {axis.label(event.end)}, {axis.label(event.end - event.start)}"
    yield (
        f"<g><title>{NAMES[step.kind]} of micro-batch {step.microbatch}, stage {step.stage}, rank "
        f"{event.rank}\n{times}</title>"
    )
    edge = ' stroke="white" stroke-width="0.6"' if wide > 3 else ""
    yield f'<rect x="{x:.2f}" y="{top:g}" width="{wide:.2f}" height="{BOX}" fill="{color}"{edge}/>'
    text = _text(step.microbatch, step.stage, wide, len(stages) > 1)
    if text:
        middle = x + wide / 2
        yield f'<text x="{middle:.2f}" y="{top + 16:g}" text-anchor="middle" font-size="10">{text}</text>'
    yield "</g>"


def _text(microbatch: int, stage: int, wide: float, several: bool) -> str:
    """The text for a box of a width: `3`, followed by `s1` where there is room and the rank has several
    stages.
    """
    number = str(microbatch)
    if several and wide >= 5.6 * len(number) + 4.5 * len(str(stage)) + 10:
        return f'{number}<tspan dx="2" fill="#46525c" font-size="8">s{stage}</tspan>'
    return number if wide >= 6 * len(number) + 2 else ""
