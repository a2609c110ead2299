"""Recomputes values, in the stages that read them, that cost less to compute there than to send."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from stagecut.ir.aliases import Aliases, storage_root
from stagecut.ir.errors import SplitError, nearest
from stagecut.ir.graph import (
    PURE,
    WHOLE,
    Op,
    Program,
    Stage,
    StateEntry,
    Transfer,
    Value,
)
from stagecut.ir.ops import is_heavy, module_path
from stagecut.ir.types import carries_grad, value_bytes

START = 256 * 1024
"""Cost of starting an op: the bytes that a link of 50 GB/s (400 Gb/s InfiniBand) carries in 5 microseconds.
"""

MEMORY = 64
"""Bytes that an op reads and writes, with a memory of 3.35 TB/s (H100), while that link carries one byte."""

DEEPEST = 64
"""Longest chain of ops that is looked at."""

RECOMPUTE, RELAY = "recompute", "relay"


@dataclass(frozen=True)
class Recompute:
    """A value that is cheaper to compute than to send is computed in every stage that reads it; ops left
    without readers are gone.

    Only values that no write, no random number and no gradient touches are recomputed, so results and
    gradients stay bit for bit the same. Costs are in bytes sent: START for each op, plus the bytes that it
    reads and writes divided by MEMORY, are compared with the value's bytes times the stages it travels. A
    view costs nothing. Ops without operands (arange, full, zeros) are always computed where they are read. A
    buffer or a constant that is read there is held there too.

    routes: (name of a value, 'recompute' or 'relay') as the user wants it, whatever it costs.
    """

    routes: tuple[tuple[str, str], ...] = ()
    name = "recompute"

    def run(self, program: Program) -> bool:
        if program.phase != "partitioned" or program.transfers:
            return False
        if any(stage.state for stage in program.stages):
            return False
        work = _Work(program, dict(self.routes))
        for stage in program.stages:
            work.visit(stage)
        work.refuse_unknown()
        return work.finish()


class _Work:
    def __init__(self, program: Program, routes: dict[str, str]) -> None:
        self._program = program
        self._routes = routes
        self._home: dict[Op, int] = {}
        for stage in program.stages:
            self._home |= dict.fromkeys(stage.ops, stage.index)
        self._aliases = Aliases(program.all_ops(), program.state)
        last = len(program.stages) - 1
        returned = program.output.operands
        self._reach: dict[Value, int] = dict.fromkeys(returned, last)
        self._returned = {storage_root(value) for value in returned}
        """Storage that the model returns. A value in it must not be recomputed, or it would stop sharing
        storage with the output.
        """
        self._twins: list[dict[Value, Value]] = [{} for _ in program.stages]
        self._arriving: list[list[Op]] = [[] for _ in program.stages]
        self._needs: list[dict[Value, int | None]] = [{} for _ in program.stages]
        self._copied: dict[Op, None] = {}
        self._crossing: set[str] = set()

    def visit(self, stage: Stage) -> None:
        """Decides for each value that `stage` defines and later stages read. Earlier stages are decided
        already.
        """
        # the user asked for this stage: do not leave it empty
        idle = all(self._is_source(op) for op in stage.ops)
        for op in stage.ops:
            source = not idle and self._is_source(op)
            for value in op.definitions():
                later = self._later_readers(value, stage.index)
                if later:
                    self._crossing.add(value.hint)
                    self._choose_route(value, stage.index, later, source)

    def _later_readers(self, value: Value, home: int) -> list[int]:
        """The stages after `home` that read the value, in order."""
        stages = {self._home.get(user, 0) for user in value.uses}
        return sorted(stage for stage in stages if stage > home)

    def _choose_route(
        self, value: Value, home: int, later: list[int], source: bool
    ) -> None:
        route = self._routes.get(value.hint)
        asked = route == RECOMPUTE
        may_move = asked or source or not carries_grad(value.type)
        if may_move and route != RELAY:
            self._decide(value, home, later, source, asked)
        last = later[-1]
        if value not in self._twins[last]:
            self._extend(value, last)

    def _extend(self, value: Value, stage: int) -> None:
        """The value is sent at least to `stage`."""
        reach = self._reach.get(value, 0)
        self._reach[value] = max(stage, reach)

    def _decide(
        self, value: Value, home: int, later: list[int], source: bool, asked: bool
    ) -> None:
        """The stages `later` compute the value where that costs less than sending it. A source is always
        computed there, and so is a value for which the user asked.
        """
        limit: int | None = None
        if not source and not asked:
            limit = _bytes(value, later[-1] - home)
            if limit is None or value in self._reach:
                return
        cost = self._total_cost(value, later, asked)
        if cost is None:
            return
        if limit is not None and cost >= limit:
            return
        for stage in later:
            twin = self._make(value, stage, asked)
            self._needs[stage].clear()  # more values are in this stage from here on
            readers = self._readers(value, stage)
            value.replace_uses(twin, readers.__contains__)
            transfer = Transfer(value, home, stage, RECOMPUTE, twin)
            self._program.transfers.append(transfer)

    def _total_cost(self, value: Value, stages: list[int], asked: bool) -> int | None:
        """The cost of computing `value` in all these stages; None when one of them cannot or must not."""
        total = 0
        for stage in stages:
            cost = self._cost(value, stage, 0, asked)
            if cost is not None:
                total += cost
            elif asked:
                raise _not_repeatable(value, stage)
            else:
                return None
        return total

    def _cost(self, value: Value, stage: int, depth: int, asked: bool) -> int | None:
        """The cost of computing `value` in `stage`; None when it cannot or must not be computed there. A
        value that is needed twice on the way is counted twice.
        """
        op = value.owner
        if not isinstance(op, Op):
            return None
        if depth > DEEPEST:
            return None
        if not self._is_repeatable(value, op):
            return None
        if not asked and not self._may_be_copied(value, op):
            return None
        total = _own_cost(op)
        for operand in dict.fromkeys(op.operands):
            cost = self._need(operand, stage, depth, asked)
            if cost is None:
                return None
            total += cost
        return total

    def _may_be_copied(self, value: Value, op: Op) -> bool:
        """True for a value that is recomputed without the user's asking."""
        if is_heavy(op):
            return False
        return storage_root(value) not in self._returned

    def _need(self, value: Value, stage: int, depth: int, asked: bool) -> int | None:
        """The cost of having `value` in `stage`: nothing when it is there, else the lesser of the costs of
        sending and of computing it.
        """
        if self._aliases.is_written(value):
            return None
        if self._is_there(value, stage, asked):
            return 0
        needs = self._needs[stage]
        if value not in needs:
            costs = (
                self._cost(value, stage, depth + 1, False),
                self._sending_cost(value, stage),
            )
            possible = [cost for cost in costs if cost is not None]
            needs[value] = min(possible, default=None)
        return needs[value]

    def _is_there(self, value: Value, stage: int, asked: bool) -> bool:
        owner = value.owner
        if isinstance(owner, StateEntry):
            if asked or owner.kind != "param":
                return True
            return bool(self._readers(value, stage))
        if owner is None:
            return True
        if value in self._twins[stage] or self._home[owner] == stage:
            return True
        return self._reach.get(value, -1) >= stage

    def _readers(self, value: Value, stage: int) -> set[Op]:
        """The ops of a stage that read a value."""
        readers: set[Op] = set()
        for user in value.uses:
            if self._home.get(user) == stage:
                readers.add(user)
        return readers

    def _sending_cost(self, value: Value, stage: int) -> int | None:
        if not isinstance(value.owner, Op):
            return None
        travelled = stage - self._home[value.owner]
        size = _bytes(value, travelled)
        if size is not None and carries_grad(value.type):
            size *= 2
        return size

    def _make(self, value: Value, stage: int, asked: bool) -> Value:
        """The value as `stage` computes it."""
        twins = self._twins[stage]
        op = value.owner
        assert isinstance(op, Op)
        swap: dict[Value, Value] = {}
        for operand in dict.fromkeys(op.operands):
            if not self._is_there(operand, stage, asked):
                self._bring(operand, stage)
            if operand in twins:
                swap[operand] = twins[operand]
        twin = op.copy(swap)
        twins.update(zip(op.results, twin.results, strict=True))
        self._home[twin] = stage
        self._arriving[stage].append(twin)
        self._copied[op] = None
        return twins[value]

    def _bring(self, operand: Value, stage: int) -> None:
        """The value gets to `stage` in the cheaper way."""
        computing = self._cost(operand, stage, 1, False)
        if computing is None:
            self._extend(operand, stage)
            return
        sending = self._sending_cost(operand, stage)
        if sending is not None and computing >= sending:
            self._extend(operand, stage)
            return
        self._make(operand, stage, False)

    def finish(self) -> bool:
        """The copies stand at the beginning of their stages. Originals and copies that nothing reads are
        gone.
        """
        for stage, ops in zip(self._program.stages, self._arriving, strict=True):
            stage.ops[:0] = ops
        sizes = {stage.index: len(stage.ops) for stage in self._program.stages}
        unread: set[Op] = set()
        candidates = {*self._copied, *chain.from_iterable(self._arriving)}
        for op in reversed([*self._program.all_ops()]):
            home = self._home[op]
            if op not in candidates or sizes[home] < 2:
                continue
            if all(set(value.uses) <= unread for value in op.definitions()):
                sizes[home] -= 1
                unread.add(op)
        self._program.remove_ops(unread)
        return bool(self._copied)

    def _is_source(self, op: Op) -> bool:
        if op.operands or op.regions or op.effects != PURE:
            return False
        if len(op.results) != 1:
            return False
        result = op.results[0]
        return self._is_repeatable(result, op)

    def _is_repeatable(self, value: Value, op: Op) -> bool:
        if op.has_effect or op.regions or module_path(op):
            return False
        if any(context.kind in WHOLE for context in op.context):
            return False
        if value.version_of is not None:
            return False
        return not any(map(self._aliases.is_written, op.definitions()))

    def refuse_unknown(self) -> None:
        """Raises SplitError for a route of a value that does not cross."""
        inputs = {value.hint for value in self._program.inputs}
        names = sorted(self._crossing | inputs)
        for name, route in self._routes.items():
            if name not in names:
                raise SplitError(
                    f"routes names '{name}', which no stage needs from another",
                    hint=nearest(name, names),
                )
            if route == RELAY:
                continue
            what = f"'{route}' is no route for '{name}'"
            if name not in self._crossing:
                raise SplitError(what, hint="'relay': it is an input of the model")
            if route != RECOMPUTE:
                raise SplitError(what, hint="'recompute' or 'relay'")


def _own_cost(op: Op) -> int:
    """The cost of an op when its operands are there: none for a view."""
    if op.is_view:
        return 0
    moved = 0
    for value in (*op.operands, *op.results):
        moved += value_bytes(value.type) or 0
    return START + moved // MEMORY


def _not_repeatable(value: Value, stage: int) -> SplitError:
    where = ""
    if isinstance(value.owner, Op):
        where = value.owner.where()
    return SplitError(
        f"{value!r} cannot be computed anew in stage {stage}: it is random, written or has "
        "effects, or so is what it needs",
        where=where,
        hint="leave its route to the compiler",
    )


def _bytes(value: Value, times: int) -> int | None:
    """Bytes of a value, `times` over; None when its size is symbolic."""
    size = value_bytes(value.type)
    if size is None:
        return None
    return size * times
