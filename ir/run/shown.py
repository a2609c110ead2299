"""Values of a call in a message: dtypes, sizes and containers, and no contents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_is_leaf

MOST_SHOWN = 4
"""So many values of a call, or of a container, are listed."""


def shown_type(tensor: torch.Tensor) -> str:
    """`float32[2, 4]`."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{[*map(int, tensor.shape)]}"


def shown_value(value: Any) -> str:
    """`float32[2, 4]`, `a tuple of int64[2] and an int`, `None`."""
    if isinstance(value, torch.Tensor):
        return shown_type(value)
    if value is None:
        return "None"
    kind = type(value).__name__
    named = f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"
    if tree_is_leaf(value):
        return named
    children = tree_flatten(value, lambda inner: inner is not value)[0]
    if not children:
        return f"an empty {kind}"
    return f"{named} of {listed(map(shown_value, children))}"


def listed(texts: Iterable[str]) -> str:
    """The first of them, and how many there are besides."""
    every = [*texts]
    few = every[:MOST_SHOWN]
    left = len(every) - len(few)
    if left:
        few.append(f"{left} more")
    return " and ".join(few)
