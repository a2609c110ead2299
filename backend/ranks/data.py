"""Data is loaded where it is wanted: the driver moves inputs and targets to the ranks that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from stagecut.backend.ranks.batch import Call
from stagecut.backend.ranks.hosts import group_of_hosts
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError, nearest
from stagecut.ir.graph import Value
from stagecut.ir.run.given import read_spec, written_spec

WAYS = ("all", "first", "ends")
"""Every rank is given everything; the first stage's rank is; or that one the inputs, and the rank of the last
stage the targets.
"""

Readers = dict[int, tuple[int, ...]]
"""Id of a tensor -> the ranks that read it."""


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
        self._pipe = pipe
        self._homes = homes
        self._group = group
        self._device = device
        self._way = way
        self._rank = dist.get_rank(group)

    @property
    def moves(self) -> bool:
        """True where ranks are given the arguments of others."""
        return self._way != "all"

    def moved(self, call: Call, count: int) -> Call:
        """The arguments of a call of `count` micro-batches, on the ranks that read them. Other ranks have
        tensors of the same sizes without memory.
        """
        if not self.moves:
            return call
        first = self._homes[0]
        last = self._homes[-1]
        readers: Readers = {}
        if self._rank == first:
            calls = call.calls(count)
            readers = self._readers(calls)
        inputs = self._move(call.inputs, readers, first)
        source = first if self._way == "first" else last
        label_readers: Readers = {}
        for leaf in tree_leaves(call.labels):
            if isinstance(leaf, torch.Tensor):
                label_readers[id(leaf)] = (last,)
        labels = self._move(call.labels, label_readers, source)
        return Call(*inputs, *labels)

    def _readers(
        self, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]
    ) -> Readers:
        """Tensor of the arguments -> the ranks whose stages read it."""
        inputs = self._pipe.program.inputs
        readers: dict[int, set[int]] = {}
        for args, kwargs in calls:
            flat = self._flat(args, kwargs)
            for value, leaf in zip(inputs, flat, strict=True):
                ranks = readers.setdefault(id(leaf), set())
                ranks |= self._readers_of(value)
        return {leaf: tuple(sorted(ranks)) for leaf, ranks in readers.items()}

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        spec = self._pipe._call_spec
        if spec is None:
            return list(args)
        return spec.flatten(args, dict(kwargs))

    def _readers_of(self, value: Value) -> set[int]:
        """The ranks that read an input: the first one, those of the stages that read it, and the last one
        where the model returns it.
        """
        program = self._pipe.program
        ranks = {self._homes[0]}
        for stage in program.stages:
            if value in stage.inputs:
                ranks.add(self._homes[stage.index])
        if value in program.output.operands:
            ranks.add(self._homes[-1])
        return ranks

    def _move(self, tree: Any, readers: Readers, source: int) -> Any:
        """`tree` of rank `source`, on every rank that reads any of it."""
        leaves, spec = tree_flatten(tree)
        message: list[Any] = [None]
        if self._rank == source:
            described = [_described(leaf, readers) for leaf in leaves]
            message = [(described, written_spec(spec))]
        hosts = group_of_hosts(self._group)
        dist.broadcast_object_list(message, group=hosts, group_src=source)
        described, written = message[0]
        if self._rank != source:
            leaves = described
        moved: list[Any] = []
        for leaf, sent in zip(leaves, described, strict=True):
            moved.append(self._leaf(leaf, sent, source))
        return tree_unflatten(moved, read_spec(written))

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
        requests: list[dist.P2POp] = []
        for work, tensor, rank in operations:
            request = dist.P2POp(work, tensor, group=self._group, group_peer=rank)
            requests.append(request)
        if not requests:
            return
        for pending in dist.batch_isend_irecv(requests):
            pending.wait()


def _described(leaf: Any, readers: Readers) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = tuple(leaf.shape)
    ranks = readers.get(id(leaf), ())
    return _Sent(shape, leaf.dtype, ranks)
