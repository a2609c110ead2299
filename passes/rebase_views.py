"""Values that share storage and are written in a stage share storage there too: the stage takes the views
itself instead of receiving them. So it does with a view around which it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
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


class _Stages:
    """The stages that define values, and the values that these are views of."""

    def __init__(self, program: Program) -> None:
        self._home: dict[Value, int] = {
            v: stage.index
            for stage in program.stages
            for op in stage.ops
            for v in op.definitions()
        }
        self._stage_of: dict[Op, int] = {
            op: stage.index for stage in program.stages for op in stage.ops
        }
        self._first = first_versions(program.all_ops())
        self._ops = program.all_ops

    def rebase(self, stage: Stage) -> bool:
        """No two values of one storage both cross into `stage` and are written there. True when that took a
        change.
        """
        twins: dict[tuple[Op, Value], Op] = {}
        changed = False
        for op in list(stage.ops):
            if op.effects.writes:
                for root, crossing in self._crossing(op, stage.index).items():
                    changed |= self._derive(root, crossing, op, stage, twins)
        stage.ops[:0] = twins.values()
        return changed

    def _crossing(self, op: Op, here: int) -> dict[Value, list[Value]]:
        """Storage root -> the values from other stages in that storage which `op` writes, renews or also
        reads. Only storage that `op` writes or renews, and in which these values must become one: they are
        two or more, or the root is an input or state.
        """
        written = [*op.effects.writes, *op.versions]
        found: dict[Value, list[Value]] = {}
        for value in self._received(written, here):
            found.setdefault(self._steps(value)[0], []).append(value)
        # inputs and state need not cross
        whole = {
            root
            for value in written
            if not isinstance((root := self._steps(value)[0]).owner, Op)
        }
        for value in self._received(op.operands, here):
            root = self._steps(value)[0]
            if root in whole:
                found.setdefault(root, [])
            beside = found.get(root, [value])
            if value not in beside:
                beside.append(value)
        return {
            root: values
            for root, values in found.items()
            if len(values) > 1 or not isinstance(root.owner, Op)
        }

    def _received(self, values: list[Value], here: int) -> list[Value]:
        """The values from other stages that `values` are, or are views of, each once."""
        entries = dict.fromkeys(self._entry(value, here) for value in values)
        return [value for value in entries if self._home.get(value, here) != here]

    def _entry(self, value: Value, here: int) -> Value:
        """The value that `value` was made a view of in stage `here`. The result of a write made there is not
        followed further, because that write saw to the rest.
        """
        while (
            self._home.get(value) == here
            and (base := viewed_value(value)) is not None
            and not _is_of_write(value)
        ):
            value = base
        return value

    def _member(self, value: Value) -> Value:
        """The value that `value` was a version of before this pass; `value` itself if it is none."""
        return self._first.get(value, value)

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
        self,
        root: Value,
        crossing: list[Value],
        op: Op,
        stage: Stage,
        twins: dict[tuple[Op, Value], Op],
    ) -> bool:
        base = self._base(root, crossing, op)
        if base is None:  # then only values that are read need to see the write
            crossing = [
                v
                for v in crossing
                if v in op.operands or v not in op.versions or op.versions[v].uses
            ]
            base = self._base(root, crossing, op)
        if base is None and self._shows(op, root):
            raise SplitError(
                f"stage {stage.index} writes one of several views of a tensor that earlier stages made, and "
                "does not have that tensor",
                where=op.where(),
                hint="cut so that the views and the write lie in one stage, or clone what is written",
            )
        if base is None:
            return False
        self._retake(base, crossing, stage, twins)
        return crossing != [base]

    def surround(self, stage: Stage) -> bool:
        """Every tensor around which as_strided reads is whole in `stage`. True when that took a change."""
        twins: dict[tuple[Op, Value], Op] = {}
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
                self._retake(root, [value], stage, twins)
                changed = True
        stage.ops[:0] = twins.values()
        return changed

    @cached_property
    def _written(self) -> set[Value]:
        """The roots of all storages that are written."""
        return Aliases(self._ops()).written

    def _retake(
        self,
        base: Value,
        crossing: list[Value],
        stage: Stage,
        twins: dict[tuple[Op, Value], Op],
    ) -> None:
        """The stage takes the views `crossing` of `base` itself."""
        known = len(self._steps(base)[1])
        for value in crossing:
            if value is base:
                continue
            derived, steps = base, self._steps(value)[1]
            # an operand that only lends its shape may be one of the views on the way
            anew: dict[Value, Value] = {}
            for view, index in reversed(steps[: len(steps) - known]):
                derived = self._twin(
                    view, index, derived, base, stage.index, twins, anew
                ).results[index]
                anew[view.results[index]] = derived
            value.replace_uses(
                derived, lambda user: self._stage_of.get(user) == stage.index
            )

    def _shows(self, op: Op, root: Value) -> bool:
        """True when what `op` writes is read later through another value in the storage of `root`."""
        return any(
            new.uses and old not in op.effects.writes and self._steps(old)[0] is root
            for old, new in op.versions.items()
        )

    def _base(self, root: Value, crossing: list[Value], op: Op) -> Value | None:
        """The value at hand that all of `crossing` are, or are views of, without loss of a gradient; the root
        where it is at hand.
        """
        paths = {value: self._steps(value)[1] for value in crossing}
        found: list[tuple[int, bool, Value]] = []
        for value in dict.fromkeys([*op.reads, *crossing]):
            origin, steps = self._steps(value)
            leads = all(
                path[len(path) - len(steps) :] == steps for path in paths.values()
            )
            if (
                origin is root
                and leads
                and not any(
                    _loses(view, path[: len(path) - len(steps)])
                    for view, path in paths.items()
                )
            ):
                found.append((len(steps), self._member(value) is not root, value))
        return min(found, key=lambda item: item[:2])[2] if found else None

    def _twin(
        self,
        view: Op,
        index: int,
        base: Value,
        whole: Value,
        here: int,
        twins: dict[tuple[Op, Value], Op],
        anew: dict[Value, Value],
    ) -> Op:
        """The view op on `base`, which is `whole` or a view of it, in stage `here`. `anew` maps values to the
        views of `whole` that stand for them already.
        """
        if view.has_effect:
            raise SplitError(
                f"stage {here} writes the result of {view.target}, which may or may not be the tensor it "
                "was given",
                where=view.where(),
                hint="cut so that this op and the write lie in one stage, or clone its result",
            )
        if (view, base) not in twins:
            viewed = view.effects.viewed_by(index)
            # an operand that only lends its shape may be the whole itself
            steps = self._steps(whole)
            now = {
                operand: whole
                for operand in view.operands
                if self._steps(operand) == steps
            }
            now |= {
                operand: anew[member]
                for operand in view.operands
                if (member := self._member(operand)) in anew
            }
            if viewed is not None:
                now[viewed] = base
            twin = twins[view, base] = view.copy(now)
            self._stage_of[twin] = here
            self._home.update(dict.fromkeys(twin.results, here))
        return twins[view, base]


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
                for v in op.definitions()
                for user in v.uses
            ):
                idle.add(op)
        if len(idle) < len(stage.ops):
            dead |= idle
    program.remove_ops(dead)
