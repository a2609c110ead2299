"""Turns the user's wishes into split markers: module names, or positions a policy chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from stagecut.ir.errors import SplitError, nearest
from stagecut.ir.graph import SPLIT, WHOLE, Context, Frame, Op, Place, Program, Scope
from stagecut.ir.ops import module_path

BEGINNING = "beginning"
END = "end"
SIDES = (BEGINNING, END)
_Call = tuple[str, Scope]


@dataclass(frozen=True)
class FindSplits:
    """The markers in the program are exactly the cuts: in-model ones, module boundaries, chosen positions.

    at: (module path, 'beginning' | 'end') pairs, each meaning every call of that module.
    policy: a function of the program that returns positions in the list of ops (markers not counted) in
        front of which to cut.
    also: module path -> the other paths of the same module object.
    whole: module path -> why the module is kept whole.
    """

    at: tuple[tuple[str, str], ...] = ()
    policy: Callable[[Program], Sequence[int]] | None = None
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    name = "find-splits"

    def run(self, program: Program) -> bool:
        if program.phase != "traced":
            return False
        cuts = self._positions(program)
        ops: list[Op] = []
        asked: dict[Op, str] = {}
        for index, op in enumerate(program.ops):
            may_cut = bool(ops) and not ops[-1].is_split and not op.is_split
            if may_cut and index in cuts:
                marker = _marker(op)
                ops.append(marker)
                asked[marker] = cuts[index]
            ops.append(op)
        _refuse_cuts_through_regions(ops, asked)
        program.ops = ops
        return bool(asked)

    def _positions(self, program: Program) -> dict[int, str]:
        """Position of a cut -> the request for it."""
        names: dict[str, Sequence[str]] = {}
        for name, _ in self.at:
            others = self.also.get(name, ())
            names[name] = (name, *others)
        paths = set(chain.from_iterable(names.values()))
        spans = _call_spans(program.ops, paths)
        cuts = self._chosen(program)
        for name, side in self.at:
            if side not in SIDES:
                raise SplitError(
                    f"'{side}' is no side of module '{name}'",
                    hint=nearest(side, SIDES),
                )
            calls: list[tuple[int, int]] = []
            for alias in names[name]:
                calls += spans.get(alias, ())
            asked = _asked(name, side)
            if not calls:
                self._refuse_inside(names[name], program.ops, asked)
                raise SplitError(
                    f"no op of the program runs in a call of module '{name}'",
                    where=asked,
                    hint=_hint_for(name, program),
                )
            for first, last in calls:
                cut = first if side == BEGINNING else last + 1
                cuts[cut] = asked
        return cuts

    def _refuse_inside(self, names: Sequence[str], ops: list[Op], asked: str) -> None:
        """Raises SplitError when a module, by any of its names, lies inside one that is kept whole."""
        for leaf in dict.fromkeys(map(module_path, ops)):
            if not leaf:
                continue
            inside = f"{leaf}."
            if not any(name.startswith(inside) for name in names):
                continue
            what = f"a split point lies inside module '{leaf}', which is kept whole"
            hint = f"cut at '{leaf}'"
            if leaf in self.whole:
                what += f": {self.whole[leaf]}"
                hint += ", or change that line so that torch.export can trace it"
            raise SplitError(what, where=asked, hint=hint)

    def _chosen(self, program: Program) -> dict[int, str]:
        if self.policy is None:
            return {}
        places: list[int] = []
        for place, op in enumerate(program.ops):
            if not op.is_split:
                places.append(place)
        cuts: dict[int, str] = {}
        chosen: Any = self.policy(program)
        if not isinstance(chosen, Iterable):
            raise SplitError(
                f"the split policy returned {type(chosen).__name__}, and no positions of ops",
                hint="return a list of numbers, such as [4, 9]",
            )
        for cut in chosen:
            if not isinstance(cut, int) or not 0 <= cut <= len(places):
                raise SplitError(
                    f"the split policy chose position {cut!r}",
                    hint=f"positions are numbers from 0 to {len(places)}",
                )
            if cut < len(places):
                cuts[places[cut]] = f"position {cut} of the split policy"
        return cuts


def _asked(name: str, side: str) -> str:
    return f"split point at the {side} of '{name}'"


def _hint_for(name: str, program: Program) -> str:
    """The nearest modules that have ops. A module with state that has none is called in an unusual way."""
    paths: dict[str, None] = {}
    for op in program.ops:
        paths |= dict.fromkeys(_prefixes(op.scope))
        leaf = module_path(op)
        if leaf:
            paths[leaf] = None
    hint = nearest(name, paths)
    inside = f"{name}."
    if any(fqn.startswith(inside) for fqn in program.name_owners()):
        return f"a split point is at a call m(x), or m.forward(x) of a module without hooks; {hint}"
    return hint


_REGIONS = {
    "checkpoint": "a checkpointed region",
    "transform": "a vmap",
}


def _refuse_cuts_through_regions(ops: list[Op], asked: dict[Op, str]) -> None:
    """Returns when no marker stands between two ops of a region that runs as a whole. Raises SplitError
    naming the first that does.
    """
    last: dict[Context, int] = {}
    for index, op in enumerate(ops):
        last |= dict.fromkeys(_regions(op), index)
    begun: dict[Context, None] = {}
    for index, op in enumerate(ops):
        begun |= dict.fromkeys(_regions(op))
        if not op.is_split:
            continue
        for region in begun:
            if index < last[region]:
                raise _cut_through(region, op, asked.get(op))


def _cut_through(region: Context, marker: Op, asked: str | None) -> SplitError:
    where = marker.where()
    if asked:
        where = f"{asked}, {where}"
    return SplitError(
        f"a split point lies inside {_REGIONS[region.kind]}, which runs as a whole",
        where=where,
        hint="move it before or after the region, or make two regions of it",
    )


def _regions(op: Op) -> list[Context]:
    """The regions that run as a whole and that an op is in. A marker is in none."""
    if op.is_split:
        return []
    return [context for context in op.context if context.kind in WHOLE]


def _marker(neighbour: Op) -> Op:
    outside = neighbour.scope[:-1]
    place = Place(outside, loc=neighbour.loc)
    return Op(SPLIT, place=place)


def _prefixes(scope: Scope) -> list[str]:
    names: list[str] = []
    path = ""
    for frame in scope:
        if names:
            path += "."
        path += frame.name
        names.append(path)
    return names


def _matching_calls(scope: Scope, paths: set[str]) -> list[_Call]:
    """The calls of these modules that a scope lies in, outermost first."""
    calls: list[_Call] = []
    for depth, path in enumerate(_prefixes(scope), 1):
        if path in paths:
            calls.append((path, scope[:depth]))
    return calls


def _call_spans(ops: list[Op], paths: set[str]) -> dict[str, list[tuple[int, int]]]:
    """Path of a module -> the first and last op of each of its calls."""
    calls: dict[_Call, tuple[int, int]] = {}
    matches: dict[Scope, list[_Call]] = {}
    for index, op in enumerate(ops):
        if op.scope not in matches:
            matches[op.scope] = _matching_calls(op.scope, paths)
        calls_around = [*matches[op.scope]]
        leaf = module_path(op)
        if leaf in paths:
            frame = Frame(op.target, index)
            scope = (*op.scope, frame)
            calls_around.append((leaf, scope))
        for call in calls_around:
            first, _ = calls.get(call, (index, index))
            calls[call] = (first, index)
    spans: dict[str, list[tuple[int, int]]] = {}
    for (name, _), span in calls.items():
        spans.setdefault(name, []).append(span)
    return spans
