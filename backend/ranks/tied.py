"""The parameters that several stages hold, each with a replica of its own: their gradients are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import DTensor

from stagecut.backend.ranks.stage import Group
from stagecut.backend.stages.staged import Staged
from stagecut.ir.graph import Program, StateEntry


def _replicas(
    program: Program, homes: Sequence[int]
) -> list[tuple[tuple[int, ...], list[StateEntry]]]:
    """The parameters of several stages by the ranks that hold them, in the same order everywhere."""
    by_ranks: dict[tuple[int, ...], list[StateEntry]] = {}
    for entry in program.state:
        if entry.kind == "param" and len(entry.stages) > 1:
            by_ranks.setdefault(
                tuple(sorted({homes[stage] for stage in entry.stages})), []
            ).append(entry)
    return sorted(by_ranks.items(), key=lambda item: item[0])


def _held(
    pipe: Staged, entries: Sequence[StateEntry], stages: Sequence[int]
) -> list[list[torch.nn.Parameter]]:
    """The tensors that this rank holds for each parameter: several where stages of this rank were sharded
    separately.
    """
    found: list[dict[torch.nn.Parameter, None]] = [{} for _ in entries]
    for index in stages:
        names = {
            clean_tensor_name(name): p
            for name, p in pipe.stages[index].named_parameters(remove_duplicate=False)
        }
        for entry, tensors in zip(entries, found, strict=True):
            if index in entry.stages:
                tensors[names[pipe.program.stages[index].state[entry][0]]] = None
    return [list(tensors) for tensors in found]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


LARGE = 2**20
"""A gradient of so many elements or more is summed in place: packing it costs more than a message of
its own.
"""


def _sum_gradients(
    replicas: Sequence[list[torch.nn.Parameter]], ranks: tuple[int, ...], group: Group
) -> None:
    """Each replica of a parameter has the sum of the gradients of all replicas, here and on `ranks`; it has
    none where no replica has one.

    The host waits for the device only where a gradient is missing here.
    """
    for dtype in dict.fromkeys(same[0].dtype for same in replicas):
        mine = [same for same in replicas if same[0].dtype == dtype]
        parts = [_gradient(same) for same in mine]
        missing = [
            place
            for place, same in enumerate(mine)
            if all(p.grad is None for p in same)
        ]
        counts = parts[0].new_ones(len(mine))
        for place in missing:
            counts[place] = 0
        small = [
            place
            for place, part in enumerate(parts)
            if part.numel() < LARGE or not part.is_contiguous()
        ]
        packed = torch.cat([*(parts[place].flatten() for place in small), counts])
        *sums, counts = _total(packed, ranks, group).split(
            [*(parts[place].numel() for place in small), len(mine)]
        )
        totals = dict(zip(small, sums, strict=True))
        totals |= {
            place: _total(part, ranks, group)
            for place, part in enumerate(parts)
            if place not in totals
        }
        nowhere = {place for place in missing if not counts[place].item()}
        for place, same in enumerate(mine):
            if place not in nowhere:
                _give(same, totals[place])


def _gradient(same: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The sum of the gradients of the replicas here: the gradient itself where there is one, zeros where
    there is none.
    """
    grads = [_local(p.grad.detach()) for p in same if p.grad is not None]
    if not grads:
        return torch.zeros_like(_local(same[0]))
    return grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)


def _give(same: Sequence[torch.nn.Parameter], total: torch.Tensor) -> None:
    """All replicas here have `total` as their gradient."""
    for parameter in same:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = _local(parameter.grad)
        if grad.data_ptr() != total.data_ptr():
            grad.copy_(total.view_as(grad))


def _total(mine: torch.Tensor, ranks: tuple[int, ...], group: Group) -> torch.Tensor:
    """The sum of a tensor over some ranks of the group, bit for bit the same on each.

    The ranks send to each other. A process group of their own would have to be made by all processes there
    are, including those of other pipelines.
    """
    if len(ranks) == dist.get_world_size(group):
        dist.all_reduce(mine, group=group)
        return mine
    me = dist.get_rank(group)
    parts = {rank: mine if rank == me else torch.empty_like(mine) for rank in ranks}
    others = [rank for rank in ranks if rank != me]
    ops = [
        dist.P2POp(dist.isend, mine, group=group, group_peer=rank) for rank in others
    ]
    ops += [
        dist.P2POp(dist.irecv, parts[rank], group=group, group_peer=rank)
        for rank in others
    ]
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()
    return torch.stack(list(parts.values())).sum(0)
