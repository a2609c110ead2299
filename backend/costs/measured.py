"""The seconds of a stage, measured as torch's runtime runs it: its forward, its backward, and both parts of a
backward that is split; with the loss, and in the form in which it will run.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import _backward
from torch.utils._pytree import tree_map

from stagecut.backend.costs import store
from stagecut.backend.costs.loss import LossCost, loss_alone, output_of
from stagecut.backend.costs.ops import known_shape
from stagecut.backend.costs.runtime import Parts, Timing
from stagecut.backend.costs.setting import Setting
from stagecut.backend.ranks.wrapped import Wrap
from stagecut.backend.stages.backwards import refuse_backward
from stagecut.backend.stages.crossing import backward_is_whole
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.modules import Stage
from stagecut.backend.stages.roles import RoleCode
from stagecut.backend.stages.run import results_of
from stagecut.backend.stages.staged import Staged
from stagecut.ir.aliases import storage_root
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import Op, Program, Value, transform
from stagecut.ir.ops import facts
from stagecut.ir.sizes import evaluate
from stagecut.ir.types import DTYPES, TensorType, carries_grad

ROUNDS = 2
"""Micro-batches that are in flight in a measurement."""

MOST_BLOCKS = 4
MOST_OPS = 200
"""Equal blocks that are timed in a row, and their ops: a GPU keeps a thousand kernels that wait."""

WARM_UP = 2
REPEATS = 5
"""Measurements before the first that counts, and those of which the median counts."""

FILLED = 0.1
MOST_BEFORE = 50
"""Seconds, and at most how many micro-batches, for which a GPU computes before a measurement."""

CYCLES = 2e9
"""The cycles of a GPU's clock in a second, about."""

SPREAD = 0.02
"""The standard deviation of parameters that are made for a measurement."""


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
        refuse_backward(setting.backward, setting.compile, setting.recompute)
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


@dataclass(frozen=True)
class Trial:
    """What timing needs: `cut(positions)` cuts a copy of the program in front of these ops; examples of the
    model's flat inputs.
    """

    cut: Callable[[Sequence[int]], Staged]
    examples: Sequence[Any] = ()


def torch_device(wanted: torch.device | str | None) -> torch.device:
    """The device. Raises InputError where torch does not know it, or has none."""
    try:
        device = torch.device(wanted or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError):
        raise InputError(
            f"profile_on={wanted!r} is no device of torch here",
            hint='"cpu" or "cuda:0"',
        ) from None
    return device


def time_spans(
    ops: Sequence[Op],
    spans: Sequence[tuple[int, int]],
    trial: Trial,
    way: Way,
    sizes: Mapping[str, int],
) -> list[Timing[float]]:
    """The seconds of each span of ops, from the store, or measured. Equal ones are timed once, some of them
    in a row, so that no weights stay in a cache; the last one has the loss.
    """
    keys = [signature(ops[begin:end]) for begin, end in spans]
    keys[-1] += " and the loss"
    rows = _rows_of(keys, spans)
    known: dict[str, Timing[float]] = {}
    places = {key: way.key(key, len(row), sizes) for key, row in rows.items()}
    for key, place in places.items():
        kept = store.read(place)
        if kept is not None:
            known[key] = kept
    missing = {key: row for key, row in rows.items() if key not in known}
    edges = {spans[row[0]][0] for row in missing.values()}
    edges |= {spans[row[-1]][1] for row in missing.values()}
    cuts = sorted(edges - {spans[0][0], spans[-1][1]})
    staged = trial.cut(cuts) if missing else None
    for key, row in missing.items():
        assert staged is not None
        stage = bisect_right(cuts, spans[row[0]][0])
        timing = measure(staged, stage, way, sizes, trial.examples)
        known[key] = timing.over(len(row))
        store.write(places[key], timing.over(len(row)))
    return [known[key] for key in keys]


def _rows_of(keys: Sequence[str], spans: Sequence[tuple[int, int]]) -> dict[str, range]:
    """Key -> the first spans in a row that have it, at most MOST_BLOCKS of them with MOST_OPS ops."""
    rows: dict[str, range] = {}
    begin = 0
    for key, group in itertools.groupby(keys):
        length = len([*group])
        first, last = spans[begin]
        most = max(1, min(MOST_BLOCKS, MOST_OPS // (last - first)))
        rows.setdefault(key, range(begin, begin + min(length, most)))
        begin += length
    return rows


def signature(ops: Sequence[Op]) -> str:
    """A text that is equal for ops that do the same on operands of the same types, whatever their names."""
    numbers: dict[Value, int] = {}

    def text_of(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        number = numbers.setdefault(leaf, len(numbers))
        return f"{number}:{leaf.type}"

    lines: list[str] = []
    for op in ops:
        tree = transform((op.args, op.kwargs), text_of)
        results = [text_of(result) for result in op.results]
        lines.append(f"{op.target} {tree} {op.context} {results}")
    return "\n".join(lines)


def measure(
    pipe: Staged,
    index: int,
    way: Way,
    sizes: Mapping[str, int],
    examples: Sequence[Any] = (),
) -> Timing[float]:
    """The seconds of one stage. Its state is copied to the device, or made up where it is on meta.

    `examples` are the model's flat inputs; other inputs are random. Raises StagecutError where the
    stage does not run so.
    """
    block = pipe.program.stages[index]
    stage = _placed(pipe.stages[index], way.device)
    module: nn.Module = stage if way.wrap is None else way.wrap(stage, index)
    known = dict(zip(pipe.program.inputs, examples, strict=False))
    rows = _rows(pipe.program)
    given = [_example(value, rows, sizes, known, way.device) for value in block.inputs]
    graphs = way.graphs(pipe, index, stage)
    runner = _Runner(pipe, stage, module, given, way, block, graphs)
    try:
        return runner.seconds()
    except Exception as error:
        raise_ours(error)
        raise StagecutError(
            f"stage {index} could not be timed on {way.device}: {error}",
            hint="leave profile_on= away, or give inputs with which the model runs",
        ) from error


def _placed(stage: Stage, device: torch.device) -> Stage:
    """A copy of the stage on the device."""
    memo: dict[int, Any] = {}
    for tensor in (*stage.parameters(), *stage.buffers()):
        memo[id(tensor)] = _on(tensor, device)
    return copy.deepcopy(stage, memo)


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not tensor.is_meta:
        twin = tensor.detach().to(device, copy=True)
    elif tensor.is_floating_point():
        twin = torch.empty_like(tensor, device=device).normal_(0.0, SPREAD)
    else:
        twin = torch.zeros_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, tensor.requires_grad)
    return twin


def _example(
    value: Value,
    rows: Mapping[Value, int],
    sizes: Mapping[str, int],
    examples: Mapping[Value, Any],
    device: torch.device,
) -> Any:
    """A value for an input of a stage: that of the example, or a random one of its type."""
    known = examples.get(value)
    if isinstance(known, torch.Tensor) and not known.is_meta:
        return known.detach().to(device).requires_grad_(known.requires_grad)
    kind = value.type
    symbols = tuple(sorted(sizes.items()))
    if not isinstance(kind, TensorType):
        return known if known is not None else evaluate(str(kind.expr), symbols)
    shape = known_shape(kind, sizes)
    dtype = getattr(torch, DTYPES[kind.dtype])
    if dtype.is_floating_point or dtype.is_complex:
        tensor = torch.randn(shape, dtype=dtype, device=device)
        return tensor.requires_grad_(carries_grad(kind))
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    count = rows.get(storage_root(value))
    if count is None:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randint(count, shape, dtype=dtype, device=device)


def _rows(program: Program) -> dict[Value, int]:
    """Value whose elements are indices of rows -> how many rows there are."""
    rows: dict[Value, int] = {}
    for op in program.all_ops():
        if facts(op).takes_rows:
            table, indices, *_ = op.operands
            kind = table.type
            if isinstance(kind, TensorType) and isinstance(kind.shape[0], int):
                rows[storage_root(indices)] = kind.shape[0]
    return rows


def _described(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return str(leaf)


def _goal(leaf: Any, device: torch.device) -> Any:
    """A part of a target on the device."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.zeros_like(leaf, device=device) if leaf.is_meta else leaf.to(device)


_Back = tuple[list[torch.Tensor], Any, list[Any]]
"""What a backward needs: outputs, their gradients, inputs."""


class _Runner:
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
        output = output_of(self._pipe._call_spec, leaves)
        assert self._way.loss_fn is not None
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
