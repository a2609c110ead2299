"""What a prediction for other numbers of stages and micro-batches, and for other schedules, is made of: the
costs of small pieces of a program, and the orders of steps.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from stagecut.backend.costs.line import Holding, Line
from stagecut.backend.costs.ops import Device
from stagecut.backend.costs.runtime import Action, Actions, Message, Post, Timing
from stagecut.backend.costs.setting import Setting
from stagecut.backend.schedules import SCHEDULES, Step
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import scope_fqn

MOST_UNITS = 240
"""A program is divided into so many units at most, where the calls of its modules allow it."""

MOST_STEPS = 8_000
"""The orders that a prediction may choose from have about so many forwards in all."""


@dataclass(frozen=True)
class Unit:
    """Ops that stay together; name: the module of the first. device, host: the seconds of Timing, for each of
    KINDS. crossing: bytes that cross in front of it, one way. static, kept: bytes of state (with gradients
    and optimizer), and those kept of a micro-batch, of holders in no other unit; shared: (holder, static,
    kept) of the others. passing: as in a StageReport.
    """

    name: str
    device: tuple[float, ...]
    host: tuple[float, ...]
    crossing: float
    static: int
    kept: int
    shared: tuple[tuple[int, int, int], ...]
    passing: int


@dataclass(frozen=True)
class Units:
    """A program in units, and its stages as they are cut. stages: their seconds. delays: the seconds for
    which each sends. splits: whether torch can split their backwards.
    """

    units: tuple[Unit, ...]
    stages: tuple[Timing[float], ...]
    delays: tuple[float, ...]
    splits: bool
    device: Device
    setting: Setting


def units_of(
    line: Line,
    timings: Sequence[Timing[float]],
    delays: Sequence[float],
    splits: bool,
    where: Device,
) -> Units:
    """The units of a line, as small as their number allows."""
    edges = _edges(line)
    spans = [*pairwise(edges)]
    parts = line.parts(where)
    ways = 2 if line.setting.training else 1
    owner = _owners(line, spans)
    units: list[Unit] = []
    for begin, end in spans:
        device, host = parts[:, :, begin:end].sum(2).tolist()
        own = _holdings(line, begin, end)
        alone = [holding for holding in own if owner[holding.holder] is None]
        units.append(
            Unit(
                scope_fqn(line.ops[begin].scope),
                tuple(device),
                tuple(host),
                float(line.crossing[begin]) / ways,
                sum(holding.static for holding in alone),
                sum(holding.kept for holding in alone),
                tuple(_shared(own, owner)),
                max(line.passing(position) for position in range(begin, end)),
            )
        )
    return Units(
        tuple(units), tuple(timings), tuple(delays), splits, where, line.setting
    )


def _edges(line: Line) -> list[int]:
    """Where units begin, and the end: at every op, or between module calls where ops are too many."""
    end = len(line.ops)
    chosen = [0, end]
    for level in range(int(line.depth.max()) + 1):
        inside = ((line.depth <= level) & line.divisible).nonzero().flatten().tolist()
        edges = sorted({0, end, *inside})
        if len(edges) - 1 > MOST_UNITS and level:
            break
        chosen = edges
    return _thinned(chosen)


def _thinned(edges: list[int]) -> list[int]:
    """So many of the edges that there are not too many units."""
    step = math.ceil((len(edges) - 1) / MOST_UNITS)
    return [*edges[:-1:step], edges[-1]]


def _holdings(line: Line, begin: int, end: int) -> list[Holding]:
    """What these ops hold, each holder once."""
    own: dict[object, Holding] = {}
    for holdings in line.holdings[begin:end]:
        for holding in holdings:
            own.setdefault(holding.holder, holding)
    return [*own.values()]


def _owners(line: Line, spans: Sequence[tuple[int, int]]) -> dict[object, int | None]:
    """Holder -> None where a single span has it, else its number among those that several have."""
    seen: set[object] = set()
    owners: dict[object, int | None] = {}
    count = 0
    for begin, end in spans:
        for holding in _holdings(line, begin, end):
            owners.setdefault(holding.holder, None)
            if holding.holder in seen and owners[holding.holder] is None:
                owners[holding.holder] = count
                count += 1
            seen.add(holding.holder)
    return owners


def _shared(
    own: Sequence[Holding], owner: dict[object, int | None]
) -> Iterator[tuple[int, int, int]]:
    for holding in own:
        number = owner[holding.holder]
        if number is not None:
            yield number, holding.static, holding.kept


Key = tuple[str, int, int, int]
"""Schedule, stages, ranks, micro-batches."""


def orders_of(units: Units, stages: int) -> tuple[list[Key], str]:
    """The settings near that of the units, and for each the actions of all ranks: as texts with an empty line
    between them, compressed by zlib, in base64.
    """
    keys: list[Key] = []
    texts: list[str] = []
    left = MOST_STEPS
    for setting, count in _near(units, stages):
        left -= count * setting.n_microbatches
        if keys and left < 0:
            break
        try:
            ranks = max(setting.placement(count)) + 1
            listed = setting.actions(count)
        except StagecutError:  # there is no such order
            continue
        keys.append((setting.schedule, count, ranks, setting.n_microbatches))
        texts.append(_text(listed))
    return keys, packed("\n\n".join(texts))


def packed(text: str) -> str:
    """A text deflated, in base64, as a page unpacks it."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _near(units: Units, stages: int) -> Iterator[tuple[Setting, int]]:
    """Settings and numbers of stages, the nearest first: every schedule for each two numbers."""
    now = units.setting
    counts = {stages, stages // 2, stages + 1, 2 * stages, 2, 4, 8}
    batches = {now.n_microbatches * 2**power // 4 for power in range(6)}
    counts = {n for n in counts if 1 < n <= min(len(units.units), max(8, 2 * stages))}
    pairs = [(n, m) for n in counts | {stages} for m in batches - {0}]
    pairs.sort(key=lambda pair: _distance(pair, (stages, now.n_microbatches)))
    for count, batch in pairs:
        for schedule in SCHEDULES:
            ranks = order = None
            if (schedule, count) == (now.schedule, stages):
                ranks = now.ranks
                order = now.order if batch == now.n_microbatches else None
            other = replace(
                now, schedule=schedule, n_microbatches=batch, ranks=ranks, order=order
            )
            yield other, count


def _distance(pair: tuple[int, int], other: tuple[int, int]) -> tuple[float, int, int]:
    ratios = [abs(math.log2(a / b)) for a, b in zip(pair, other, strict=True)]
    return sum(ratios), *pair


def _text(listed: Actions) -> str:
    """A line for each rank, in which numbers of micro-batches are those by which they rise: `F0` is the next
    forward of stage 0, `F0:3` one further on. `Pv0,g1` posts values and gradients, `P2/v0` values on the
    stream for rank 2, `A` waits for the post before it, `A3` for the one three actions before.
    """
    return "\n".join(" ".join(_words(own)) for own in listed)


def _words(own: Sequence[Action]) -> Iterator[str]:
    last: dict[str, int] = {}
    for position, action in enumerate(own):
        if isinstance(action, Step):
            yield _word(f"{action.kind}{action.stage}", action.microbatch, last)
        elif isinstance(action, Post):
            peer = "" if action.peer < 0 else f"{action.peer}/"
            messages = ",".join(_sent(message, last) for message in action.messages)
            yield f"P{peer}{messages}"
        else:
            back = position - action.number
            yield "A" if back == 1 else f"A{back}"


def _sent(message: Message, last: dict[str, int]) -> str:
    kind = "g" if message.is_gradient else "v"
    return _word(f"{kind}{message.boundary}", message.microbatch, last)


def _word(name: str, microbatch: int, last: dict[str, int]) -> str:
    rise = microbatch - last.get(name, -1)
    last[name] = microbatch
    return name if rise == 1 else f"{name}:{rise}"
