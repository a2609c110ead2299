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
    ends = {t.grad_fn for t in outputs if isinstance(t, torch.Tensor)}
    pending, seen, found = [loss.grad_fn], set(ends), []
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: torch.Tensor | None = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        pending += [following for following, _ in node.next_functions]
    return found


class StaleError(StagecutError):
    """The loss function read a weight as it was before the stage that has it was loaded. All ranks raise it,
    and can go on.
    """


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
        self._pipe, self._homes, self._group = pipe, homes, group
        self._device, self._rank = device, dist.get_rank(group)
        self._known: dict[int, int | str] | None = None
        self.entries: tuple[int, ...] = ()
        self.read: dict[int, None] = {}

    def look(self, leaves: Iterable[torch.Tensor]) -> None:
        """`read` has the entries among the leaves of a loss that other ranks hold. Raises StagecutError for a
        weight of the model in whose place a stage holds another tensor.
        """
        if self._known is None:
            self._known = dict(self._places())
        for leaf in leaves:
            place = self._known.get(id(leaf))
            if isinstance(place, str):
                raise StagecutError(
                    f"loss_fn reads '{place}' of the model, in whose place a stage holds another tensor",
                    where="the stage was wrapped, sharded, moved or loaded",
                    hint="let forward return what the loss needs of it",
                )
            if place is not None:
                self.read[place] = None

    def _places(self) -> Iterator[tuple[int, int | str]]:
        """Tensor -> the entry of a stage of another rank, or its name in the model where no stage has it."""
        program = self._pipe.program
        stages = range(len(program.stages))
        here = {i for i in stages if self._homes[i] == self._rank}
        held = {id(p) for i in here for p in self._pipe.stages[i].parameters()}
        model = self._pipe._model() if self._pipe._model is not None else None
        for name, parameter in model.named_parameters() if model is not None else ():
            if id(parameter) not in held:
                yield id(parameter), name
        for place, entry in enumerate(program.state):
            for stage in set(entry.stages) - here:
                tensor = self._held(entry, stage)
                if tensor is not None and id(tensor) not in held:
                    yield id(tensor), place

    def _held(self, entry: StateEntry, stage: int) -> torch.Tensor | None:
        name = self._pipe.program.stages[stage].state[entry][0]
        return find(self._pipe.stages[stage], name)

    def agree(self, read: Iterable[int]) -> None:
        """Every rank knows that the loss function reads these entries, and that the last rank read the values
        that their homes have. Raises StagecutError where it read others.
        """
        fresh = [place for place in read if place not in self.entries]
        self.entries = (*self.entries, *fresh)
        stale = [place for place in fresh if self._was_stale(place)]
        if not fresh:
            return
        told = [stale]
        dist.broadcast_object_list(told, group=self._group, group_src=self._last)
        for place in told[0]:
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

    def give(self, factor: float) -> None:
        """The homes of the weights have the gradients of the loss function's use of them, times `factor`."""
        for place in self.entries:
            tensor = self._here(place)
            found = tensor.grad if self._rank == self._last else None
            grad = torch.zeros_like(tensor) if found is None else found * factor
            self._move(place, grad, self._last, self._home(place))
            if self._rank == self._last:
                tensor.grad = None
            elif self._rank == self._home(place):
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad

    @property
    def _last(self) -> int:
        return self._homes[-1]

    def _home(self, place: int) -> int:
        return self._homes[self._pipe.program.state[place].stages[0]]

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
