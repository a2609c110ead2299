"""Chooses what a stage saves for its backward, and what the backward computes again from that.

A value that the forward computes is either there when a part of the backward begins, at the price of its
bytes times the micro-batches for which it lies there, or it is computed again, at the cost of its op. That is
a cut of a network, which has all values twice: for the gradients of the inputs, which begin after the
forward, and for those of the weights, which begin later. What is there for the weights was there for the
inputs. Values in one memory are there together, and views of what is there cost nothing.

Each part computes again what it reads, so that no copy waits for the weights. Light ops cost the bytes that
they move. Heavy ones are done again only where light ones do not suffice. Ops with an effect never are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from stagecut.ir.errors import BudgetError
from stagecut.ir.graph import Op, Value
from stagecut.ir.ops import facts, is_heavy, library_name
from stagecut.ir.roles import Budget, Flight, Joint
from stagecut.ir.types import storage_bytes
from stagecut.passes.cheapest_cut import END, START, Cut, Network

Flops = Callable[[Op], int]
"""What a heavy op computes; 0 where nobody knows."""


def unknown(op: Op) -> int:
    """Nobody knows what the op computes."""
    return 0


INPUTS, WEIGHTS = 0, 1
"""The parts of a backward."""


def recompute_saved(
    joint: Joint,
    forward: set[Op],
    inputs: set[Op],
    recompute: bool | Budget,
    flops: Flops,
) -> None:
    """The ops of the backward of a joint block read copies of ops of the `forward` where these are done
    again, and else what the forward computed. `inputs` are those ops that the gradients of inputs need.

    Within a budget, as little as possible is done again. With True, no heavy op is, and as few bytes as
    possible lie in memory. Raises BudgetError where the budget is less than that takes. Each copy stands
    right before the first op that reads it.
    """
    choice = _Choice(joint, forward, inputs)
    if isinstance(recompute, Budget):
        again = choice.within(recompute, flops)
    else:
        again = choice.least()
    weights = choice.backward - inputs
    # a view that the inputs take of what is computed again is another one for the weights
    choice.copy(WEIGHTS, weights, forward | inputs, again)
    choice.copy(INPUTS, inputs, forward, again)


class _Choice:
    """The ways to save the values of a joint block. They are known by their memory."""

    def __init__(self, joint: Joint, forward: set[Op], inputs: set[Op]) -> None:
        self._joint = joint
        self._storages = joint.storages()
        self._forward = [op for op in joint.block.ops if op in forward]
        self._ops = [op for op in self._forward if not op.is_view]
        self.backward = set(joint.block.ops) - forward
        made = (result for op in self._ops for result in op.results)
        self._own = self._storages.roots([*joint.primals, *made])
        self._read = [set[Value](), set[Value]()]
        for op in self.backward:
            part = INPUTS if op in inputs else WEIGHTS
            self._read[part].update(self._roots(op.reads))
        for place, gradient in enumerate(joint.gradients):
            if gradient is not None:
                part = WEIGHTS if place in joint.weights else INPUTS
                self._read[part].update(self._roots([gradient]))
        self._gradients = {
            root
            for root in self._read[WEIGHTS].difference(self._own)
            if root.owner not in self.backward - inputs
        }

    def _roots(self, values: Iterable[Value]) -> list[Value]:
        return self._storages.roots(values)

    def least(self) -> Cut:
        """The cut where as few bytes as possible are saved and no heavy op is done again."""
        network = self._network(Flight())
        for op, cost in self._light().items():
            network.price(START, op, 0, cost)
        return network.least()

    def within(self, budget: Budget, flops: Flops) -> Cut:
        """The cut where what is saved fits the budget. Raises BudgetError."""
        network = self._network(budget.flight)
        for op, cost in self._light().items():
            network.price(START, op, 0, cost)
        outweighs = network.cost_that_outweighs()
        for op in self._ops:
            work = flops(op) if _repeats(op) and is_heavy(op) else 0
            if work:
                network.price(START, op, 0, outweighs * work)
        fixed = budget.flight.gradients * _bytes(self._gradients)
        least, cheapest = network.least(), network.cheapest()
        limit = int(budget.limit) - fixed
        if isinstance(budget.limit, float):
            way = cheapest.nbytes - least.nbytes
            limit = least.nbytes + int(budget.limit * way)
        if limit < least.nbytes:
            raise BudgetError(least.nbytes + fixed, int(budget.limit))
        return network.within(limit, least, cheapest)

    def _light(self) -> dict[Op, int]:
        """Op that may be done again without much work -> the bytes that it moves."""
        return {
            op: 1 + _bytes((*op.operands, *op.results))
            for op in self._ops
            if _repeats(op) and not is_heavy(op)
        }

    def _network(self, flight: Flight) -> Network:
        """The network in which nothing may be done again."""
        network = Network()
        counts = flight.inputs, flight.weights - flight.inputs
        for root in self._own:
            nbytes = storage_bytes(root.type)
            for part, count in enumerate(counts):
                network.price(_begins(part, root), _ends(part, root), nbytes * count)
            network.follow(_ends(INPUTS, root), _ends(WEIGHTS, root))
            network.follow(_begins(WEIGHTS, root), _begins(INPUTS, root))
            if not isinstance(root.owner, Op):
                network.follow(START, _begins(WEIGHTS, root))
        for op in self._ops:
            network.follow(START, op)
            for part in (INPUTS, WEIGHTS):
                network.follow(op, (part, op))
                for root in self._roots(op.operands):
                    network.follow(_ends(part, root), (part, op))
                for root in self._roots(op.results):
                    network.follow((part, op), _begins(part, root))
        for part in (INPUTS, WEIGHTS):
            for root in self._read[part].intersection(self._own):
                network.follow(_ends(part, root), END)
        return network

    def copy(self, part: int, readers: set[Op], originals: set[Op], again: Cut) -> None:
        """The ops among `readers`, and the gradients of this part, read copies of what the cut has computed
        again, by twins of `originals`.
        """
        joint = self._joint
        block = joint.block
        copies: dict[Value, Value] = {}
        ops: list[Op] = []

        def is_copied(value: Value) -> bool:
            root = self._storages.root(value)
            is_again = root is not None and _begins(part, root) in again.behind
            return is_again and value.owner in originals

        for op in block.ops:
            if op in readers:
                _copy(op.reads, is_copied, copies, ops)
                op.substitute(copies)
            ops.append(op)
        gradients = list(joint.gradients)
        for place, gradient in enumerate(gradients):
            if gradient is not None and (place in joint.weights) == (part == WEIGHTS):
                _copy([gradient], is_copied, copies, ops)
                gradients[place] = copies.get(gradient, gradient)
        block.ops = ops
        block.set_outputs([*block.outputs[: joint.results], *gradients])


def _begins(part: int, root: Value) -> Hashable:
    """The node that lies behind the cut where a value is computed again in a part."""
    return part, "begins", root


def _ends(part: int, root: Value) -> Hashable:
    """The node that lies behind the cut where a part, or one after it, needs a value of those before it."""
    return part, "ends", root


def _bytes(values: Iterable[Value]) -> int:
    return sum(storage_bytes(value.type) for value in values)


def _repeats(op: Op) -> bool:
    """True for an op that gives the same again, in memory of its own."""
    shares = any(view is not None for view in op.effects.views)
    changes = op.has_effect or shares or facts(op).uninitialised
    return not (changes or op.regions or library_name(op))


def _copy(
    values: Iterable[Value],
    is_copied: Callable[[Value], bool],
    copies: dict[Value, Value],
    ops: list[Op],
) -> None:
    """`copies` has a copy of each of these values that is computed again; `ops` gains the ops that compute
    it.
    """
    pending = list(values)
    while pending:
        value = pending[-1]
        op = value.owner
        if value in copies or not isinstance(op, Op) or not is_copied(value):
            pending.pop()
            continue
        missing = [v for v in op.operands if v not in copies and is_copied(v)]
        if missing:
            pending += missing
            continue
        twin = op.copy(copies)
        copies |= zip(op.results, twin.results, strict=True)
        ops.append(twin)
