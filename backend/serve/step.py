"""One call of a linked program: all stages in this process, or one stage on each rank of a group.

Every rank has the inputs that are small: token ids, masks, positions. Tensors of a cache are on the rank of
the stage that touches them; elsewhere a tensor on the meta device stands for them, with their sizes. So the
objects that hold a cache have one structure on all ranks, and nothing of a cache crosses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from stagecut.backend.ranks.wire import (
    Port,
    Sizes,
    boundaries,
    known_number,
    number_of,
    port,
)
from stagecut.backend.serve.everywhere import Everywhere
from stagecut.backend.serve.faster import Record, Run
from stagecut.backend.serve.line import Line, Seat
from stagecut.backend.serve.moved import moved
from stagecut.backend.stages.run import release_plan, results_of, run_stages
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Program, Value
from stagecut.ir.lanes import left_value, reads_sizes_only
from stagecut.ir.types import DTYPES, TensorType


class Step(Protocol):
    """Runs a program: its flat inputs -> its flat outputs."""

    def __call__(self, flat: Sequence[Any], sizes: Sizes) -> tuple[Any, ...]: ...


class LocalStep:
    """All stages, one after the other, in this process and on one device."""

    def __init__(self, pipe: Staged, device: torch.device, runs: Sequence[Run]) -> None:
        self._pipe = pipe
        self._runs = runs
        self._plan = release_plan(pipe.program)
        self._device = device
        self._kept = {lane.given for lane in pipe.program.lanes}

    def __call__(self, flat: Sequence[Any], sizes: Sizes) -> tuple[Any, ...]:
        program = self._pipe.program
        there = [
            moved(leaf, self._device, value in self._kept)
            for value, leaf in zip(program.inputs, flat, strict=True)
        ]
        return run_stages(program, self._runs, self._plan, there)


class RankStep:
    """The stage of this rank, between those of its neighbours."""

    def __init__(
        self,
        pipe: Staged,
        seat: Seat,
        line: Line,
        run: Run,
        record: Record | None = None,
    ) -> None:
        program = pipe.program
        if len(program.stages) != seat.ranks:
            raise StagecutError(
                f"{len(program.stages)} stages on {seat.ranks} ranks",
                hint="one stage for each rank of the group",
            )
        self._program = program
        self._seat = seat
        self._kept = {lane.given for lane in program.lanes}
        self._run = run
        self._block = program.stages[seat.rank]
        lists = boundaries(program, frozenset(program.inputs), _left(pipe))
        self._received = lists[seat.rank - 1] if seat.rank else []
        self._sent = lists[seat.rank] if seat.rank + 1 < seat.ranks else []
        own = set(self._block.ops)
        self._sized = {
            value
            for value in self._block.inputs
            if all(map(reads_sizes_only, own.intersection(value.uses)))
        }
        self._everywhere = Everywhere(program, seat.rank, seat.device, record)
        self._line = line
        self._ports: dict[tuple[tuple[str, int], ...], tuple[list[Port], ...]] = {}

    def __call__(self, flat: Sequence[Any], sizes: Sizes) -> tuple[Any, ...]:
        values: dict[Value, Any] = dict(zip(self._program.inputs, flat, strict=True))
        received, sent = self._ports_for(sizes)
        if received:
            values |= self._line.receive(received)
        arguments = [
            self._argument(value, values, sizes) for value in self._block.inputs
        ]
        results = results_of(self._run(*arguments), self._block)
        values |= zip(self._block.outputs, results, strict=True)
        if sent:
            self._line.send(sent, values)
        self._everywhere.write(values, sizes)
        return tuple(
            self._output(leaf, values, sizes) if isinstance(leaf, Value) else leaf
            for leaf in self._program.outputs
        )

    def _ports_for(self, sizes: Sizes) -> tuple[list[Port], ...]:
        """The ports of what is received and of what is sent on. A number that follows from the sizes of the
        inputs does not cross.
        """
        key = tuple(sorted(sizes.items()))
        if key not in self._ports:
            self._ports[key] = tuple(
                [port(v, sizes) for v in values if known_number(v, sizes) is None]
                for values in (self._received, self._sent)
            )
        return self._ports[key]

    def _argument(self, value: Value, values: Mapping[Value, Any], sizes: Sizes) -> Any:
        if value not in values:
            return known_number(value, sizes)
        argument = values[value]
        if not isinstance(argument, torch.Tensor):
            return argument
        if argument.is_meta and value in self._sized:
            return argument
        if argument.is_meta:
            raise StagecutError(
                f"stage {self._block.index} reads {value.hint}, which another rank holds",
                where=", ".join(map(str, self._touching(value))),
                hint="cut where one stage has all that reads it",
            )
        return moved(argument, self._seat.device, value in self._kept)

    def _touching(self, value: Value) -> list[str]:
        return [
            f"stages {lane.stages} touch it"
            for lane in self._program.lanes
            if lane.given is value
        ]

    def _output(self, value: Value, values: Mapping[Value, Any], sizes: Sizes) -> Any:
        if value in values:
            return values[value]
        number = known_number(value, sizes)
        return placeholder(value, sizes) if number is None else number


def _left(pipe: Staged) -> frozenset[Value]:
    """The outputs that stand in objects of the caller's after a call, and are not in the result."""
    spec = pipe._call_spec
    outputs = pipe.program.outputs
    if spec is None:
        return frozenset()
    values = [leaf for leaf in outputs if isinstance(leaf, Value)]
    result = {leaf for leaf in outputs[: spec.result_leaves] if isinstance(leaf, Value)}
    return frozenset(values) - result


def placeholder(value: Value, sizes: Sizes) -> torch.Tensor:
    """The tensor that stands for a value of another rank."""
    kind = value.type
    shape = []
    if isinstance(kind, TensorType):
        shape = [number_of(dim, sizes) for dim in kind.shape]
    if not isinstance(kind, TensorType) or None in shape:
        raise StagecutError(
            f"{value!r} is made on another rank, and its {kind} cannot be told here",
            hint="cut where it is made in the last stage, or run in one process",
        )
    dtype = getattr(torch, DTYPES[kind.dtype])
    return torch.empty(shape, dtype=dtype, device="meta")  # type: ignore[arg-type]


def lane_bytes(program: Program, sizes: Sizes) -> dict[int, int]:
    """Stage -> the bytes of the caller's objects that it touches, after a call of these sizes."""
    sums: dict[int, int] = {}
    for lane in program.lanes:
        after = placeholder(left_value(program, lane), sizes)
        for stage in lane.stages:
            sums[stage] = sums.get(stage, 0) + after.nbytes
    return sums
