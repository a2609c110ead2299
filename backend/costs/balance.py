"""Policies that find the cuts: a step of the schedule takes the shortest time within the memory of every
device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stagecut.backend.costs.line import Line
from stagecut.backend.costs.loss import counted_loss
from stagecut.backend.costs.measured import Trial, time_spans, torch_device
from stagecut.backend.costs.ops import Device, program_ops
from stagecut.backend.costs.plan import WORTH, Choice, Plan, call_text
from stagecut.backend.costs.runtime import KINDS, Parts, as_run
from stagecut.backend.costs.search import Problem
from stagecut.backend.costs.setting import Setting, refuse_unknown
from stagecut.backend.costs.steps import Found, Steps
from stagecut.backend.costs.way import Way
from stagecut.backend.ranks.wrapped import Wrap
from stagecut.backend.schedules import SCHEDULES, SINGLE
from stagecut.ir.errors import InputError, SplitError, StagecutError, nearest
from stagecut.ir.graph import Op, Program, scope_fqn
from stagecut.ir.keywords import near_names_in
from stagecut.ir.ops import module_path
from stagecut.ir.roles import Flight
from stagecut.ir.run.bindings import Bindings

GIB = 2**30

INSIDE = ("never", "if worth it", "always")
"""Whether cuts may divide a block."""

ORDERS = ("schedule", "timed")
"""In which order each rank does its steps."""

MOST_ROUNDS = 6
"""Orders and cuts are searched in turn so many times."""

MOST = 256
"""The most stages that are tried when their number is left open."""


@near_names_in
@dataclass(frozen=True)
class Balanced:
    """A policy: cuts with which a step of the schedule takes the shortest time, and every stage fits its
    device.

    stages: how many; None takes as few as memory allows, or with `ranks` in the setting, compares all
        schedules on so many ranks.
    setting: devices, schedule, micro-batches.
    pins: module path -> the stage it runs in, counted from the end when negative.
    tolerance: how much longer than the best the step may take, as a part of it, in exchange for cuts at outer
        modules, for no stage without parameters, and for fewer bytes that cross.
    budget: the part of a device's memory to fill.
    profile_on: a torch device, such as "cuda", on which blocks are timed instead of estimated.
    inside: whether a cut may divide a block of repeated ones: "never", "always", or "if worth it", when the
        step gains more than WORTH.
    loss_fn, target: the loss that the last stage computes, loss_fn(output, target), with an example of its
        target for one micro-batch; without one, cross-entropy where the model returns logits.
    wrap: wrap(module, index) gives a stage the form in which its blocks are timed, as for Driver.
    order: "schedule", the order in which torch's schedule has the steps of each rank, or "timed", one that is
        searched for the times of the stages, together with the cuts. The plan has it as `order`, for a
        Driver(order=). A rank holds no more micro-batches at once than by the schedule's own order. It is for
        schedules that split backwards; others keep their own.

    Called with a traced program it returns the cuts, the positions of ops in front of which to cut; `plan`
    returns more.
    """

    stages: int | None = None
    setting: Setting = field(default_factory=Setting)
    pins: Mapping[str, int] = field(default_factory=dict)
    tolerance: float = 0.01
    budget: float = 0.9
    profile_on: str | None = None
    inside: str = "if worth it"
    loss_fn: Callable[..., Any] | None = field(default=None, repr=False)
    target: Any = field(default=None, repr=False, compare=False)
    wrap: Wrap = field(default=None, repr=False)
    order: str = "schedule"

    def __call__(self, program: Program) -> list[int]:
        return list(self.plan(program).cuts)

    @property
    def needs_trial(self) -> bool:
        """True when blocks are timed, or traced with their backward."""
        return self.profile_on is not None or self.setting.by_graphs

    def refuse_wrong(self) -> None:
        """Returns when there is nothing wrong with the policy, whatever the program is. Raises InputError
        otherwise, and SplitError for less than one stage.
        """
        if not isinstance(self.setting, Setting):
            raise InputError(
                f"setting={self.setting!r} is no Setting",
                hint='Setting(device="H100", schedule="1F1B")',
            )
        self.setting.refuse_wrong()
        refuse_unknown("inside", self.inside, INSIDE)
        refuse_unknown("order", self.order, ORDERS)
        if self.profile_on is not None:
            torch_device(self.profile_on)
        for name in ("budget", "tolerance"):
            number = getattr(self, name)
            if not isinstance(number, int | float) or number < 0:
                raise InputError(
                    f"{name}={number!r} is no part of something", hint=f"{name}=0.5"
                )
        if not isinstance(self.pins, Mapping):
            raise InputError(f"pins={self.pins!r} is no dict", hint='pins={"head": -1}')
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise InputError(
                f"loss_fn={self.loss_fn!r} is no function",
                hint="loss_fn(output, target) returns the loss",
            )
        if self.stages is None:
            return
        if not isinstance(self.stages, int):
            raise InputError(f"stages={self.stages!r} is no number", hint="stages=2")
        if self.stages < 1:
            raise SplitError(
                f"{self.stages} stages: there is at least one", hint="stages=2"
            )
        for pin in self.pins.values():
            _refuse_pin(pin, self.stages)
        if self.stages <= MOST:
            self.setting.devices(self.stages)
            self.setting.actions(self.stages)

    def plan(
        self,
        program: Program,
        sizes: Mapping[str, int] | None = None,
        bindings: Bindings | None = None,
        trial: Trial | None = None,
    ) -> Plan:
        """The cuts of a traced program and their predicted costs.

        sizes: name of a dynamic size -> the size to reckon with.
        bindings: the real objects behind the program's names, where the model is at hand.
        trial: makes what is timed, and what is traced with its backward; without it, memory is what autograd
            keeps.

        Raises SplitError when no cuts fit: it names the stage that is over its memory, by how much, and what
        would fit. Raises InputError for a pin of an unknown module or stage.
        """
        self.refuse_wrong()
        setting = self.setting
        if any(op.is_split for op in program.ops):
            raise SplitError(
                "the model marks boundaries with pipe_split(), and cuts are to be searched as well",
                hint="take the markers out, or leave stages= and Balanced away",
            )
        call = bindings.call if bindings is not None else None
        loss = counted_loss(
            program, call, sizes or {}, self.setting, self.loss_fn, self.target
        )
        line = Line.of(program, self.setting, sizes or {}, bindings, loss)
        if not line.ops:
            return Plan((), (0.0,), (0,), (0,), 0.0, 0.0, self.setting)
        if setting.by_graphs and trial is not None:
            line.hold(trial)
        if self.profile_on is not None:
            self._time(line, sizes or {}, trial)
        return self.of_line(line)

    def _time(self, line: Line, sizes: Mapping[str, int], trial: Trial | None) -> None:
        """The seconds of the line are those of its blocks, measured."""
        if trial is None:
            raise InputError(
                "ops are timed within a compilation only",
                hint="pipeline(model, ..., split_policy=Balanced(..., profile_on=...))",
            )
        device_there = torch_device(self.profile_on)
        way = Way.before(line.loss, device_there, self.wrap, self.setting)
        spans = line.blocks()
        line.calibrate(spans, time_spans(line.ops, spans, trial, way, sizes))

    def of_line(self, line: Line) -> Plan:
        """The plan of `plan`, for a line of ops whose costs are known. Raises as `plan`."""
        stages = self.stages
        if stages is None and self.setting.ranks is not None:
            return self._compared(line, self.setting.ranks)
        if stages is None:
            stages = self._fewest(line, 1)
        if stages is None:
            most = min(MOST, len(line.ops))
            raise self._does_not_fit(line, most)
        plan = self._cut(line, stages)
        if plan is None:
            raise self._does_not_fit(line, stages)
        return plan

    def _compared(self, line: Line, ranks: int) -> Plan:
        """The plan with the shortest step of all schedules on so many ranks."""
        plans: list[Plan] = []
        compared: list[tuple[str, int, float | str]] = []
        for schedule in SCHEDULES:
            single = schedule in SINGLE
            stages = ranks if single else 2 * ranks
            setting = replace(
                self.setting, schedule=schedule, ranks=None if single else ranks
            )
            policy = replace(self, stages=stages, setting=setting)
            try:
                plan = policy.of_line(replace(line, setting=setting))
            except StagecutError as error:
                compared.append((schedule, stages, error.what))
                continue
            plans.append(plan)
            compared.append((schedule, stages, plan.step))
        if not plans:
            raise self._does_not_fit(line, ranks)
        best = min(plans, key=lambda plan: plan.step)
        return replace(best, compared=tuple(compared))

    def _fewest(self, line: Line, least: int) -> int | None:
        """The smallest number of stages that fits, at least `least`; None when none fits up to MOST. Only
        numbers that the schedule can place are tried.
        """
        unit = self.setting.stages_at_once

        def fits(units: int) -> bool:
            return self._fits(line, unit * units)

        limit = self.budget * max(d.memory for d in self.setting.every_device)
        static = line.whole.static
        least = math.ceil(max(least, static / limit) / unit)
        most = min(MOST, len(line.ops)) // unit
        tried = least - 1
        while least <= most and not fits(least):
            tried = least
            least = max(least + 1, int(1.3 * least))
        if least > most:
            return None
        while least - tried > 1:  # more stages hold less, so halving finds the fewest
            middle = (tried + least) // 2
            if fits(middle):
                least = middle
            else:
                tried = middle
        return unit * least

    def _cut(self, line: Line, stages: int, scale: float = 1.0) -> Plan | None:
        if not 1 <= stages <= len(line.ops):
            raise SplitError(
                f"{stages} stages of {len(line.ops)} ops: each stage has at least one op",
                hint=f"stages=1 to stages={len(line.ops)}",
            )
        steps = self.steps(line, stages, scale)
        choice = self._choice(line, steps)
        if choice is None:
            return None
        if self.order == "timed" and self.setting.splits:
            steps, choice = self._timed(line, steps, choice, scale)
        positions = {cut for way in choice.ways.values() for cut in way.cuts[1:-1]}
        choice = replace(choice, places={cut: line.place(cut) for cut in positions})
        setting = steps.setting
        cuts = list(choice.chosen.cuts)
        flights = setting.flights(stages)
        memory: list[int] = []
        intervals = itertools.pairwise(cuts)
        for (begin, end), flight in zip(intervals, flights, strict=True):
            parts = line.memory(begin, end, flight)
            memory.append(sum(parts))
        seconds = self._stage_seconds(line, steps.problem, cuts)
        return Plan(
            tuple(cuts[1:-1]),
            tuple(seconds),
            tuple(memory),
            tuple(self.setting.placement(stages)),
            self._bound(line, stages),
            choice.chosen.seconds,
            setting,
            choice,
            line.loss_name,
            inside=int(line.is_inside_block[cuts[1:-1]].sum()),
            policy=call_text(replace(self, stages=stages, budget=self._limit), 2),
        )

    @property
    def _limit(self) -> float:
        """The budget as a call has it: one for which `stages=` alone stands is left out."""
        return self.budget if self.budget < math.inf else Balanced.budget

    def _stage_seconds(
        self, line: Line, problem: Problem, cuts: Sequence[int]
    ) -> list[float]:
        """Seconds of each stage: of its device or its host, whichever has more to do, with its links."""
        seconds: list[float] = []
        for stage, where in enumerate(self.setting.devices(len(cuts) - 1)):
            begin, end = cuts[stage : stage + 2]
            both_ways = line.parts(where)[:, :2, begin:end].sum((1, 2))
            link = problem.links[stage][begin] + problem.links[stage][end]
            seconds.append(float(both_ways.max() + link))
        return seconds

    def _timed(
        self, line: Line, steps: Steps, choice: Choice, scale: float
    ) -> tuple[Steps, Choice]:
        """The steps in an order for some cuts, and cuts for that order, in turn, as long as the step gets
        shorter. They begin with the chosen cuts, and with those that give the ranks the most alike work.
        """
        own = choice.chosen
        for cuts in (choice.chosen.cuts, choice.evenest.cuts):
            for _ in range(MOST_ROUNDS):
                policy = replace(self, setting=steps.timed(cuts))
                ordered = policy.steps(line, len(steps.parts), scale)
                found = policy._choice(line, ordered)
                if found is None or found.chosen.seconds >= choice.chosen.seconds:
                    break
                steps, choice = ordered, found
                cuts = found.chosen.cuts
        return steps, replace(choice, own_order=own)

    def steps(self, line: Line, stages: int, scale: float) -> Steps:
        """The steps of a program that is divided into so many stages, for all cuts at once.

        line: the ops with their costs. scale: the part of the memory budget that a stage may take.
        """
        parts: list[torch.Tensor] = []
        delays: list[torch.Tensor] = []
        zero = torch.zeros(2, len(KINDS), 1, dtype=torch.float64)
        ways = 2 if self.setting.training else 1
        for stage, where in enumerate(self.setting.devices(stages)):
            rows = [
                as_run(Parts(*part), stage, self.wrap is None)
                for part in line.parts(where)
            ]
            seconds = torch.stack([torch.stack([*row]) for row in rows])
            parts.append(torch.cat([zero, seconds.cumsum(2)], 2))
            delays.append(where.delay(line.crossing / ways))
        return Steps(
            self.setting,
            self._problem(line, stages, scale),
            parts,
            delays,
            line.crossing,
            line.reading,
        )

    def _choice(self, line: Line, steps: Steps) -> Choice | None:
        """The cuts that `inside` allows: at the outermost modules, with no stage that reads no state, with
        the fewest bytes, as far as that is within the tolerance of the best. None where no cuts fit.
        """
        levels = [*self._levels(line)]
        inside = line.is_inside_block
        at_blocks = [steps.best(mask) for mask in _distinct(levels, ~inside)]
        dividing = [level for level in levels if (level & inside).any()]
        everywhere = torch.ones_like(inside)
        anywhere = at_blocks + [steps.best(m) for m in _distinct(dividing, everywhere)]
        best = _least(anywhere)
        if best is None:
            return None
        best_at_blocks = _least(at_blocks)
        allowed = anywhere
        if self.inside != "always" and best_at_blocks is not None:
            is_close = best_at_blocks.least <= best.least * (1 + WORTH)
            if self.inside == "never" or is_close:
                allowed = at_blocks
        if self.inside == "never" and best_at_blocks is None:
            return None
        limit = _least(allowed).least * (1 + self.tolerance)  # type: ignore[union-attr]
        outermost = next(found for found in allowed if found and found.least <= limit)
        return Choice(
            outermost.cheapest(limit),
            best_at_blocks.shortest if best_at_blocks is not None else None,
            best.shortest,
            outermost.evenest,
            inside=self.inside,
            tolerance=self.tolerance,
        )

    def _levels(self, line: Line) -> Iterator[torch.Tensor]:
        """Per number of module calls that cuts may divide, from none on: whether a cut may be at each
        position.
        """
        depth = line.depth
        for level in range(int(depth.max()) + 1):
            positions = (depth <= level) & line.divisible
            positions[[0, -1]] = True
            yield positions

    def _problem(self, line: Line, stages: int, scale: float) -> Problem:
        devices = self.setting.devices(stages)
        zero = torch.zeros(1, dtype=torch.float64)
        sums: dict[Device, torch.Tensor] = {}
        links: dict[Device, torch.Tensor] = {}
        for where in dict.fromkeys(devices):
            seconds = line.seconds(where)
            sums[where] = torch.cat([zero, seconds.cumsum(0)])
            # each way is waited for at one of its ends
            links[where] = line.crossing / where.link_bandwidth / 2
        return Problem(
            [sums[where] for where in devices],
            [links[where] for where in devices],
            self._starts(line, stages, scale),
            self._allowed(line, stages),
        )

    def _starts(
        self, line: Line, stages: int, scale: float
    ) -> list[torch.Tensor] | None:
        """As `Problem.starts`: None where all ops fit each device."""
        devices = self.setting.devices(stages)
        flights = self.setting.flights(stages)
        limits: list[tuple[float, Flight]] = []
        for where, flight in zip(devices, flights, strict=True):
            budget = where.memory * self.budget * scale
            limits.append((budget, flight))
        if all(line.whole.fits(budget, flight) for budget, flight in limits):
            return None
        return [line.starts(budget, flight) for budget, flight in limits]

    def _allowed(self, line: Line, stages: int) -> list[torch.Tensor]:
        """The positions where each cut may be: outside of regions, and such that pinned modules lie in their
        stages.
        """
        positions = torch.arange(len(line.ops) + 1)
        allowed = [line.divisible.clone() for _ in range(stages + 1)]
        for path, pin in self.pins.items():
            stage = pin + stages if pin < 0 else pin
            inside = [i for i, op in enumerate(line.ops) if runs_in(op, path)]
            if not inside:
                raise InputError(
                    f"pins names module '{path}', which runs no op",
                    hint=nearest(path, _paths(line.ops)),
                )
            _refuse_pin(pin, stages)
            before = positions <= inside[0]
            behind = positions > inside[-1]
            for cut, mask in enumerate(allowed):
                mask &= before if cut <= stage else behind
        return allowed

    def _bound(self, line: Line, stages: int) -> float:
        """A lower bound for the slowest rank, for any order of ops and any cuts: the largest of these.

        - The total, shared by all ranks.
        - The largest op.
        - Pigeonhole: of the n * ranks + 1 largest ops some rank runs at least n + 1, so it needs at least the
          sum of the n + 1 smallest of them.
        """
        homes = self.setting.placement(stages)
        devices = dict(zip(homes, self.setting.devices(stages), strict=True))
        seconds = torch.stack([line.seconds(d) for d in devices.values()])
        ranks = len(devices)
        weight = 1 / seconds.sum(1).clamp(min=1e-30)
        share = weight / weight.sum()
        weighted = seconds * share[:, None]
        shared = weighted.min(0).values.sum()
        fastest = seconds.min(0).values
        largest = fastest.sort(descending=True).values
        zero = largest.new_zeros(1)
        sums = torch.cat([zero, largest.cumsum(0)])
        most = (len(largest) - 1) // ranks
        counts = torch.arange(most + 1)
        largest_sum = sums[counts * ranks + 1]
        larger_ones = sums[counts * (ranks - 1)]
        together = largest_sum - larger_ones
        return max(float(shared), float(together.max()))

    def _does_not_fit(self, line: Line, stages: int) -> SplitError:
        """An error that names the stage over its memory, by how much, and what would fit."""
        if self._problem(line, stages, math.inf).within(math.inf) is None:
            budget = self.setting.activation_budget
            if line.least_too_large(self.setting.flights(stages)):
                return SplitError(
                    f"no cuts into {stages} stages save as little as activation_budget={budget:,} bytes",
                    hint="a larger one, smaller micro-batches, fewer in flight, or more stages",
                )
            return SplitError(
                f"no cuts into {stages} stages are possible",
                hint="pins contradict each other, or regions are too large",
            )
        scale = self._scale_that_fits(line, stages)
        plan = replace(self, inside="always")._cut(line, stages, scale)
        assert plan is not None
        memory = plan.memory
        limits = [d.memory * self.budget for d in self.setting.devices(stages)]
        over = max(range(stages), key=lambda i: memory[i] / limits[i])
        takes = memory[over] / GIB
        more_than = (memory[over] - limits[over]) / GIB
        limit = limits[over] / GIB
        fits = self._fewest(line, stages + 1)
        more = f"{fits} stages would fit"
        if not fits:
            larger = memory[over] / self.budget / GIB
            more = f"devices with {larger:.1f} GiB would fit"
        return SplitError(
            f"{stages} stages do not fit: with the best cuts for memory, "
            f"stage {over} takes {takes:.2f} GiB, "
            f"{more_than:.2f} GiB more than the {limit:.2f} GiB that it may",
            hint=(
                f"{more}; fewer or smaller micro-batches, a schedule with fewer in flight, or activation "
                "checkpointing take less"
            ),
        )

    def _scale_that_fits(self, line: Line, stages: int) -> float:
        """A small factor for the memory of all devices with which so many stages fit."""
        low = 1.0
        high = 2.0
        while not self._fits(line, stages, high):
            low = high
            high *= 2
        for _ in range(10):
            middle = (low + high) / 2
            if self._fits(line, stages, middle):
                high = middle
            else:
                low = middle
        return high

    def _fits(self, line: Line, stages: int, scale: float = 1.0) -> bool:
        try:
            return self._problem(line, stages, scale).within(math.inf) is not None
        except InputError:  # so many stages lie on no ranks
            return False


def _distinct(
    levels: Iterable[torch.Tensor], mask: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The levels within a mask, each of which has the positions of those before it; equal ones once."""
    before = torch.zeros_like(mask)
    for level in levels:
        within = level & mask
        if not torch.equal(within, before):
            yield within
        before = within


def _least(tried: Iterable[Found | None]) -> Found | None:
    """The one with the shortest step; the first of equals."""
    found = [ways for ways in tried if ways is not None]
    return min(found, key=lambda ways: ways.least, default=None)


def _refuse_pin(pin: int, stages: int) -> None:
    """Returns for the number of one of so many stages, counted from either end."""
    if not -stages <= pin < stages:
        raise InputError(
            f"pins names stage {pin} of {stages}",
            hint="count from 0, or from the end",
        )


def runs_in(op: Op, path: str) -> bool:
    """True for an op in a call of the module at `path`, or of one inside."""
    whole = f"{path}."
    names = (scope_fqn(op.scope), module_path(op))
    return any(f"{name}.".startswith(whole) for name in names)


def _paths(ops: Iterable[Op]) -> list[str]:
    """The modules that run ops, each once."""
    paths = (scope_fqn(op.scope) for op in ops if op.scope)
    return list(dict.fromkeys(paths))


@dataclass(frozen=True)
class Markers:
    """A policy that adds nothing: the cuts are the `pipe_split()` calls in the model."""

    def __call__(self, program: Program) -> list[int]:
        return []


@near_names_in
@dataclass(frozen=True)
class AtModules:
    """A policy: cuts in front of the first op of each module that `paths` names, such as "layers.4". Raises
    SplitError for a module that runs no op.
    """

    paths: Sequence[str]

    def __call__(self, program: Program) -> list[int]:
        ops = program_ops(program)
        return [self._first_op(ops, path) for path in self.paths]

    def _first_op(self, ops: Sequence[Op], path: str) -> int:
        for position, op in enumerate(ops):
            if runs_in(op, path):
                return position
        raise SplitError(
            f"no op of the program runs in module '{path}'",
            hint=nearest(path, _paths(ops)),
        )
