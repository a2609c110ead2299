"""What the ops of a line keep in memory for a backward by graphs: what the roles of its blocks save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stagecut.backend.costs.measured import Trial, signature
from stagecut.backend.costs.setting import Setting
from stagecut.backend.stages.memory import REFUSALS, TracedStage, traced_stage
from stagecut.ir.graph import Op, Stage, Value
from stagecut.ir.roles import NOTHING, Budget, Roles, Saved


@dataclass(frozen=True)
class Held:
    """What is in memory for each micro-batch, where nothing is computed again that need not be, and where all
    is that may be.
    """

    most: Saved = NOTHING
    least: Saved = NOTHING

    def __add__(self, other: Held) -> Held:
        return Held(self.most + other.most, self.least + other.least)

    def __sub__(self, other: Held) -> Held:
        return Held(self.most - other.most, self.least - other.least)

    def or_longer(self, other: Held) -> Held:
        """One value, as two readers hold it: as long as the one that holds it longer."""
        return Held(self.most.or_longer(other.most), self.least.or_longer(other.least))

    @property
    def of_first(self) -> Held:
        """What a stage without gradients of inputs holds: all of it is for the weights."""
        most, least = self.most.forward, self.least.forward
        return Held(Saved(weights=most), Saved(weights=least))


NONE = Held()

Holdings = list[list[tuple[object, Held]]]
"""For each op, what it holds: the holder, and how much. A holder counts once in a stage."""


@dataclass(frozen=True)
class _Block:
    """What a block holds: each input and output by its place, the gradients that arrive, and the rest."""

    inputs: tuple[Saved, ...]
    outputs: tuple[Saved, ...]
    arriving: Saved
    rest: Saved

    @staticmethod
    def of(roles: Roles) -> _Block:
        """That of the roles of a block."""
        joint = roles.joint
        storages = joint.storages()
        kinds = roles.lying
        primals = [p for i, p in enumerate(joint.primals) if i not in joint.weights]
        results = joint.block.outputs[: joint.results]
        inputs = tuple(_taken(kinds, storages.root(value)) for value in primals)
        outputs = tuple(_taken(kinds, storages.root(value)) for value in results)
        arriving = sum(
            (_taken(kinds, storages.root(value)) for value in joint.cotangents),
            NOTHING,
        )
        return _Block(inputs, outputs, arriving, Saved.of(kinds))


def _taken(kinds: dict[Value, str], root: Value | None) -> Saved:
    """What a value holds; `kinds` no longer has it."""
    kind = kinds.pop(root, None) if root is not None else None
    return NOTHING if root is None or kind is None else Saved.of({root: kind})


def held_by_graphs(
    ops: Sequence[Op],
    spans: Sequence[tuple[int, int]],
    shares: Sequence[int],
    trial: Trial,
    setting: Setting,
    sizes: Mapping[str, int],
) -> Holdings | None:
    """What the ops hold, when each span of them is a stage. Equal spans are traced once. What lies within a
    span is divided by the `shares` of its ops. None where autograd runs a span.
    """
    staged = trial.cut([begin for begin, _ in spans[1:]])
    known: dict[str, tuple[_Block, _Block]] = {}
    holdings: Holdings = [[] for _ in ops]
    owners: dict[object, Held] = {}
    for index, (begin, end) in enumerate(spans):
        stage = staged.program.stages[index]
        key = signature(ops[begin:end]) + _edges_of(stage)
        if key not in known:
            try:
                traced = traced_stage(staged, index, sizes)
                known[key] = _ways(traced, setting)
            except REFUSALS:
                return None
        most, least = known[key]
        for at, value, held in _at_edges(stage, begin, end, most, least):
            if held != NONE:
                owners[value] = owners.get(value, NONE).or_longer(held)
                holdings[at].append((value, held))
        arriving = Held(most.arriving, least.arriving)
        holdings[end - 1].append((stage, arriving))
        owners[stage] = arriving
        inner = Held(most.rest, least.rest)
        for at, part in enumerate(_divided(inner, shares[begin:end]), begin):
            owners[at] = part
            holdings[at].append((at, part))
    return [[(holder, owners[holder]) for holder, _ in own] for own in holdings]


def _edges_of(stage: Stage) -> str:
    """A text that is equal for stages of equal ops whose inputs and outputs stand at the same places."""
    inputs = set(stage.inputs)
    reads: dict[Value, tuple[int, int]] = {}
    made: dict[Value, tuple[int, int]] = {}
    for number, op in enumerate(stage.ops):
        for place, value in enumerate(op.operands):
            if value in inputs:
                reads.setdefault(value, (number, place))
        made |= {value: (number, value.index) for value in op.results}
    given = [(reads.get(value), value.owner is None) for value in stage.inputs]
    return f"{given} {[made.get(value) for value in stage.outputs]}"


def _ways(traced: TracedStage, setting: Setting) -> tuple[_Block, _Block]:
    """A block as most of it is held, and as the least of it is, in a setting."""
    most, _ = traced.roles(setting.recompute)
    if setting.activation_budget is None:
        return (_Block.of(most),) * 2
    least, _ = traced.roles(Budget(0.0))
    return _Block.of(most), _Block.of(least)


def _at_edges(
    stage: Stage, begin: int, end: int, most: _Block, least: _Block
) -> Iterator[tuple[int, Value, Held]]:
    """The position of an op, and the value that it holds, which the op at another edge may hold too."""
    for value, of_most, of_least in zip(
        stage.inputs, most.inputs, least.inputs, strict=True
    ):
        yield begin, value, Held(of_most, of_least)
    # inputs that are handed on do not follow the outputs here
    for value, of_most, of_least in zip(
        stage.outputs, most.outputs, least.outputs, strict=False
    ):
        yield end - 1, value, Held(of_most, of_least)


def _divided(held: Held, shares: Sequence[int]) -> Iterator[Held]:
    """What is held, in the proportion of some shares."""
    whole = sum(shares)
    parts = list(shares) if whole else [1] * len(shares)
    whole = whole or len(parts)
    done = 0
    before = NONE
    for part in parts:
        done += part
        until = Held(held.most.part(done, whole), held.least.part(done, whole))
        yield until - before
        before = until
