"""Tells which masks hide just the future, so that attention can do without them, and how the result lies in
memory without a mask. Needs torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from stagecut.ir.graph import CAUSAL, OPEN, Program, Value
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.constants import Constants
from stagecut.ir.types import DTYPES, TensorType, contiguous_strides


class Masks:
    """The kinds of the attention masks of a program."""

    def __init__(self, program: Program, bindings: Bindings) -> None:
        self._constants = Constants(program, bindings)
        self._kinds: dict[Value, str | None] = {}

    def kind(
        self, mask: Value, query: Value, key: Value, value: Value, result: Value
    ) -> str | None:
        """The kind of a mask that attention may do without: CAUSAL or OPEN; None where the mask is neither,
        or is not known.

        Also None where the result would lie otherwise in memory without the mask, because later ops may rely
        on that.
        """
        types = [operand.type for operand in (query, key, value)]
        tensors = [
            kind for kind in types if isinstance(kind, TensorType) and _is_known(kind)
        ]
        if len(tensors) < 3:
            return None
        if mask not in self._kinds:
            tensor = self._constants.value(mask)
            self._kinds[mask] = (
                mask_kind(tensor, tensors[0].shape[-2], tensors[1].shape[-2])
                if tensor is not None
                else None
            )
        kind = self._kinds[mask]
        if kind is None or not isinstance(result.type, TensorType):
            return None
        return (
            kind
            if all(
                _strides_without(kind, tensors, grad) == _strides(result.type)
                for grad in (False, True)
            )
            else None
        )


def mask_kind(mask: torch.Tensor, queries: Any, keys: Any) -> str | None:
    """CAUSAL for an attention mask that hides just the future, OPEN for one that hides nothing, None for
    another.

    A boolean mask is True where a query sees a key. Any other mask is added to the scores: 0 where a query
    sees a key, else -inf or the least finite number. No mask is CAUSAL where there are more keys than
    queries, or fewer, because torch lets the first query see just the first key.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool(
        (seen | (mask <= torch.finfo(mask.dtype).min)).all()
    ):
        return None
    if bool(seen.all()):
        return OPEN
    if queries != keys or mask.shape[-2:] != (queries, keys):
        return None
    future = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(1)
    return CAUSAL if bool((seen == ~future).all()) else None


def _is_known(kind: TensorType) -> bool:
    return all(isinstance(size, int) for size in (*kind.shape, *(kind.strides or ())))


def _strides(kind: TensorType) -> tuple[Any, ...]:
    return kind.strides or contiguous_strides(kind.shape)  # type: ignore[arg-type]


def _strides_without(mask: str, kinds: list[TensorType], grad: bool) -> tuple[int, ...]:
    """The strides of the result of attention without its mask of that kind."""
    with FakeTensorMode(), torch.enable_grad():
        query, key, value = (_fake(kind).requires_grad_(grad) for kind in kinds)
        heads_differ = query.dim() > 3 and query.shape[-3] != key.shape[-3]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=mask == CAUSAL, enable_gqa=heads_differ
        ).stride()


def _fake(kind: TensorType) -> torch.Tensor:
    shape: Any = kind.shape
    strides: Any = _strides(kind)
    dtype = getattr(torch, DTYPES[kind.dtype])
    return torch.empty_strided(shape, strides, dtype=dtype, device=kind.device)
