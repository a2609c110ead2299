"""Weights of the model that the loss function reads, as a fused linear cross entropy reads that of the head.

The rank of the last stage has the whole model, so its loss function can read a weight that a stage of
another rank holds. The optimizer of that rank changes it, and needs its gradient. So the weight comes to the
last rank before every call, and its gradient goes back after every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from stagecut.backend.stages.modules import find
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import StateEntry


def leaves_of(loss: torch.Tensor, outputs: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors to which a backward of `loss` gives gradients without passing through `outputs`."""
    seen = {leaf.grad_fn for leaf in outputs if isinstance(leaf, torch.Tensor)}
    leaves: list[torch.Tensor] = []
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: torch.Tensor | None = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        for following, _ in node.next_functions:
            pending.append(following)
    return leaves


class StaleError(StagecutError):
    """The loss function read a weight as it was before the stage that has it was loaded. All ranks raise it,
    and can go on.
    """

    __module__ = "stagecut"


class Lent:
    """The weights of stages of other ranks that the loss function reads on the last one.

    `entries` are their places in the program's state, the same on every rank.
    """

    def __init__(
        self,
        pipe: Staged,
        homes: Sequence[int],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._pipe = pipe
        self._homes = homes
        self._group = group
        self._device = device
        self._rank = dist.get_rank(group)
        self._elsewhere: dict[int, int | str] | None = None
        self.entries: tuple[int, ...] = ()
        self.read: dict[int, None] = {}

    def look(self, leaves: Iterable[torch.Tensor]) -> None:
        """`read` has the entries among the leaves of a loss that other ranks hold. Raises StagecutError for a
        weight of the model in whose place a stage holds another tensor.
        """
        if self._elsewhere is None:
            self._elsewhere = dict(self._not_here())
        for leaf in leaves:
            place = self._elsewhere.get(id(leaf))
            if isinstance(place, str):
                raise StagecutError(
                    f"loss_fn reads '{place}' of the model, in whose place a stage holds another tensor",
                    where="the stage was wrapped, sharded, moved or loaded",
                    hint="let forward return what the loss needs of it",
                )
            if place is not None:
                self.read[place] = None

    def _not_here(self) -> Iterator[tuple[int, int | str]]:
        """Tensor -> the entry of a stage of another rank, or its name in the model where no stage has it."""
        held = {id(parameter) for parameter in self._parameters_here()}
        model: torch.nn.Module | None = None
        if self._pipe._model is not None:
            model = self._pipe._model()
        if model is not None:
            for name, parameter in model.named_parameters():
                if id(parameter) not in held:
                    yield id(parameter), name
        for place, entry in enumerate(self._pipe.program.state):
            for stage in entry.stages:
                if self._homes[stage] == self._rank:
                    continue
                tensor = self._held(entry, stage)
                if tensor is not None and id(tensor) not in held:
                    yield id(tensor), place

    def _parameters_here(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of the stages of this rank."""
        for stage in range(len(self._pipe.program.stages)):
            if self._homes[stage] == self._rank:
                yield from self._pipe.stages[stage].parameters()

    def _held(self, entry: StateEntry, stage: int) -> torch.Tensor | None:
        names = self._pipe.program.stages[stage].state[entry]
        return find(self._pipe.stages[stage], names[0])

    def agree(self, read: Iterable[int]) -> None:
        """Every rank knows that the loss function reads these entries, and that the last rank read the values
        that their homes have. Raises StagecutError where it read others.
        """
        fresh = [place for place in read if place not in self.entries]
        self.entries = (*self.entries, *fresh)
        stale = [place for place in fresh if self._was_stale(place)]
        if not fresh:
            return
        message = [stale]
        dist.broadcast_object_list(message, group=self._group, group_src=self._last)
        for place in message[0]:
            raise StaleError(
                f"loss_fn read another '{self._name(place)}' than rank {self._home(place)} has in its stage",
                where=f"rank {self._last}, which has the last stage",
                hint="the right one is there now: call zero_grad and make this call again",
            )

    def _was_stale(self, place: int) -> bool:
        """True on the last rank when it had other values than it has now, which are those of the home."""
        self._refuse_sharded(place)
        tensor = self._here(place).detach()
        before = tensor.clone()
        self._move(place, tensor, self._home(place), self._last)
        return self._rank == self._last and not torch.equal(before, tensor)

    def refuse_late(self) -> None:
        """Raises StagecutError where the loss function reads a weight of which no rank was told."""
        for place in self.read:
            if place not in self.entries:
                raise StagecutError(
                    f"loss_fn reads '{self._name(place)}', which it did not read in the first step",
                    where=f"rank {self._last}, which has the last stage",
                    hint="Driver(share_losses=True): the ranks are told after every step",
                )

    def fetch(self) -> None:
        """The last rank has the values of the weights that its loss function reads, and no gradients."""
        for place in self.entries:
            tensor = self._here(place)
            self._move(place, tensor.detach(), self._home(place), self._last)
            if self._rank == self._last:
                tensor.grad = None

    def refuse_recorded(self) -> None:
        """Returns where the loss function reads no weight of another rank. Else all ranks raise a
        StagecutError.
        """
        if self.entries:
            names = [self._pipe.program.state[place].name for place in self.entries]
            raise StagecutError(
                f"a step cannot be recorded in a CUDA graph: loss_fn reads {names[0]!r} of another rank",
                hint="leave cuda_graphs=True away, or let forward return what the loss needs of it",
            )

    def give(self, factor: torch.Tensor | None) -> None:
        """The homes of the weights have the gradients of the loss function's use of them, times `factor`."""
        for place in self.entries:
            tensor = self._here(place)
            home = self._home(place)
            grad = self._gradient(tensor, factor)
            self._move(place, grad, self._last, home)
            if self._rank == self._last:
                tensor.grad = None
            elif self._rank == home:
                _add_gradient(tensor, grad)

    def _gradient(
        self, tensor: torch.Tensor, factor: torch.Tensor | None
    ) -> torch.Tensor:
        """What the last rank has of it, times `factor`; zeros elsewhere, to receive into."""
        if self._rank != self._last or tensor.grad is None:
            return torch.zeros_like(tensor)
        if factor is None:
            return tensor.grad
        return (tensor.grad * factor).to(tensor.dtype)

    @property
    def _last(self) -> int:
        return self._homes[-1]

    def _home(self, place: int) -> int:
        entry = self._pipe.program.state[place]
        first = entry.stages[0]
        return self._homes[first]

    def _name(self, place: int) -> str:
        return self._pipe.program.state[place].name

    def _here(self, place: int) -> torch.Tensor:
        entry = self._pipe.program.state[place]
        tensor = self._held(entry, entry.stages[0])
        assert tensor is not None
        return tensor

    def _refuse_sharded(self, place: int) -> None:
        if isinstance(self._here(place), DTensor):
            raise StagecutError(
                f"loss_fn reads '{self._name(place)}', which is sharded on rank {self._home(place)}",
                where=f"rank {self._last}, which has the last stage",
                hint="let forward return what the loss needs of it, or do not shard it",
            )

    def _move(self, place: int, tensor: torch.Tensor, source: int, target: int) -> None:
        """`tensor` on rank `target` has the values that it has on `source`."""
        if self._rank not in (source, target):
            return
        sends = self._rank == source
        buffer = tensor.to(self._device).contiguous()
        work = dist.isend if sends else dist.irecv
        peer = target if sends else source
        operation = dist.P2POp(work, buffer, group=self._group, group_peer=peer)
        for request in dist.batch_isend_irecv([operation]):
            request.wait()
        if not sends and buffer.data_ptr() != tensor.data_ptr():
            tensor.copy_(buffer)


def _add_gradient(tensor: torch.Tensor, grad: torch.Tensor) -> None:
    if tensor.grad is not None:
        grad = tensor.grad + grad
    tensor.grad = grad
