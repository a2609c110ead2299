"""Which parameters are trained may change after the cut, as when layers are unfrozen one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stagecut.backend.stages.modules import find
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.gradients import infer_gradients
from stagecut.ir.types import TensorType


def changed_here(pipe: Staged, stages: tuple[int, ...]) -> bool:
    """True when a parameter of these stages is trained and was not when the program was told, or the other
    way round.
    """
    flags = flags_here(pipe, stages)
    return any(
        pipe.program.state[position].requires_grad != flag
        for position, flag in flags.items()
    )


def flags_here(pipe: Staged, stages: tuple[int, ...]) -> dict[int, bool]:
    """Position in the program's state -> whether it is trained, for the parameters of these stages."""
    flags = {}
    for position, entry in enumerate(pipe.program.state):
        holders = [index for index in entry.stages if index in stages]
        if entry.kind != "param" or not holders:
            continue
        name = pipe.program.stages[holders[0]].state[entry][0]
        tensor = find(pipe.stages[holders[0]], name)
        if tensor is not None:
            flags[position] = tensor.requires_grad
    return flags


def refuse_other_parameters(
    optimizer: Optimizer,
    pipe: Staged,
    stages: Collection[int],
    own: Collection[Parameter],
) -> None:
    """Returns when an optimizer updates parameters of these `stages`, and none of other stages. `own` are
    those of these stages, as they run. Raises InputError otherwise: what other ranks train never moves here.
    """
    given: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        given += group["params"]
    kind = type(optimizer).__name__
    elsewhere = _names_of_others(pipe, stages)
    names = [elsewhere[id(tensor)] for tensor in given if id(tensor) in elsewhere]
    if names:
        more = f" and {len(names) - 1} more parameters" if names[1:] else ""
        raise InputError(
            f"{kind} has '{names[0]}'{more} of stages that other ranks train",
            hint=_OWN,
        )
    here = {*map(id, own)}
    if given and here.isdisjoint(map(id, given)):
        raise InputError(
            f"{kind} has none of the parameters of this rank's stages, so that none of them would be trained",
            where=f"{len(given)} parameters, the first of shape {list(given[0].shape)}",
            hint=_OWN,
        )


_OWN = "make it with driver.parameters(), after materialize(); one of other modules needs no attach"


def _names_of_others(pipe: Staged, stages: Collection[int]) -> dict[int, str]:
    """id of a parameter that none of these stages holds -> its name."""
    names: dict[int, str] = {}
    for entry in pipe.program.state:
        if entry.kind != "param" or not entry.stages:
            continue
        if not set(stages).isdisjoint(entry.stages):
            continue
        home = entry.stages[0]
        tensor = find(pipe.stages[home], pipe.program.stages[home].state[entry][0])
        names[id(tensor)] = entry.name
    return names


def follow(
    pipe: Staged, modules: Mapping[int, Module], group: dist.ProcessGroup | None
) -> None:
    """The program of every rank says which parameters are trained now, and which values carry gradient
    therefore. `modules` are what runs the stages of this rank.

    Raises StagecutError on every rank where those that hold one parameter differ, or where a wrapper has
    noted once and for all which parameters are trained.
    """
    own = flags_here(pipe, tuple(modules)), _packed(modules)
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, own, group)
    for rank, (_, packed) in enumerate(everywhere):
        for index in packed:
            raise StagecutError(
                f"requires_grad of parameters has changed, and DistributedDataParallel averages those that "
                f"were trained when stage {index} was wrapped",
                where=f"rank {rank}, stage {index}",
                hint="set requires_grad before the driver is made, or make a pipe and a driver anew",
            )
    agreed = _agreed(pipe, [flags for flags, _ in everywhere])
    for position, flag in agreed.items():
        _tell(pipe, position, flag)
    infer_gradients(pipe.program.all_ops())


def _agreed(pipe: Staged, everywhere: Sequence[dict[int, bool]]) -> dict[int, bool]:
    """Position in the program's state -> whether it is trained, as all ranks say alike."""
    first_told: dict[int, tuple[bool, int]] = {}
    for rank, flags in enumerate(everywhere):
        for position, flag in flags.items():
            first_flag, first_rank = first_told.setdefault(position, (flag, rank))
            if first_flag != flag:
                raise StagecutError(
                    f"'{pipe.program.state[position].name}' is "
                    f"{'trained' if flag else 'frozen'} on rank {rank}, and not so on rank {first_rank}",
                    where="a parameter that several stages hold",
                    hint="call requires_grad_ on every rank",
                )
    return {position: flag for position, (flag, _) in first_told.items()}


def _packed(modules: Mapping[int, Module]) -> list[int]:
    """The stages in which DistributedDataParallel is."""
    return [
        index
        for index, module in modules.items()
        if any(isinstance(part, DistributedDataParallel) for part in module.modules())
    ]


def _tell(pipe: Staged, position: int, flag: bool) -> None:
    entry = pipe.program.state[position]
    tensor_type = entry.type
    if isinstance(tensor_type, TensorType) and tensor_type.grad != flag:
        entry.type = entry.value.type = replace(tensor_type, grad=flag)
