"""The user's loss function on the rank of the last stage: what it is called with, what it may return, and how
the losses and metrics of the micro-batches become those of the batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from stagecut.ir.errors import InputError, nearest


class StepLosses(list[torch.Tensor]):
    """The losses of the micro-batches of one call, in a list.

    losses: one scalar for each micro-batch. batch: the loss of the whole batch, whose gradient the step
    accumulated; None without losses. metrics: what the loss function returned besides, joined over the
    micro-batches; None when it returned none.
    """

    def __init__(
        self,
        losses: Sequence[torch.Tensor] = (),
        batch: torch.Tensor | None = None,
        metrics: Any = None,
    ) -> None:
        super().__init__(losses)
        self.batch = batch
        self.metrics = metrics

    def __getattr__(self, name: str) -> NoReturn:
        """Raises AttributeError; for what a tensor has, it names the loss of the batch."""
        what = f"'{type(self).__name__}' object has no attribute '{name}'"
        if name == "backward":
            what += ": driver.step has made the gradients"
        elif hasattr(torch.Tensor, name) and not name.startswith("_"):
            what += (
                ": it is the list of the losses of the micro-batches\n"
                f"  try: losses.batch.{name}, of the loss of the batch"
            )
        raise AttributeError(what)


class Losses:
    """Calls `loss_fn(output, target, **loss_kwargs)` for each micro-batch of one call of the driver.

    It returns a loss, or a loss and metrics. With `normalize_by`, the name of a metric, losses are sums, and
    that metric is how many things each is a sum over.

    A backward begins before all of these numbers are known. It divides by what the first micro-batch lets
    expect; `correction` is the factor that its gradients lack.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        count: int,
        scale: float,
        normalize_by: str | None,
    ) -> None:
        self.loss_fn = loss_fn
        self._count = count
        self._scale = scale
        self._by = normalize_by
        self.begin([], [])

    def begin(self, targets: Sequence[Any], kwargs: Sequence[dict[str, Any]]) -> None:
        """A call of the driver begins, with these targets and keyword arguments of its micro-batches, none of
        either for [].
        """
        self._targets = targets
        self._kwargs = kwargs
        self._losses: list[torch.Tensor] = []
        self._numbers: list[torch.Tensor] = []
        self._metrics: list[Any] = []
        self._expected: torch.Tensor | None = None

    @property
    def given(self) -> tuple[Any, Any]:
        """The targets and the keyword arguments of the micro-batches."""
        return self._targets, self._kwargs

    @property
    def collected(self) -> tuple[Any, ...]:
        """What the micro-batches have given so far."""
        return self._losses, self._numbers, self._metrics, self._expected

    @collected.setter
    def collected(self, collected: tuple[Any, ...]) -> None:
        self._losses, self._numbers, self._metrics, self._expected = collected

    def of(self, output: Any, index: int) -> torch.Tensor:
        """The loss of micro-batch `index`, as it goes backward."""
        targets = self._targets[index : index + 1]
        kwargs: dict[str, Any] = {}
        if self._kwargs:
            kwargs = self._kwargs[index]
        returned = self.loss_fn(output, *targets, **kwargs)
        loss, metrics = self._parts(returned)
        self._metrics.append(metrics)
        self._losses.append(loss.detach())
        if self._by is None:
            return loss * self._scale
        number = self._number(metrics, loss)
        self._numbers.append(number)
        if self._expected is None:
            first = number.clamp(min=1)
            self._expected = first * self._count
        return loss / self._expected

    def _parts(self, returned: Any) -> tuple[torch.Tensor, Any]:
        """The loss and the metrics in what the loss function returned."""
        loss = returned
        metrics: Any = None
        if isinstance(returned, tuple) and len(returned) == 2:
            loss, metrics = returned
        what = f"a {type(returned).__name__}"
        if isinstance(loss, torch.Tensor):
            if loss.numel() == 1:
                return loss.reshape(()), _detached(metrics)
            what = f"a tensor of shape {list(loss.shape)}"
        raise InputError(
            f"loss_fn returns {what}, not a loss of one element",
            where=place_of_loss(self.loss_fn),
            hint="return the loss, or (loss, metrics)",
        )

    def _number(self, metrics: Any, loss: torch.Tensor) -> torch.Tensor:
        """How many things the loss is a sum over."""
        by_name: dict[Any, Any] = {}
        if isinstance(metrics, dict):
            by_name = metrics
        if self._by not in by_name:
            names = map(str, by_name)
            raise InputError(
                f"normalize_by={self._by!r}, and loss_fn returns no metric of that name",
                where=place_of_loss(self.loss_fn),
                hint=f"return (sum, {{{self._by!r}: number}}); "
                f"{nearest(str(self._by), names)}",
            )
        number = torch.as_tensor(by_name[self._by], device=loss.device)
        return number.to(loss.dtype)

    @property
    def correction(self) -> torch.Tensor | None:
        """The factor between the gradients of this call and those of its batch; None where they are equal."""
        if self._expected is None:
            return None
        return self._expected / torch.stack(self._numbers).sum()

    def result(self) -> StepLosses:
        """The losses and metrics of the call, when its last micro-batch is through."""
        if not self._losses:
            return StepLosses()
        metrics = joined_metrics(self._metrics, self._numbers, self._by)
        losses = torch.stack(self._losses)
        if self._by is None:
            whole = losses.mean() if self._scale != 1.0 else losses.sum()
            return StepLosses(self._losses, whole, metrics)
        numbers = torch.stack(self._numbers)
        means = (losses / numbers).unbind()
        whole = losses.sum() / numbers.sum()
        return StepLosses(means, whole, metrics)


def carriers(outputs: Sequence[Any]) -> list[torch.Tensor]:
    """The outputs from which a backward can begin."""
    tensors = (output for output in outputs if isinstance(output, torch.Tensor))
    return [tensor for tensor in tensors if tensor.requires_grad]


def refuse_no_gradient(
    loss: torch.Tensor,
    index: int,
    loss_fn: Callable[..., Any],
    outputs: Sequence[Any],
    trains: Callable[[], bool],
) -> None:
    """Returns when a backward can begin from the loss of micro-batch `index`. Raises InputError otherwise, as
    nothing would be trained. `trains` tells whether any parameter of the model is trained.
    """
    if loss.requires_grad:
        return
    hint = (
        "compute it from the output itself, without detach(), item(), numpy or no_grad(); for a micro-batch "
        "that trains nothing, return output.sum() * 0"
    )
    if not carriers(outputs):
        hint = "no output of the model carries one, as each is detached, rounded or an index: return another"
        if not trains():
            hint = "all parameters are frozen: requires_grad_(True), or driver.eval(...) for a forward alone"
    raise InputError(
        f"the loss of micro-batch {index} carries no gradient, so that nothing would be trained",
        where=place_of_loss(loss_fn),
        hint=hint,
    )


def no_loss(outputs: Sequence[Any]) -> torch.Tensor:
    """A loss in the place of one that failed: the gradients of these outputs are zeros."""
    total = torch.zeros(())
    for output in carriers(outputs):
        whole = output.sum() * 0
        total = total.to(whole.device) + (whole.real if whole.is_complex() else whole)
    return total


def put_aside(
    parameters: Sequence[torch.nn.Parameter],
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The gradients of the parameters, which have none afterwards."""
    aside: dict[torch.nn.Parameter, torch.Tensor] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            aside[parameter] = parameter.grad
            parameter.grad = None
    return aside


def add_corrected(
    parameters: Sequence[torch.nn.Parameter],
    aside: dict[torch.nn.Parameter, torch.Tensor],
    factor: torch.Tensor | None,
) -> None:
    """The gradients are those put aside, and `factor` times those of now."""
    for parameter in parameters:
        before = aside.get(parameter)
        now = parameter.grad
        if now is not None and factor is not None:
            local = now.to_local() if isinstance(now, DTensor) else now
            local.mul_(factor.to(local.device))
        if before is None:
            continue
        if now is not None:
            before.add_(now)
        parameter.grad = before


def takes_no_target(loss_fn: Callable[..., Any], names: Sequence[str] = ()) -> bool:
    """True when `loss_fn(output, **kwargs)` is a call that fits, with keyword arguments of these names."""
    called = loss_fn.forward if isinstance(loss_fn, torch.nn.Module) else loss_fn
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return True  # a function of C tells nothing
    try:
        signature.bind(None, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def joined_metrics(
    parts: Sequence[Any], weights: Sequence[Any], total: str | None
) -> Any:
    """Metrics of the micro-batches as those of their batch, in the structure of the first.

    Whole numbers, and the metric called `total`, are summed. Floats are averaged, by `weights` where there
    are any. Tensors are joined along their first dim. All else stays a list of one per micro-batch.
    """
    first, spec = tree_flatten(parts[0])
    rows: list[list[Any]] = [[] for _ in first]
    for part in parts:
        leaves, other_spec = tree_flatten(part)
        if other_spec != spec:
            return list(parts)
        for row, leaf in zip(rows, leaves, strict=True):
            row.append(leaf)
    merged = [_merged(row, weights) for row in rows]
    whole = tree_unflatten(merged, spec)
    if total is not None:
        whole[total] = sum(part[total] for part in parts)
    return whole


def _merged(row: list[Any], weights: Sequence[Any]) -> Any:
    """The values of one metric put together."""
    if _are_all(row, torch.Tensor):
        return _merged_tensors(row, weights)
    if _are_all(row, int) and not any(isinstance(number, bool) for number in row):
        return sum(row)
    if _are_all(row, float):
        return _mean(row, [float(weight) for weight in weights])
    if _are_all(row, type(None)):
        return None
    return row


def _are_all(row: Sequence[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in row)


def _merged_tensors(row: list[torch.Tensor], weights: Sequence[Any]) -> Any:
    first = row[0]
    if first.dim():
        if any(tensor.shape[1:] != first.shape[1:] for tensor in row):
            return row
        return torch.cat(row)
    if first.is_floating_point():
        return _mean(row, weights)
    numbers = torch.stack(row)
    return numbers.sum()


def _mean(row: Sequence[Any], weights: Sequence[Any]) -> Any:
    """The mean of some numbers, by weights where there are any."""
    if not weights:
        weights = [1.0] * len(row)
    total = sum(weights)
    if isinstance(total, float) and not total:
        return math.nan
    mean = 0
    for number, weight in zip(row, weights, strict=True):
        mean = mean + number * weight / total
    return mean


def _detached(metrics: Any) -> Any:
    return tree_map(_detached_leaf, metrics)


def _detached_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach()


def place_of_loss(function: Callable[..., Any]) -> str:
    """`file:line, name` of a loss function, as far as it can be told."""
    while isinstance(function, partial):
        function = function.func
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    if not code:
        return name
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}, {name}"
