"""Which ops a model runs on the device, and which its pipe runs: one forward and one backward of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stagecut.ir.objects import opened

FREE = frozenset({"aten.detach.default", "aten.view.default", "aten._unsafe_view.default", "aten.alias.default", "aten.lift_fresh.default"})
"""Ops that start no kernel, which autograd and views add as they like."""


class Calls(TorchDispatchMode):
    """Counts the ops that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_view(func, result, args):
            self.counts[str(func)] += 1
        return result


def _is_view(func: Any, result: Any, args: Any) -> bool:
    """True for an op that only looks at memory that is there: it starts no kernel."""
    if func._schema.is_mutable:
        return False
    storages = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return bool(made) and all(leaf.untyped_storage()._cdata in storages for leaf in made)


def calls(module: Callable[..., Any], inputs: dict[str, Any]) -> Counter[str]:
    """The ops of one forward and one backward, by name."""
    with Calls() as seen:
        torch.manual_seed(0)
        output = module(**inputs)
        leaves = [leaf for leaf in tree_leaves(opened(output)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        torch.stack([leaf.float().mean() for leaf in leaves]).mean().backward()
    return seen.counts


def difference(model: nn.Module, pipe: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Op -> how often the model runs it, how often the pipe does, where that differs."""
    for module in (model, pipe):
        module.zero_grad()
    ours, theirs = calls(pipe, inputs), calls(model, inputs)
    return {name: (theirs[name], ours[name]) for name in sorted(ours | theirs) if ours[name] != theirs[name]}
