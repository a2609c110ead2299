"""The parameters that several stages hold, each with a replica of its own: their gradients are summed once
before an update, whoever asks.

What the replicas of a parameter have is one of two things: a part each (`accumulated`: each has the gradient
of its own stages), or the whole each (`summed`). A backward that follows a sum adds parts to the whole. So
the whole is then kept at one place, by the first rank that holds the parameter, and is dropped by the others:
the next sum is right again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stagecut.backend.ranks.agree import Calls
from stagecut.backend.ranks.faults import Faults
from stagecut.backend.ranks.stage import Group
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Program, StateEntry

Replicas = list[torch.nn.Parameter]
"""The tensors that this rank holds for one parameter."""
State = Literal["new", "accumulated", "summed"]
"""What the gradients of replicas are."""
_states: WeakKeyDictionary[Staged, State] = WeakKeyDictionary()
"""Pipe -> what its gradients are, whichever driver ran last."""


class TiedError(StagecutError):
    """The replicas of a tied parameter would become different."""

    __module__ = "stagecut"


class Tied:
    """The replicated parameters as this rank sees them. All ranks of the group call its methods alike.

    `homes` are the ranks of the stages, by stage.
    """

    def __init__(
        self,
        pipe: Staged,
        homes: Sequence[int],
        group: Group,
        faults: Faults,
        calls: Calls,
    ) -> None:
        self._pipe = pipe
        self._homes = homes
        self._group = group
        self._faults = faults
        self._calls = calls
        self._rank = dist.get_rank(group)
        self._stages = [i for i, home in enumerate(homes) if home == self._rank]
        self._shared: list[tuple[tuple[int, ...], list[StateEntry]]] = []
        for ranks, entries in _replicas(pipe.program, homes):
            if self._rank in ranks:
                self._shared.append((ranks, entries))

    @property
    def _state(self) -> State:
        return _states.get(self._pipe, "new")

    @_state.setter
    def _state(self, state: State) -> None:
        _states[self._pipe] = state

    def sum(self, call: str = "") -> None:
        """Every replica that is trained has the sum of the gradients of all replicas. Ranks are told of the
        `call` that asks for it, unless they know of it, where all of them have replicas.
        """
        if self._state == "summed":
            return
        trained = self._trained()
        ranks = dist.get_world_size(self._group)
        if call and ranks > 1 and any(len(holders) == ranks for holders, _ in trained):
            self._calls.announce(call)
        for holders, replicas in trained:
            told = call or "the sum of tied gradients"
            with self._faults.together(), self._faults.partly(told, holders):
                _sum_gradients(replicas, holders, self._group)
        self._state = "summed"

    def _trained(self) -> list[tuple[tuple[int, ...], list[Replicas]]]:
        """The replicas here of what is trained and has several, by the ranks that hold them."""
        trained: list[tuple[tuple[int, ...], list[Replicas]]] = []
        for ranks, entries in self._shared:
            replicas: list[Replicas] = []
            for _, same in self._held(entries):
                if _are_several(ranks, same) and _is_trained(same):
                    replicas.append(same)
            if replicas:
                trained.append((ranks, replicas))
        return trained

    def accumulate(self) -> None:
        """A backward may begin: what it adds to the gradients is summed once, and what was summed before is
        not summed again.
        """
        if self._state == "summed":
            for parameter in self.repeated():
                parameter.grad = None
        self._state = "accumulated"

    def repeated(self) -> Replicas:
        """The replicas here but for the first of each parameter in the whole group."""
        repeated: Replicas = []
        for _, entries in self._shared:
            for entry, same in self._held(entries):
                first = self._homes[entry.stages[0]] == self._rank
                repeated += same[1:] if first else same
        return repeated

    def refuse_update(self, optimizer: Optimizer) -> None:
        """Returns when `optimizer` may step. Raises TiedError when it would take a part of a gradient for the
        whole.
        """
        if self._state != "accumulated":
            return
        updated: set[int] = set()
        for group in optimizer.param_groups:
            updated.update(map(id, group["params"]))
        for ranks, entries in self._shared:
            for entry, same in self._held(entries):
                if not _are_several(ranks, same):
                    continue
                graded = {id(replica) for replica in same if replica.grad is not None}
                if updated.isdisjoint(graded):
                    continue
                with self._faults.alike():
                    raise _not_summed(entry)

    def _held(self, entries: Sequence[StateEntry]) -> list[tuple[StateEntry, Replicas]]:
        """Each entry with the tensors that this rank holds for it."""
        held = _held(self._pipe, entries, self._stages)
        return list(zip(entries, held, strict=True))


def _is_trained(same: Replicas) -> bool:
    return any(parameter.requires_grad for parameter in same)


def _are_several(ranks: Sequence[int], same: Replicas) -> bool:
    """True for a parameter that has replicas on other ranks too, or several here."""
    return len(ranks) > 1 or len(same) > 1


def _not_summed(entry: StateEntry) -> TiedError:
    names = " and ".join(f"'{name}'" for name in entry.names)
    stages = " and ".join(map(str, entry.stages))
    return TiedError(
        f"an optimizer would step with a part of the gradient of {names}, which stages {stages} share",
        hint=(
            "driver.attach(optimizer) once, or driver.sync_shared_gradients() before every step of the "
            "optimizer"
        ),
    )


def _replicas(
    program: Program, homes: Sequence[int]
) -> list[tuple[tuple[int, ...], list[StateEntry]]]:
    """The parameters of several stages by the ranks that hold them, in the same order everywhere."""
    by_ranks: dict[tuple[int, ...], list[StateEntry]] = {}
    for entry in program.state:
        if entry.kind != "param":
            continue
        if len(entry.stages) < 2:
            continue
        ranks = {homes[stage] for stage in entry.stages}
        entries = by_ranks.setdefault(tuple(sorted(ranks)), [])
        entries.append(entry)
    return [(ranks, by_ranks[ranks]) for ranks in sorted(by_ranks)]


def _held(
    pipe: Staged, entries: Sequence[StateEntry], stages: Sequence[int]
) -> list[list[torch.nn.Parameter]]:
    """The tensors that this rank holds for each parameter: several where stages of this rank were sharded
    separately.
    """
    held: list[dict[torch.nn.Parameter, None]] = [{} for _ in entries]
    for index in stages:
        by_name = _by_clean_name(pipe.stages[index])
        names = pipe.program.stages[index].state
        for entry, tensors in zip(entries, held, strict=True):
            if index in entry.stages:
                name = names[entry][0]
                tensors[by_name[name]] = None
    return [list(tensors) for tensors in held]


def _by_clean_name(stage: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a stage by the names that they had before it was wrapped."""
    parameters: dict[str, torch.nn.Parameter] = {}
    for name, parameter in stage.named_parameters(remove_duplicate=False):
        parameters[clean_tensor_name(name)] = parameter
    return parameters


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
    by_dtype: dict[torch.dtype, list[Replicas]] = {}
    for same in replicas:
        alike = by_dtype.setdefault(same[0].dtype, [])
        alike.append(same)
    for alike in by_dtype.values():
        _sum_alike(alike, ranks, group)


def _sum_alike(
    replicas: Sequence[Replicas], ranks: tuple[int, ...], group: Group
) -> None:
    """The same for parameters of one dtype."""
    parts = [_gradient(same) for same in replicas]
    missing: list[int] = []
    small: list[int] = []
    counts = parts[0].new_ones(len(replicas))
    for place, same in enumerate(replicas):
        if all(replica.grad is None for replica in same):
            missing.append(place)
            counts[place] = 0
        part = parts[place]
        if part.numel() < LARGE or not part.is_contiguous():
            small.append(place)
    flat = [parts[place].flatten() for place in small]
    sizes = [part.numel() for part in flat]
    packed = torch.cat([*flat, counts])
    summed = _total(packed, ranks, group)
    *sums, counts = summed.split([*sizes, len(replicas)])
    totals = dict(zip(small, sums, strict=True))
    for place, part in enumerate(parts):
        if place not in totals:
            totals[place] = _total(part, ranks, group)
    nowhere = {place for place in missing if not counts[place].item()}
    for place, same in enumerate(replicas):
        if place not in nowhere:
            _give(same, totals[place])


def _gradient(same: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The sum of the gradients of the replicas here: the gradient itself where there is one, zeros where
    there is none.
    """
    grads: list[torch.Tensor] = []
    for replica in same:
        if replica.grad is not None:
            grad = replica.grad.detach()
            grads.append(_local(grad))
    if not grads:
        return torch.zeros_like(_local(same[0]))
    if len(grads) == 1:
        return grads[0]
    return torch.stack(grads).sum(0)


def _give(same: Sequence[torch.nn.Parameter], total: torch.Tensor) -> None:
    """All replicas here have `total` as their gradient."""
    for parameter in same:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = _local(parameter.grad)
        if grad.data_ptr() != total.data_ptr():
            grad.copy_(total.view_as(grad))


def _total(part: torch.Tensor, ranks: tuple[int, ...], group: Group) -> torch.Tensor:
    """The sum of a tensor over some ranks of the group, bit for bit the same on each.

    The ranks send to each other. A process group of their own would have to be made by all processes there
    are, including those of other pipelines.
    """
    if len(ranks) == dist.get_world_size(group):
        dist.all_reduce(part, group=group)
        return part
    own_rank = dist.get_rank(group)
    parts: list[torch.Tensor] = []
    sends: list[dist.P2POp] = []
    receives: list[dist.P2POp] = []
    for rank in ranks:
        if rank == own_rank:
            parts.append(part)
            continue
        theirs = torch.empty_like(part)
        parts.append(theirs)
        send = dist.P2POp(dist.isend, part, group=group, group_peer=rank)
        sends.append(send)
        receive = dist.P2POp(dist.irecv, theirs, group=group, group_peer=rank)
        receives.append(receive)
    if sends:
        for work in dist.batch_isend_irecv(sends + receives):
            work.wait()
    return torch.stack(parts).sum(0)
