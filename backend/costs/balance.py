"""Finds the cuts: the slowest stage is as fast as possible within the memory of every device, and a bound
shows how near that is to the optimum.

Ops stand in a line, and a stage is an interval of it. The time of a stage is that of its ops and of the
values that cross at its two ends. For a time B, a scan from the left marks where a stage may end so that none
takes longer than B; bisection finds the smallest such B. This is exact over all cuts of the line, and a scan
costs a few vector operations for each stage. Where ranks have several stages, the result is the start of a
search by moving cuts, which is exact for up to FEW ways to cut.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from stagecut.backend.costs.ops import (
    Device,
    OpCost,
    device,
    op_costs,
    program_ops,
    state_bytes,
)
from stagecut.backend.schedules import (
    FORWARD,
    SCHEDULES,
    SINGLE,
    Order,
    Step,
    V,
    homes,
    in_flight,
    orders,
)
from stagecut.ir.aliases import unwritten
from stagecut.ir.errors import InputError, SplitError, nearest
from stagecut.ir.graph import WHOLE, Op, Program, StateEntry, Value, scope_fqn
from stagecut.ir.ops import is_heavy, module_path
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.types import carries_grad, value_bytes

CLOSE = 1e-9
"""How near the found time is to the smallest one, relative to it."""

FEW = 20_000
"""Up to so many ways to cut are all tried, where ranks have several stages."""

MOST = 256
"""The most stages that are tried when their number is left open."""

STATE_OF = {"sgd": 0, "momentum": 1, "adamw": 2, "none": 0}
"""Optimizer -> how many tensors of the size of a parameter it keeps for each."""


@dataclass(frozen=True)
class Setting:
    """Where and how the stages will run.

    device: one for all ranks, or one for each. ranks: their number, where a rank has several stages.
    optimizer: a key of STATE_OF.
    """

    device: Device | str | Sequence[Device | str] = "H100"
    schedule: str = "1F1B"
    n_microbatches: int = 8
    training: bool = True
    optimizer: str = "adamw"
    ranks: int | None = None

    def placement(self, stages: int) -> list[int]:
        """Stage -> rank. Raises InputError for an unknown schedule, and where the stages do not fit the
        ranks.
        """
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"there is no schedule '{self.schedule}'",
                hint=nearest(self.schedule, SCHEDULES),
            )
        if self.schedule in SINGLE:
            return homes(stages, stages, False)
        ranks = self.ranks or max(1, stages // 2)
        if stages % ranks or (self.schedule in V and stages != 2 * ranks):
            raise InputError(
                f"{self.schedule} cannot place {stages} stages on {ranks} ranks",
                hint="pass ranks=, a divisor of the stages",
            )
        return homes(stages, ranks, self.schedule in V)

    def devices(self, stages: int) -> list[Device]:
        """The device of each stage. Raises InputError when there are too few."""
        if isinstance(self.device, Device | str):
            return [device(self.device)] * stages
        placement = self.placement(stages)
        if max(placement) >= len(self.device):
            raise InputError(
                f"{max(placement) + 1} ranks, but {len(self.device)} devices",
                hint="give one for each rank",
            )
        return [device(self.device[home]) for home in placement]

    def orders(self, stages: int) -> Sequence[Order]:
        """The steps of every rank in their order. Raises InputError when the stages do not fit the ranks, and
        StagecutError where the schedule has no order for these numbers.
        """
        placement, count = self.placement(stages), self.n_microbatches
        ranks = max(placement) + 1
        if self.training:
            return orders(self.schedule, stages, ranks, count)
        mine = [[s for s in range(stages) if placement[s] == r] for r in range(ranks)]
        pairs = [itertools.product(range(count), some) for some in mine]
        return [tuple(Step(FORWARD, s, m) for m, s in some) for some in pairs]

    def in_flight(self, stages: int) -> list[int]:
        """The largest number of micro-batches of which each stage holds activations."""
        if not self.training:
            return [1] * stages
        return in_flight(self.orders(stages), stages)


@dataclass
class Line:
    """A program as a line of ops with their costs: gives the costs of stages that are intervals of it."""

    ops: list[Op]
    costs: list[OpCost]
    setting: Setting
    returned: frozenset[Value]
    _starts: dict[tuple[float, int], torch.Tensor] = field(default_factory=dict)
    _seconds: dict[Device, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        program: Program,
        setting: Setting,
        sizes: Mapping[str, int],
        bindings: Bindings | None,
        measure_on: str | None,
    ) -> Line:
        """The line of a program."""
        ops = program_ops(program)
        returned = frozenset(program.output.operands)
        return Line(ops, op_costs(ops, sizes, bindings, measure_on), setting, returned)

    @cached_property
    def crossing(self) -> torch.Tensor:
        """Bytes that cross in front of each op, forward and, when training, backward. User inputs and
        recomputed values do not cross.
        """
        at = {op: place for place, op in enumerate(self.ops)}
        steps = torch.zeros(len(self.ops) + 2, dtype=torch.float64)
        cheap: set[Value] = set()
        for place, op in enumerate(self.ops):
            anew = _is_cheap(op, cheap)
            for value in op.definitions():
                if anew:
                    cheap.add(value)
                    continue
                last = (
                    len(self.ops)
                    if value in self.returned
                    else max(
                        (at.get(user, place) for user in value.uses), default=place
                    )
                )
                if last > place:
                    size = self._bytes(value) * (
                        2 if self.setting.training and carries_grad(value.type) else 1
                    )
                    steps[place + 1] += size
                    steps[last + 1] -= size
        return (
            steps.cumsum(0)[: len(self.ops) + 1]
            .clamp(min=0.0)
            .index_fill(0, torch.tensor([0, len(self.ops)]), 0.0)
        )

    def _bytes(self, value: Value) -> int:
        return value_bytes(value.type) or 0

    @cached_property
    def divisible(self) -> torch.Tensor:
        """Where the line may be cut: not inside a region that runs as a whole."""
        free = torch.ones(len(self.ops) + 1, dtype=torch.bool)
        last = {
            c: place
            for place, op in enumerate(self.ops)
            for c in op.context
            if c.kind in WHOLE
        }
        for place, op in enumerate(self.ops):
            for context in op.context:
                if context.kind in WHOLE:
                    free[place + 1 : last[context] + 1] = False
        return free

    def seconds(self, where: Device) -> torch.Tensor:
        """Seconds of each op on a device."""
        if where not in self._seconds:
            self._seconds[where] = torch.tensor(
                [cost.on(where, self.setting.training) for cost in self.costs],
                dtype=torch.float64,
            )
        return self._seconds[where]

    def depth(self) -> torch.Tensor:
        """For each place, the number of module calls that a cut there divides."""
        found = torch.zeros(len(self.ops) + 1, dtype=torch.int64)
        for place in range(1, len(self.ops)):
            one, other = self.ops[place - 1].scope, self.ops[place].scope
            found[place] = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)),
            )
        return found

    def held(self, op: Op) -> list[StateEntry]:
        """The state an op reads."""
        return [
            entry
            for v in op.reads
            if isinstance(entry := unwritten(v).owner, StateEntry)
        ]

    def memory(self, begin: int, end: int, in_flight: int) -> tuple[int, int, int]:
        """Bytes of a stage: of its state with gradients and optimizer, of the values it keeps for the
        backward, of gradients on their way.
        """
        window = _Window(self)
        for place in range(begin, end):
            window.add(place)
        return window.static, window.kept * in_flight, window.passing

    @cached_property
    def whole(self) -> tuple[int, int, int]:
        """As `memory` of all ops as one stage, with one micro-batch in flight."""
        return self.memory(0, len(self.ops), 1)

    @cached_property
    def things(self) -> list[list[tuple[object, int, int]]]:
        """Things that each op holds while it is in a stage: a thing, its bytes once, its bytes for every
        micro-batch in flight.
        """
        return [
            self._things(op, cost, place)
            for place, (op, cost) in enumerate(zip(self.ops, self.costs, strict=True))
        ]

    def _things(
        self, op: Op, cost: OpCost, place: int
    ) -> list[tuple[object, int, int]]:
        things: list[tuple[object, int, int]] = (
            [(v, 0, self._bytes(v)) for v in cost.kept] if self.setting.training else []
        )
        if self.setting.training and cost.extra:
            things.append((place, 0, cost.extra))
        for entry in dict.fromkeys(self.held(op)):
            size, trained = state_bytes([entry])
            copies = (
                1 + STATE_OF[self.setting.optimizer] if self.setting.training else 0
            )
            things.append((entry, size + trained * copies, 0))
        return things

    def starts(self, budget: float, in_flight: int) -> torch.Tensor:
        """For each end, the first beginning from which a stage fits the budget."""
        if (budget, in_flight) not in self._starts:
            self._starts[budget, in_flight] = self._first_beginnings(budget, in_flight)
        return self._starts[budget, in_flight]

    def _first_beginnings(self, budget: float, in_flight: int) -> torch.Tensor:
        window, begin = _Window(self), 0
        found = torch.zeros(len(self.ops) + 1, dtype=torch.int64)
        for end in range(1, len(self.ops) + 1):
            window.add(end - 1)
            while (
                begin < end
                and window.static + window.kept * in_flight + window.passing > budget
            ):
                window.remove(begin)
                begin += 1
            found[end] = begin
        return found


class _Window:
    """An interval that grows to the right and shrinks from the left. It counts the bytes that it holds, each
    thing once.
    """

    def __init__(self, line: Line) -> None:
        self._line, self._count = line, dict[object, int]()
        # the places of ops whose gradients take more than those of any later one
        self._largest: deque[tuple[int, int]] = deque()
        self.static = self.kept = 0

    @property
    def passing(self) -> int:
        """The most bytes of gradients that one op's backward reads and makes."""
        return self._largest[0][1] if self._largest else 0

    def add(self, place: int) -> None:
        """The op at `place` joins."""
        passing = self._line.costs[place].passing if self._line.setting.training else 0
        while self._largest and self._largest[-1][1] <= passing:
            self._largest.pop()
        self._largest.append((place, passing))
        for thing, static, kept in self._line.things[place]:
            count = self._count.get(thing, 0)
            self._count[thing] = count + 1
            if not count:
                self.static += static
                self.kept += kept

    def remove(self, place: int) -> None:
        """The op at `place` leaves."""
        if self._largest and self._largest[0][0] == place:
            self._largest.popleft()
        for thing, static, kept in self._line.things[place]:
            self._count[thing] -= 1
            if not self._count[thing]:
                self.static -= static
                self.kept -= kept


def _is_cheap(op: Op, cheap: set[Value]) -> bool:
    """True when stages compute the result again instead of receiving it."""
    if op.has_effect or op.regions or op.is_users or is_heavy(op):
        return False
    if any(carries_grad(result.type) for result in op.results):
        return False
    return all(
        v.owner is None
        or v in cheap
        or (isinstance(v.owner, StateEntry) and v.owner.kind != "param")
        for v in op.operands
    )


# --- the search ---------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A line to cut into `len(times)` stages.

    times: per stage, the prefix sums of the seconds of its ops. links: per stage, the seconds that the values
    crossing at each place take. starts: per stage and end, the first beginning that fits its memory; None
    when every beginning fits. allowed: per cut (0, ..., stages) and place, whether the cut may be there.
    """

    times: list[torch.Tensor]
    links: list[torch.Tensor]
    starts: list[torch.Tensor] | None
    allowed: list[torch.Tensor]

    def stage_seconds(self, cuts: Sequence[int]) -> list[float]:
        """Seconds of each stage between `cuts`, which include the first and the last place."""
        return [
            float(t[b] - t[a] + link[a] + link[b])
            for t, link, a, b in zip(
                self.times, self.links, cuts[:-1], cuts[1:], strict=True
            )
        ]

    def fits(self, cuts: Sequence[int]) -> bool:
        """True when every cut is allowed where it is and every stage fits its memory."""
        inside = self.starts is None or all(
            cuts[i] >= int(s[cuts[i + 1]]) for i, s in enumerate(self.starts)
        )
        return inside and all(
            bool(mask[cut]) for mask, cut in zip(self.allowed, cuts, strict=True)
        )

    def within(self, most: float) -> list[int] | None:
        """Cuts with which no stage takes more than `most` seconds, None when there are none."""
        reached = [self.allowed[0].clone()]
        reached[0][1:] = False
        for i, (time, link) in enumerate(zip(self.times, self.links, strict=True)):
            best = self._best(torch.where(reached[i], time - link, -math.inf), i)
            reached.append(
                (best > -math.inf) & (best >= time + link - most) & self.allowed[i + 1]
            )
        cuts = [len(self.times[0]) - 1]
        if not reached[-1][cuts[0]]:
            return None
        for i in reversed(range(len(self.times))):
            end = cuts[0]
            begin = int(self.starts[i][end]) if self.starts is not None else 0
            best = torch.where(reached[i], self.times[i] - self.links[i], -math.inf)[
                begin:end
            ]
            cuts.insert(0, begin + int(best.argmax()))
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
        high, low = max(self.stage_seconds(cuts)), 0.0
        while high - low > CLOSE * high:
            middle = (low + high) / 2
            found = self.within(middle)
            if found is None:
                low = middle
            else:
                cuts, high = found, min(middle, max(self.stage_seconds(found)))
        return cuts

    def only(self, places: torch.Tensor) -> Problem:
        """The same problem with cuts at those places only. They must include the first and the last."""
        starts = None
        if self.starts is not None:
            starts = [torch.searchsorted(places, s[places]) for s in self.starts]
        return Problem(
            [t[places] for t in self.times],
            [x[places] for x in self.links],
            starts,
            [a[places] for a in self.allowed],
        )

    def cheapest(self, most: float, price: torch.Tensor) -> list[int] | None:
        """The cuts with the smallest sum of prices among those with which no stage takes more than `most`.
        Quadratic in the places.
        """
        count = len(price)
        total = torch.full((count,), math.inf, dtype=torch.float64)
        total[0] = 0.0
        origins: list[torch.Tensor] = []
        ends, begins = torch.arange(count)[:, None], torch.arange(count)[None, :]
        for i, (time, link) in enumerate(zip(self.times, self.links, strict=True)):
            fits = (
                time[:, None] - time[None, :] + link[:, None] + link[None, :] <= most
            ) & (begins < ends)
            if self.starts is not None:
                fits &= begins >= self.starts[i][:, None]
            sums = torch.where(fits, total[None, :], math.inf)
            smallest = sums.min(1)
            origins.append(smallest.indices)
            total = torch.where(self.allowed[i + 1], smallest.values + price, math.inf)
        if not math.isfinite(float(total[-1])):
            return None
        cuts = [count - 1]
        for origin in reversed(origins):
            cuts.insert(0, int(origin[cuts[0]]))
        return cuts


def _window_max(values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """For each end e, the largest of values[starts[e]:e], minus infinity where that is empty."""
    tables = [values]
    while 2 ** len(tables) <= len(values):
        half = 2 ** (len(tables) - 1)
        last = tables[-1]
        tables.append(
            torch.cat([torch.maximum(last[:-half], last[half:]), last[-half:]])
        )
    ends = torch.arange(len(values))
    length = ends - starts
    level = torch.log2(length.clamp(min=1).double()).floor().long()
    stacked = torch.stack(tables)
    found = torch.maximum(
        stacked[level, starts.clamp(max=len(values) - 1)],
        stacked[level, (ends - 2**level).clamp(min=0)],
    )
    return torch.where(length > 0, found, -math.inf)


def by_rank(placement: Sequence[int], seconds: Iterable[float]) -> list[float]:
    """The seconds of all stages of each rank."""
    sums = [0.0] * (max(placement) + 1)
    for rank, time in zip(placement, seconds, strict=True):
        sums[rank] += time
    return sums


# --- policies -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Cuts, and their predicted costs.

    cuts: the positions of ops in front of which to cut. seconds, memory: per stage, predicted. bound: no
    stage order and no cuts can have a slowest rank below it. best: the slowest stage of the best cuts of this
    order; the chosen ones may be slower within the tolerance.
    """

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: tuple[int, ...]
    placement: tuple[int, ...]
    bound: float
    best: float
    setting: Setting = field(default_factory=Setting)

    @property
    def rank_seconds(self) -> list[float]:
        """Seconds of each rank for one micro-batch."""
        return by_rank(self.placement, self.seconds)

    @property
    def bottleneck(self) -> float:
        """Seconds of the slowest rank for one micro-batch."""
        return max(self.rank_seconds)

    @property
    def gap(self) -> float:
        """How far the slowest rank may be above the optimum over any cuts in any order: 0.01 is one
        percent.
        """
        return self.bottleneck / self.bound - 1 if self.bound else 0.0


@dataclass(frozen=True)
class Balanced:
    """A policy: cuts so that the slowest stage is as fast as possible, and every stage fits its device.

    stages: how many; None takes as few as memory allows. setting: devices, schedule, micro-batches. pins:
    module path -> the stage it runs in, counted from the end when negative. tolerance: how much slower than
    the best the slowest stage may be, in exchange for cuts at module boundaries and fewer bytes that cross.
    budget: the part of a device's memory to fill. profile_on: a torch device on which ops are timed, instead
    of a roofline. Called with a program it returns the cuts; `plan` returns more.
    """

    stages: int | None = None
    setting: Setting = field(default_factory=Setting)
    pins: Mapping[str, int] = field(default_factory=dict)
    tolerance: float = 0.01
    budget: float = 0.9
    profile_on: str | None = None

    def __call__(self, program: Program) -> list[int]:
        return list(self.plan(program).cuts)

    def plan(
        self,
        program: Program,
        sizes: Mapping[str, int] | None = None,
        bindings: Bindings | None = None,
    ) -> Plan:
        """The cuts of a traced program and their predicted costs.

        Raises SplitError when no cuts fit: it names the stage that is over its memory, by how much, and what
        would fit. Raises InputError for a pin of an unknown module or stage.
        """
        if self.setting.optimizer not in STATE_OF:
            raise InputError(
                f"optimizer '{self.setting.optimizer}' is not known",
                hint=nearest(self.setting.optimizer, STATE_OF),
            )
        if any(op.is_split for op in program.ops):
            raise SplitError(
                "the model marks boundaries with pipe_split(), and cuts are to be searched as well",
                hint="take the markers out, or leave stages= and Balanced away",
            )
        line = Line.of(program, self.setting, sizes or {}, bindings, self.profile_on)
        if not line.ops:
            return Plan((), (0.0,), (0,), (0,), 0.0, 0.0, self.setting)
        return self.of_line(line)

    def of_line(self, line: Line) -> Plan:
        """As `plan`, for a line whose costs are known."""
        if self.stages is not None:
            found = self._cut(line, self.stages)
            if found is None:
                raise self._does_not_fit(line, self.stages)
            return found
        fewest = self._fewest(line, 1)
        found = self._cut(line, fewest) if fewest is not None else None
        if found is None:
            raise self._does_not_fit(line, min(MOST, len(line.ops)))
        return found

    def _fewest(self, line: Line, least: int) -> int | None:
        """The smallest number of stages that fits, at least `least`; None when none fits up to MOST."""
        limit = self.budget * max(d.memory for d in self._every_device())
        least = max(least, math.ceil(line.whole[0] / limit))
        most, tried = min(MOST, len(line.ops)), least - 1
        while least <= most and not self._fits(line, least):
            tried, least = least, max(least + 1, int(1.3 * least))
        if least > most:
            return None
        while least - tried > 1:  # more stages hold less, so halving finds the fewest
            middle = (tried + least) // 2
            tried, least = (
                (tried, middle) if self._fits(line, middle) else (middle, least)
            )
        return least

    def _every_device(self) -> list[Device]:
        given = self.setting.device
        return (
            [device(given)]
            if isinstance(given, Device | str)
            else [device(d) for d in given]
        )

    def problem(self, line: Line) -> Problem:
        """The problem to search: the times and limits of so many stages of a line."""
        return self._problem(line, self.stages or 1, 1.0)

    def _cut(self, line: Line, stages: int, scale: float = 1.0) -> Plan | None:
        if not 1 <= stages <= len(line.ops):
            raise SplitError(
                f"{stages} stages of {len(line.ops)} ops", hint="no stage is empty"
            )
        problem = self._problem(line, stages, scale)
        cuts = problem.best()
        if cuts is None:
            return None
        placement = self.setting.placement(stages)
        flights = self.setting.in_flight(stages)
        best = max(problem.stage_seconds(cuts))
        cuts = self._cleaner(line, problem, cuts, best)
        if self.setting.schedule not in SINGLE:
            cuts = _shift(problem, cuts, placement)
        memory = [
            sum(line.memory(a, b, n))
            for a, b, n in zip(cuts[:-1], cuts[1:], flights, strict=True)
        ]
        seconds = problem.stage_seconds(cuts)
        return Plan(
            tuple(cuts[1:-1]),
            tuple(seconds),
            tuple(memory),
            tuple(placement),
            self._bound(line, stages),
            best,
            self.setting,
        )

    def _problem(self, line: Line, stages: int, scale: float) -> Problem:
        devices, flights = self.setting.devices(stages), self.setting.in_flight(stages)
        zero = torch.zeros(1, dtype=torch.float64)
        sums = {
            d: torch.cat([zero, line.seconds(d).cumsum(0)])
            for d in dict.fromkeys(devices)
        }
        # each way is waited for at one of its ends
        links = {d: line.crossing / d.link_bandwidth / 2 for d in sums}
        budgets = [d.memory * self.budget * scale for d in devices]
        starts = None
        static, kept, passing = line.whole
        if any(
            static + kept * n + passing > b
            for n, b in zip(flights, budgets, strict=True)
        ):
            starts = [line.starts(b, n) for n, b in zip(flights, budgets, strict=True)]
        return Problem(
            [sums[d] for d in devices],
            [links[d] for d in devices],
            starts,
            self._allowed(line, stages),
        )

    def _allowed(self, line: Line, stages: int) -> list[torch.Tensor]:
        """The places where each cut may be: outside of regions, and such that pinned modules lie in their
        stages.
        """
        places = torch.arange(len(line.ops) + 1)
        allowed = [line.divisible.clone() for _ in range(stages + 1)]
        for path, pin in self.pins.items():
            stage = pin + stages if pin < 0 else pin
            inside = [i for i, op in enumerate(line.ops) if runs_in(op, path)]
            if not inside or not 0 <= stage < stages:
                known = dict.fromkeys(
                    scope_fqn(op.scope) for op in line.ops if op.scope
                )
                what = (
                    f"module '{path}', which runs no op"
                    if not inside
                    else f"stage {pin} of {stages}"
                )
                raise InputError(
                    f"pins names {what}",
                    hint=nearest(path, known)
                    if not inside
                    else "count from 0, or from the end",
                )
            for cut, mask in enumerate(allowed):
                mask &= places <= inside[0] if cut <= stage else places > inside[-1]
        return allowed

    def _cleaner(
        self, line: Line, problem: Problem, cuts: list[int], best: float
    ) -> list[int]:
        """Cuts at the outermost module boundaries, with the fewest bytes, that are within the tolerance of
        the best.
        """
        most, depth, price = best * (1 + self.tolerance), line.depth(), line.crossing
        ends = torch.tensor([0, len(line.ops)])
        for level in range(int(depth.max()) + 1):
            places = torch.unique(
                torch.cat(
                    [ends, torch.nonzero((depth <= level) & line.divisible).flatten()]
                )
            )
            if not len(cuts) <= len(places) <= 1500:
                continue
            fewer = problem.only(places)
            found = fewer.cheapest(most, price[places])
            if found is not None:
                return [int(places[i]) for i in found]
        return cuts

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
        weight = 1 / seconds.sum(1).clamp(min=1e-30)
        shared = (seconds * (weight / weight.sum())[:, None]).min(0).values.sum()
        fastest = seconds.min(0).values.sort(descending=True).values
        sums = torch.cat([fastest.new_zeros(1), fastest.cumsum(0)])
        counts = torch.arange((len(fastest) - 1) // len(devices) + 1)
        together = sums[counts * len(devices) + 1] - sums[counts * (len(devices) - 1)]
        return max(float(shared), float(together.max()))

    def _does_not_fit(self, line: Line, stages: int) -> SplitError:
        """An error that names the stage over its memory, by how much, and what would fit."""
        if self._problem(line, stages, math.inf).within(math.inf) is None:
            return SplitError(
                f"no cuts into {stages} stages are possible",
                hint="pins contradict each other, or regions are too large",
            )
        low, high = 1.0, 2.0
        while not self._fits(line, stages, high):
            low, high = high, 2 * high
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (
                (low, middle) if self._fits(line, stages, middle) else (middle, high)
            )
        plan = self._cut(line, stages, high)
        assert plan is not None
        limits = [d.memory * self.budget for d in self.setting.devices(stages)]
        over = max(range(stages), key=lambda i: plan.memory[i] / limits[i])
        fits = self._fewest(line, stages + 1)
        more = (
            f"{fits} stages would fit"
            if fits
            else f"devices with {plan.memory[over] / self.budget / 2**30:.1f} GiB would fit"
        )
        return SplitError(
            f"{stages} stages do not fit: with the best cuts for memory, stage {over} takes "
            f"{plan.memory[over] / 2**30:.2f} GiB, "
            f"{(plan.memory[over] - limits[over]) / 2**30:.2f} GiB more than the {limits[over] / 2**30:.2f} "
            "GiB that it may",
            hint=(
                f"{more}; fewer or smaller micro-batches, a schedule with fewer in flight, or activation "
                "checkpointing take less"
            ),
        )

    def _fits(self, line: Line, stages: int, scale: float = 1.0) -> bool:
        try:
            return self._problem(line, stages, scale).within(math.inf) is not None
        except InputError:  # so many stages lie on no ranks
            return False


def _shift(problem: Problem, cuts: list[int], placement: Sequence[int]) -> list[int]:
    """Cuts with which the slowest rank is faster, where ranks have several stages. They are the best of all
    where there are few, else the best that the search reaches by moving one cut or two at a time.
    """
    count, stages = len(problem.times[0]) - 1, len(placement)
    if math.comb(count - 1, stages - 1) <= FEW:
        everything = (
            [0, *inner, count]
            for inner in itertools.combinations(range(1, count), stages - 1)
        )
        return min(
            filter(problem.fits, everything),
            key=lambda some: _slowest(problem, some, placement),
        )
    best, step = _slowest(problem, cuts, placement), max(1, count // 8)
    while step:
        moved = False
        single = [{cut: way} for cut in range(1, stages) for way in (-step, step)]
        for move in [
            *single,
            *(
                {**one, **other}
                for one, other in itertools.combinations(single, 2)
                if one.keys() != other.keys()
            ),
        ]:
            other = [place + move.get(cut, 0) for cut, place in enumerate(cuts)]
            if not all(a < b for a, b in itertools.pairwise(other)) or not problem.fits(
                other
            ):
                continue
            now = _slowest(problem, other, placement)
            if now < best:
                cuts, best, moved = other, now, True
        step = step if moved else step // 2
    return cuts


def _slowest(
    problem: Problem, cuts: Sequence[int], placement: Sequence[int]
) -> tuple[float, float]:
    """Seconds of the slowest rank, and a measure of how unequal all ranks are."""
    sums = by_rank(placement, problem.stage_seconds(cuts))
    return max(sums), sum(s * s for s in sums)


def runs_in(op: Op, path: str) -> bool:
    """True for an op in a call of the module at `path`, or of one inside."""
    return any(
        name == path or name.startswith(path + ".")
        for name in (scope_fqn(op.scope), module_path(op))
    )


@dataclass(frozen=True)
class Markers:
    """A policy that adds nothing: the cuts are the `pipe_split()` calls in the model."""

    def __call__(self, program: Program) -> list[int]:
        return []


@dataclass(frozen=True)
class AtModules:
    """A policy that cuts in front of the first op of each of these modules. Raises SplitError for one that
    runs no op.
    """

    paths: Sequence[str]

    def __call__(self, program: Program) -> list[int]:
        ops = program_ops(program)
        cuts = []
        for path in self.paths:
            place = next((i for i, op in enumerate(ops) if runs_in(op, path)), None)
            if place is None:
                known = dict.fromkeys(scope_fqn(op.scope) for op in ops if op.scope)
                raise SplitError(
                    f"no op of the program runs in module '{path}'",
                    hint=nearest(path, known),
                )
            cuts.append(place)
        return cuts
