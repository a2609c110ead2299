"""Finds the cuts of a line: the slowest stage is as fast as possible within the memory of every device.

The time of a stage is that of its ops and of the values that cross at its two ends. For a time B, a scan from
the left marks where a stage may end so that none takes longer than B; bisection finds the smallest such B.
This is exact over all cuts of the line, and a scan costs a few vector operations for each stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

CLOSE = 1e-9
"""The distance between the found time and the smallest one, relative to it, at which the search ends."""


@dataclass
class Problem:
    """A line to cut into `len(times)` stages.

    times: per stage, the prefix sums of the seconds of its ops. links: per stage, the seconds that the values
    crossing at each position take. starts: per stage and end, the first beginning that fits its memory; None
    when every beginning fits. allowed: per cut (0, ..., stages) and position, whether the cut may be there.
    """

    times: list[torch.Tensor]
    links: list[torch.Tensor]
    starts: list[torch.Tensor] | None
    allowed: list[torch.Tensor]

    def stage_seconds(self, cuts: Sequence[int]) -> list[float]:
        """Seconds of each stage between `cuts`, which include the first and the last position."""
        seconds: list[float] = []
        stages = itertools.pairwise(cuts)
        for time, link, (begin, end) in zip(
            self.times, self.links, stages, strict=True
        ):
            total = time[end] - time[begin]
            total += link[begin]
            total += link[end]
            seconds.append(float(total))
        return seconds

    def fitting(self, cuts: torch.Tensor) -> torch.Tensor:
        """Per row of cuts, whether they increase, each is allowed where it is, and every stage fits its
        memory.
        """
        fits = (cuts[:, 1:] > cuts[:, :-1]).all(1)
        inside = cuts.clamp(0, len(self.allowed[0]) - 1)
        for number, mask in enumerate(self.allowed):
            fits &= mask[inside[:, number]]
        for stage, starts in enumerate(self.starts or ()):
            fits &= inside[:, stage] >= starts[inside[:, stage + 1]]
        return fits

    def within(self, most: float) -> list[int] | None:
        """Cuts with which no stage takes more than `most` seconds, None when there are none."""
        reached = [self.allowed[0].clone()]
        reached[0][1:] = False
        for i, (time, link) in enumerate(zip(self.times, self.links, strict=True)):
            values = torch.where(reached[i], time - link, -math.inf)
            best = self._best(values, i)
            in_time = best >= time + link - most
            in_time &= best > -math.inf
            reached.append(in_time & self.allowed[i + 1])
        end = len(self.times[0]) - 1
        if not reached[-1][end]:
            return None
        cuts = [end]
        for i in reversed(range(len(self.times))):
            begin = 0
            if self.starts is not None:
                begin = int(self.starts[i][end])
            time = self.times[i]
            link = self.links[i]
            values = torch.where(reached[i], time - link, -math.inf)
            end = begin + int(values[begin:end].argmax())
            cuts.insert(0, end)
        return cuts

    def _best(self, values: torch.Tensor, stage: int) -> torch.Tensor:
        """For each end, the largest of `values` at the beginnings that fit."""
        none = values.new_full((1,), -math.inf)
        if self.starts is None:
            return torch.cat([none, values[:-1].cummax(0).values])
        return _window_max(values, self.starts[stage])

    def best(self) -> list[int] | None:
        """The cuts with which the slowest stage is as fast as possible, None when no cuts are allowed."""
        cuts = self.within(math.inf)
        if cuts is None:
            return None
        low = 0.0
        high = max(self.stage_seconds(cuts))
        while high - low > CLOSE * high:
            middle = (low + high) / 2
            faster = self.within(middle)
            if faster is None:
                low = middle
                continue
            cuts = faster
            slowest = max(self.stage_seconds(cuts))
            high = min(middle, slowest)
        return cuts

    def only(self, positions: torch.Tensor) -> Problem:
        """The same problem with cuts at those positions only. They must include the first and the last."""
        starts = None
        if self.starts is not None:
            starts = [torch.searchsorted(positions, s[positions]) for s in self.starts]
        return Problem(
            [t[positions] for t in self.times],
            [x[positions] for x in self.links],
            starts,
            [a[positions] for a in self.allowed],
        )


def _window_max(values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """For each end e, the largest of values[starts[e]:e], minus infinity where that is empty."""
    tables = [values]
    while 2 ** len(tables) <= len(values):
        half = 2 ** (len(tables) - 1)
        last = tables[-1]
        larger = torch.maximum(last[:-half], last[half:])
        table = torch.cat([larger, last[-half:]])
        tables.append(table)
    ends = torch.arange(len(values))
    length = ends - starts
    level = torch.log2(length.clamp(min=1).double()).floor().long()
    stacked = torch.stack(tables)
    first = starts.clamp(max=len(values) - 1)
    second = (ends - 2**level).clamp(min=0)
    largest = torch.maximum(stacked[level, first], stacked[level, second])
    return torch.where(length > 0, largest, -math.inf)


def by_rank(placement: Sequence[int], seconds: Iterable[float]) -> list[float]:
    """The seconds of all stages of each rank."""
    sums = [0.0] * (max(placement) + 1)
    for rank, time in zip(placement, seconds, strict=True):
        sums[rank] += time
    return sums
