"""What only the rank of the last stage knows when a schedule is through, told to the other ranks.

No device is waited for: sizes go from host to host, and what is in tensors from device to device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from stagecut.backend.ranks.faults import Report
from stagecut.backend.ranks.hosts import group_of_hosts
from stagecut.backend.ranks.losses import StepLosses

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Told:
    """The losses; the factor that the gradients lack, None for none; the entries of the state that the loss
    function reads. Or nothing of these, and a report of its failure, as in backend/ranks/faults.py.
    """

    losses: StepLosses = field(default_factory=StepLosses)
    factor: torch.Tensor | None = None
    read: tuple[int, ...] = ()
    failure: Report | None = None


@dataclass(frozen=True)
class _Sent:
    """A tensor that goes from device to device."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def tell(
    own: Told, share: bool, source: int, group: Group, device: torch.device
) -> Told:
    """What rank `source` has of these. Without `share`, the losses stay there."""
    losses = own.losses if share else StepLosses()
    parts = [*losses], losses.batch, losses.metrics, own.factor
    leaves = tree_leaves(parts)
    message = [(tree_map(_sent, parts), own.read, own.failure)]
    dist.broadcast_object_list(message, group=group_of_hosts(group), group_src=source)
    told, read, failure = message[0]
    sent, spec = tree_flatten(told)
    tensors = [leaf for leaf in sent if isinstance(leaf, _Sent)]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    is_source = dist.get_rank(group) == source
    if is_source:
        packed = _packed(leaves, device)
    else:
        packed = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if nbytes:
        dist.broadcast(packed, group=group, group_src=source)
    if is_source:
        return own
    whole = iter(_unpacked(packed, tensors))
    received = [next(whole) if isinstance(leaf, _Sent) else leaf for leaf in sent]
    parts = tree_unflatten(received, spec)
    return Told(StepLosses(*parts[:3]), parts[3], read, failure)


def _sent(leaf: Any) -> Any:
    """A leaf as it goes from host to host: of a dense tensor its size, all else as it is."""
    if _is_dense(leaf):
        return _Sent(tuple(leaf.shape), leaf.dtype)
    return leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf


def _is_dense(leaf: Any) -> bool:
    return (
        type(leaf) is torch.Tensor
        and leaf.layout is torch.strided
        and not leaf.is_quantized
    )


def _packed(leaves: Sequence[Any], device: torch.device) -> torch.Tensor:
    """The bytes of the dense tensors, one tensor after the other."""
    parts = [torch.empty(0, dtype=torch.uint8, device=device)]
    for leaf in leaves:
        if _is_dense(leaf):
            plain = leaf.detach().to(device).resolve_conj().resolve_neg()
            parts.append(plain.reshape(-1).view(torch.uint8))
    return torch.cat(parts)


def _unpacked(packed: torch.Tensor, tensors: Sequence[_Sent]) -> list[torch.Tensor]:
    parts = packed.split([tensor.nbytes for tensor in tensors])
    return [
        part.clone().view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
