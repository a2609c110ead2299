"""Ops -> a tree of module calls, in which runs of equal neighbours are folded to the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from stagecut.ir.graph import (
    WHOLE,
    Block,
    Context,
    Op,
    Scope,
    StateEntry,
    Value,
    scope_fqn,
    transform,
)


@dataclass(eq=False)
class ModuleCall:
    """A call of a module, with its ops and inner calls in order of their first op.

    `copies` are the calls after it that it stands for, `carried` the values that it hands to the first of
    them.
    """

    scope: Scope
    parts: list[ModuleCall | Op] = field(default_factory=list)
    copies: list[ModuleCall] = field(default_factory=list)
    carried: list[Value] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The module's path below the call around it, followed by `#2` for its second call."""
        frame = self.scope[-1]
        return frame.name + (f" #{frame.call + 1}" if frame.call else "")

    def ops(self) -> Iterator[Op]:
        """All ops inside, without those of folded copies."""
        for part in self.parts:
            if isinstance(part, Op):
                yield part
            else:
                yield from part.ops()

    def every_op(self) -> Iterator[Op]:
        """All ops inside, including those of folded copies."""
        for part in self.parts:
            if isinstance(part, Op):
                yield part
                continue
            for block in (part, *part.copies):
                yield from block.every_op()


@dataclass
class Folded:
    """A tree, and its foldings: op of a copy -> the op it is drawn as."""

    root: ModuleCall
    stands: dict[Op, Op] = field(default_factory=dict)

    def drawn(self, op: Op) -> Op:
        """The op that `op` is drawn as: `op` itself where nothing is folded."""
        while op in self.stands:
            op = self.stands[op]
        return op


def folded(ops: Iterable[Op]) -> Folded:
    """The tree of calls of `ops`, in which runs of neighbours with the same ops, shapes and wiring are
    folded.
    """
    tree = Folded(_tree(ops))
    _fold(tree, tree.root)
    return tree


def _tree(ops: Iterable[Op]) -> ModuleCall:
    root = ModuleCall(())
    calls: dict[Scope, ModuleCall] = {(): root}
    for op in ops:
        block = root
        for depth in range(1, len(op.scope) + 1):
            scope = op.scope[:depth]
            if scope not in calls:
                calls[scope] = ModuleCall(scope)
                block.parts.append(calls[scope])
            block = calls[scope]
        block.parts.append(op)
    return root


def _fold(tree: Folded, block: ModuleCall) -> None:
    """Runs of equal neighbours among the blocks inside are folded; after that, runs inside the remaining
    blocks.
    """
    kept: list[ModuleCall | Op] = []
    last: _Shape | None = None
    links: dict[int, int] | None = None
    for part in block.parts:
        shape = _Shape(part) if isinstance(part, ModuleCall) else None
        new_links = shape.follows(last) if shape and last else None
        if shape and new_links is not None and links in (None, new_links):
            links = new_links
            _add(tree, kept[-1], shape)
        else:
            kept.append(part)
            links = None
        last = shape
    block.parts = kept
    for part in kept:
        if isinstance(part, ModuleCall):
            _fold(tree, part)


def _add(tree: Folded, first: Any, copy: _Shape) -> None:
    """`copy` is drawn as `first`, the block it is equal to."""
    if not first.copies:
        inside = {value for op in first.ops() for value in op.definitions()}
        first.carried = [value for value in copy.outside if value in inside]
    tree.stands |= zip(copy.ops, first.ops(), strict=True)
    first.copies.append(copy.block)


class _Shape:
    """The computation of a block, without the names: its ops with their types, and the values it takes from
    outside in order.
    """

    def __init__(self, block: ModuleCall) -> None:
        self.block, self.path = block, scope_fqn(block.scope) + "."
        self.ops = list(block.ops())
        defined = chain.from_iterable(map(_defined, self.ops))
        self.inside = {value: place for place, value in enumerate(defined)}
        self.outside: dict[Value, int] = {}
        self.lines = [self._op(op) for op in self.ops]

    def follows(self, other: _Shape) -> dict[int, int] | None:
        """None unless this block is a copy of `other`, directly after it. Otherwise: place among its values
        from outside -> place of the value in `other` that it is.

        The other values from outside are the same for both, and only the two blocks read the values of
        `other`: no copy differs from the next.
        """
        if self.lines != other.lines:
            return None
        links: dict[int, int] = {}
        for value, other_value in zip(self.outside, other.outside, strict=True):
            if value in other.inside:
                links[self.outside[value]] = other.inside[value]
            elif value is not other_value:
                return None
        readers = {*self.ops, *other.ops}
        for op in other.ops:
            if any(not readers.issuperset(value.uses) for value in op.definitions()):
                return None
        return links

    def _op(self, op: Op) -> str:
        regions = [self._region(region) for region in op.regions]
        types = [str(value.type) for value in op.definitions()]
        scope = op.scope[len(self.block.scope) :]
        parts = (
            self._without_names((op.args, op.kwargs, [*op.versions])),
            op.form,
            self._without_names((op.effects.writes, op.effects.views)),
            (op.effects.random, op.effects.effect),
            [*map(_context, op.context)],
            types,
            scope,
            regions,
        )
        return f"{op.target} {parts}"

    def _region(self, region: Block) -> Any:
        return (
            [str(value.type) for value in region.inputs],
            [self._op(op) for op in region.ops],
            self._without_names(region.outputs),
        )

    def _without_names(self, tree: Any) -> Any:
        return transform(tree, self._leaf)

    def _leaf(self, leaf: Any) -> Any:
        if type(leaf) is not Value:
            return leaf
        if leaf in self.inside:
            return "inside", self.inside[leaf]
        if isinstance(leaf.owner, StateEntry):
            return self._state(leaf.owner)
        place = self.outside.setdefault(leaf, len(self.outside))
        return "outside", place, str(leaf.type)

    def _state(self, entry: StateEntry) -> Any:
        own = [
            name.removeprefix(self.path)
            for name in entry.names
            if name.startswith(self.path)
        ]
        return (
            own[0] if own else f"@{entry.name}",
            str(entry.type),
            entry.kind,
            entry.share,
            len(entry.names),
        )


def _defined(op: Op) -> Iterator[Value]:
    """The values that an op defines, including those inside its regions."""
    for region in op.regions:
        yield from region.inputs
        for inner in region.ops:
            yield from _defined(inner)
    yield from op.definitions()


def _context(context: Context) -> Any:
    """A context without the number that tells regions of one kind apart."""
    return (context.kind, context.args[1:]) if context.kind in WHOLE else context
