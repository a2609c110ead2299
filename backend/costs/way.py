"""How stages will run, as it decides their seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from stagecut.backend.costs import store
from stagecut.backend.costs.loss import LossCost
from stagecut.backend.costs.setting import Setting
from stagecut.backend.ranks.wrapped import Wrap
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.modules import Stage
from stagecut.backend.stages.roles import RoleCode
from stagecut.backend.stages.staged import Staged


@dataclass(frozen=True)
class Way:
    """How stages run: on which device, in which form, before which loss.

    wrap, backward, compile, recompute: as those of Driver. target: an example for one micro-batch. splits:
    whether backwards are split too.
    """

    device: torch.device
    wrap: Wrap = None
    loss_fn: Callable[..., Any] | None = None
    target: Any = None
    training: bool = True
    splits: bool = False
    backward: str = "autograd"
    compile: bool = False
    recompute: bool = False

    def key(self, ops: str, count: int, sizes: Mapping[str, int]) -> str:
        """The place in the store of so many spans of these ops, for these sizes."""
        forms = store.form_of(self.wrap), store.form_of(self.loss_fn)
        target = tree_map(_described, self.target)
        return store.key_of(
            self.device,
            *forms,
            target,
            self.training,
            self.splits,
            self.backward,
            self.compile,
            self.recompute,
            sorted(sizes.items()),
            count,
            ops,
        )

    @staticmethod
    def before(
        loss: LossCost | None,
        device: torch.device,
        wrap: Wrap,
        setting: Setting,
    ) -> Way:
        """How stages run under a setting, before a loss whose cost is known. Raises InputError for what
        Driver does not know either.
        """
        setting.refuse_backward()
        return Way(
            device,
            wrap,
            loss.function if loss is not None else None,
            loss.target if loss is not None else None,
            setting.training,
            setting.splits,
            setting.backward,
            setting.compile,
            setting.recompute,
        )

    def graphs(self, pipe: Staged, index: int, stage: Stage) -> Graphs | None:
        """The graphs that run a copy of a stage; None where autograd makes the backward."""
        if self.backward != "graph":
            return None
        return Graphs(
            pipe,
            index,
            RoleCode(self.compile),
            self.recompute,
            stage,
        )


def _described(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return str(leaf)
