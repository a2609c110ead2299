"""Turns the user's wishes into split markers: module names, or positions a policy chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from stagecut.ir.errors import SplitError, nearest
from stagecut.ir.graph import SPLIT, WHOLE, Context, Frame, Op, Place, Program, Scope
from stagecut.ir.ops import module_path

BEGINNING, END = "beginning", "end"
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
        for index in range(len(program.ops) + 1):
            between = 0 < index < len(program.ops) and SPLIT not in (
                program.ops[index - 1].target,
                program.ops[index].target,
            )
            if index in cuts and between:
                ops.append(_marker(program.ops[index]))
                asked[ops[-1]] = cuts[index]
            ops += program.ops[index : index + 1]
        _refuse_cuts_through_regions(ops, asked)
        program.ops = ops
        return bool(asked)

    def _positions(self, program: Program) -> dict[int, str]:
        """Position of a cut -> the request for it."""
        ops = program.ops
        names = {name: (name, *self.also.get(name, ())) for name, _ in self.at}
        spans = _call_spans(ops, set(chain.from_iterable(names.values())))
        cuts = self._chosen(program)
        for name, side in self.at:
            if side not in (BEGINNING, END):
                raise SplitError(
                    f"'{side}' is no side of module '{name}'",
                    hint=nearest(side, (BEGINNING, END)),
                )
            calls = [span for alias in names[name] for span in spans.get(alias, ())]
            if not calls:
                self._refuse_inside(names[name], ops, _asked(name, side))
                raise SplitError(
                    f"no op of the program runs in a call of module '{name}'",
                    where=_asked(name, side),
                    hint=_hint_for(name, program),
                )
            cuts |= {
                first if side == BEGINNING else last + 1: _asked(name, side)
                for first, last in calls
            }
        return cuts

    def _refuse_inside(self, names: Sequence[str], ops: list[Op], asked: str) -> None:
        """Raises SplitError when a module, by any of its names, lies inside one that is kept whole."""
        for leaf in filter(None, dict.fromkeys(map(module_path, ops))):
            if not any(name.startswith(f"{leaf}.") for name in names):
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
        places = [place for place, op in enumerate(program.ops) if not op.is_split]
        cuts: dict[int, str] = {}
        for cut in self.policy(program):
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
        if module_path(op):
            paths[module_path(op)] = None
    hint = nearest(name, paths)
    if any(fqn.startswith(f"{name}.") for fqn in program.name_owners()):
        return f"a split point is at a call m(x), or m.forward(x) of a module without hooks; {hint}"
    return hint


_REGIONS = {"checkpoint": "a checkpointed region", "transform": "a vmap"}


def _refuse_cuts_through_regions(ops: list[Op], asked: dict[Op, str]) -> None:
    """Returns when no marker stands between two ops of a region that runs as a whole. Raises SplitError
    naming the first that does.
    """
    last = {region: index for index, op in enumerate(ops) for region in _regions(op)}
    begun: dict[Context, None] = {}
    for index, op in enumerate(ops):
        begun |= dict.fromkeys(_regions(op))
        cut = next(
            (region for region in begun if op.is_split and index < last[region]), None
        )
        if cut is not None:
            raise SplitError(
                f"a split point lies inside {_REGIONS[cut.kind]}, which runs as a whole",
                where=", ".join(filter(None, [asked.get(op), op.where()])),
                hint="move it before or after the region, or make two regions of it",
            )


def _regions(op: Op) -> list[Context]:
    return [
        context for context in op.context if context.kind in WHOLE and not op.is_split
    ]


def _marker(neighbour: Op) -> Op:
    place = Place(neighbour.scope[:-1], loc=neighbour.loc)
    return Op(SPLIT, place=place)


def _prefixes(scope: Scope) -> list[str]:
    names: list[str] = []
    for frame in scope:
        names.append(f"{names[-1]}.{frame.name}" if names else frame.name)
    return names


def _call_spans(ops: list[Op], paths: set[str]) -> dict[str, list[tuple[int, int]]]:
    """Path of a module -> the first and last op of each of its calls."""
    calls: dict[_Call, tuple[int, int]] = {}
    matches: dict[Scope, list[_Call]] = {}
    for index, op in enumerate(ops):
        if op.scope not in matches:
            matches[op.scope] = [
                (path, op.scope[:depth])
                for depth, path in enumerate(_prefixes(op.scope), 1)
                if path in paths
            ]
        calls_around = [*matches[op.scope]]
        if module_path(op) in paths:
            frame = Frame(op.target, index)
            calls_around.append((module_path(op), (*op.scope, frame)))
        for call in calls_around:
            first, _ = calls.get(call, (index, index))
            calls[call] = (first, index)
    spans: dict[str, list[tuple[int, int]]] = {}
    for (name, _), span in calls.items():
        spans.setdefault(name, []).append(span)
    return spans
