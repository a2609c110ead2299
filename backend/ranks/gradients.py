"""The gradients of a whole pipeline, between the last backward and the update: what needs all ranks.

Tied gradients are summed, the norm is that of the whole model, and a GradScaler finds on every rank what it
finds on any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import (
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stagecut.backend.ranks.agree import Calls
from stagecut.backend.ranks.faults import Faults
from stagecut.backend.ranks.stage import Group
from stagecut.backend.ranks.tied import Tied
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Program
from stagecut.ir.keywords import short_errors

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of `Optimizer.step`, the optimizer first."""


class NonFiniteError(StagecutError, RuntimeError):
    """The norm of the gradients is infinite or not a number, and `error_if_nonfinite` was asked for."""

    __module__ = "stagecut"


class Gradients:
    """The gradients of this rank's stages of a pipe, and what they need of the other ranks. Every rank makes
    one. `homes` are the ranks of the stages, by stage.
    """

    def __init__(
        self,
        pipe: Staged,
        homes: Sequence[int],
        group: Group,
        device: torch.device,
        faults: Faults,
        calls: Calls,
    ) -> None:
        self.tied = Tied(pipe, homes, group, faults, calls)
        self.scaler: GradScaler | None = None
        self._pipe = pipe
        self._group = group
        self._device = device
        self._stages = [i for i, home in enumerate(homes) if home == faults.rank]
        self._faults = faults
        self._calls = calls
        _watch_updates()
        _watch_scalers()
        _alive.add(self)

    def parameters(self) -> list[Parameter]:
        """The parameters this rank holds, each once."""
        stages = [self._pipe.stages[index] for index in self._stages]
        return list(dict.fromkeys(p for stage in stages for p in stage.parameters()))

    def attach(self, optimizer: Optimizer) -> None:
        """Every update by `optimizer` is made with summed gradients, and is made on all ranks or on none."""
        if isinstance(optimizer, LBFGS):
            raise StagecutError(
                "LBFGS needs the gradients of all parameters together, and a rank has only its own",
                hint="take an optimizer that treats every parameter by itself, such as AdamW",
            )
        if _attached.get(optimizer) is self:
            return
        _attached[optimizer] = self

        @short_errors
        def whole(_: Optimizer, args: Any, kwargs: Any) -> Call:
            return _before_update(lambda: self.tied.sum("optimizer.step"), args, kwargs)

        optimizer.register_step_pre_hook(whole)

    def attach_scaler(self, scaler: GradScaler) -> None:
        """Losses are scaled by `scaler` for the backward; its scale exists on ranks without a loss, too."""
        self.scaler = scaler
        scaler.scale(torch.zeros((), device=self._device))

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss as the backward starts from it."""
        if self.scaler is None:
            return loss
        return self.scaler.scale(loss)

    def clip_norm(
        self,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        foreach: bool | None,
    ) -> torch.Tensor:
        """The norm of the gradients of the whole model, which have at most `max_norm` afterwards."""
        self._calls.announce("driver.clip_grad_norm_")
        self.tied.sum()
        total = self._total_norm(norm_type, foreach)
        if error_if_nonfinite and not total.isfinite():
            raise NonFiniteError(
                f"the norm of order {norm_type} of the gradients is {total.item()}",
                hint="leave out error_if_nonfinite, and skip the step where the norm is not finite",
            )
        for parameters in _alike(self.parameters()):
            clip_grads_with_norm_(parameters, max_norm, total, foreach)
        return total

    def clip_value(self, clip_value: float, foreach: bool | None) -> None:
        """Every element of the gradients of the whole model is within `clip_value` of zero."""
        self.tied.sum()
        for parameters in _alike(self.parameters()):
            clip_grad_value_(parameters, clip_value, foreach)

    def _total_norm(self, order: float, foreach: bool | None) -> torch.Tensor:
        """The norm over all ranks, in which every parameter counts once; bit for bit the same on each."""
        repeated = {id(parameter) for parameter in self.tied.repeated()}
        counted = [p for p in self.parameters() if id(p) not in repeated]
        norms = [_local_norm(same, order, foreach) for same in _alike(counted)]
        own = _norm_of_norms([norm.to(self._device) for norm in norms], order)
        if own is None:
            nothing = math.inf if order < 0 else 0.0
            own = torch.tensor(nothing, dtype=torch.float64, device=self._device)
        everywhere = [
            torch.empty_like(own) for _ in range(dist.get_world_size(self._group))
        ]
        with self._faults.together():
            dist.all_gather(everywhere, own, self._group)
        total = _norm_of_norms(everywhere, order)
        assert total is not None
        return total.to(_norm_dtype(self._pipe.program))

    def _before_unscaling(self, optimizer: Optimizer) -> None:
        """The gradients that `optimizer` will take are whole, so that what overflows in a sum is seen."""
        self._calls.announce("step or unscale_ of a GradScaler")
        if optimizer in _attached:
            self.tied.sum()
        else:
            self.tied.refuse_update(optimizer)

    def _agree(self, overflowed: dict[torch.device, torch.Tensor]) -> None:
        """Every flag of `overflowed` (device -> flag) is 1.0 when a gradient of any rank is not finite."""
        flags = [flag.to(self._device).reshape(()) for flag in overflowed.values()]
        anywhere = torch.zeros((), device=self._device)
        if flags:
            anywhere = torch.stack(flags).amax()
        with self._faults.together():
            dist.all_reduce(anywhere, dist.ReduceOp.MAX, self._group)
        for flag in overflowed.values():
            flag.copy_(anywhere)
        # a scaler refuses to step where nothing was looked at
        overflowed.setdefault(self._device, anywhere)


def _alike(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """The parameters that have a gradient, by the mesh that they are sharded over: torch computes with those
    of one mesh at a time.
    """
    by_mesh: dict[Any, list[Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            mesh = grad.device_mesh if isinstance(grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    yield from by_mesh.values()


def _local_norm(
    parameters: Sequence[Parameter], order: float, foreach: bool | None
) -> torch.Tensor:
    """The norm of the gradients of parameters that are sharded alike: over all shards."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(grads, order, foreach=foreach)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole.detach().double()


def _norm_dtype(program: Program) -> torch.dtype:
    """The same on every rank, whatever the dtypes of its gradients are."""
    for entry in program.state:
        if entry.kind == "param" and str(entry.type).startswith("f64"):
            return torch.float64
    return torch.float32


def _norm_of_norms(norms: Sequence[torch.Tensor], order: float) -> torch.Tensor | None:
    """The norm of what has these norms; None for nothing. The norm of order 0 counts, so counts are added."""
    if not norms:
        return None
    stacked = torch.stack(list(norms))
    return stacked.sum() if order == 0 else torch.linalg.vector_norm(stacked, order)


# --- what happens in optimizers and scalers of torch's ------------------------------------------------

_alive: WeakSet[Gradients] = WeakSet()
_attached: WeakKeyDictionary[Optimizer, Gradients] = WeakKeyDictionary()


def _before_update(
    work: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """`work` is done before an update: now, and after every call of a closure that makes new gradients."""
    work()

    def followed(closure: Callable[[], Any]) -> Callable[[], Any]:
        @short_errors
        def call() -> Any:
            loss = closure()
            work()
            return loss

        return call

    optimizer, *rest = args
    rest = [followed(argument) if callable(argument) else argument for argument in rest]
    keywords = {**kwargs}
    if keywords.get("closure") is not None:
        keywords["closure"] = followed(keywords["closure"])
    return (optimizer, *rest), keywords


@cache
def _watch_updates() -> None:
    """An optimizer that is not attached is refused an update with parts of gradients."""

    @short_errors
    def check(optimizer: Optimizer, args: Any, kwargs: Any) -> Call | None:
        if optimizer in _attached:
            return None

        def refuse() -> None:
            for gradients in list(_alive):
                gradients.tied.refuse_update(optimizer)

        return _before_update(refuse, args, kwargs)

    register_optimizer_step_pre_hook(check)


@cache
def _watch_scalers() -> None:
    """Every GradScaler finds in the gradients of a pipeline's optimizer what it finds on any rank.

    torch has no hook there: a scaler looks at the gradients of one process, and skips the update of that
    process alone.
    """
    for scaler in (GradScaler, ShardedGradScaler):
        setattr(scaler, "_unscale_grads_", _on_all_ranks(scaler._unscale_grads_))  # noqa: B010


def _on_all_ranks(unscale: Callable[..., Any]) -> Callable[..., Any]:
    @short_errors
    @wraps(unscale)
    def unscaled(
        scaler: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any
    ) -> dict[torch.device, torch.Tensor]:
        gradients = _gradients_of(optimizer)
        if gradients is None:
            alone: dict[torch.device, torch.Tensor] = unscale(
                scaler, optimizer, *args, **kwargs
            )
            return alone
        gradients._before_unscaling(optimizer)
        overflowed: dict[torch.device, torch.Tensor] = unscale(
            scaler, optimizer, *args, **kwargs
        )
        gradients._agree(overflowed)
        return overflowed

    return unscaled


def _gradients_of(optimizer: Optimizer) -> Gradients | None:
    """The gradients that `optimizer` is attached to, else those of a pipeline whose parameters it has."""
    if optimizer in _attached:
        return _attached[optimizer]
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for gradients in list(_alive):
        if any(id(p) in updated for p in gradients.parameters()):
            return gradients
    return None
