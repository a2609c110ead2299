"""A program as a line of ops with their costs: a stage is an interval of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product

import torch

from stagecut.backend.costs.held import NONE, Held, Holdings, held_by_graphs
from stagecut.backend.costs.loss import OWN_LOSS, LossCost, returns_loss
from stagecut.backend.costs.measured import Trial
from stagecut.backend.costs.ops import (
    Device,
    OpCost,
    known_bytes,
    op_costs,
    program_ops,
    state_bytes,
)
from stagecut.backend.costs.plan import Place
from stagecut.backend.costs.runtime import KINDS, Parts, Timing
from stagecut.backend.costs.setting import STATE_OF, Setting
from stagecut.ir.aliases import unwritten
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
from stagecut.ir.roles import Flight
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.text.printer import file_names
from stagecut.ir.types import carries_grad


@dataclass(frozen=True)
class Holding:
    """Memory that an op needs in a stage, which counts once for its holder. static: bytes. kept: those that
    autograd keeps for each micro-batch; graphs: those that graphs do.
    """

    holder: object
    static: int = 0
    kept: int = 0
    graphs: Held = NONE


@dataclass
class Line:
    """A program as a line of ops with their costs: gives the costs of stages that are intervals of it."""

    ops: list[Op]
    costs: list[OpCost]
    setting: Setting
    returned: frozenset[Value]
    loss: LossCost | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    returns_loss: bool = False
    measured: torch.Tensor | None = None
    held: Holdings | None = None
    _starts: dict[tuple[float, Flight], torch.Tensor] = field(default_factory=dict)
    _parts: dict[Device, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        program: Program,
        setting: Setting,
        sizes: Mapping[str, int],
        bindings: Bindings | None,
        loss: LossCost | None = None,
    ) -> Line:
        """The line of a program."""
        ops = program_ops(program)
        returned = frozenset(program.output.operands)
        costs = op_costs(ops, sizes, bindings)
        own = returns_loss(program)
        return Line(ops, costs, setting, returned, loss, sizes, own)

    @property
    def loss_name(self) -> str:
        """The loss that is counted; empty for none."""
        if self.loss is not None:
            return self.loss.name
        return OWN_LOSS if self.returns_loss and self.setting.training else ""

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
        return known_bytes(value.type, self.sizes)

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

    def parts(self, where: Device) -> torch.Tensor:
        """Seconds of each op, on a device and on the host, with a row for each of KINDS: those that were
        measured, else those of the roofline. The loss belongs to the last op.
        """
        if self.measured is not None:
            return self.measured
        if where not in self._parts:
            device_rows = [self.parts_of(cost, where) for cost in self.costs]
            host_rows = [self._host_parts(cost, where) for cost in self.costs]
            rows = torch.tensor([device_rows, host_rows], dtype=torch.float64)
            parts = rows.transpose(1, 2).contiguous()
            if self.loss is not None:
                parts[..., -1] += self._loss_parts(self.loss, where)
            self._parts[where] = parts
        return self._parts[where]

    def parts_of(self, cost: OpCost, where: Device) -> tuple[float, ...]:
        """Seconds of an op by the roofline, for each of KINDS."""
        forward = cost.on(where, False)
        backward = cost.on(where, self.setting.training) - forward
        weights = backward * cost.weights
        return forward, backward, backward - weights, weights

    def _host_parts(self, cost: OpCost, where: Device) -> tuple[float, ...]:
        runs_back = bool(cost.backward_moved) and self.setting.training
        start = where.starting
        back = 2 * start * runs_back  # for its inputs and for its weights
        return start, back, back * (1 - cost.weights), back * cost.weights

    def _loss_parts(self, loss: LossCost, where: Device) -> torch.Tensor:
        training = self.setting.training
        forward, backward = loss.on(where, training)
        start = where.starting * len(loss.forward)
        back = where.starting * len(loss.backward) * training
        return torch.tensor(
            [[forward, backward, backward, 0.0], [start, back, back, 0.0]]
        )

    def seconds(self, where: Device) -> torch.Tensor:
        """Seconds of each op, forward and backward: of the device or the host, whichever has more to do."""
        both_ways = self.parts(where)[:, :2].sum(1)
        busier = both_ways.sum(1).argmax()
        return both_ways[busier]

    def total(self, where: Device) -> Timing[float]:
        """Seconds of all ops together."""
        device_sums, host_sums = self.parts(where).sum(2).tolist()
        return Timing(Parts(*device_sums), Parts(*host_sums))

    def calibrate(
        self, spans: Sequence[tuple[int, int]], seconds: Sequence[Timing[float]]
    ) -> None:
        """The seconds of each span of ops are those measured, in the shares that the roofline gives to its
        ops.
        """
        shares = self.parts(self.setting.every_device[0])[0]
        measured = torch.zeros(2, *shares.shape, dtype=torch.float64)
        for (begin, end), timing in zip(spans, seconds, strict=True):
            total = shares[:2, begin:end].sum(0)
            for row, where in product(range(len(KINDS)), range(2)):
                share = shares[row, begin:end]
                if not float(share.sum()):
                    share = total if float(total.sum()) else torch.ones_like(total)
                amount = timing[where][row]
                measured[where, row, begin:end] = amount * share / share.sum()
        self.measured = measured

    @cached_property
    def depth(self) -> torch.Tensor:
        """For each position, the number of module calls that a cut there divides."""
        depth = torch.zeros(len(self.ops) + 1, dtype=torch.int64)
        for position in range(1, len(self.ops)):
            before = self.ops[position - 1].scope
            after = self.ops[position].scope
            depth[position] = _common(before, after)
        return depth

    def place(self, position: int) -> Place:
        """What a cut in front of the op at a position is in front of."""
        op = self.ops[position]
        depth = int(self.depth[position])
        inner = op.scope[: depth + 1]
        name = scope_fqn(inner)
        if len(inner) == depth:  # an op of the module that is divided
            name = module_path(op) or f"{op.target} of {name or 'the model'}"
        source = ""
        if op.loc is not None:
            source = f"{self._files[op.loc.file]}:{op.loc.line}"
        return Place(name, source, bool(self.is_inside_block[position]))

    @cached_property
    def _files(self) -> dict[str, str]:
        return file_names(self.ops)

    def blocks(self) -> list[tuple[int, int]]:
        """The line in spans: each block of repeated ones, and what lies between them. Where there are none, a
        span for each module that the model calls.
        """
        edges = self._edges_of_blocks() or [
            position for position, depth in enumerate(self.depth.tolist()) if depth == 0
        ]
        inner = [p for p in edges if 0 < p < len(self.ops) and self.divisible[p]]
        return [*pairwise([0, *inner, len(self.ops)])]

    def _edges_of_blocks(self) -> list[int]:
        """The positions between an op in a block and one that is in none or in another."""
        blocks = [_block_of(op.scope) for op in self.ops]
        return [
            position
            for position, (before, after) in enumerate(pairwise(blocks), 1)
            if before != after
        ]

    def state_read(self, op: Op) -> list[StateEntry]:
        """The state an op reads."""
        entries: list[StateEntry] = []
        for value in op.reads:
            owner = unwritten(value).owner
            if isinstance(owner, StateEntry):
                entries.append(owner)
        return entries

    def memory(self, begin: int, end: int, flight: Flight) -> tuple[int, int, int]:
        """Bytes of a stage: of its state with gradients and optimizer, of the values it keeps for the
        backward, of gradients on their way.
        """
        window = self._window(begin, end)
        return window.static, int(window.kept(flight)), window.passing

    def _window(self, begin: int, end: int) -> _Window:
        window = _Window(self)
        for position in range(begin, end):
            window.add(position)
        return window

    @cached_property
    def whole(self) -> _Window:
        """All ops as one stage."""
        return self._window(0, len(self.ops))

    def hold(self, trial: Trial) -> None:
        """The values that ops keep are those that graphs save, but where autograd runs a block all the same.
        `trial` cuts the program.
        """
        shares = [sum(map(self._bytes, cost.kept)) + cost.extra for cost in self.costs]
        self.held = held_by_graphs(
            self.ops, self.blocks(), shares, trial, self.setting, self.sizes
        )

    @cached_property
    def holdings(self) -> list[list[Holding]]:
        """For each op, the memory that it needs in a stage."""
        holdings: list[list[Holding]] = []
        for op, cost in zip(self.ops, self.costs, strict=True):
            position = len(holdings)
            holdings.append(self._holdings_of(op, cost, position))
        if self.loss is not None and holdings and self.setting.training:
            holdings[-1].append(Holding(self.loss, 0, self.loss.kept))
        return holdings

    @cached_property
    def reading(self) -> torch.Tensor:
        """Per position, how many ops in front of it read state."""
        reads = [any(held.static for held in own) for own in self.holdings]
        return torch.tensor([0, *reads]).cumsum(0)

    def passing(self, position: int) -> int:
        """The bytes of gradients that the backward of an op reads and makes."""
        if not self.setting.training:
            return 0
        passing = self.costs[position].passing
        if self.loss is not None and position == len(self.ops) - 1:
            passing = max(passing, self.loss.passing)
        return passing

    @cached_property
    def is_inside_block(self) -> torch.Tensor:
        """Per position, whether a cut there divides a block: a module that is called in a row with others of
        its list.
        """
        inside = torch.zeros(len(self.ops) + 1, dtype=torch.bool)
        depths = self.depth.tolist()
        for position, op in enumerate(self.ops):
            inside[position] = bool(_block_of(op.scope[: depths[position]]))
        return inside

    def _holdings_of(self, op: Op, cost: OpCost, position: int) -> list[Holding]:
        holdings: list[Holding] = []
        copies = 0
        if self.setting.training:
            copies = 1 + STATE_OF[self.setting.optimizer]
            holdings += self._for_backward(cost, position)
        for entry in dict.fromkeys(self.state_read(op)):
            size, trained = state_bytes([entry])
            size += trained * copies
            holdings.append(Holding(entry, size))
        return holdings

    def _for_backward(self, cost: OpCost, position: int) -> list[Holding]:
        """What an op keeps for the backward."""
        if self.held is not None:
            own = self.held[position]
            return [Holding(holder, graphs=held) for holder, held in own]
        holdings = [Holding(value, 0, self._bytes(value)) for value in cost.kept]
        if cost.extra:
            holdings.append(Holding(position, 0, cost.extra))
        return holdings

    def least_too_large(self, flights: Sequence[Flight]) -> bool:
        """Whether no stage with so many micro-batches in flight may have all ops for its budget."""
        return all(self.whole.kept(flight) == math.inf for flight in flights)

    @cached_property
    def takes_gradient(self) -> bool:
        """Whether an input of the model has a gradient."""
        return any(
            value.owner is None and carries_grad(value.type)
            for op in self.ops
            for value in op.operands
        )

    def within(self, held: Held, flight: Flight) -> float:
        """The bytes that a stage keeps within the budget of the setting; infinity where it cannot."""
        budget = self.setting.activation_budget
        most = held.most.during(flight)
        if budget is None:
            return most
        least = held.least.during(flight)
        if isinstance(budget, float):
            return least + int(budget * (most - least))
        return min(most, budget) if least <= budget else math.inf

    def starts(self, budget: float, flight: Flight) -> torch.Tensor:
        """For each end, the first beginning from which a stage fits the budget."""
        key = (budget, flight)
        if key not in self._starts:
            self._starts[key] = self._first_beginnings(budget, flight)
        return self._starts[key]

    def _first_beginnings(self, budget: float, flight: Flight) -> torch.Tensor:
        window = _Window(self)
        begin = 0
        beginnings = torch.zeros(len(self.ops) + 1, dtype=torch.int64)
        for end in range(1, len(self.ops) + 1):
            window.add(end - 1)
            while begin < end and not window.fits(budget, flight):
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
        self._by_autograd = 0
        self._by_graphs = Held()
        self._has_first = False

    @property
    def passing(self) -> int:
        """The most bytes of gradients that one op's backward reads and makes."""
        if not self._largest:
            return 0
        _, passing = self._largest[0]
        return passing

    def kept(self, flight: Flight) -> float:
        """The bytes of what the interval keeps for the backward, with so many micro-batches in flight."""
        held = self._by_graphs
        if self._has_first and not self._line.takes_gradient:
            held = held.of_first
        by_graphs = self._line.within(held, flight)
        return self._by_autograd * flight.weights + by_graphs

    def nbytes(self, flight: Flight) -> float:
        """The bytes of all that the interval holds, with so many micro-batches in flight."""
        return self.static + self.kept(flight) + self.passing

    def fits(self, budget: float, flight: Flight) -> bool:
        """Whether the interval may be a stage within so many bytes."""
        nbytes = self.nbytes(flight)
        return nbytes <= budget and nbytes < math.inf

    def add(self, position: int) -> None:
        """The op at `position` joins."""
        self._has_first |= position == 0
        passing = self._line.passing(position)
        while self._largest and self._largest[-1][1] <= passing:
            self._largest.pop()
        self._largest.append((position, passing))
        for holding in self._line.holdings[position]:
            count = self._count.get(holding.holder, 0)
            self._count[holding.holder] = count + 1
            if not count:
                self.static += holding.static
                self._by_autograd += holding.kept
                self._by_graphs += holding.graphs

    def remove(self, position: int) -> None:
        """The op at `position` leaves."""
        self._has_first &= position != 0
        if self._largest and self._largest[0][0] == position:
            self._largest.popleft()
        for holding in self._line.holdings[position]:
            self._count[holding.holder] -= 1
            if not self._count[holding.holder]:
                self.static -= holding.static
                self._by_autograd -= holding.kept
                self._by_graphs -= holding.graphs


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


def _block_of(scope: Scope) -> Scope:
    """The outermost call of a module that is in a list, with the calls around it; () for none."""
    for depth, frame in enumerate(scope, 1):
        if frame.name.rpartition(".")[2].isdecimal():
            return scope[:depth]
    return ()
