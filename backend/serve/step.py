"""One call of a linked program: all stages in this process, or one stage on each rank of a group.

Every rank has the inputs that are small: token ids, masks, positions. Tensors of a cache are on the rank of
the stage that touches them; elsewhere a tensor on the meta device stands for them, with their sizes. So the
objects that hold a cache have one structure on all ranks, and nothing of a cache crosses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stagecut.backend.ranks.recorded import Record
from stagecut.backend.ranks.wire import (
    Port,
    Sizes,
    boundaries,
    known_number,
    number_of,
    port,
)
from stagecut.backend.serve.away import Away, Homes
from stagecut.backend.serve.everywhere import Everywhere
from stagecut.backend.serve.faster import Ready, Run
from stagecut.backend.serve.line import Line, Seat
from stagecut.backend.serve.moved import moved
from stagecut.backend.stages.failures import telling_place
from stagecut.backend.stages.run import release_plan, results_of, run_stages
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Program, Stage, Value
from stagecut.ir.lanes import left_value
from stagecut.ir.types import DTYPES, TensorType

Call = Callable[[Sequence[Any]], tuple[Any, ...]]
"""Flat inputs -> flat outputs."""


class Step(Protocol):
    """Runs a program."""

    def prepared(self, flat: Sequence[Any], sizes: Sizes) -> Call:
        """What runs a call on these flat inputs, and others on the same caches and with tensors of the same
        forms.
        """
        ...


class LocalStep:
    """All stages, one after the other, in this process and on one device."""

    def __init__(self, pipe: Staged, device: torch.device, runs: Sequence[Run]) -> None:
        self._pipe = pipe
        self._runs = runs
        self._plan = release_plan(pipe.program)
        self._device = device

    def prepared(self, flat: Sequence[Any], sizes: Sizes) -> Call:
        """All stages on these inputs."""
        program = self._pipe.program
        inputs = Inputs(program, flat, self._device)
        runs = [Ready(run) for run in self._runs]
        return lambda flat: run_stages(program, runs, self._plan, inputs.moved(flat))


class Inputs:
    """The flat inputs of calls on the same caches, on a device. A cache is moved there once."""

    def __init__(
        self, program: Program, flat: Sequence[Any], device: torch.device
    ) -> None:
        kept = {lane.given for lane in program.lanes}
        self._device = device
        self._ready = [
            moved(leaf, device, True) if value in kept else leaf
            for value, leaf in zip(program.inputs, flat, strict=True)
        ]
        self._others = [
            place
            for place, value in enumerate(program.inputs)
            if value not in kept and isinstance(flat[place], torch.Tensor)
        ]

    def moved(self, flat: Sequence[Any]) -> list[Any]:
        """The inputs of a call."""
        there = list(self._ready)
        for place in self._others:
            there[place] = moved(flat[place], self._device, False)
        return there


class RankStep:
    """The stage of this rank, between those of its neighbours."""

    def __init__(
        self,
        pipe: Staged,
        seat: Seat,
        line: Line,
        homes: Homes,
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
        self._run = run
        self._block = program.stages[seat.rank]
        lists = boundaries(program, frozenset(program.inputs), _left(pipe))
        self._received = lists[seat.rank - 1] if seat.rank else []
        self._sent = lists[seat.rank] if seat.rank + 1 < seat.ranks else []
        self._everywhere = Everywhere(
            program,
            seat.rank,
            seat.device,
            record,
        )
        self._line = line
        received = [[], *lists[:-1]]
        everywhere = self._everywhere.written
        self._away = Away(program, seat, line, homes, received, everywhere)

    def prepared(self, flat: Sequence[Any], sizes: Sizes) -> Call:
        """The stage of this rank on these inputs and on what the rank before sends."""
        there = self._away.kept(flat, sizes)
        inputs = Inputs(self._program, there, self._seat.device)
        received = self._ports(self._received, sizes)
        here = {p.value for p in received}
        here.update(self._block.outputs, self._program.inputs)
        return _RankCall(
            program=self._program,
            block=self._block,
            inputs=inputs,
            received=received,
            sent=self._ports(self._sent, sizes),
            numbers=self._numbers(sizes),
            elsewhere={
                place: self._output(leaf, sizes)
                for place, leaf in enumerate(self._program.outputs)
                if not isinstance(leaf, Value) or leaf not in here
            },
            line=self._line,
            away=self._away,
            sizes=sizes,
            run=Ready(self._run),
            write=self._everywhere.ready(),
        )

    def _numbers(self, sizes: Sizes) -> dict[Value, Any]:
        """The numbers that follow from the sizes of the inputs."""
        numbers: dict[Value, Any] = {}
        for value in (*self._block.inputs, *self._everywhere.inputs):
            number = known_number(value, sizes)
            if number is not None:
                numbers[value] = number
        return numbers

    def _ports(self, values: Sequence[Value], sizes: Sizes) -> list[Port]:
        """The ports of what crosses. A number that follows from the sizes of the inputs does not cross."""
        return [port(v, sizes) for v in values if known_number(v, sizes) is None]

    def _output(self, value: Any, sizes: Sizes) -> Any:
        """What stands for an output of another rank."""
        if not isinstance(value, Value):
            return value
        number = known_number(value, sizes)
        return placeholder(value, sizes) if number is None else number


@dataclass(frozen=True)
class _RankCall:
    """Calls of the stage of a rank that differ in their tensors alone. elsewhere: place -> what stands for an
    output of another rank.
    """

    program: Program
    block: Stage
    inputs: Inputs
    received: list[Port]
    sent: list[Port]
    numbers: dict[Value, Any]
    elsewhere: dict[int, Any]
    line: Line
    away: Away
    sizes: Sizes
    run: Run
    write: Callable[[Mapping[Value, Any]], None]

    def __call__(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        values = dict(self.numbers)
        there = self.inputs.moved(self.away.others(flat, self.sizes))
        values |= zip(self.program.inputs, there, strict=True)
        if self.received:
            values |= self.line.receive(self.received)
        arguments = [values[value] for value in self.block.inputs]
        with telling_place(self.block.index):
            result = self.run(*arguments)
        results = results_of(result, self.block)
        values |= zip(self.block.outputs, results, strict=True)
        if self.sent:
            self.line.send(self.sent, values)
        self.write(values)
        self.away.settle(flat, values, self.sizes)
        outputs = tuple(
            self.elsewhere[place] if place in self.elsewhere else values[leaf]
            for place, leaf in enumerate(self.program.outputs)
        )
        self.away.note(outputs)
        return outputs


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
