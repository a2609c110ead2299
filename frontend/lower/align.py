"""Aligns two traces of one model: finds the ops that are the same in both, and the runs of ops that each has
between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

from stagecut.ir.graph import Block, Mode, Op, Program, StateEntry, Value, scope_fqn
from stagecut.ir.types import TensorType, Type

Pair = tuple[Value, Value]
"""The values that stand in the same place in both traces, ours first."""


class CannotFollow(Exception):
    """The two traces do not make one program; the text says why."""


@dataclass
class Part:
    """A part of both traces: an op that is the same in both, or a run of ops from each.

    joins maps the pairs of values that are one value after the part to the op that reads them first; None for
    the output.
    """

    ours: list[Op]
    theirs: list[Op]
    shared: bool = False
    joins: dict[Pair, Op | None] = field(default_factory=dict)

    @property
    def ops(self) -> list[Op]:
        """The ops of both traces."""
        return [*self.ours, *self.theirs]


class _Conflict(Exception):
    """The parts from `first` to `last` must be one, because one of them makes a value that another needs in
    one mode only.
    """

    def __init__(self, first: int, last: int) -> None:
        super().__init__(first, last)
        self.first = first
        self.last = last


class Alignment:
    """The parts of two traced programs, and the value of ours for each value of theirs.

    `same_constant` tells whether two constants of these names have equal values. `filled` gives the arguments
    of an op, including those that it leaves out and another op gives.
    """

    def __init__(
        self,
        ours: Program,
        theirs: Program,
        same_constant: Callable[[str, str], bool],
        filled: Callable[[Op, Op], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        self.ours = ours
        self.theirs = theirs
        self.same_constant = same_constant
        self.filled = filled
        self._inputs = dict(self._interface())
        self.partner: dict[Value, Value] = {}
        self._place: dict[Value, int] = {}
        self._alone: set[Value] = set()
        self.parts = _aligned(ours.ops, theirs.ops)
        while True:
            try:
                self._walk()
                return
            except _Conflict as conflict:
                self._unite(conflict.first, conflict.last)

    def _interface(self) -> Iterator[Pair]:
        """Inputs and state, theirs first."""
        ours, theirs = self.ours, self.theirs
        our_types = [bare(value.type) for value in ours.inputs]
        their_types = [bare(value.type) for value in theirs.inputs]
        if our_types != their_types:
            raise CannotFollow("it takes other inputs there")
        yield from zip(theirs.inputs, ours.inputs, strict=True)
        owners = ours.name_owners()
        for entry in theirs.state:
            if entry.kind != "const":
                yield entry.value, owners[entry.name].value

    def _is_run(self, number: int) -> bool:
        """True for the number of a part that is a run of ops."""
        if not 0 <= number < len(self.parts):
            return False
        part = self.parts[number]
        return not part.shared

    def _unite(self, first: int, last: int) -> None:
        """The parts from `first` to `last`, and the runs beside them, become one run."""
        while self._is_run(first - 1):
            first -= 1
        while self._is_run(last + 1):
            last += 1
        united = Part([], [])
        for part in self.parts[first : last + 1]:
            united.ours += part.ours
            united.theirs += part.theirs
        self.parts[first : last + 1] = [united]

    # --- one walk over all parts, which ends where two of them must be one ------------------------

    def _walk(self) -> None:
        self.partner = dict(self._inputs)
        self._place = {}
        self._alone = set()
        for number, part in enumerate(self.parts):
            part.joins = {}
            self._visit(part, number)
            for op in part.ops:
                self._place |= dict.fromkeys(op.results, number)
        self._visit_outputs()

    def _visit_outputs(self) -> None:
        outputs = zip(self.ours.outputs, self.theirs.outputs, strict=True)
        for ours, theirs in outputs:
            if isinstance(ours, Value) and isinstance(theirs, Value):
                self._meet(ours, theirs, len(self.parts), None)
            elif isinstance(theirs, Value) or not same_literal(ours, theirs):
                raise CannotFollow("it returns something else there")

    def _visit(self, part: Part, number: int) -> None:
        if not part.shared:
            self._visit_run(part, number)
            return
        our_op = part.ours[0]
        their_op = part.theirs[0]
        pairs = self.pairs(our_op, their_op)
        if pairs is None:
            raise _Conflict(number, number)
        for ours, theirs in pairs:
            if isinstance(ours, Value):
                self._meet(ours, theirs, number, our_op)
        self.partner |= zip(their_op.results, our_op.results, strict=True)

    def _visit_run(self, part: Part, number: int) -> None:
        results: set[Value] = set()
        for op in part.ops:
            results.update(op.results)
        for op in part.ops:
            for value in op.operands:
                if value in self._alone and value not in results:
                    raise _Conflict(self._place[value], number)
        self._alone |= results

    def _meet(self, ours: Value, theirs: Value, number: int, reader: Op | None) -> None:
        """The two values are one, or become one after the part that makes them."""
        if self.partner.get(theirs) is ours:
            return
        if self._are_equal_constants(ours, theirs):
            self.partner[theirs] = ours
            return
        pair = (ours, theirs)
        where = self._where_joined(pair, number)
        if bare(ours.type) != bare(theirs.type):
            if reader is None:
                raise CannotFollow("it returns tensors of another type or size there")
            raise _Conflict(where, number)
        self.parts[where].joins.setdefault(pair, reader)

    def _where_joined(self, pair: Pair, number: int) -> int:
        """The number of the run that makes the values of a pair, or of the one before part `number` where no
        run does.
        """
        runs = [self._place[value] for value in pair if value in self._alone]
        if runs:
            where = max(runs)
        else:
            where = self._run_before(number)
        first = min([where, *runs])
        makers = [self._place.get(value, -1) for value in pair]
        last = max(where, *makers)
        if first < where or last > where:
            raise _Conflict(first, last)
        return where

    def _run_before(self, number: int) -> int:
        """The number of the run right before that part."""
        if not self._is_run(number - 1):
            self.parts.insert(number, Part([], []))
            raise _Conflict(number, number)
        return number - 1

    def _are_equal_constants(self, ours: Value, theirs: Value) -> bool:
        our_name = _constant_name(ours)
        their_name = _constant_name(theirs)
        if our_name is None or their_name is None:
            return False
        return self.same_constant(our_name, their_name)

    # --- pairs ------------------------------------------------------------------------------------

    def pairs(self, our_op: Op, their_op: Op) -> list[tuple[Any, Any]] | None:
        """The pairs of leaves of the operands of both, in order; None where the operands are not built
        alike.
        """
        args = our_op.args
        kwargs = our_op.kwargs
        their_args = their_op.args
        their_kwargs = their_op.kwargs
        if len(args) != len(their_args) or kwargs.keys() != their_kwargs.keys():
            args, kwargs = self.filled(our_op, their_op)
            their_args, their_kwargs = self.filled(their_op, our_op)
        if kwargs.keys() != their_kwargs.keys():
            return None
        if not all(map(self._are_same_regions, our_op.regions, their_op.regions)):
            return None
        in_our_order = {key: their_kwargs[key] for key in kwargs}
        pairs: list[tuple[Any, Any]] = []
        alike = _zip((args, kwargs), (their_args, in_our_order), pairs)
        if not alike:
            return None
        return pairs

    def _are_same_regions(self, ours: Block, theirs: Block) -> bool:
        """True for regions of equal ops. Where anything in them differs by mode, they are not the same, and
        so neither are their ops.
        """
        if _signature(ours) != _signature(theirs):
            return False
        partner = dict(zip(theirs.inputs, ours.inputs, strict=True))
        our_ops = [*ours.ops, ours.output]
        their_ops = [*theirs.ops, theirs.output]
        for our_op, their_op in zip(our_ops, their_ops, strict=True):
            if not self._reads_partners(our_op, their_op, partner):
                return False
            partner |= zip(their_op.results, our_op.results, strict=True)
        return True

    def _reads_partners(
        self, our_op: Op, their_op: Op, partner: dict[Value, Value]
    ) -> bool:
        """True for ops of a region whose operands are the same in both."""
        pairs = self.pairs(our_op, their_op)
        if pairs is None:
            return False
        return all(_are_partners(*pair, partner) for pair in pairs)


def _constant_name(value: Value) -> str | None:
    """The name of a constant of the tracer's; None for another value."""
    entry = value.owner
    if not isinstance(entry, StateEntry) or entry.kind != "const":
        return None
    return entry.name


def _signature(region: Block) -> tuple[list[Type], list[Any]]:
    """The types of the inputs of a region, and the keys of its ops."""
    types = [value.type for value in region.inputs]
    keys = [_key(op) for op in region.ops]
    return types, keys


def _aligned(ours: Sequence[Op], theirs: Sequence[Op]) -> list[Part]:
    """Parts of one op each for ops that may be the same in both, and parts for the runs between them. The
    split points are the same where both traces have as many.
    """
    our_runs = _between_splits(ours)
    their_runs = _between_splits(theirs)
    if len(our_runs) != len(their_runs):
        our_runs = [[*ours]]
        their_runs = [[*theirs]]
    parts: list[Part] = []
    for our_run, their_run in zip(our_runs, their_runs, strict=True):
        parts += _aligned_runs(our_run, their_run)
    return parts


def _aligned_runs(our_run: list[Op], their_run: list[Op]) -> Iterator[Part]:
    our_keys = [*map(_key, our_run)]
    their_keys = [*map(_key, their_run)]
    matcher = SequenceMatcher(None, our_keys, their_keys, autojunk=False)
    for tag, start, stop, begin, end in matcher.get_opcodes():
        ours = our_run[start:stop]
        theirs = their_run[begin:end]
        if tag != "equal":
            yield Part(ours, theirs)
            continue
        for our_op, their_op in zip(ours, theirs, strict=True):
            yield Part([our_op], [their_op], shared=True)


def _between_splits(ops: Sequence[Op]) -> list[list[Op]]:
    """The ops from one split point to the next; each split point by itself."""
    runs: list[list[Op]] = [[]]
    for op in ops:
        if op.is_split:
            runs += [[op], []]
        else:
            runs[-1].append(op)
    return runs


def _key(op: Op) -> Any:
    """A key that is equal for ops that can stand for each other. It leaves out the operands, and also
    checkpoints and the numbers of calls, which change no result.
    """
    path = scope_fqn(op.scope)
    marks = [mark for mark in op.context if mark.kind != "checkpoint"]
    context = repr(tuple(marks))
    types: list[str] = []
    for result in op.results:
        result_type = bare(result.type)
        types.append(str(result_type))
    form = repr(op.form)
    return op.target, path, context, tuple(types), form, len(op.regions)


def bare(value_type: Type) -> Type:
    """A type without its gradient, which a trace does not know."""
    if isinstance(value_type, TensorType) and value_type.grad:
        return replace(value_type, grad=False)
    return value_type


def _are_partners(ours: Any, theirs: Any, partner: dict[Value, Value]) -> bool:
    """True for values that stand in the same place, and for equal literals."""
    if isinstance(ours, Value):
        return partner.get(theirs) is ours
    return same_literal(ours, theirs)


def _zip(one: Any, other: Any, pairs: list[tuple[Any, Any]]) -> bool:
    """`pairs` gains the pairs of leaves; False where the trees are not built alike."""
    if isinstance(one, (tuple, list)):
        if type(one) is not type(other):
            return False
        if len(one) != len(other):
            return False
        return all(_zip(*parts, pairs) for parts in zip(one, other, strict=True))
    if isinstance(one, dict):
        if not isinstance(other, dict):
            return False
        if [*one] != [*other]:
            return False
        values = [*one.values()]
        other_values = [*other.values()]
        return _zip(values, other_values, pairs)
    if isinstance(one, slice):
        if not isinstance(other, slice):
            return False
        bounds = (one.start, one.stop, one.step)
        other_bounds = (other.start, other.stop, other.step)
        return _zip(bounds, other_bounds, pairs)
    if isinstance(one, Value) != isinstance(other, Value):
        return False
    if isinstance(other, (tuple, list, dict, slice)):
        return False
    pairs.append((one, other))
    return True


def same_literal(one: Any, other: Any) -> bool:
    """True for equal literals, where 1 is not True and nan is nan. Two literals that follow a flag must be
    equal in both modes.
    """
    if isinstance(one, Mode) and isinstance(other, Mode):
        if not same_literal(one.training, other.training):
            return False
        return same_literal(one.evaluating, other.evaluating)
    if type(one) is not type(other):
        return False
    if one == other:
        return True
    return repr(one) == repr(other)
