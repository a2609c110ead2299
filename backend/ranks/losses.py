"""The user's loss function on the rank of the last stage: what it is called with, what it may return, and how
the losses and metrics of the micro-batches become those of the batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from stagecut.ir.errors import InputError, nearest


class StepLosses(list[torch.Tensor]):
    """The losses of the micro-batches of one call.

    batch: the loss of the whole batch, whose gradient the step accumulated; None without losses. metrics:
    what the loss function returned besides, joined over the micro-batches; None when it returned none.
    """

    def __init__(
        self,
        losses: Sequence[torch.Tensor] = (),
        batch: torch.Tensor | None = None,
        metrics: Any = None,
    ) -> None:
        super().__init__(losses)
        self.batch, self.metrics = batch, metrics


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
        self._count, self._scale, self._by = count, scale, normalize_by
        self.begin([], [])

    def begin(self, targets: Sequence[Any], kwargs: Sequence[dict[str, Any]]) -> None:
        """A call of the driver begins, with these targets and keyword arguments of its micro-batches, none of
        either for [].
        """
        self._targets, self._kwargs = targets, kwargs
        self._losses: list[torch.Tensor] = []
        self._numbers: list[torch.Tensor] = []
        self._metrics: list[Any] = []
        self._expected: torch.Tensor | None = None

    def of(self, output: Any, index: int) -> torch.Tensor:
        """The loss of micro-batch `index`, as it goes backward."""
        targets = self._targets[index : index + 1]
        kwargs = self._kwargs[index] if self._kwargs else {}
        returned = self.loss_fn(output, *targets, **kwargs)
        loss, metrics = self._parts(returned)
        self._metrics.append(metrics)
        self._losses.append(loss.detach())
        if self._by is None:
            return loss * self._scale
        number = self._number(metrics, loss)
        self._numbers.append(number)
        if self._expected is None:
            self._expected = number.clamp(min=1) * self._count
        return loss / self._expected

    def _parts(self, returned: Any) -> tuple[torch.Tensor, Any]:
        pair = isinstance(returned, tuple) and len(returned) == 2
        loss, metrics = returned if pair else (returned, None)
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return loss.reshape(()), _detached(metrics)
        what = (
            f"a tensor of shape {list(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else f"a {type(returned).__name__}"
        )
        raise InputError(
            f"loss_fn returns {what}, not a loss of one element",
            where=_name(self.loss_fn),
            hint="return the loss, or (loss, metrics)",
        )

    def _number(self, metrics: Any, loss: torch.Tensor) -> torch.Tensor:
        known = metrics if isinstance(metrics, dict) else {}
        if self._by not in known:
            raise InputError(
                f"normalize_by={self._by!r}, and loss_fn returns no metric of that name",
                where=_name(self.loss_fn),
                hint=f"return (sum, {{{self._by!r}: number}}); "
                f"{nearest(str(self._by), map(str, known))}",
            )
        return torch.as_tensor(known[self._by], device=loss.device).to(loss.dtype)

    @property
    def correction(self) -> float:
        """The factor between the gradients of this call and those of its batch."""
        if self._expected is None:
            return 1.0
        return float(self._expected / torch.stack(self._numbers).sum())

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
        return StepLosses(
            list((losses / numbers).unbind()), losses.sum() / numbers.sum(), metrics
        )


Told = tuple[StepLosses, float, tuple[int, ...]]
"""Losses, the factor that gradients lack, and the weights that the loss function read."""


def tell(
    mine: Told,
    share: bool,
    source: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Told:
    """What rank `source` has of these; without `share`, the losses stay there."""
    losses, factor, read = mine
    shared = losses if share else StepLosses()
    message = [(_moved(shared, torch.device("cpu")), factor, read)]
    dist.broadcast_object_list(message, group=group, group_src=source)
    if dist.get_rank(group) == source:
        return mine
    losses, factor, read = message[0]
    return _moved(losses, device), factor, read


def _moved(losses: StepLosses, device: torch.device) -> StepLosses:
    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    return StepLosses(
        [move(loss) for loss in losses],
        move(losses.batch),
        tree_map(move, losses.metrics),
    )


def put_aside(
    parameters: Sequence[torch.nn.Parameter],
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The gradients of the parameters, which have none afterwards."""
    aside = {p: p.grad for p in parameters if p.grad is not None}
    for parameter in aside:
        parameter.grad = None
    return aside


def add_corrected(
    parameters: Sequence[torch.nn.Parameter],
    aside: dict[torch.nn.Parameter, torch.Tensor],
    factor: float,
) -> None:
    """The gradients are those put aside, and `factor` times those of now."""
    for parameter in parameters:
        before, now = aside.get(parameter), parameter.grad
        if now is not None and factor != 1.0:
            now.mul_(factor)
        if before is not None:
            parameter.grad = before if now is None else before.add_(now)


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
    flat = [tree_flatten(part) for part in parts]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        return list(parts)
    rows = list(zip(*(leaves for leaves, _ in flat), strict=True))
    merged = [_merged(row, weights) for row in rows]
    whole = tree_unflatten(merged, spec)
    if total is not None:
        whole[total] = sum(part[total] for part in parts)
    return whole


def _merged(row: Sequence[Any], weights: Sequence[Any]) -> Any:
    if all(isinstance(one, torch.Tensor) for one in row):
        return _merged_tensors(row, weights)
    if all(isinstance(one, int) and not isinstance(one, bool) for one in row):
        return sum(row)
    if all(isinstance(one, float) for one in row):
        return _mean(row, [float(weight) for weight in weights] or [1.0] * len(row))
    return row[0] if all(one is None for one in row) else list(row)


def _merged_tensors(row: Sequence[torch.Tensor], weights: Sequence[Any]) -> Any:
    if row[0].dim():
        alike = all(one.shape[1:] == row[0].shape[1:] for one in row)
        return torch.cat(list(row)) if alike else list(row)
    if not row[0].is_floating_point():
        return torch.stack(list(row)).sum()
    return _mean(row, weights or [1.0] * len(row))


def _mean(row: Sequence[Any], weights: Sequence[Any]) -> Any:
    total = sum(weights)
    if isinstance(total, float) and not total:
        return math.nan
    return sum(one * weight / total for one, weight in zip(row, weights, strict=True))


def _detached(metrics: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, metrics
    )


def _name(function: Callable[..., Any]) -> str:
    """`loss_fn` at file:line, as far as it can be told."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{code.co_filename}:{code.co_firstlineno}, {name}" if code else name
