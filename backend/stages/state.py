"""The tensors that stages hold, by the model's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from stagecut.backend.stages.modules import Stage, find, stored
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Program, StateEntry
from stagecut.ir.run.bindings import EXTRA


def held_tensors(
    program: Program, stages: Iterable[Stage], entry: StateEntry
) -> Iterator[torch.Tensor]:
    """Every distinct tensor that `stages` hold for `entry`: the one they share, or replicas that became
    separate tensors.
    """
    yielded: set[int] = set()
    for stage in stages:
        for name in program.stages[stage.index].state.get(entry, ()):
            tensor = find(stage, name)
            if tensor is None:
                raise StagecutError(
                    f"stage {stage.index} does not hold '{name}' any more",
                    hint="leave the names of a stage's state as they are",
                )
            if id(tensor) not in yielded:
                yielded.add(id(tensor))
                yield tensor


def refuse_meta(program: Program, stage: Stage) -> None:
    """Returns when `stage` is real; raises StagecutError naming what is on meta."""
    for entry in entries(program, [stage.index]):
        if next(held_tensors(program, [stage], entry)).is_meta:
            raise StagecutError(
                f"stage {stage.index} is on the meta device: '{entry.name}' has no values",
                hint=(
                    f"pipe.materialize({stage.index}, ...), or pipe.initialize({stage.index}) for new "
                    "values; of a saved pipe, load that stage as well"
                ),
            )


def persistent(entry: StateEntry) -> list[str]:
    """The names of an entry that are in the model's state dict, in its order."""
    return (
        []
        if entry.kind == "const"
        else [stored(name) for name in entry.names if name not in entry.transient]
    )


def lost_hint(name: str, hint: str) -> str:
    """A hint for a name that is in a stage's state dict and not in the program."""
    return (
        "extra state is no tensor: torch.save pipe.state_dict() instead"
        if name.rpartition(".")[2] == EXTRA
        else hint
    )


def entries(program: Program, indices: Iterable[int]) -> list[StateEntry]:
    """The state that those stages hold, each entry once, in the model's order."""
    stages = set(indices)
    return [entry for entry in program.state if not stages.isdisjoint(entry.stages)]
