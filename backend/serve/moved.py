"""Arguments on the device of this process."""

from __future__ import annotations

from typing import Any

import torch


def moved(leaf: Any, device: torch.device, kept: bool) -> Any:
    """An argument on a device. A tensor that an object of the caller's keeps is moved itself, so that what is
    written into it is written there. One on the meta device stands for a tensor of another rank, and stays.
    """
    if not isinstance(leaf, torch.Tensor) or leaf.device == device or leaf.is_meta:
        return leaf
    if not kept:
        return leaf.to(device)
    leaf.data = leaf.data.to(device)
    return leaf
