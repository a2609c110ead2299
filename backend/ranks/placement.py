"""Which rank runs which stages, under which schedule of torch, on which device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    get_schedule_class,
)

from stagecut.backend.ranks.hosts import refuse_destroyed
from stagecut.backend.schedules import SCHEDULES, V, homes
from stagecut.ir.errors import InputError, StagecutError, nearest

Group = dist.ProcessGroup | None


def schedule_class(name: str) -> Any:
    """The class of torch with this name. Raises InputError where there is none."""
    try:
        return get_schedule_class(name)
    except ValueError:
        raise InputError(
            f"there is no schedule '{name}'", hint=nearest(name, SCHEDULES)
        ) from None


_SET_BY_DRIVER = (
    "n_microbatches loss_fn scale_grads args_chunk_spec kwargs_chunk_spec output_merge_spec"
).split()


def accepted_by(schedule: Any, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`options`, which a schedule class of torch takes. Raises InputError for one that it does not take, or
    that the Driver gives it.
    """
    for name in options:
        if name in _SET_BY_DRIVER:
            raise InputError(
                f"schedule_kwargs has '{name}', which is set by the Driver's own argument"
            )
        taken = inspect.signature(schedule.__init__).parameters
        if name not in taken:
            raise InputError(
                f"{schedule.__name__} of torch {torch.__version__} takes no '{name}'",
                hint=nearest(name, taken),
            )
    return options


def placement(stages: int, ranks: int, schedule: Any) -> list[int]:
    """Stage -> rank under a schedule class of torch. Raises StagecutError when it cannot place so many
    stages.
    """
    name = schedule.__name__
    v = name.removeprefix("Schedule") in V
    if issubclass(schedule, PipelineScheduleMulti):
        if stages % ranks or (v and stages != 2 * ranks):
            raise StagecutError(
                f"{name} cannot place {_several(stages, 'stage')} on {_several(ranks, 'rank')}",
                hint=f"cut into {2 * ranks} stages" if v else "cut into a multiple",
            )
    elif stages != ranks:
        raise StagecutError(
            f"{name} has one stage a rank: {_several(stages, 'stage')}, {_several(ranks, 'rank')}",
            hint=f"start {_several(stages, 'process', 'es')}, torchrun --nproc-per-node {stages}, "
            f"or cut into {_several(ranks, 'stage')}",
        )
    return homes(stages, ranks, v)


def _several(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}{plural}"


def part_of_loss(n_microbatches: int, scale_grads: bool) -> float:
    """What the loss of one micro-batch counts in that of the batch. Raises InputError where a batch cannot
    have so many micro-batches.
    """
    if not isinstance(n_microbatches, int) or n_microbatches < 1:
        raise InputError(
            f"n_microbatches={n_microbatches!r}",
            hint="a whole number from 1 on, such as n_microbatches=8",
        )
    return 1.0 / n_microbatches if scale_grads else 1.0


def refuse_no_group(group: Group) -> None:
    """Returns when this process is in the process group. Raises StagecutError otherwise."""
    if not dist.is_available() or not dist.is_initialized():
        raise StagecutError(
            "a Driver runs on a process group, and there is none",
            hint='dist.init_process_group("nccl" or "gloo") under torchrun; pipe(...) runs all stages in one '
            "process",
        )
    refuse_destroyed(group)
    if dist.get_rank(group) < 0:
        raise StagecutError(
            f"rank {dist.get_rank()} is not in the group of the Driver",
            hint="make a Driver on the ranks of the group only",
        )


def own_device(group: Group) -> torch.device:
    """The device on which this process computes, by the backend of its group."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
