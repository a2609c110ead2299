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
from stagecut.ir.graph import (
    WHOLE,
    Context,
    Op,
    Program,
    Scope,
    StateEntry,
    Value,
    scope_fqn,
)
from stagecut.ir.ops import is_heavy, module_path
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.types import carries_grad, value_bytes

CLOSE = 1e-9
"""The distance between the found time and the smallest one, relative to it, at which the search ends."""

FEW = 20_000
"""Up to so many ways to cut are all tried, where ranks have several stages."""

GIB = 2**30

MOST = 256
"""The most stages that are tried when their number is left open."""

STATE_OF = {"sgd": 0, "momentum": 1, "adamw": 2, "none": 0}
"""Optimizer -> how many tensors of the size of a parameter it keeps for each."""


@dataclass(frozen=True)
class Setting:
    """The devices on which the stages will run, and how they run there.

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
        is_v = self.schedule in V
        ranks = self.ranks or max(1, stages // 2)
        if stages % ranks or (is_v and stages != 2 * ranks):
            raise InputError(
                f"{self.schedule} cannot place {stages} stages on {ranks} ranks",
                hint="pass ranks=, a divisor of the stages",
            )
        return homes(stages, ranks, is_v)

    def devices(self, stages: int) -> list[Device]:
        """The device of each stage. Raises InputError when there are too few."""
        if isinstance(self.device, Device | str):
            return [device(self.device)] * stages
        placement = self.placement(stages)
        ranks = max(placement) + 1
        if ranks > len(self.device):
            raise InputError(
                f"{ranks} ranks, but {len(self.device)} devices",
                hint="give one for each rank",
            )
        return [device(self.device[home]) for home in placement]

    def orders(self, stages: int) -> Sequence[Order]:
        """The steps of every rank in their order. Raises InputError when the stages do not fit the ranks, and
        StagecutError where the schedule has no order for these numbers.
        """
        placement = self.placement(stages)
        count = self.n_microbatches
        ranks = max(placement) + 1
        if self.training:
            return orders(self.schedule, stages, ranks, count)
        steps: list[list[Step]] = [[] for _ in range(ranks)]
        for microbatch in range(count):
            for stage, rank in enumerate(placement):
                step = Step(FORWARD, stage, microbatch)
                steps[rank].append(step)
        return [tuple(order) for order in steps]

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
        costs = op_costs(ops, sizes, bindings, measure_on)
        return Line(ops, costs, setting, returned)

    @cached_property
    def crossing(self) -> torch.Tensor:
        """Bytes that cross in front of each op, forward and, when training, backward. User inputs and
        recomputed values do not cross.
        """
        count = len(self.ops)
        positions = {op: position for position, op in enumerate(self.ops)}
        steps = torch.zeros(count + 2, dtype=torch.float64)
        cheap: set[Value] = set()
        for position, op in enumerate(self.ops):
            if _is_cheap(op, cheap):
                cheap.update(op.definitions())
                continue
            for value in op.definitions():
                last = self._last_use(value, position, positions)
                if last > position:
                    size = self._sent_bytes(value)
                    steps[position + 1] += size
                    steps[last + 1] -= size
        sums = steps.cumsum(0)[: count + 1]
        crossing = sums.clamp(min=0.0)
        crossing[0] = 0.0
        crossing[count] = 0.0
        return crossing

    def _last_use(
        self, value: Value, position: int, positions: Mapping[Op, int]
    ) -> int:
        """The position of the last op that reads a value of the op at `position`, or behind all ops when the
        model returns the value.
        """
        if value in self.returned:
            return len(self.ops)
        users = (positions.get(user, position) for user in value.uses)
        return max(users, default=position)

    def _sent_bytes(self, value: Value) -> int:
        """Bytes of a value where it crosses, with those of its gradient."""
        size = self._bytes(value)
        if self.setting.training and carries_grad(value.type):
            size *= 2
        return size

    def _bytes(self, value: Value) -> int:
        return value_bytes(value.type) or 0

    @cached_property
    def divisible(self) -> torch.Tensor:
        """Per position, whether the line may be cut there: not inside a region that runs as a whole."""
        free = torch.ones(len(self.ops) + 1, dtype=torch.bool)
        spans: dict[Context, tuple[int, int]] = {}
        for position, op in enumerate(self.ops):
            for context in op.context:
                if context.kind in WHOLE:
                    first, _ = spans.get(context, (position, position))
                    spans[context] = (first, position)
        for first, last in spans.values():
            free[first + 1 : last + 1] = False
        return free

    def seconds(self, where: Device) -> torch.Tensor:
        """Seconds of each op on a device."""
        if where not in self._seconds:
            training = self.setting.training
            seconds = [cost.on(where, training) for cost in self.costs]
            self._seconds[where] = torch.tensor(seconds, dtype=torch.float64)
        return self._seconds[where]

    def depth(self) -> torch.Tensor:
        """For each position, the number of module calls that a cut there divides."""
        depth = torch.zeros(len(self.ops) + 1, dtype=torch.int64)
        for position in range(1, len(self.ops)):
            before = self.ops[position - 1].scope
            after = self.ops[position].scope
            depth[position] = _common(before, after)
        return depth

    def state_read(self, op: Op) -> list[StateEntry]:
        """The state an op reads."""
        entries: list[StateEntry] = []
        for value in op.reads:
            owner = unwritten(value).owner
            if isinstance(owner, StateEntry):
                entries.append(owner)
        return entries

    def memory(self, begin: int, end: int, in_flight: int) -> tuple[int, int, int]:
        """Bytes of a stage: of its state with gradients and optimizer, of the values it keeps for the
        backward, of gradients on their way.
        """
        window = _Window(self)
        for position in range(begin, end):
            window.add(position)
        return window.static, window.kept * in_flight, window.passing

    @cached_property
    def whole(self) -> tuple[int, int, int]:
        """As `memory` of all ops as one stage, with one micro-batch in flight."""
        return self.memory(0, len(self.ops), 1)

    @cached_property
    def holdings(self) -> list[list[tuple[object, int, int]]]:
        """For each op, the memory that it needs in a stage. A holding is the holder, its bytes once, and its
        bytes for every micro-batch in flight.
        """
        holdings: list[list[tuple[object, int, int]]] = []
        for op, cost in zip(self.ops, self.costs, strict=True):
            position = len(holdings)
            holdings.append(self._holdings_of(op, cost, position))
        return holdings

    def _holdings_of(
        self, op: Op, cost: OpCost, position: int
    ) -> list[tuple[object, int, int]]:
        holdings: list[tuple[object, int, int]] = []
        copies = 0
        if self.setting.training:
            copies = 1 + STATE_OF[self.setting.optimizer]
            for value in cost.kept:
                holdings.append((value, 0, self._bytes(value)))
            if cost.extra:
                holdings.append((position, 0, cost.extra))
        for entry in dict.fromkeys(self.state_read(op)):
            size, trained = state_bytes([entry])
            size += trained * copies
            holdings.append((entry, size, 0))
        return holdings

    def starts(self, budget: float, in_flight: int) -> torch.Tensor:
        """For each end, the first beginning from which a stage fits the budget."""
        key = (budget, in_flight)
        if key not in self._starts:
            self._starts[key] = self._first_beginnings(budget, in_flight)
        return self._starts[key]

    def _first_beginnings(self, budget: float, in_flight: int) -> torch.Tensor:
        window = _Window(self)
        begin = 0
        beginnings = torch.zeros(len(self.ops) + 1, dtype=torch.int64)
        for end in range(1, len(self.ops) + 1):
            window.add(end - 1)
            while begin < end and window.nbytes(in_flight) > budget:
                window.remove(begin)
                begin += 1
            beginnings[end] = begin
        return beginnings


class _Window:
    """An interval that grows to the right and shrinks from the left. It counts the bytes that it holds,
    each holding once.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._count: dict[object, int] = {}
        # the positions of ops whose gradients take more than those of any later one
        self._largest: deque[tuple[int, int]] = deque()
        self.static = 0
        self.kept = 0

    @property
    def passing(self) -> int:
        """The most bytes of gradients that one op's backward reads and makes."""
        if not self._largest:
            return 0
        _, passing = self._largest[0]
        return passing

    def nbytes(self, in_flight: int) -> int:
        """The bytes of all that the interval holds, with so many micro-batches in flight."""
        return self.static + self.kept * in_flight + self.passing

    def add(self, position: int) -> None:
        """The op at `position` joins."""
        passing = 0
        if self._line.setting.training:
            passing = self._line.costs[position].passing
        while self._largest and self._largest[-1][1] <= passing:
            self._largest.pop()
        self._largest.append((position, passing))
        for key, static, kept in self._line.holdings[position]:
            count = self._count.get(key, 0)
            self._count[key] = count + 1
            if not count:
                self.static += static
                self.kept += kept

    def remove(self, position: int) -> None:
        """The op at `position` leaves."""
        if self._largest and self._largest[0][0] == position:
            self._largest.popleft()
        for key, static, kept in self._line.holdings[position]:
            self._count[key] -= 1
            if not self._count[key]:
                self.static -= static
                self.kept -= kept


def _is_cheap(op: Op, cheap: set[Value]) -> bool:
    """True when stages compute the result again instead of receiving it."""
    if op.has_effect or op.regions or op.is_users or is_heavy(op):
        return False
    if any(carries_grad(result.type) for result in op.results):
        return False
    for value in op.operands:
        owner = value.owner
        if owner is None or value in cheap:
            continue
        if not isinstance(owner, StateEntry) or owner.kind == "param":
            return False
    return True


def _common(first: Scope, second: Scope) -> int:
    """The number of outermost calls that two scopes share."""
    common = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        common += 1
    return common


# --- the search ---------------------------------------------------------------------------------------


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

    def fits(self, cuts: Sequence[int]) -> bool:
        """True when every cut is allowed where it is and every stage fits its memory."""
        for mask, cut in zip(self.allowed, cuts, strict=True):
            if not mask[cut]:
                return False
        if self.starts is None:
            return True
        for i, starts in enumerate(self.starts):
            end = cuts[i + 1]
            if cuts[i] < int(starts[end]):
                return False
        return True

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

    def cheapest(self, most: float, price: torch.Tensor) -> list[int] | None:
        """The cuts with the smallest sum of prices among those with which no stage takes more than `most`.
        Quadratic in the positions.
        """
        count = len(price)
        total = torch.full((count,), math.inf, dtype=torch.float64)
        total[0] = 0.0
        origins: list[torch.Tensor] = []
        ends = torch.arange(count)[:, None]
        begins = torch.arange(count)[None, :]
        for i, (time, link) in enumerate(zip(self.times, self.links, strict=True)):
            seconds = time[:, None] - time[None, :]
            seconds += link[:, None]
            seconds += link[None, :]
            fits = seconds <= most
            fits &= begins < ends
            if self.starts is not None:
                fits &= begins >= self.starts[i][:, None]
            sums = torch.where(fits, total[None, :], math.inf)
            smallest = sums.min(1)
            origins.append(smallest.indices)
            allowed = self.allowed[i + 1]
            total = torch.where(allowed, smallest.values + price, math.inf)
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
        if not self.bound:
            return 0.0
        return self.bottleneck / self.bound - 1


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
        optimizer = self.setting.optimizer
        if optimizer not in STATE_OF:
            raise InputError(
                f"optimizer '{optimizer}' is not known",
                hint=nearest(optimizer, STATE_OF),
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
        stages = self.stages
        if stages is None:
            stages = self._fewest(line, 1)
        if stages is None:
            most = min(MOST, len(line.ops))
            raise self._does_not_fit(line, most)
        plan = self._cut(line, stages)
        if plan is None:
            raise self._does_not_fit(line, stages)
        return plan

    def _fewest(self, line: Line, least: int) -> int | None:
        """The smallest number of stages that fits, at least `least`; None when none fits up to MOST."""
        limit = self.budget * max(d.memory for d in self._every_device())
        static, _, _ = line.whole
        least = max(least, math.ceil(static / limit))
        most = min(MOST, len(line.ops))
        tried = least - 1
        while least <= most and not self._fits(line, least):
            tried = least
            least = max(least + 1, int(1.3 * least))
        if least > most:
            return None
        while least - tried > 1:  # more stages hold less, so halving finds the fewest
            middle = (tried + least) // 2
            if self._fits(line, middle):
                least = middle
            else:
                tried = middle
        return least

    def _every_device(self) -> list[Device]:
        devices = self.setting.device
        if isinstance(devices, Device | str):
            return [device(devices)]
        return [device(name) for name in devices]

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
        memory: list[int] = []
        intervals = itertools.pairwise(cuts)
        for (begin, end), flight in zip(intervals, flights, strict=True):
            parts = line.memory(begin, end, flight)
            memory.append(sum(parts))
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
        flights = self.setting.in_flight(stages)
        limits: list[tuple[float, int]] = []
        for where, flight in zip(devices, flights, strict=True):
            budget = where.memory * self.budget * scale
            limits.append((budget, flight))
        static, kept, passing = line.whole
        if all(static + kept * flight + passing <= budget for budget, flight in limits):
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
            if not 0 <= stage < stages:
                raise InputError(
                    f"pins names stage {pin} of {stages}",
                    hint="count from 0, or from the end",
                )
            before = positions <= inside[0]
            behind = positions > inside[-1]
            for cut, mask in enumerate(allowed):
                mask &= before if cut <= stage else behind
        return allowed

    def _cleaner(
        self, line: Line, problem: Problem, cuts: list[int], best: float
    ) -> list[int]:
        """Cuts at the outermost module boundaries, with the fewest bytes, that are within the tolerance of
        the best.
        """
        most = best * (1 + self.tolerance)
        depth = line.depth()
        deepest = int(depth.max())
        ends = torch.tensor([0, len(line.ops)])
        for level in range(deepest + 1):
            is_boundary = (depth <= level) & line.divisible
            boundaries = torch.nonzero(is_boundary).flatten()
            positions = torch.unique(torch.cat([ends, boundaries]))
            if not len(cuts) <= len(positions) <= 1500:
                continue
            fewer = problem.only(positions)
            price = line.crossing[positions]
            cheapest = fewer.cheapest(most, price)
            if cheapest is not None:
                return [int(positions[i]) for i in cheapest]
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
            return SplitError(
                f"no cuts into {stages} stages are possible",
                hint="pins contradict each other, or regions are too large",
            )
        scale = self._scale_that_fits(line, stages)
        plan = self._cut(line, stages, scale)
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


def _shift(problem: Problem, cuts: list[int], placement: Sequence[int]) -> list[int]:
    """Cuts with which the slowest rank is faster, where ranks have several stages. They are the best of all
    where there are few, else the best that the search reaches by moving one cut or two at a time.
    """
    count = len(problem.times[0]) - 1
    stages = len(placement)
    if math.comb(count - 1, stages - 1) <= FEW:
        inner = itertools.combinations(range(1, count), stages - 1)
        everything = ([0, *positions, count] for positions in inner)
        return min(
            filter(problem.fits, everything),
            key=lambda choice: _slowest(problem, choice, placement),
        )
    best = _slowest(problem, cuts, placement)
    step = max(1, count // 8)
    while step:
        moved = False
        for move in _moves(stages, step):
            shifted = [position + move.get(cut, 0) for cut, position in enumerate(cuts)]
            if not _increases(shifted) or not problem.fits(shifted):
                continue
            slowest = _slowest(problem, shifted, placement)
            if slowest < best:
                cuts = shifted
                best = slowest
                moved = True
        if not moved:
            step //= 2
    return cuts


def _moves(stages: int, step: int) -> list[dict[int, int]]:
    """Every way to move one cut or two by a step: cut -> how far."""
    single: list[dict[int, int]] = []
    for cut in range(1, stages):
        single.append({cut: -step})
        single.append({cut: step})
    moves = [*single]
    for first, second in itertools.combinations(single, 2):
        if first.keys() != second.keys():
            moves.append({**first, **second})
    return moves


def _increases(cuts: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(cuts))


def _slowest(
    problem: Problem, cuts: Sequence[int], placement: Sequence[int]
) -> tuple[float, float]:
    """Seconds of the slowest rank, and a measure of how unequal all ranks are."""
    sums = by_rank(placement, problem.stage_seconds(cuts))
    return max(sums), sum(s * s for s in sums)


def runs_in(op: Op, path: str) -> bool:
    """True for an op in a call of the module at `path`, or of one inside."""
    inside = f"{path}."
    names = (scope_fqn(op.scope), module_path(op))
    return any(name == path or name.startswith(inside) for name in names)


def _paths(ops: Iterable[Op]) -> list[str]:
    """The modules that run ops, each once."""
    paths = (scope_fqn(op.scope) for op in ops if op.scope)
    return list(dict.fromkeys(paths))


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
        return [self._first_op(ops, path) for path in self.paths]

    def _first_op(self, ops: Sequence[Op], path: str) -> int:
        for position, op in enumerate(ops):
            if runs_in(op, path):
                return position
        raise SplitError(
            f"no op of the program runs in module '{path}'",
            hint=nearest(path, _paths(ops)),
        )
