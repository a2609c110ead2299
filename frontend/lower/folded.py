"""Calls that were not traced by themselves: their ops are those of an equal call, under other names."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import fx

from stagecut.frontend.marks import AGAIN, BEGINS, STEP, Repeated, Template
from stagecut.ir.graph import Op, Place, Value, substitute
from stagecut.ir.run.storage import storage_of


@dataclass(slots=True)
class Made:
    """A node, the ops that it became, and the tree of its results; the operands of one that changes the
    contexts.
    """

    node: fx.Node
    ops: list[Op]
    tree: Any
    operands: Any = None


@dataclass
class First:
    """An earlier call: the node in front of it, its operands, and what its nodes became."""

    node: fx.Node
    operands: list[Value]
    made: list[Made] = field(default_factory=list)
    by_place: dict[int, Made] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path of its module."""
        template: Template = self.node.meta[BEGINS]
        return template.path


class Folded:
    """The calls of a trace that later ones are like. `storage` says in which memory each value lives."""

    def __init__(self, storage: dict[Value, int]) -> None:
        self._storage = storage
        self._firsts: dict[int, First] = {}
        self._numbers = count(1)
        self._newest: First | None = None
        self._between: list[Made] = []

    @property
    def is_noting(self) -> bool:
        """True when an earlier call has begun."""
        return self._newest is not None

    def begin(self, node: fx.Node, operands: list[Value]) -> None:
        """The nodes of an earlier call come next."""
        template: Template = node.meta[BEGINS]
        self._newest = First(node, operands)
        self._firsts[template.number] = self._newest
        self._between = []

    def note(self, made: Made) -> None:
        """A node is lowered. One that export puts between those of an earlier call belongs to it."""
        assert self._newest is not None
        self._between.append(made)
        step = made.node.meta.get(STEP)
        if step is not None:
            self._newest.made += self._between
            self._newest.by_place[step.place] = made
            self._between = []

    def again(self, node: fx.Node, operands: list[Value]) -> Again:
        """The call that a node stands for."""
        call: Repeated = node.meta[AGAIN]
        first = self._firsts[call.number]
        swap = dict(zip(first.operands, operands, strict=True))
        homes: dict[int, int] = {}
        for ours, theirs in swap.items():
            if ours in self._storage and theirs in self._storage:
                homes[self._storage[ours]] = self._storage[theirs]
        for place, tensor in zip(call.results, node.meta["val"], strict=True):
            home = storage_of(tensor)
            result = first.by_place[place].tree
            if home is not None and result in self._storage:
                homes[self._storage[result]] = home
        return Again(node, call, first, swap, homes, self)

    def live(self, value: Value, like: Value, homes: dict[int, int]) -> None:
        """The value lives in the memory of the call that stands for the memory of `like` in the earlier
        one.
        """
        home = self._storage.get(like)
        if home is None:
            return
        if home not in homes:
            homes[home] = -next(self._numbers)
        self._storage[value] = homes[home]


@dataclass
class Again:
    """A call that is like an earlier one."""

    node: fx.Node
    call: Repeated
    first: First
    swap: dict[Value, Value]
    """Value of the earlier call -> the one in its place."""
    homes: dict[int, int]
    """The same for memory."""
    folded: Folded

    def results(self) -> list[Any]:
        """The tensors that the call returns."""
        trees = [self.first.by_place[place].tree for place in self.call.results]
        return [substitute(tree, self.swap) for tree in trees]

    def twin(self, op: Op, made: Made, place: Place) -> Op:
        """The op that stands for one of the earlier call."""
        twin = Op(
            op.target,
            substitute(op.args, self.swap),
            substitute(op.kwargs, self.swap),
            effects=op.effects.substitute(self.swap),
            place=place if op.loc is not None else place._replace(loc=None),
            form=op.form,
        )
        step = made.node.meta.get(STEP)
        name = made.node.name if step is None else self.call.names[step.place]
        for result in op.results:
            hint = name if result.hint == made.node.name else result.hint
            value = twin.add_result(result.type, hint)
            self.folded.live(value, result, self.homes)
            self.swap[result] = value
        return twin

    def stack(self, node: fx.Node) -> dict[str, tuple[str, Any]]:
        """The module calls around the node that stands for one of the earlier call."""
        own = self.first.path
        stack = dict(self.node.meta["nn_module_stack"])
        for key, (path, cls) in node.meta["nn_module_stack"].items():
            if path != own and not path.startswith(f"{own}."):
                continue
            path = self.call.path + path[len(own) :]
            _, mark, number = key.partition("@")
            stack[f"{path}{mark}{number}"] = (path, cls)
        return stack

    def trace(self, node: fx.Node) -> str:
        """The lines that lead to the node that stands for one of the earlier call."""
        trace: str = node.meta.get("stack_trace", "")
        before: str = self.first.node.meta.get("stack_trace", "")
        here: str = self.node.meta.get("stack_trace", "")
        return here + trace[len(before) :]
