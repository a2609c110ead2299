"""Cuts that were searched, and what they and others are predicted to cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from stagecut.backend.costs.search import by_rank
from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.steps import Cuts
from stagecut.backend.schedules import Orders
from stagecut.backend.tables import table, time_text


@dataclass(frozen=True)
class Choice:
    """The chosen cuts, the best at the boundaries of blocks, where there are any, and the best anywhere;
    of the allowed ones those with which the ranks have the most alike work. own_order: where an order by
    times was searched, those chosen for the schedule's own order.
    """

    chosen: Cuts
    at_blocks: Cuts | None
    anywhere: Cuts
    evenest: Cuts
    own_order: Cuts | None = None


@dataclass(frozen=True, repr=False)
class Plan:
    """Cuts, and their predicted costs. `print` it for a table.

    cuts: the positions of ops in front of which to cut. seconds, memory: of each stage for one micro-batch,
    in seconds and bytes. placement: stage -> rank. step: the seconds of one step of the schedule. bound: no
    stage order and no cuts can have a slowest rank below these seconds. setting: the devices and the schedule
    that were reckoned with. choice: the steps of other cuts. loss: the loss that was counted. compared:
    (schedule, stages, its step or why it has none), where schedules were compared. inside: how many of the
    cuts divide a block.
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
    def basis(self) -> str:
        """For which devices and which schedule the cuts were searched, and how others are asked for."""
        setting = self.setting
        devices: dict[str, None] = {}
        for where in setting.every_device:
            devices[where.name] = None
        names = ", ".join(devices)
        text = f"cut for {names} and {setting.schedule}"
        text += f" with {setting.n_microbatches} micro-batches"
        stages = len(self.seconds)
        options = f"{stages}, Setting(device, schedule)"
        if self.inside:
            options += ', inside="never"'
        if self.inside == 1:
            text += ", one cut inside a block"
        if self.inside > 1:
            text += f", {self.inside} cuts inside blocks"
        return f"{text}; to change that: split_policy=Balanced({options})"

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
        rows = [("cuts", "step", "in front of op")]
        if self.choice is not None:
            ways = {
                "chosen": self.choice.chosen,
                "best between blocks": self.choice.at_blocks,
                "best anywhere": self.choice.anywhere,
                "by the schedule's own order": self.choice.own_order,
            }
            for name, way in ways.items():
                if way is not None:
                    places = ", ".join(map(str, way.cuts[1:-1]))
                    rows.append((name, time_text(way.seconds), places))
        yield table(rows, left=(0, 2))
        ranks = max(self.placement) + 1
        yield (
            f"{self.setting.schedule}, {len(self.seconds)} stages on {ranks} ranks, "
            f"{self.setting.n_microbatches} micro-batches"
            f"{self._ordering()}"
        )
        yield f"loss: {self.loss or 'none counted'}"
        yield self.basis
        if self.compared:
            rows = [("schedule", "stages", "step")]
            for schedule, stages, step in self.compared:
                text = step if isinstance(step, str) else time_text(step)
                rows.append((schedule, str(stages), text))
            yield table(rows, left=(0, 2))
