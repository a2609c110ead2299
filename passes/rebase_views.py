"""Values that share storage and are written in a stage share storage there too: the stage takes the views
itself instead of receiving them. So it does with a view around which it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from stagecut.ir.aliases import Aliases, first_versions, is_what_it_wrote, viewed_value
from stagecut.ir.errors import SplitError
from stagecut.ir.graph import Op, Program, Stage, Value
from stagecut.ir.ops import facts
from stagecut.ir.types import carries_grad


@dataclass(frozen=True)
class RebaseViews:
    """A stage that writes a value receives its storage once.

    Two values that share storage arrive in another process as two tensors, and a write to one would not show
    in the other. So the stage receives only the value they are views of, and takes the views itself. It does
    so too for a view around which as_strided reads: a view arrives without the rest of its storage.
    """

    name = "rebase-views"

    def run(self, program: Program) -> bool:
        if program.phase != "partitioned" or any(
            stage.state for stage in program.stages
        ):
            return False
        stages = _Stages(program)
        changed = False
        for stage in program.stages:
            changed |= stages.rebase(stage)
            changed |= stages.surround(stage)
        if changed:
            _remove_dead_views(program)
        return changed


@dataclass
class _Taken:
    """The views that a stage takes itself: the op of another stage, and what it views here -> its twin."""

    stage: int
    twins: dict[tuple[Op, Value], Op] = field(default_factory=dict)


class _Stages:
    """The stages that define values, and the values that these are views of."""

    def __init__(self, program: Program) -> None:
        self._home: dict[Value, int] = {}
        self._stage_of: dict[Op, int] = {}
        for stage in program.stages:
            for op in stage.ops:
                self._home.update(dict.fromkeys(op.definitions(), stage.index))
                self._stage_of[op] = stage.index
        self._first = first_versions(program.all_ops())
        self._ops = program.all_ops

    def rebase(self, stage: Stage) -> bool:
        """No two values of one storage both cross into `stage` and are written there. True when that took a
        change.
        """
        taken = _Taken(stage.index)
        changed = False
        for op in list(stage.ops):
            if op.effects.writes:
                for root, crossing in self._crossing(op, stage.index).items():
                    changed |= self._derive(root, crossing, op, taken)
        stage.ops[:0] = taken.twins.values()
        return changed

    def _crossing(self, op: Op, stage: int) -> dict[Value, list[Value]]:
        """Storage root -> the values from other stages in that storage which `op` writes, renews or also
        reads. Only storage that `op` writes or renews, and in which these values must become one: they are
        two or more, or the root is an input or state.
        """
        written = [*op.effects.writes, *op.versions]
        crossing: dict[Value, list[Value]] = {}
        for value in self._received(written, stage):
            crossing.setdefault(self._root(value), []).append(value)
        # inputs and state need not cross
        uncrossed = {
            root for root in map(self._root, written) if not _is_computed(root)
        }
        for value in self._received(op.operands, stage):
            root = self._root(value)
            if root not in crossing and root not in uncrossed:
                continue
            members = crossing.setdefault(root, [])
            if value not in members:
                members.append(value)
        return {
            root: values
            for root, values in crossing.items()
            if len(values) > 1 or not _is_computed(root)
        }

    def _received(self, values: list[Value], stage: int) -> list[Value]:
        """The values from other stages that `values` are, or are views of, each once."""
        entries = dict.fromkeys(self._entry(value, stage) for value in values)
        return [value for value in entries if self._home.get(value, stage) != stage]

    def _entry(self, value: Value, stage: int) -> Value:
        """The value that `value` was made a view of in `stage`. The result of a write made there is not
        followed further, because that write saw to the rest.
        """
        while self._home.get(value) == stage and not _is_of_write(value):
            base = viewed_value(value)
            if base is None:
                break
            value = base
        return value

    def _member(self, value: Value) -> Value:
        """The value that `value` was a version of before this pass; `value` itself if it is none."""
        return self._first.get(value, value)

    def _root(self, value: Value) -> Value:
        """The first value in the storage of `value`."""
        root, _ = self._steps(value)
        return root

    def _path(self, value: Value) -> list[tuple[Op, int]]:
        """The view ops that lead from the root of a value's storage to the value, last first."""
        _, steps = self._steps(value)
        return steps

    def _steps(self, value: Value) -> tuple[Value, list[tuple[Op, int]]]:
        """The root of a value's storage, and the view ops that lead from it to the value, last first."""
        steps: list[tuple[Op, int]] = []
        member = self._member(value)
        while (base := viewed_value(member)) is not None:
            if isinstance(member.owner, Op) and not is_what_it_wrote(member):
                steps.append((member.owner, member.index))
            member = self._member(base)
        return member, steps

    def _derive(
        self, root: Value, crossing: list[Value], op: Op, taken: _Taken
    ) -> bool:
        base = self._base(root, crossing, op)
        if base is None:  # then only values that are read need to see the write
            crossing = [value for value in crossing if _sees_write(value, op)]
            base = self._base(root, crossing, op)
        if base is None and self._shows(op, root):
            raise SplitError(
                f"stage {taken.stage} writes one of several views of a tensor that earlier stages made, and "
                "does not have that tensor",
                where=op.where(),
                hint="cut so that the views and the write lie in one stage, or clone what is written",
            )
        if base is None:
            return False
        self._retake(base, crossing, taken)
        return crossing != [base]

    def surround(self, stage: Stage) -> bool:
        """Every tensor around which as_strided reads is whole in `stage`. True when that took a change."""
        taken = _Taken(stage.index)
        changed = False
        for op in [op for op in stage.ops if facts(op).reads_around]:
            for value in self._received([op.operands[0]], stage.index):
                root, steps = self._steps(value)
                if not steps:  # the whole tensor crosses, not a part of it
                    continue
                if root in self._written or _loses(value, steps):
                    raise SplitError(
                        f"stage {stage.index} has a part of a tensor that is written, and {op.target} may "
                        "read the rest of it",
                        where=op.where(),
                        hint=(
                            "cut so that this op lies in the stage that makes the tensor, or index the "
                            "tensor instead"
                        ),
                    )
                self._retake(root, [value], taken)
                changed = True
        stage.ops[:0] = taken.twins.values()
        return changed

    @cached_property
    def _written(self) -> set[Value]:
        """The roots of all storages that are written."""
        return Aliases(self._ops()).written

    def _retake(self, base: Value, crossing: list[Value], taken: _Taken) -> None:
        """The stage takes the views `crossing` of `base` itself."""
        depth = len(self._path(base))
        for value in crossing:
            if value is base:
                continue
            derived, steps = base, self._path(value)
            # an operand that only lends its shape may be the base, or one of the views on the way
            retaken: dict[Value, Value] = {}
            for view, index in reversed(steps[: len(steps) - depth]):
                twin = taken.twins.get((view, derived))
                if twin is None:
                    swap = self._lenders(view, base, retaken)
                    viewed = view.effects.viewed_by(index)
                    if viewed is not None:
                        swap[viewed] = derived
                    twin = self._twin(view, swap, taken.stage)
                    taken.twins[view, derived] = twin
                derived = retaken[view.results[index]] = twin.results[index]
            value.replace_uses(
                derived, lambda user: self._stage_of.get(user) == taken.stage
            )

    def _shows(self, op: Op, root: Value) -> bool:
        """True when what `op` writes is read later through another value in the storage of `root`."""
        return any(
            new.uses and old not in op.effects.writes and self._root(old) is root
            for old, new in op.versions.items()
        )

    def _base(self, root: Value, crossing: list[Value], op: Op) -> Value | None:
        """The value at hand that all of `crossing` are, or are views of, without loss of a gradient; the root
        where it is at hand.
        """
        paths = {value: self._path(value) for value in crossing}
        at_hand = dict.fromkeys([*op.reads, *crossing])
        bases = [value for value in at_hand if self._is_base(value, root, paths)]
        return min(bases, key=self._distance, default=None)

    def _is_base(
        self, base: Value, root: Value, paths: dict[Value, list[tuple[Op, int]]]
    ) -> bool:
        """True when all views with these paths can be taken of `base`."""
        origin, steps = self._steps(base)
        if origin is not root:
            return False
        for view, path in paths.items():
            rest = len(path) - len(steps)
            if path[rest:] != steps or _loses(view, path[:rest]):
                return False
        return True

    def _distance(self, value: Value) -> tuple[int, bool]:
        """The number of views between the root of the storage and a value, then whether they differ."""
        root, steps = self._steps(value)
        return len(steps), self._member(value) is not root

    def _lenders(
        self, view: Op, base: Value, retaken: dict[Value, Value]
    ) -> dict[Value, Value]:
        """Operand of a view op -> the value that stands for it: `base`, or a view of it that is retaken."""
        steps = self._steps(base)
        swap: dict[Value, Value] = {}
        for operand in view.operands:
            member = self._member(operand)
            if member in retaken:
                swap[operand] = retaken[member]
            elif self._steps(operand) == steps:
                swap[operand] = base
        return swap

    def _twin(self, view: Op, swap: dict[Value, Value], stage: int) -> Op:
        """A copy of a view op in `stage`, with other operands as in `swap`."""
        if view.has_effect:
            raise SplitError(
                f"stage {stage} writes the result of {view.target}, which may or may not be the tensor it "
                "was given",
                where=view.where(),
                hint="cut so that this op and the write lie in one stage, or clone its result",
            )
        twin = view.copy(swap)
        self._stage_of[twin] = stage
        self._home.update(dict.fromkeys(twin.results, stage))
        return twin


def _is_computed(value: Value) -> bool:
    """True for a value that an op defines, False for inputs and state."""
    return isinstance(value.owner, Op)


def _sees_write(value: Value, op: Op) -> bool:
    """True when `op` names the value, or something reads it after `op` wrote its storage."""
    if value in op.operands or value not in op.versions:
        return True
    return bool(op.versions[value].uses)


def _is_of_write(value: Value) -> bool:
    """True for a view of what its op writes."""
    return (
        isinstance(value.owner, Op)
        and value.owner.effects.viewed_by(value.index) in value.owner.effects.writes
    )


def _loses(value: Value, steps: list[tuple[Op, int]]) -> bool:
    """True when `value` carries gradient, but would not if it were taken anew by `steps`. That happens to a
    value that was written into a detached tensor.
    """
    return carries_grad(value.type) and any(facts(op).cuts_gradient for op, _ in steps)


def _remove_dead_views(program: Program) -> None:
    """Views that nothing reads any more are gone, but no stage is left empty."""
    dead: set[Op] = set()
    for stage in reversed(program.stages):
        idle: set[Op] = set()
        for op in reversed(stage.ops):
            if not op.has_effect and all(
                user in dead or user in idle
                for value in op.definitions()
                for user in value.uses
            ):
                idle.add(op)
        if len(idle) < len(stage.ops):
            dead |= idle
    program.remove_ops(dead)
