"""Cuts that were searched, and what they and others are predicted to cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from stagecut.backend.costs.ops import DEVICES, Device
from stagecut.backend.costs.search import by_rank
from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.steps import Cuts
from stagecut.backend.schedules import Orders
from stagecut.backend.tables import table, time_text

WORTH = 0.03
"""A cut may divide a block where the step gains more than this part."""


@dataclass(frozen=True)
class Place:
    """A position to cut at: the module that begins there, or the op and the module that it divides; the
    user's line; whether it divides a block of repeated ones.
    """

    module: str
    source: str
    is_inside: bool


@dataclass(frozen=True)
class Choice:
    """The chosen cuts, the best at the boundaries of blocks, where there are any, and the best anywhere;
    of the allowed ones those with which the ranks have the most alike work. own_order: where an order by
    times was searched, those chosen for the schedule's own order. places: what is at the positions of all of
    them. inside, tolerance: as in the policy that chose.
    """

    chosen: Cuts
    at_blocks: Cuts | None
    anywhere: Cuts
    evenest: Cuts
    own_order: Cuts | None = None
    places: Mapping[int, Place] = field(default_factory=dict)
    inside: str = "if worth it"
    tolerance: float = 0.01

    @property
    def ways(self) -> dict[str, Cuts]:
        """The cuts by the names that a table has for them."""
        named = {
            "chosen": self.chosen,
            "best between blocks": self.at_blocks,
            "best anywhere": self.anywhere,
            "by the schedule's own order": self.own_order,
        }
        return {name: way for name, way in named.items() if way is not None}

    def why_not(self, way: Cuts) -> str:
        """Why others were chosen; empty where their step is not longer."""
        if way.seconds >= self.chosen.seconds or way.cuts == self.chosen.cuts:
            return ""
        between = self.at_blocks
        divides = self._divides(way) and not self._divides(self.chosen)
        if divides and self.inside == "never":
            return 'it divides blocks, and inside="never"'
        if divides and self.inside == "if worth it" and between is not None:
            longer = between.seconds / way.seconds - 1
            if longer <= WORTH:
                return (
                    f"it divides blocks, and between them a step takes {100 * longer:.1f} % longer: "
                    f'inside="{self.inside}" asks for more than {100 * WORTH:g} %'
                )
        return (
            "the chosen ones divide less, send less, or leave no stage without parameters, in at most "
            f"{100 * self.tolerance:g} % more time"
        )

    def _divides(self, way: Cuts) -> bool:
        return any(self.places[cut].is_inside for cut in way.cuts[1:-1])


@dataclass(frozen=True, repr=False)
class Plan:
    """Cuts, and their predicted costs. `print` it for a table.

    cuts: the positions of ops in front of which to cut. seconds, memory: of each stage for one micro-batch,
    in seconds and bytes. placement: stage -> rank. step: the seconds of one step of the schedule. bound: no
    stage order and no cuts can have a slowest rank below these seconds. setting: the devices and the schedule
    that were reckoned with. choice: the steps of other cuts. loss: the loss that was counted. compared:
    (schedule, stages, its step or why it has none), where schedules were compared. inside: how many of the
    cuts divide a block. policy: a call that gives a policy for the same cuts.
    """

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: tuple[int, ...]
    placement: tuple[int, ...]
    bound: float
    step: float
    setting: Setting = field(default_factory=Setting)
    choice: Choice | None = None
    loss: str = ""
    compared: tuple[tuple[str, int, float | str], ...] = ()
    inside: int = 0
    policy: str = ""

    @property
    def order(self) -> Orders | None:
        """The steps of every rank in the order that was searched; None for the schedule's own."""
        return self.setting.order

    @property
    def rank_seconds(self) -> list[float]:
        """The time that each rank computes for one micro-batch, in seconds."""
        return by_rank(self.placement, self.seconds)

    @property
    def bottleneck(self) -> float:
        """The time that the slowest rank computes for one micro-batch, in seconds."""
        return max(self.rank_seconds)

    @property
    def gap(self) -> float:
        """How far the slowest rank may be above the optimum over any cuts in any order: 0.01 is one
        percent.
        """
        if not self.bound:
            return 0.0
        return self.bottleneck / self.bound - 1

    @property
    def basis(self) -> tuple[str, ...]:
        """For which devices and which schedule the cuts were searched, and how to ask for others; lines."""
        setting = self.setting
        names = ", ".join(dict.fromkeys(where.name for where in setting.every_device))
        if setting.device == Setting().device:
            names += " (the preset)"
        text = f"cut for {names} and {setting.schedule}"
        text += f" with {setting.n_microbatches} micro-batches"
        if self.inside == 1:
            text += ", one cut inside a block"
        if self.inside > 1:
            text += f", {self.inside} cuts inside blocks"
        if self.inside:
            text += ' (none with Balanced(..., inside="never"))'
        if not self.policy:
            return (text,)
        return text, f"for another device or schedule: split_policy={self.policy}"

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _ordering(self) -> str:
        """By which order the steps are done, where one was searched."""
        if self.order is not None:
            return ", steps ordered by their times"
        if self.choice is not None and self.choice.own_order is not None:
            return ", steps in the schedule's own order: no shorter one was found"
        return ""

    def _lines(self) -> Iterator[str]:
        if self.choice is not None:
            yield from self._choice_lines(self.choice)
        ranks = max(self.placement) + 1
        yield (
            f"{self.setting.schedule}, {len(self.seconds)} stages on {ranks} ranks, "
            f"{self.setting.n_microbatches} micro-batches"
            f"{self._ordering()}"
        )
        yield f"loss: {self.loss or 'none counted'}"
        yield from self.basis
        if self.compared:
            rows = [("schedule", "stages", "step")]
            for schedule, stages, step in self.compared:
                text = step if isinstance(step, str) else time_text(step)
                rows.append((schedule, str(stages), text))
            yield table(rows, left=(0, 2))

    def _choice_lines(self, choice: Choice) -> Iterator[str]:
        """A line for each way to cut, and what is at the positions of the cuts."""
        rows = [("cuts", "step", "in front of op", "")]
        ways = choice.ways
        for name, way in ways.items():
            cuts = ", ".join(map(str, way.cuts[1:-1]))
            why_not = choice.why_not(way)
            rows.append((name, time_text(way.seconds), cuts, why_not))
        yield table(rows, left=(0, 2, 3))
        positions = sorted({cut for way in ways.values() for cut in way.cuts[1:-1]})
        rows = [("op", "begins", "at", "")]
        for cut in positions:
            place = choice.places[cut]
            inside = "inside a block" if place.is_inside else ""
            rows.append((str(cut), place.module, place.source, inside))
        if positions:
            yield table(rows, left=(1, 2, 3))


def call_text(made: Any, first: int = 0) -> str:
    """A call that makes a dataclass anew: its first arguments, and others that are not as by default. Fields
    that its repr leaves out are left out.
    """
    arguments: list[str] = []
    for number, each in enumerate(fields(made)):
        value = getattr(made, each.name)
        if number < first:
            arguments.append(_text(value))
        elif each.repr and value != _default(each):
            arguments.append(f"{each.name}={_text(value)}")
    return f"{type(made).__name__}({', '.join(arguments)})"


def _text(value: Any) -> str:
    """An expression for an argument of a policy."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Setting):
        return call_text(value, 3)
    if isinstance(value, Device):
        if DEVICES.get(value.name) == value:
            return json.dumps(value.name)
        return call_text(value, 5)
    if isinstance(value, Mapping):
        pairs: list[str] = []
        for key, item in value.items():
            pairs.append(f"{_text(key)}: {_text(item)}")
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, Sequence):
        items = ", ".join(map(_text, value))
        return f"[{items}]"
    if value == math.inf:
        return 'float("inf")'
    return repr(value)


def _default(each: Field[Any]) -> Any:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return each.default
