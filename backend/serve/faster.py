"""Stages that run faster when a call is repeated: compiled, and captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stagecut.backend.stages.staged import Staged
from stagecut.ir.graph import Program
from stagecut.ir.types import TensorType

Run = Callable[..., Any]
Replay = Callable[[], None]

MOST_GRAPHS = 64
"""Graphs of one stage. A call on tensors that none of them has runs as it is then."""


def faster(pipe: Staged, index: int, compiled: bool, graphs: bool) -> Run:
    """Stage `index` of a pipe. If its sizes do not vary, it is compiled and captured where that is asked."""
    run: Run = pipe.stages[index]
    if not _is_static(pipe.program):
        return run
    if compiled:
        run = torch.compile(run, dynamic=False)
    if graphs:
        kept = {lane.given for lane in pipe.program.lanes}
        inputs = pipe.program.stages[index].inputs
        run = Graphed(run, [value in kept for value in inputs], recorded)
    return run


def _is_static(program: Program) -> bool:
    """True where all sizes are numbers, and what the caller's objects hold stays the same tensors."""
    sizes: list[int | str] = []
    for value in program.inputs:
        if isinstance(value.type, TensorType):
            sizes += value.type.shape
    replaced = any(lane.left is not None for lane in program.lanes)
    if replaced or not program.lanes:
        return False
    return all(isinstance(size, int) for size in sizes)


def recorded(run: Callable[[], Any]) -> tuple[Replay, Any]:
    """The kernels of `run` as a graph: what starts them again, and the tensors in which results are then."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


class Graphed:
    """A function of tensors that is recorded at its second call on the same kept tensors, and replayed from
    then on.

    kept: for each argument, whether it is used where it lies, as a cache is; others are copied to where the
    recording reads them. The first call runs as it is: libraries set themselves up in it.
    """

    def __init__(
        self,
        run: Run,
        kept: Sequence[bool],
        record: Callable[[Callable[[], Any]], tuple[Replay, Any]],
    ) -> None:
        self._run = run
        self._kept = tuple(kept)
        self._record = record
        self._seen: set[tuple[Any, ...]] = set()
        self._recordings: dict[tuple[Any, ...], tuple[list[Any], Replay, Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        key = tuple(map(self._key, arguments, self._kept))
        if key not in self._recordings:
            if key not in self._seen or len(self._recordings) == MOST_GRAPHS:
                self._seen.add(key)
                return self._run(*arguments)
            own = [
                argument
                if keeps or not isinstance(argument, torch.Tensor)
                else argument.clone()
                for argument, keeps in zip(arguments, self._kept, strict=True)
            ]
            self._recordings[key] = (own, *self._record(lambda: self._run(*own)))
        own, replay, results = self._recordings[key]
        for mine, argument in zip(own, arguments, strict=True):
            if isinstance(mine, torch.Tensor) and mine is not argument:
                mine.copy_(argument)
        replay()
        return results

    def _key(self, argument: Any, keeps: bool) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        where = argument.data_ptr() if keeps else None
        return where, argument.dtype, argument.shape, argument.stride()
