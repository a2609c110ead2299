"""Some micro-batches of one stage, run and timed as torch's runtime runs them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import _backward
from torch.utils._pytree import tree_map

from stagecut.backend.costs.loss import loss_alone, output_of
from stagecut.backend.costs.runtime import Parts, Timing
from stagecut.backend.costs.way import Way
from stagecut.backend.stages.crossing import backward_is_whole
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.modules import Stage
from stagecut.backend.stages.run import results_of
from stagecut.backend.stages.staged import Staged
from stagecut.ir.types import carries_grad

ROUNDS = 2
"""Micro-batches that are in flight in a measurement."""

WARM_UP = 2
REPEATS = 5
"""Measurements before the first that counts, and those of which the median counts."""

FILLED = 0.1
MOST_BEFORE = 50
"""Seconds, and at most how many micro-batches, for which a GPU computes before a measurement."""

CYCLES = 2e9
"""The cycles of a GPU's clock in a second, about."""


def _goal(leaf: Any, device: torch.device) -> Any:
    """A part of a target on the device."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.zeros_like(leaf, device=device) if leaf.is_meta else leaf.to(device)


_Back = tuple[list[torch.Tensor], Any, list[Any]]
"""What a backward needs: outputs, their gradients, inputs."""


class Runner:
    """Runs a stage as torch's runtime does."""

    def __init__(
        self,
        pipe: Staged,
        stage: Stage,
        module: nn.Module,
        given: Sequence[Any],
        way: Way,
        block: Any,
        graphs: Graphs | None = None,
    ) -> None:
        self._pipe = pipe
        self._module = module
        self._graphs = graphs
        if graphs is not None:
            graphs.begin(module)
        self._given = given
        self._way = way
        self._block = block
        self._parameters = [p for p in stage.parameters() if p.requires_grad]
        is_last = block is pipe.program.stages[-1]
        self._has_loss = is_last and way.loss_fn is not None
        self._target = tree_map(lambda leaf: _goal(leaf, way.device), way.target)
        self._cuda = way.device.type == "cuda"
        self._before = 0
        self._ahead = 0.0

    def seconds(self) -> Timing[float]:
        """The medians of some measurements, and the least of the host."""
        if self._graphs is not None:
            # the first run shows whether they can
            self._round(False)
        if self._runs_by_graphs:
            device, host = self._least(True)
            return Timing(_of_graphs(*device), _of_graphs(*host))
        device, host = self._least(False)
        forward, backward, _ = device
        starts, starts_backward, _ = host
        inputs = backward, starts_backward
        weights = 0.0, 0.0
        if self._can_split():
            split, starts_split = self._least(True)
            inputs = split[1], starts_split[1]
            weights = split[2], starts_split[2]
        return Timing(
            Parts(forward, backward, inputs[0], weights[0]),
            Parts(starts, starts_backward, inputs[1], weights[1]),
        )

    @property
    def _runs_by_graphs(self) -> bool:
        """Whether graphs run the stage: there is a note where they do not."""
        if self._graphs is None or not self._way.training:
            return False
        return not self._graphs.note

    def _least(self, split: bool) -> tuple[list[float], list[float]]:
        self._before = 0
        self._ahead = 0.0
        for _ in range(WARM_UP):
            self._round(split)
        runs = [self._round(split)]
        if self._cuda:
            device, host = (ROUNDS * sum(part) for part in runs[0])
            self._before = min(MOST_BEFORE, math.ceil(FILLED / device))
            self._ahead = 1.5 * host if host > 0.7 * device else 0.0
        runs += [self._round(split) for _ in range(REPEATS)]
        devices = zip(*(device for device, _ in runs[1:]), strict=True)
        hosts_of_all = zip(*(host for _, host in runs), strict=True)
        return [statistics.median(part) for part in devices], [
            min(p) for p in hosts_of_all
        ]

    def _can_split(self) -> bool:
        """True where torch splits the backward of the stage: none that is wrapped, nor one that has no
        gradient to hand on.
        """
        arriving = {v for v in self._block.inputs if carries_grad(v.type)}
        leaving = {v for v in self._block.outputs if carries_grad(v.type)}
        if not (self._way.splits and arriving) or self._way.wrap is not None:
            return False
        return not backward_is_whole(self._block, arriving, leaving)

    def _round(self, split: bool) -> tuple[list[float], list[float]]:
        """Seconds for one micro-batch, on the device and on the host: forward, backward or its part for the
        inputs, its part for the weights.
        """
        with torch.set_grad_enabled(self._way.training):
            self._fill()
            runs, forward = self._timed(lambda _: self._forward(), range(ROUNDS))
        backs: list[Any] = []
        for outputs, inputs in runs:
            if outputs:
                backs.append((outputs, self._grads(outputs), inputs))
        if not split:
            _, backward = self._timed(self._whole, backs)
            _, weights = self._timed(lambda _: None, ())
        else:
            rest, backward = self._timed(self._for_inputs, backs)
            _, weights = self._timed(lambda weights_of: weights_of(), rest)
        device, host = zip(forward, backward, weights, strict=True)
        return [*device], [*host]

    def _whole(self, back: _Back) -> None:
        _whole_backward(*back)
        if self._graphs is not None:
            self._graphs.take_weights()()

    def _for_inputs(self, back: _Back) -> Callable[[], None]:
        """Computes the gradients of the inputs. Returns what computes those of the weights."""
        if self._graphs is not None and self._runs_by_graphs:
            _whole_backward(*back)
            return self._graphs.take_weights()
        outputs, grads, inputs = back
        # torch detaches them in place, and a backward may still read them
        ends = [output.clone() for output in outputs]
        parameters = iter(self._parameters)
        _, groups = _backward.stage_backward_input(ends, grads, inputs, parameters)
        return partial(_weights_of_groups, self._parameters, groups)

    def _timed(
        self, run: Callable[[Any], Any], items: Iterable[Any]
    ) -> tuple[list[Any], tuple[float, float]]:
        """The results for all items, and the seconds for one of ROUNDS, on the device and on the host."""
        self._wait()
        if self._ahead:
            torch.cuda._sleep(int(self._ahead * CYCLES))
        begin, first = self._mark()
        results = [run(item) for item in items]
        end, last = self._mark()
        host = (end - begin) / ROUNDS
        if not self._cuda:
            return results, (host, 0.0)
        self._wait()
        return results, (first.elapsed_time(last) / 1e3 / ROUNDS, host)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._way.device)

    def _fill(self) -> None:
        """A GPU works like this for some time, so that it has the clock rate of long work."""
        for _ in range(self._before):
            outputs, inputs = self._forward()
            if outputs:
                self._whole((outputs, self._grads(outputs), inputs))

    def _mark(self) -> tuple[float, Any]:
        """The present moment on the host, and an event on a GPU."""
        if not self._cuda:
            return time.perf_counter(), None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._way.device))
        return time.perf_counter(), event

    def _forward(self) -> tuple[list[torch.Tensor], list[Any]]:
        """The outputs from which the backward starts, and the inputs."""
        inputs = [
            x.detach().requires_grad_(x.requires_grad)
            if isinstance(x, torch.Tensor)
            else x
            for x in self._given
        ]
        results: Sequence[Any] | None = None
        if self._graphs is not None:
            results = self._graphs.run(inputs)
        if results is None:
            # the stage may write what it is given
            results = results_of(self._module(*inputs), self._block)
        if self._has_loss:
            results = (self._loss(results),)
        outputs = [
            r for r in results if isinstance(r, torch.Tensor) and r.requires_grad
        ]
        return outputs if self._way.training else [], inputs

    def _loss(self, results: Sequence[Any]) -> torch.Tensor:
        by_value = dict(zip(self._block.outputs, results, strict=True))
        leaves = [by_value.get(leaf, leaf) for leaf in self._pipe.program.outputs]
        assert self._way.loss_fn is not None
        output = output_of(self._pipe._call_spec, leaves, self._way.loss_fn)
        return loss_alone(self._way.loss_fn(output, self._target))

    def _grads(self, outputs: list[torch.Tensor]) -> Any:
        """The gradients that come back: None behind a loss."""
        if self._has_loss:
            return None
        return [torch.ones_like(output) for output in outputs]


def _whole_backward(outputs: list[torch.Tensor], grads: Any, inputs: list[Any]) -> None:
    # torch takes a loss bare
    ends: Any = outputs if grads is not None else outputs[0]
    _backward.stage_backward(ends, grads, inputs)


def _weights_of_groups(parameters: Sequence[nn.Parameter], groups: Any) -> None:
    _backward.stage_backward_weight(iter(parameters), groups)


def _of_graphs(forward: float, inputs: float, weights: float) -> Parts[float]:
    """The seconds of a stage whose backward is two functions, whether or not the schedule divides them."""
    return Parts(forward, inputs + weights, inputs, weights)
