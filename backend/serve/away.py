"""Tensors of the caller's that one rank has as they are now, and another rank needs.

Stages that write an input in place, one after the other, each write what the one before has sent. So the
last of them has what stands in the input after the call, and the ranks that are given the input itself get it
then.

Where a call returns a tensor, or leaves it in an object, and a later call is given it, only some ranks have
it; elsewhere a tensor on the meta device stands for it. A rank that has it sends it to those whose stages
read it. All ranks make the same calls in the same order, so each knows what the others have, and none asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from stagecut.backend.ranks.wire import Port, Sizes, port
from stagecut.backend.serve.line import Line, Seat
from stagecut.backend.stages.crossing import written_inputs
from stagecut.ir.aliases import storage_root, unwritten
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.lanes import reads_sizes_only
from stagecut.ir.run.storage import storage_of
from stagecut.ir.types import TensorType


@dataclass(frozen=True)
class Home:
    """A rank that has a tensor, and the ranks that have not."""

    rank: int
    absent: frozenset[int]


class Homes:
    """Where the tensors are that calls have returned or left, as long as they live."""

    def __init__(self) -> None:
        self._homes: Any = WeakTensorKeyDictionary()

    def note(self, tensor: Any, home: Home) -> None:
        """From now on, `of(tensor)` is `home`."""
        if isinstance(tensor, torch.Tensor):
            self._homes[tensor] = home

    def of(self, tensor: Any) -> Home | None:
        """The home of a tensor; None for one that every rank has, as far as it is known."""
        if not isinstance(tensor, torch.Tensor):
            return None
        home: Home | None = self._homes.get(tensor)
        return home


@dataclass(frozen=True)
class Written:
    """An input that `last` writes in place as the last stage: there it is `final`. `readers` are the stages
    that are given the input itself.
    """

    place: int
    last: int
    final: Value
    readers: frozenset[int]


class Away:
    """What the calls of a program exchange besides the boundaries of its stages. `received` are the values
    that the stages receive from the ones before; `everywhere` are the inputs that each rank keeps up to date
    by itself.
    """

    def __init__(
        self,
        program: Program,
        seat: Seat,
        line: Line,
        homes: Homes,
        received: Sequence[Iterable[Value]],
        everywhere: Set[Value],
    ) -> None:
        self._program = program
        self._seat = seat
        self._line = line
        self._homes = homes
        self._readers = _readers(program)
        self._written = _written_in_turn(program, self._readers, everywhere)
        self._left = _homes_of_outputs(program, received)
        lanes = {lane.given for lane in program.lanes}
        places = [
            place
            for place, value in enumerate(program.inputs)
            if isinstance(value.type, TensorType) and self._readers[value]
        ]
        self._kept = [place for place in places if program.inputs[place] in lanes]
        self._others = [place for place in places if program.inputs[place] not in lanes]
        self._writers = _writers(program)

    def kept(self, flat: Sequence[Any], sizes: Sizes) -> list[Any]:
        """The flat inputs with what objects of the caller's hold, as far as this rank reads it.

        Raises InputError where what one stage writes shares memory with what another one reads.
        """
        self._refuse_shared(flat)
        return self._fetched(flat, self._kept, sizes)

    def others(self, flat: Sequence[Any], sizes: Sizes) -> list[Any]:
        """The flat inputs with the other tensors that this rank reads."""
        return self._fetched(flat, self._others, sizes)

    def _fetched(
        self, flat: Sequence[Any], places: Iterable[int], sizes: Sizes
    ) -> list[Any]:
        rank, there = self._seat.rank, list(flat)
        for place in places:
            value, home = self._program.inputs[place], self._homes.of(flat[place])
            readers = self._readers[value]
            lacking = set() if home is None else readers & home.absent
            if home is not None and lacking:
                one = [port(value, sizes)]
                if rank == home.rank:
                    self._send(one, flat[place], lacking)
                elif rank in lacking:
                    there[place] = self._line.receive(one, home.rank)[value]
            if rank in readers:
                self._refuse_absent(value, there[place])
        return there

    def settle(
        self, flat: Sequence[Any], values: Mapping[Value, Any], sizes: Sizes
    ) -> None:
        """What stages have written in place stands in the caller's tensors, on the ranks that are given them
        and have them.
        """
        rank = self._seat.rank
        for written in self._written:
            tensor, home = flat[written.place], self._homes.of(flat[written.place])
            ranks, absent = written.readers | {written.last}, frozenset[int]()
            if home is not None:
                ranks, absent = ranks | {home.rank}, home.absent
            one = [port(self._program.inputs[written.place], sizes)]
            others = ranks - absent - {written.last}
            if rank == written.last:
                final = values[written.final]
                if rank not in absent and final is not tensor:
                    tensor.copy_(final)
                self._send(one, final, others)
            elif rank in others:
                tensor.copy_(self._line.receive(one, written.last)[one[0].value])

    def note(self, outputs: Sequence[Any]) -> None:
        """The outputs of a call are known to be where they are."""
        for place, home in self._left.items():
            self._homes.note(outputs[place], home)

    def _send(self, one: list[Port], tensor: Any, ranks: Iterable[int]) -> None:
        for rank in sorted(ranks):
            self._line.send(one, {one[0].value: tensor}, rank)

    def _refuse_absent(self, value: Value, argument: Any) -> None:
        if not isinstance(argument, torch.Tensor) or not argument.is_meta:
            return
        raise StagecutError(
            f"stage {self._seat.rank} reads {value.hint}, which another rank holds",
            hint="give calls what calls have left, as it is; or cut where one stage has all that reads it",
        )

    def _refuse_shared(self, flat: Sequence[Any]) -> None:
        """Raises InputError for a tensor that one stage writes, and that overlaps in memory with another one
        of another stage's: there the write would not show.
        """
        storages: dict[Any, list[int]] = {}
        for place, leaf in enumerate(flat):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                storages.setdefault(storage_of(leaf), []).append(place)
        inputs = self._program.inputs
        for places in storages.values():
            for place in self._writers.keys() & places:
                for other in places:
                    ranks = self._writers[place] | self._readers[inputs[other]]
                    if other == place or len(ranks) < 2:
                        continue
                    if _overlap(flat[place], flat[other]):
                        raise InputError(
                            f"input '{inputs[place].hint}' is written, and shares memory with input "
                            f"'{inputs[other].hint}', which another rank reads",
                            hint="give a clone of one of them; one process can run this, several cannot",
                        )


def _readers(program: Program) -> dict[Value, frozenset[int]]:
    """Input -> the stages that read more of it than its sizes."""
    readers: dict[Value, set[int]] = {value: set() for value in program.inputs}
    for stage in program.stages:
        own = set(stage.ops)
        for value in stage.inputs:
            if value not in readers:
                continue
            users = [op for op in value.uses if isinstance(op, Op) and op in own]
            if not all(map(reads_sizes_only, users)):
                readers[value].add(stage.index)
    return {value: frozenset(stages) for value, stages in readers.items()}


def _writers(program: Program) -> dict[int, frozenset[int]]:
    """Place of an input that is written in place -> the stages that write it."""
    places = {value: place for place, value in enumerate(program.inputs)}
    stages: dict[int, set[int]] = {}
    for stage in program.stages:
        for value in written_inputs(stage):
            place = places.get(storage_root(value))
            if place is not None:
                stages.setdefault(place, set()).add(stage.index)
    return {place: frozenset(writers) for place, writers in stages.items()}


def _written_in_turn(
    program: Program, readers: Mapping[Value, frozenset[int]], everywhere: Set[Value]
) -> list[Written]:
    """The inputs that a stage writes in place, and that another one is given.

    Raises StagecutError where a stage writes one of them through a view that it receives.
    """
    final: dict[Value, tuple[int, Value]] = {}
    for stage in program.stages:
        for value in written_inputs(stage):
            root = storage_root(value)
            if root not in readers or root in everywhere:
                continue
            if unwritten(value) is not root or final.get(root, (-1,))[0] == stage.index:
                raise StagecutError(
                    f"stage {stage.index} writes a view of {root.hint}, which it receives from another rank",
                    hint="cut where one stage writes it, or run all stages in one process",
                )
            final[root] = stage.index, value
    return [
        Written(place, *final[value], readers[value])
        for place, value in enumerate(program.inputs)
        if value in final and readers[value] != {final[value][0]}
    ]


def _homes_of_outputs(
    program: Program, received: Sequence[Iterable[Value]]
) -> dict[int, Home]:
    """Place of an output -> its home, where some rank lacks it. What a lane holds that one stage touches is
    needed nowhere else.
    """
    ranks: dict[Value, list[int]] = {}
    for stage, values in zip(program.stages, received, strict=True):
        for value in dict.fromkeys([*values, *stage.outputs]):
            ranks.setdefault(value, []).append(stage.index)
    resident = {lane.left for lane in program.lanes if len(lane.stages) < 2}
    homes: dict[int, Home] = {}
    for place, leaf in enumerate(program.outputs):
        if not isinstance(leaf, Value) or place in resident or leaf not in ranks:
            continue
        absent = frozenset(range(len(program.stages))) - {*ranks[leaf]}
        if absent and isinstance(leaf.type, TensorType):
            homes[place] = Home(ranks[leaf][-1], absent)
    return homes


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True unless the elements of one tensor all lie before those of the other."""
    (start, end), (begin, stop) = map(_span, (one, other))
    return start < stop and begin < end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one behind its last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum(
        (size - 1) * stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (last + 1) * tensor.itemsize
