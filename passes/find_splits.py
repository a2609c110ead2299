"""Turns the user's wishes into split markers: module names, or positions a policy chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
        spans = _call_spans(
            ops, {alias for aliases in names.values() for alias in aliases}
        )
        cuts = self._chosen(program)
        for name, side in self.at:
            if side not in (BEGINNING, END):
                raise SplitError(
                    f"'{side}' is no side of module '{name}'",
                    hint=nearest(side, (BEGINNING, END)),
                )
            found = [span for alias in names[name] for span in spans.get(alias, ())]
            if not found:
                self._refuse_inside(names[name], ops, _asked(name, side))
                known = dict.fromkeys(
                    fqn
                    for op in ops
                    for fqn in [*_prefixes(op.scope), *filter(None, [module_path(op)])]
                )
                exists = any(
                    full.startswith(f"{name}.") for full in program.name_owners()
                )
                raise SplitError(
                    f"no op of the program runs in a call of module '{name}'",
                    where=_asked(name, side),
                    hint="a split point is at a call m(x), or m.forward(x) of a module without hooks; "
                    * exists
                    + nearest(name, known),
                )
            cuts |= {
                first if side == BEGINNING else last + 1: _asked(name, side)
                for first, last in found
            }
        return cuts

    def _refuse_inside(self, names: Sequence[str], ops: list[Op], asked: str) -> None:
        """Raises SplitError when a module, by any of its names, lies inside one that is kept whole."""
        around = (
            leaf
            for leaf in dict.fromkeys(map(module_path, ops))
            if leaf and any(name.startswith(f"{leaf}.") for name in names)
        )
        for leaf in around:
            raise SplitError(
                f"a split point lies inside module '{leaf}', which is kept whole"
                + (f": {self.whole[leaf]}" if leaf in self.whole else ""),
                where=asked,
                hint=f"cut at '{leaf}'"
                + ", or change that line so that torch.export can trace it"
                * (leaf in self.whole),
            )

    def _chosen(self, program: Program) -> dict[int, str]:
        if self.policy is None:
            return {}
        real = [i for i, op in enumerate(program.ops) if not op.is_split]
        chosen = list(self.policy(program))
        for cut in chosen:
            if not isinstance(cut, int) or not 0 <= cut <= len(real):
                raise SplitError(
                    f"the split policy chose position {cut!r}",
                    hint=f"positions are numbers from 0 to {len(real)}",
                )
        return {
            real[c]: f"position {c} of the split policy"
            for c in chosen
            if c < len(real)
        }


def _asked(name: str, side: str) -> str:
    return f"split point at the {side} of '{name}'"


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


def _call_spans(ops: list[Op], wanted: set[str]) -> dict[str, list[tuple[int, int]]]:
    """Wanted module -> the first and last op of each of its calls."""
    calls: dict[_Call, tuple[int, int]] = {}
    matches: dict[Scope, list[_Call]] = {}
    for index, op in enumerate(ops):
        if op.scope not in matches:
            matches[op.scope] = [
                (n, op.scope[: i + 1])
                for i, n in enumerate(_prefixes(op.scope))
                if n in wanted
            ]
        leaf = (
            [(module_path(op), (*op.scope, Frame(op.target, index)))]
            if module_path(op) in wanted
            else []
        )
        for call in matches[op.scope] + leaf:
            calls[call] = (calls[call][0] if call in calls else index, index)
    spans: dict[str, list[tuple[int, int]]] = {}
    for (name, _), span in calls.items():
        spans.setdefault(name, []).append(span)
    return spans
