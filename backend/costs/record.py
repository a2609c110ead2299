"""The measured work of each rank over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from stagecut.backend.costs.timeline import Timeline
from stagecut.backend.ranks.driver import Driver
from stagecut.backend.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Event, Step
from stagecut.ir.errors import StagecutError
from stagecut.ir.keywords import near_names


class Recording:
    """A measurement that `record` makes. `timeline` is there when the block has ended."""

    def __init__(self) -> None:
        self._timeline: Timeline | None = None

    @property
    def timeline(self) -> Timeline:
        """The measured steps of all ranks. Raises StagecutError while they are still being measured, and when
        a step failed.
        """
        if self._timeline is None:
            raise StagecutError(
                "there is no timeline yet",
                hint="read it behind the `with` block, which must not end with an error",
            )
        return self._timeline


@contextmanager
@near_names
def record(
    what: Driver | PipelineStage | Sequence[PipelineStage],
    group: dist.ProcessGroup | None = None,
) -> Iterator[Recording]:
    """Measures every step that runs inside its block; all ranks of the group do it together.

    what: a driver, a stage for torch's schedules, or several. group: the ranks of such stages; None for all,
    and for a driver its own.

        with record(driver) as recording:
            driver.step(x)
        recording.timeline.to_svg()

    Every rank has the timeline of all ranks afterwards. All ranks meet at a barrier first, and each counts
    from there on its own clock. So the times of two ranks are apart by as much as the ranks leave the barrier
    apart, some ten microseconds on one host. The first step starts at 0. On a GPU a step is from when its
    first kernel may run to when its last one is done, by CUDA events; elsewhere it is the time of the call.
    The time between steps, waiting and sending, belongs to none. The steps run in the usual way otherwise,
    and the stages are as before at the end.
    """

    together: Callable[[], AbstractContextManager[Any]] = nullcontext
    if isinstance(what, Driver):
        drivers = [what]
        stages = list[PipelineStage]()
        title = _title(what)
        group = what.group
        device = what.device
        together = what.faults.together
    else:
        drivers = []
        stages = [what] if isinstance(what, PipelineStage) else list(what)
        title = "measured"
        device = torch.device("cpu")
        if stages:
            device = stages[0].device
    recording = Recording()
    for driver in drivers:
        driver.calls.announce("record")
    with together():
        meter = _Meter(device, group)
    try:
        for driver in drivers:
            meter.watch_driver(driver)
        for stage in stages:
            meter.watch(stage)
        yield recording
    finally:
        meter.restore()
    with together():
        recording._timeline = meter.timeline(title)


def _title(driver: Driver) -> str:
    name = driver.schedule_class.__name__.removeprefix("Schedule")
    return f"{name}, {driver.pipe.num_stages} stages, {driver.n_microbatches} micro-batches, measured"


_METHODS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


class _Meter:
    """Times the steps of stages, by methods that it puts in front of their own."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._group = group
        self._changed: list[tuple[Any, str, Any]] = []
        self._watched: set[int] = set()
        self._marks: list[tuple[Step, Any, Any]] = []
        self._meets = dist.is_available() and dist.is_initialized()
        if self._meets:
            dist.barrier(group)
        if self._cuda:
            torch.cuda.synchronize(device)
        self._zero = self._now()

    def watch(self, stage: PipelineStage) -> None:
        """The steps of this stage are timed from now on."""
        if id(stage) not in self._watched:
            self._watched.add(id(stage))
            for name in _METHODS:
                self._put(
                    stage,
                    name,
                    partial(self._timed, getattr(stage, name), name, stage.stage_index),
                )

    def watch_driver(self, driver: Driver) -> None:
        """The steps of all stages of a driver are timed too. The driver makes the stages when it first needs
        them.
        """
        prepared = driver._prepared

        def watched(*how: Any) -> tuple[Any, list[Any]]:
            schedule, stages = prepared(*how)
            for stage in stages:
                self.watch(stage)
            return schedule, stages

        self._put(driver, "_prepared", watched)

    def restore(self) -> None:
        """Everything is as it was before."""
        for owner, name, original in reversed(self._changed):
            if original is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = original
        self._changed.clear()

    def timeline(self, title: str) -> Timeline:
        """The steps of all ranks, from the first start on."""
        rank = 0
        ranks = 1
        if self._meets:
            rank = dist.get_rank(self._group)
            ranks = dist.get_world_size(self._group)
        own = [
            Event(step, rank, self._since(start), self._since(end))
            for step, start, end in self._marks
        ]
        everywhere: list[Any] = [own] * ranks
        if self._meets:
            dist.all_gather_object(everywhere, own, group=self._group)
        events = sorted(chain(*everywhere), key=lambda e: (e.start, e.rank))
        first = events[0].start if events else 0.0
        return Timeline(
            tuple(replace(e, start=e.start - first, end=e.end - first) for e in events),
            ranks,
            title,
        )

    def _put(self, owner: Any, name: str, method: Any) -> None:
        self._changed.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = method

    def _timed(
        self, method: Any, name: str, stage: int, chunk: int, *args: Any, **kwargs: Any
    ) -> Any:
        start = self._now()
        result = method(chunk, *args, **kwargs)
        self._marks.append(
            (Step(_kind(name, args, kwargs), stage, chunk), start, self._now())
        )
        return result

    def _now(self) -> Any:
        """The present moment. On a GPU, it is the moment at which the work submitted so far is done."""
        if not self._cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def _since(self, mark: Any) -> float:
        if not self._cuda:
            return float(mark - self._zero)
        mark.synchronize()
        return float(self._zero.elapsed_time(mark)) / 1e3


def _kind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The kind of a step, by the method of the stage that it calls: (chunk, loss, full_backward, ...)."""
    if name != "backward_one_chunk":
        return FORWARD if name == "forward_one_chunk" else WEIGHT
    whole = kwargs.get("full_backward", args[1] if len(args) > 1 else True)
    return BACKWARD if whole else INPUT
