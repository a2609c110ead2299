"""The tensors of the model that a process saves."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.distributed.tensor import DTensor

from stagecut.backend.files.together import CheckpointError
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import (
    held_tensors,
    lost_hint,
    persistent,
    refuse_meta,
)
from stagecut.ir.graph import StateEntry


def saved_state(
    pipe: Staged, indices: Collection[int]
) -> dict[StateEntry, torch.Tensor]:
    """The persistent entries that the process with these stages saves, with their tensors: the process of the
    first stage that holds an entry saves it.

    Raises CheckpointError for what would be lost, and for what is sharded. Raises StagecutError for a stage
    on meta.
    """
    for index in indices:
        refuse_meta(pipe.program, pipe.stages[index])
    _refuse_unknown(pipe, indices)
    state: dict[StateEntry, torch.Tensor] = {}
    for entry in pipe.program.state:
        if not persistent(entry) or not entry.stages:
            continue
        first = entry.stages[0]
        if first in indices:
            tensors = held_tensors(pipe.program, [pipe.stages[first]], entry)
            state[entry] = next(tensors).detach()
    for entry, tensor in state.items():
        if isinstance(tensor, DTensor):
            raise CheckpointError(
                f"'{persistent(entry)[0]}' is sharded over ranks of other pipelines, which this one does not "
                "know",
                hint=(
                    "save pipe.stages[i].state_dict() by torch.distributed.checkpoint.save on every rank: "
                    "its names are the model's"
                ),
            )
    return state


def _refuse_unknown(pipe: Staged, indices: Collection[int]) -> None:
    """Raises CheckpointError for a tensor of these stages that the program does not know."""
    traced = {name for entry in pipe.program.state for name in persistent(entry)}
    for index in indices:
        for name in pipe.stages[index].state_dict():
            if name not in traced:
                raise CheckpointError(
                    f"'{name}' is no tensor of the traced model, it would be lost",
                    hint=lost_hint(name, "register it before the model is cut"),
                )
