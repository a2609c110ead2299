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
        types = [
            operand.type
            for operand in (query, key, value)
            if isinstance(operand.type, TensorType) and _is_known(operand.type)
        ]
        if len(types) < 3:
            return None
        if mask not in self._kinds:
            self._kinds[mask] = self._mask_kind(mask, types)
        kind = self._kinds[mask]
        if kind is None or not isinstance(result.type, TensorType):
            return None
        strides = _strides(result.type)
        for grad in (False, True):
            if _strides_without(kind, types, grad) != strides:
                return None
        return kind

    def _mask_kind(self, mask: Value, types: list[TensorType]) -> str | None:
        tensor = self._constants.value(mask)
        if tensor is None:
            return None
        queries, keys, _ = types
        return mask_kind(tensor, queries.shape[-2], keys.shape[-2])


def mask_kind(mask: torch.Tensor, queries: Any, keys: Any) -> str | None:
    """CAUSAL for an attention mask that hides just the future, OPEN for one that hides nothing, None for
    another.

    A boolean mask is True where a query sees a key. Any other mask is added to the scores: 0 where a query
    sees a key, else -inf or the least finite number. No mask is CAUSAL where there are more keys than
    queries, or fewer, because torch lets the first query see just the first key.
    """
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool(
        (visible | (mask <= torch.finfo(mask.dtype).min)).all()
    ):
        return None
    if bool(visible.all()):
        return OPEN
    if queries != keys or mask.shape[-2:] != (queries, keys):
        return None
    future = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(1)
    return CAUSAL if bool((visible == ~future).all()) else None


def _is_known(tensor_type: TensorType) -> bool:
    return all(
        isinstance(size, int)
        for size in (*tensor_type.shape, *(tensor_type.strides or ()))
    )


def _strides(tensor_type: TensorType) -> tuple[Any, ...]:
    return tensor_type.strides or contiguous_strides(tensor_type.shape)  # type: ignore[arg-type]


def _strides_without(mask: str, types: list[TensorType], grad: bool) -> tuple[int, ...]:
    """The strides of the result of attention without its mask of that kind."""
    with FakeTensorMode(), torch.enable_grad():
        query, key, value = (
            _fake(tensor_type).requires_grad_(grad) for tensor_type in types
        )
        heads_differ = query.dim() > 3 and query.shape[-3] != key.shape[-3]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=mask == CAUSAL, enable_gqa=heads_differ
        ).stride()


def _fake(tensor_type: TensorType) -> torch.Tensor:
    shape: Any = tensor_type.shape
    strides: Any = _strides(tensor_type)
    dtype = getattr(torch, DTYPES[tensor_type.dtype])
    return torch.empty_strided(shape, strides, dtype=dtype, device=tensor_type.device)
