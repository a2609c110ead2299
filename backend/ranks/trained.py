"""Which parameters are trained may change after the cut, as when layers are unfrozen one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from stagecut.backend.stages.modules import find
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import StagecutError
from stagecut.ir.gradients import infer_gradients
from stagecut.ir.types import TensorType


def changed_here(pipe: Staged, stages: tuple[int, ...]) -> bool:
    """True when a parameter of these stages is trained and was not when the program was told, or the other
    way round.
    """
    flags = flags_here(pipe, stages)
    return any(
        pipe.program.state[place].requires_grad != flag for place, flag in flags.items()
    )


def flags_here(pipe: Staged, stages: tuple[int, ...]) -> dict[int, bool]:
    """Place in the program's state -> whether it is trained, for the parameters of these stages."""
    flags = {}
    for place, entry in enumerate(pipe.program.state):
        held = [index for index in entry.stages if index in stages]
        if entry.kind != "param" or not held:
            continue
        name = pipe.program.stages[held[0]].state[entry][0]
        tensor = find(pipe.stages[held[0]], name)
        if tensor is not None:
            flags[place] = tensor.requires_grad
    return flags


def follow(
    pipe: Staged, modules: Mapping[int, Module], group: dist.ProcessGroup | None
) -> None:
    """The program of every rank says which parameters are trained now, and which values carry gradient
    therefore. `modules` are what runs the stages of this rank.

    Raises StagecutError on every rank where those that hold one parameter differ, or where a wrapper has
    noted once and for all which parameters are trained.
    """
    mine = flags_here(pipe, tuple(modules)), _packed(modules)
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, mine, group)
    for rank, (_, packed) in enumerate(everywhere):
        for index in packed:
            raise StagecutError(
                f"requires_grad of parameters has changed, and DistributedDataParallel averages those that "
                f"were trained when stage {index} was wrapped",
                where=f"rank {rank}, stage {index}",
                hint="set requires_grad before the driver is made, or make a pipe and a driver anew",
            )
    known = _agreed(pipe, [flags for flags, _ in everywhere])
    for place, flag in known.items():
        _tell(pipe, place, flag)
    infer_gradients(pipe.program.all_ops())


def _agreed(pipe: Staged, everywhere: Sequence[dict[int, bool]]) -> dict[int, bool]:
    """Place in the program's state -> whether it is trained."""
    known: dict[int, tuple[bool, int]] = {}
    for rank, flags in enumerate(everywhere):
        for place, flag in flags.items():
            before, other = known.setdefault(place, (flag, rank))
            if before != flag:
                raise StagecutError(
                    f"'{pipe.program.state[place].name}' is "
                    f"{'trained' if flag else 'frozen'} on rank {rank}, and not so on rank {other}",
                    where="a parameter that several stages hold",
                    hint="call requires_grad_ on every rank",
                )
    return {place: flag for place, (flag, _) in known.items()}


def _packed(modules: Mapping[int, Module]) -> list[int]:
    """The stages in which DistributedDataParallel is."""
    return [
        index
        for index, module in modules.items()
        if any(isinstance(part, DistributedDataParallel) for part in module.modules())
    ]


def _tell(pipe: Staged, place: int, flag: bool) -> None:
    entry = pipe.program.state[place]
    kind = entry.type
    if isinstance(kind, TensorType) and kind.grad != flag:
        entry.type = entry.value.type = replace(kind, grad=flag)
