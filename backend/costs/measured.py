"""The seconds of a stage, measured as torch's runtime runs it: its forward, its backward, and both parts of a
backward that is split; with the loss, and in the form in which it will run.
"""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stagecut.backend.costs import store
from stagecut.backend.costs.ops import known_shape
from stagecut.backend.costs.rounds import Runner
from stagecut.backend.costs.runtime import Timing
from stagecut.backend.costs.way import Way
from stagecut.backend.stages.modules import Stage
from stagecut.backend.stages.staged import Staged
from stagecut.ir.aliases import storage_root
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import Op, Program, Value, transform
from stagecut.ir.ops import facts
from stagecut.ir.sizes import evaluate
from stagecut.ir.types import DTYPES, TensorType, carries_grad

MOST_BLOCKS = 4
MOST_OPS = 200
"""Equal blocks that are timed in a row, and their ops: a GPU keeps a thousand kernels that wait."""

SPREAD = 0.02
"""The standard deviation of parameters that are made for a measurement."""


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
    except (RuntimeError, TypeError, AssertionError, ImportError):
        count = torch.cuda.device_count()
        devices = ["cpu", *(f"cuda:{index}" for index in range(count))]
        raise InputError(
            f"profile_on={wanted!r} is no device of this machine",
            where=f"{count} GPUs are seen",
            hint=" or ".join(f'profile_on="{device}"' for device in devices),
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
    runner = Runner(pipe, stage, module, given, way, block, graphs)
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
