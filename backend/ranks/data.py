"""Data is loaded where it is wanted: the driver moves inputs and targets to the ranks that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_unflatten

from stagecut.backend.ranks.batch import Call
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError, nearest

WAYS = ("all", "first", "ends")
"""Every rank is given everything; the first stage's rank is; or that one the inputs, and the rank of the last
stage the targets.
"""


@dataclass(frozen=True)
class _Sent:
    """A tensor that is not here yet: its type, and the ranks that read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    readers: tuple[int, ...]


class Data:
    """Moves the arguments of a call of the driver from the ranks that are given them to those that read
    them.
    """

    def __init__(
        self,
        pipe: Staged,
        homes: Sequence[int],
        group: dist.ProcessGroup | None,
        device: torch.device,
        way: str,
    ) -> None:
        if way not in WAYS:
            raise InputError(
                f"data_on={way!r} is not known", hint=nearest(str(way), WAYS)
            )
        self._pipe, self._homes, self._group = pipe, homes, group
        self._device, self._way, self._rank = device, way, dist.get_rank(group)

    def moved(self, call: Call, count: int) -> Call:
        """The arguments of a call of `count` micro-batches, on the ranks that read them. Other ranks have
        tensors of the same sizes without memory.
        """
        if self._way == "all":
            return call
        first, last = self._homes[0], self._homes[-1]
        readers = self._readers(call.calls(count)) if self._rank == first else {}
        source = first if self._way == "first" else last
        targets = {
            id(leaf): (last,)
            for leaf in tree_flatten(call.labels)[0]
            if isinstance(leaf, torch.Tensor)
        }
        inputs = self._move(call.inputs, readers, first)
        return Call(*inputs, *self._move(call.labels, targets, source))

    def _readers(
        self, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]
    ) -> dict[int, tuple[int, ...]]:
        """Tensor of the arguments -> the ranks whose stages read it."""
        pipe, spec = self._pipe, self._pipe._call_spec
        stages, returned = pipe.program.stages, pipe.program.output.operands
        found: dict[int, set[int]] = {}
        for args, kwargs in calls:
            flat = spec.flatten(args, dict(kwargs)) if spec is not None else list(args)
            for value, item in zip(pipe.program.inputs, flat, strict=True):
                ranks = {self._homes[s.index] for s in stages if value in s.inputs}
                ranks |= {self._homes[0]}
                if value in returned:
                    ranks.add(self._homes[-1])
                found.setdefault(id(item), set()).update(ranks)
        return {place: tuple(sorted(ranks)) for place, ranks in found.items()}

    def _move(
        self, tree: Any, readers: Mapping[int, tuple[int, ...]], source: int
    ) -> Any:
        """`tree` of rank `source`, on every rank that reads any of it."""
        leaves, spec = tree_flatten(tree)
        message = [None]
        if self._rank == source:
            described = [_described(leaf, readers) for leaf in leaves]
            message = [(described, spec)]  # type: ignore[list-item]
        dist.broadcast_object_list(message, group=self._group, group_src=source)
        told: Any = message[0]
        described, spec = told
        here = leaves if self._rank == source else described
        pairs = zip(here, described, strict=True)
        return tree_unflatten([self._leaf(*pair, source) for pair in pairs], spec)

    def _leaf(self, leaf: Any, sent: Any, source: int) -> Any:
        if not isinstance(sent, _Sent):
            return leaf
        others = [rank for rank in sent.readers if rank != source]
        if self._rank == source:
            tensor = leaf.to(self._device).contiguous()
            self._exchange([(dist.isend, tensor, rank) for rank in others])
            return leaf
        if self._rank in others:
            tensor = torch.empty(sent.shape, dtype=sent.dtype, device=self._device)
            self._exchange([(dist.irecv, tensor, source)])
            return tensor
        nothing = torch.zeros((), dtype=sent.dtype, device=self._device)
        return nothing.expand(sent.shape)

    def _exchange(self, operations: list[tuple[Any, torch.Tensor, int]]) -> None:
        made = [
            dist.P2POp(work, tensor, group=self._group, group_peer=rank)
            for work, tensor, rank in operations
        ]
        for request in dist.batch_isend_irecv(made) if made else ():
            request.wait()


def _described(leaf: Any, readers: Mapping[int, tuple[int, ...]]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return _Sent(tuple(leaf.shape), leaf.dtype, readers.get(id(leaf), ()))
