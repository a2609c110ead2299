"""Steps of a driver as CUDA graphs: `Driver(..., cuda_graphs=True)`.

All kernels of a step on this rank, and the messages among them, are recorded once; from then on the host
starts them in one go. The recording reads copies of the micro-batches, and leaves gradients, losses and
outputs in memory of its own. Ranks need not agree about when they record: what one of them replays, another
may do for the first time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map

from stagecut.backend.ranks.losses import Losses
from stagecut.backend.ranks.stage import BuiltStage
from stagecut.ir.errors import InputError, StagecutError

Run = Callable[[], Any]
Replay = Callable[[], None]
Record = Callable[[Run], tuple[Replay, Any]]
Grads = dict[torch.Tensor, torch.Tensor | None]

WARM_UP = 2
"""Steps that run as they are before one is recorded: libraries set themselves up, functions are compiled."""

MOST = 4
"""Recordings of a driver, each of which has the memory of a step. Steps of further sizes run as they are."""


def recorded(
    run: Run, what: str, stream: torch.cuda.Stream | None = None
) -> tuple[Replay, Any]:
    """The kernels of `run` as a graph: what starts them again, and the tensors in which results are then. The
    graph has memory of its own, because others may be replayed at the same time.

    Raises StagecutError where `run` cannot be captured; `what` it is.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # other threads, such as one that watches over messages, may ask the device what they like
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = run()
    except RuntimeError as error:
        raise StagecutError(
            f"{what} cannot be captured in a CUDA graph: {error}",
            hint="leave cuda_graphs=True away, or what waits for the device or draws from it",
        ) from error
    return graph.replay, results


@dataclass
class Step:
    """A step that `run` makes: the stages of this rank, the losses, and what gets gradients: the parameters
    of the stages, and those that the loss function has read besides.
    """

    run: Run
    stages: Sequence[BuiltStage]
    losses: Losses
    parameters: Sequence[torch.Tensor]
    of_loss: Sequence[torch.Tensor] = ()

    @property
    def graded(self) -> list[torch.Tensor]:
        """Each tensor that gets a gradient, once."""
        return list(dict.fromkeys([*self.parameters, *self.of_loss]))

    @property
    def data(self) -> tuple[Any, ...]:
        """The micro-batches, and what the loss takes besides."""
        return self.stages[0].microbatches, *self.losses.given

    @data.setter
    def data(self, data: tuple[Any, ...]) -> None:
        for stage in self.stages:
            stage.microbatches = data[0]
        self.losses.begin(*data[1:])

    @property
    def left(self) -> tuple[Any, ...]:
        """The outputs of the micro-batches, and the losses."""
        return [stage.results for stage in self.stages], self.losses.collected

    @left.setter
    def left(self, left: tuple[Any, ...]) -> None:
        for stage, results in zip(self.stages, left[0], strict=True):
            stage.results = results
        self.losses.collected = left[1]


class StepGraphs:
    """The steps of a driver on a CUDA device: run as they are, recorded, and replayed."""

    def __init__(self, device: torch.device, record: Record | None = None) -> None:
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        self._record = record or (
            lambda run: recorded(run, "the step of this rank", self._stream)
        )
        self._runs: Counter[Any] = Counter()
        self._recordings: dict[Any, _Recording] = {}

    def run(self, step: Step) -> None:
        """The step is made. Raises StagecutError for one that cannot be recorded."""
        key = _key(step)
        self._runs[key] += 1
        if key in self._recordings and not self._recordings[key].fits():
            del self._recordings[key]
        if key not in self._recordings:
            if self._runs[key] <= WARM_UP or len(self._recordings) == MOST:
                with self._beside():
                    step.run()
                return
            refuse_unrecordable(step)
            self._recordings[key] = _Recording(step, self._record)
        self._recordings[key].replay(step)

    def drop(self) -> None:
        """No step is recorded. The next ones run as they are, and are recorded again."""
        self._recordings.clear()
        self._runs.clear()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Inside, kernels run in the stream in which steps are recorded: autograd adds a gradient in the
        stream in which it first did.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)


class _Recording:
    """A step that was recorded."""

    def __init__(self, step: Step, record: Record) -> None:
        given, left = step.data, step.left
        held: Grads = {parameter: parameter.grad for parameter in step.graded}
        device = step.stages[0].device
        self._own = tree_map(lambda leaf: _own(leaf, device), given)
        step.data = self._own
        for parameter in held:
            parameter.grad = None
        self._replay, _ = record(step.run)
        self._left = step.left
        self._grads: Grads = {parameter: parameter.grad for parameter in held}
        self._weights = [_weight(parameter) for parameter in held]
        step.data, step.left = given, left
        for parameter, grad in held.items():
            parameter.grad = grad

    def fits(self) -> bool:
        """False where a weight lies elsewhere by now, or was frozen or unfrozen."""
        return self._weights == [_weight(parameter) for parameter in self._grads]

    def replay(self, step: Step) -> None:
        """The step is made with the micro-batches that `step` has now."""
        for own, given in zip(
            tree_flatten(self._own)[0], tree_flatten(step.data)[0], strict=True
        ):
            if isinstance(own, torch.Tensor) and own is not given:
                own.copy_(given, non_blocking=True)
        before = {
            parameter: parameter.grad.clone()
            if parameter.grad is own
            else parameter.grad
            for parameter, own in self._grads.items()
            if parameter.grad is not None
        }
        self._replay()
        for parameter, grad in self._grads.items():
            _give(parameter, grad, before.get(parameter))
        step.left = tree_map(copied, self._left)


def _give(
    parameter: torch.Tensor, grad: torch.Tensor | None, before: torch.Tensor | None
) -> None:
    """The parameter has the gradient of this step, and that of before."""
    if grad is None or before is None:
        parameter.grad = before if grad is None else grad
    elif parameter.grad is grad:
        grad.add_(before)
    else:
        before.add_(grad)


def _own(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf


def copied(leaf: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _key(step: Step) -> Any:
    """All that a recording takes from a step but the contents of tensors."""
    leaves, spec = tree_flatten(step.data)
    modules = [part for stage in step.stages for part in stage.submod.modules()]
    buffers = [buffer for stage in step.stages for buffer in stage.submod.buffers()]
    return (
        tuple(map(id, step.stages)),
        str(spec),
        *map(_form, leaves),
        *(part.training for part in modules),
        *map(_weight, step.parameters),
        *(buffer.data_ptr() for buffer in buffers),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )


def _weight(parameter: torch.Tensor) -> tuple[int, bool]:
    return parameter.data_ptr(), parameter.requires_grad


def _form(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.stride(), leaf.device, leaf.requires_grad
    return type(leaf), leaf


def refuse_drawing(draws: bool) -> None:
    """Raises InputError where the stages draw random numbers, which a recording would draw again."""
    if draws:
        raise InputError(
            "cuda_graphs=True, and the stages draw random numbers, or may: each step has its own",
            hint="dropout=0.0, or leave cuda_graphs=True away",
        )


def refuse_unrecordable(step: Step) -> None:
    """Returns for a step of which a recording does all. Raises StagecutError for another."""
    for stage in step.stages:
        for part in stage.submod.modules():
            if isinstance(part, FSDPModule | DistributedDataParallel):
                raise _unrecordable(
                    f"{type(part).__name__} is around stage {stage.stage_index}"
                )
    for parameter in step.graded:
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise _unrecordable("a parameter has hooks, which run in Python")
    leaves, _ = tree_flatten(step.data)
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
        raise _unrecordable("an input carries gradient, which would go to a copy of it")


def _unrecordable(why: str) -> StagecutError:
    return StagecutError(
        f"a step cannot be recorded in a CUDA graph: {why}",
        hint="leave cuda_graphs=True away",
    )
