"""Finds the cuts with which a step of the schedule takes the shortest time, as torch's runtime executes it.

The step is simulated for many ways to cut at once: what runs next does not depend on times, so that each time
is a tensor with a number for each way. Up to FEW ways are all tried. Where there are more, the search starts
from the cuts whose slowest stage is the fastest, and moves one cut or two at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stagecut.backend.costs.runtime import KINDS, slowed_run
from stagecut.backend.costs.search import Problem
from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.timed import Work
from stagecut.backend.schedules import most_held

FEW = 20_000
"""Up to so many ways to cut are all tried."""

EQUAL = 0.001
"""Steps that differ by less than this part are equal."""


@dataclass
class Steps:
    """The step of the schedule as a function of the cuts.

    parts: per stage, the prefix sums of the seconds of the ops, on the device and on the host, with a row for
    each of KINDS. delays: per stage, the seconds that what crosses at each position takes one way. price:
    bytes that cross there. reading: how many ops in front of each position read state.
    """

    setting: Setting
    problem: Problem
    parts: list[torch.Tensor]
    delays: list[torch.Tensor]
    price: torch.Tensor
    reading: torch.Tensor
    tried: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def seconds(self, cuts: torch.Tensor) -> torch.Tensor:
        """The seconds of the step for each row of cuts."""
        stages = len(self.parts)
        times, delays = self._times(cuts, lambda times: times)
        where = self.setting.devices(stages)[0]
        zero = torch.zeros(len(cuts), dtype=torch.float64)
        run = slowed_run(
            self.setting.actions(stages),
            lambda step: times[step.kind, step.stage],
            delays,
            zero,
            torch.maximum,
            where.posting,
            where.slowed,
        )
        end: torch.Tensor = run.end
        return end

    def _times(
        self, cuts: torch.Tensor, read: Callable[[torch.Tensor], Any]
    ) -> tuple[dict[tuple[str, int], tuple[Any, Any]], list[Any]]:
        """The seconds of each kind of step of each stage, on the device and on the host, and the delays of
        what the stages send on.
        """
        times: dict[tuple[str, int], tuple[Any, Any]] = {}
        for stage, parts in enumerate(self.parts):
            ends, begins = cuts[:, stage + 1], cuts[:, stage]
            spans = parts.index_select(2, ends) - parts.index_select(2, begins)
            for kind, device, host in zip(KINDS, *spans, strict=True):
                times[kind, stage] = read(device), read(host)
        delays = [read(self.delays[i][cuts[:, i + 1]]) for i in range(len(self.parts))]
        return times, delays

    def timed(self, cuts: Sequence[int]) -> Setting:
        """The setting with the order of steps that is the shortest one found for these cuts, the schedule's
        own among them. No rank holds more micro-batches at once than by that.
        """
        stages = len(self.parts)
        row = torch.tensor([list(cuts)])
        times, delays = self._times(row, lambda times: float(times[0]))
        setting = replace(self.setting, order=None)
        own = tuple(setting.orders(stages))
        work = Work(
            setting.placement(stages),
            setting.n_microbatches,
            {key: device for key, (device, _) in times.items()},
            delays,
            [most_held(order) for order in own],
            own,
        )
        ways = [setting]
        ways += [replace(setting, order=orders) for orders in work.orders()]
        return min(ways, key=lambda way: float(self._by(way).seconds(row)[0]))

    def _by(self, setting: Setting) -> Steps:
        """The same steps in another order."""
        return replace(self, setting=setting, tried=[])

    def best(self, allowed: torch.Tensor) -> Found | None:
        """The best cuts at the allowed positions, which include the first and the last; None where none
        fit.
        """
        self.tried.clear()
        positions = torch.nonzero(allowed).flatten()
        stages = len(self.parts)
        inner = len(positions) - 2
        if inner < stages - 1:
            return None
        if math.comb(inner, stages - 1) <= FEW:
            self._try(self._all(positions))
        else:
            self._climb(positions)
        return self._chosen() if self.tried else None

    def _all(self, positions: torch.Tensor) -> torch.Tensor:
        first, *inner, last = positions.tolist()
        ways = itertools.combinations(inner, len(self.parts) - 1)
        return torch.tensor([[first, *way, last] for way in ways])

    def _climb(self, positions: torch.Tensor) -> None:
        start = self.problem.only(positions).best()
        if start is None:
            return
        at = torch.tensor(start)
        least = self._try(positions[at][None])
        step = max(1, len(positions) // 8)
        moves = torch.tensor([*_moves(len(self.parts))])
        while step:
            ways = at + moves * step
            ways = ways[((ways >= 0) & (ways < len(positions))).all(1)]
            tried = len(self.tried)
            seconds = self._try(positions[ways])
            if seconds < least:
                least = seconds
                cuts, times = self.tried[tried]
                at = torch.searchsorted(positions, cuts[times.argmin()])
            else:
                step //= 2

    def _try(self, cuts: torch.Tensor) -> float:
        """The shortest step with one of these cuts; infinity where none fits."""
        fitting = cuts[self.problem.fitting(cuts)]
        if not len(fitting):
            return math.inf
        seconds = self.seconds(fitting)
        self.tried.append((fitting, seconds))
        return float(seconds.min())

    def _chosen(self) -> Found:
        cuts = torch.cat([cuts for cuts, _ in self.tried])
        seconds = torch.cat([seconds for _, seconds in self.tried])
        stateless = (self.reading[cuts].diff(dim=1) == 0).sum(1)
        price = self.price[cuts].sum(1)
        return Found(cuts, seconds, price, self._unevenness(cuts), stateless)

    def _unevenness(self, cuts: torch.Tensor) -> torch.Tensor:
        """Per row of cuts, a measure of how unlike the times of the ranks are."""
        placement = self.setting.placement(len(self.parts))
        ranks = torch.zeros(max(placement) + 1, len(cuts), dtype=torch.float64)
        for stage, (parts, rank) in enumerate(zip(self.parts, placement, strict=True)):
            both_ways = parts[0, :2].sum(0)
            ranks[rank] += both_ways[cuts[:, stage + 1]] - both_ways[cuts[:, stage]]
        return ranks.square().sum(0)


@dataclass(frozen=True)
class Cuts:
    """Positions, with the first and the last one of the line, and the seconds of a step with these cuts."""

    cuts: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Found:
    """Ways to cut that were tried, with the seconds of their steps, the bytes that cross, how unlike the
    times of the ranks are, and how many stages read no state.
    """

    cuts: torch.Tensor
    seconds: torch.Tensor
    price: torch.Tensor
    unevenness: torch.Tensor
    stateless: torch.Tensor

    @property
    def least(self) -> float:
        """The shortest step."""
        return float(self.seconds.min())

    @property
    def shortest(self) -> Cuts:
        """The cuts with the shortest step."""
        return self._row(self.seconds.argmin())

    @property
    def evenest(self) -> Cuts:
        """The cuts with which the ranks have the most alike work."""
        return self._row(self.unevenness.argmin())

    def cheapest(self, limit: float) -> Cuts:
        """The cuts with the fewest bytes among those whose step takes at most `limit` and that leave the
        fewest stages without state, and of these the shortest step. Of equals it is the most even one, which
        stays good where a prediction is wrong.
        """
        stateless = torch.where(self.seconds <= limit, self.stateless, math.inf)
        good = stateless <= stateless.min()
        price = torch.where(good & (self.seconds <= limit), self.price, math.inf)
        fewest = price <= price.min()
        seconds = torch.where(fewest, self.seconds, math.inf)
        shortest = seconds <= seconds.min() * (1 + EQUAL)
        return self._row(torch.where(shortest, self.unevenness, math.inf).argmin())

    def _row(self, row: torch.Tensor) -> Cuts:
        return Cuts(tuple(self.cuts[row].tolist()), float(self.seconds[row]))


def _moves(stages: int) -> Iterator[list[int]]:
    """Every way to move one cut or two by one."""
    single = [(cut, by) for cut in range(1, stages) for by in (-1, 1)]
    for cut, by in single:
        yield [by * (i == cut) for i in range(stages + 1)]
    for (one, by), (other, further) in itertools.combinations(single, 2):
        if one != other:
            yield [by * (i == one) + further * (i == other) for i in range(stages + 1)]
