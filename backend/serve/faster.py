"""Stages that run faster when a call is repeated: compiled, and captured in CUDA graphs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from stagecut.backend.progress import first_call
from stagecut.backend.ranks.recorded import Record, Replay, copied, recorded
from stagecut.backend.stages.crossing import written_inputs
from stagecut.backend.stages.staged import Staged
from stagecut.ir.graph import Program
from stagecut.ir.types import TensorType

Run = Callable[..., Any]
_Key = tuple[Any, ...]

MOST_GRAPHS = 64
"""Graphs of one stage. A call on tensors that none of them has runs as it is then."""


def faster(pipe: Staged, index: int, compiled: bool, record: Record | None) -> Run:
    """Stage `index` of a pipe. If its sizes do not vary, it is compiled and recorded where that is asked."""
    run: Run = pipe.stages[index]
    if not is_static(pipe.program):
        return run
    if compiled:
        fast = torch.compile(run, dynamic=False)
        run = first_call(fast, f"compiling stage {index}")
    stage = pipe.program.stages[index]
    kept = {lane.given for lane in pipe.program.lanes}
    # a recording reads copies of the others, and what it wrote into one would be lost
    if record is not None and written_inputs(stage) <= kept:
        inputs = stage.inputs
        run = Graphed(run, [value in kept for value in inputs], record)
    return run


def is_static(program: Program) -> bool:
    """True where all sizes are numbers, and what the caller's objects hold stays the same tensors."""
    sizes: list[int | str] = []
    for value in program.inputs:
        if isinstance(value.type, TensorType):
            sizes += value.type.shape
    replaced = any(lane.left is not None for lane in program.lanes)
    if replaced or not program.lanes:
        return False
    return all(isinstance(size, int) for size in sizes)


def recorded_step(run: Callable[[], Any]) -> tuple[Replay, Any]:
    """A decode step as a graph. Raises StagecutError where it cannot be captured."""
    return recorded(run, "a decode step")


class Recording:
    """A recorded function on the tensors that it keeps, to be replayed with others in place of the rest. The
    results are tensors of their own, which the next call leaves alone.
    """

    def __init__(self, own: dict[int, torch.Tensor], replay: Replay, results: Any):
        self._own = own
        self._replay = replay
        self._results = results

    def __call__(self, *arguments: Any) -> Any:
        for place, own in self._own.items():
            own.copy_(arguments[place])
        self._replay()
        return tree_map(copied, self._results)


class Graphed:
    """A function of tensors that is recorded at its second call on the same kept tensors, and replayed from
    then on, as long as they live.

    kept: for each argument, whether it is used where it lies, as a cache is; others are copied to where the
    recording reads them. The first call runs as it is, and so does the first of each thread: libraries set
    themselves up in it.
    """

    def __init__(
        self,
        run: Run,
        kept: Sequence[bool],
        record: Record,
    ) -> None:
        self._run = run
        self._kept = tuple(kept)
        self._record = record
        self._seen: dict[_Key, list[Any]] = {}
        """Kept tensors of a call -> what drops the call when one of them is gone."""
        self._recordings: dict[_Key, Recording] = {}
        self._own = threading.local()

    def __call__(self, *arguments: Any) -> Any:
        return self.fitting(arguments)(*arguments)

    def fitting(self, arguments: Sequence[Any]) -> Run:
        """What runs for these arguments, and others on the same kept tensors: a recording, or for the first
        call the function itself.
        """
        key = tuple(map(_key, arguments, self._kept))
        if key in self._recordings:
            return self._recordings[key]
        is_ready = key in self._seen and hasattr(self._own, "has_run")
        if not is_ready or len(self._recordings) == MOST_GRAPHS:
            self._own.has_run = True
            self._see(key, arguments)
            return self._run
        self._recordings[key] = self._recorded(arguments)
        return self._recordings[key]

    def _see(self, key: _Key, arguments: Sequence[Any]) -> None:
        """The call has been made, as long as its kept tensors live: others may lie there after them."""

        def forget(_: Any) -> None:
            self._seen.pop(key, None)
            self._recordings.pop(key, None)

        self._seen[key] = [
            weakref.ref(argument, forget)
            for argument, keeps in zip(arguments, self._kept, strict=True)
            if keeps and isinstance(argument, torch.Tensor)
        ]

    def _recorded(self, arguments: Sequence[Any]) -> Recording:
        own = {
            place: argument.clone()
            for place, argument in enumerate(arguments)
            if isinstance(argument, torch.Tensor) and not self._kept[place]
        }
        # the kept ones belong to the caller: a recording knows where they lie
        called = [own.get(place, argument) for place, argument in enumerate(arguments)]
        return Recording(own, *self._record(lambda: self._run(*called)))


def _key(argument: Any, keeps: bool) -> Any:
    """What is the same in calls that one recording serves."""
    if not isinstance(argument, torch.Tensor):
        return argument
    where = None
    if keeps:
        where = id(argument), argument.data_ptr()
    return (
        where,
        argument.dtype,
        argument.shape,
        argument.stride(),
    )


class Ready:
    """A stage for calls that are all on the same kept tensors: its recording is not looked for again."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, *arguments: Any) -> Any:
        run = self._run
        if isinstance(run, Graphed):
            run = run.fitting(arguments)
            if isinstance(run, Recording):
                self._run = run
        return run(*arguments)
