"""The costs of the stages of a pipe: time, memory, and what crosses and why; as a table, as JSON and as a
picture.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from stagecut.backend.costs.kept import KeptByGraphs
from stagecut.backend.costs.line import Line
from stagecut.backend.costs.loss import LossCost, returns_loss
from stagecut.backend.costs.ops import Device, op_costs, program_ops, state_bytes
from stagecut.backend.costs.plan import Plan
from stagecut.backend.costs.runtime import Parts, Timing, as_run
from stagecut.backend.costs.search import by_rank
from stagecut.backend.costs.setting import STATE_OF, Setting
from stagecut.backend.costs.shares import OpShare, shares_of
from stagecut.backend.costs.timeline import Timeline, simulate
from stagecut.backend.costs.units import Units, units_of
from stagecut.backend.pictures.drawing import stages_text
from stagecut.backend.pictures.stages import homes_of, maker_of, modules_text
from stagecut.backend.pictures.summary import crossing
from stagecut.backend.schedules import INPUT
from stagecut.backend.stages.staged import Staged
from stagecut.backend.tables import count_text, table, time_text
from stagecut.ir.graph import Op, Program, Stage, Transfer
from stagecut.ir.ops import module_path
from stagecut.ir.roles import Flight
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.text.printer import size_text, value_names
from stagecut.ir.types import carries_grad, value_bytes


@dataclass(frozen=True)
class StageReport:
    """One stage for one micro-batch. flops are those of the forward. forward, backward: seconds in which the
    device computes them; host: those in which the host starts the ops of both; share: the part of `seconds`
    in that of all stages. memory is in bytes by kind; `passing` are the gradients that one op's backward
    reads and makes.

    parameters counts elements. received, sent: bytes forward, including values relayed through the stage.
    sources: how many ops have their costs from each source. saved: what graphs save, None by autograd.
    """

    index: int
    rank: int
    modules: tuple[str, ...]
    ops: int
    flops: float
    forward: float
    backward: float
    host: float
    share: float
    parameters: int
    memory: dict[str, int]
    received: int
    sent: int
    sources: dict[str, int]
    saved: KeptByGraphs | None = None

    @property
    def device(self) -> float:
        """The seconds in which the device computes forward and backward."""
        return self.forward + self.backward

    @property
    def seconds(self) -> float:
        """The seconds of forward and backward: of the device or the host, whichever has more to do."""
        return max(self.device, self.host)

    @property
    def waits_for_host(self) -> bool:
        """True when the host takes longer to start the ops than the device to compute them."""
        return self.host > self.device


@dataclass(frozen=True)
class Crossing:
    """One value on its way to a stage: its route, and the reason for it. module: the one that makes it,
    nothing for inputs and for what the model makes itself.
    """

    value: str
    source: int | None
    target: int
    route: str
    bytes: int | None
    gradient: bool
    why: str
    module: str = ""


@dataclass(frozen=True)
class TooLarge:
    """A rank whose stages together need more memory than its device has; in bytes. kind: the kind that takes
    the most of it.
    """

    rank: int
    stages: tuple[int, ...]
    needs: int
    device: str
    has: int
    kind: str

    def __str__(self) -> str:
        return self.beside(0)

    def beside(self, others: int) -> str:
        """What is too large, and what helps, where so many `others` do not fit either."""
        numbers = ", ".join(map(str, self.stages))
        who = f"stage {numbers} needs"
        if len(self.stages) > 1:
            who = f"the stages {numbers} of rank {self.rank} need"
        more = ""
        if others:
            ranks = (
                "1 other rank needs" if others == 1 else f"{others} other ranks need"
            )
            more = f", and {ranks} more than there is"
        return (
            f"{who} {size_text(self.needs)}, {self.device} has {size_text(self.has)}{more}: "
            f"{_REMEDIES[self.kind in _HELD]}"
        )


_HELD = ("parameters", "gradients", "optimizer")
_REMEDIES = {
    True: "more stages, a device with more memory, or an optimizer that keeps less",
    False: (
        "smaller micro-batches, a schedule with fewer in flight, activation checkpointing, more stages, or "
        "a device with more memory"
    ),
}
"""Whether state takes the most memory of a rank -> the ways to make the rank smaller."""

_SOURCES = {
    "formula": "from FLOPs and bytes",
    "bytes only": "from bytes alone",
    "measured": "measured",
}
"""Source of the costs of an op -> the words for it."""

_HOST_REMEDY = "larger micro-batches, compiled stages or CUDA graphs help"
_TOLD = 0.01
"""Work of ranks that one device would not have is told from this part on."""


@dataclass(frozen=True, repr=False)
class Report:
    """The stages and crossings of a pipe under a setting, and totals.

    stages: the costs of each. crossings: the values between stages. device, schedule, n_microbatches: those
    of the setting. timeline: the predicted step of all ranks.

    seconds: one predicted training step. bubble: the share of all ranks' time in it that is spent waiting: a
    rank works as long as its device or its host, whichever has more to do. speed_up: over one device that
    does all the work: the number of ranks, less the bubble, and less `more_work`. balance: the mean of the
    ranks' times over that of the slowest one, where the time of a rank is that of its host if that limits it.
    slowest: the slowest rank, with the time of its links; bound: no slowest rank can be below it; best: a
    step with the best cuts anywhere; in seconds, None where the cuts were not searched for this setting.
    loss: the one that was counted on the last stage. too_large: the ranks that do not fit their devices.
    shares: for each stage what its ops take of it, and the loss behind those of the last. units: what
    predictions for other numbers of stages are made of, None where devices differ.
    """

    stages: tuple[StageReport, ...]
    crossings: tuple[Crossing, ...]
    device: str
    schedule: str
    n_microbatches: int
    seconds: float
    bubble: float
    speed_up: float
    balance: float
    slowest: float | None
    bound: float | None
    best: float | None
    loss: str
    too_large: tuple[TooLarge, ...]
    timeline: Timeline
    shares: tuple[tuple[OpShare, ...], ...] = ()
    units: Units | None = None

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The tables and the picture, for a notebook."""
        style = "background: white; overflow-x: auto"
        picture = f'<div style="{style}">{self.to_svg()}</div>'
        aligned = "font-family: monospace; white-space: pre; overflow-x: auto"
        table = f'<pre style="{aligned}">{escape(str(self))}</pre>'
        return f"<div>{table}{picture}</div>"

    def to_json(self) -> str:
        """The report as JSON, without the timeline, and without what is known of single ops."""
        data = asdict(replace(self, shares=(), units=None))
        for name in ("timeline", "shares", "units"):
            del data[name]
        return json.dumps(data, indent=1)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        head = (
            "stage",
            "rank",
            "time",
            "share",
            "forward",
            "backward",
            "host",
            "FLOPs",
            "params",
            "memory",
            "kept",
            "in",
            "out",
            "ops",
            "modules",
        )
        yield table([head, *map(_row, self.stages)], left=(len(head) - 1,))
        if too_large := self.too_large_text:
            yield f"too large: {too_large}"
        yield from self._saved_lines()
        yield ""
        yield (
            f"{self.schedule} with {self.n_microbatches} micro-batches on {self.device}: a step takes "
            f"{time_text(self.seconds)}, "
            f"bubble {100 * self.bubble:.1f} %, balance {100 * self.balance:.1f} %, {self.speed_up:.2f} "
            "times as fast as one device"
        )
        if longer := self._more_work_text():
            yield longer
        yield from self._search_lines()
        if waiting := self.host_text:
            yield waiting
        yield self._costs_line()
        if self.crossings:
            rows = [*map(_crossing_row, self.crossings)]
            yield ""
            yield table(rows, left=(0, 2, 4))

    @property
    def more_work(self) -> float:
        """The part by which ranks work longer, all together, than one device would."""
        work = self.timeline.ranks * (1 - self.bubble)
        return work / (self.speed_up or 1.0) - 1

    def _more_work_text(self) -> str:
        """Why the ranks work longer than one device would; empty where they hardly do."""
        if self.more_work < _TOLD:
            return ""
        reasons: list[str] = []
        if len({s.waits_for_host for s in self.stages}) > 1:
            reasons.append(
                "that would compute some stages while its host starts the ops of others"
            )
        slow = "messages or hosts" if any(s.host for s in self.stages) else "messages"
        reasons.append(f"{slow} slow devices")
        is_measured = any("measured" in s.sources for s in self.stages)
        if is_measured and any(e.step.kind == INPUT for e in self.timeline.events):
            reasons.append("backwards that are split take longer")
        return (
            f"ranks work {100 * self.more_work:.1f} % longer in all than one device "
            f"would: {', '.join(reasons)}"
        )

    @property
    def too_large_text(self) -> str:
        """Which rank lacks the most memory, how many others lack some, what helps; empty where all fit."""
        if self.lacks_most is None:
            return ""
        return self.lacks_most.beside(len(self.too_large) - 1)

    @property
    def lacks_most(self) -> TooLarge | None:
        """The rank that lacks the most memory; None where all fit."""
        return max(self.too_large, key=lambda r: r.needs - r.has, default=None)

    @property
    def host_text(self) -> str:
        """Which stages wait for the host, and what helps; empty where none does."""
        waiting = [s for s in self.stages if s.waits_for_host]
        if not waiting:
            return ""
        longest = max(waiting, key=lambda s: s.host)
        return (
            f"the host is the limit of {stages_text([s.index for s in waiting])}: it starts the ops of stage "
            f"{longest.index} in {time_text(longest.host)}, the device computes them in "
            f"{time_text(longest.device)}; {_HOST_REMEDY}"
        )

    def _costs_line(self) -> str:
        """The sources of the costs."""
        counts: Counter[str] = Counter()
        for stage in self.stages:
            counts.update(stage.sources)
        parts: list[str] = []
        for source, words in _SOURCES.items():
            if counts[source]:
                parts.append(f"{words} for {counts[source]}")
        told = ", ".join(parts) or "none"
        if self.loss:
            told += f"; the last stage computes the loss, {self.loss}"
        return f"times of ops: {told}"

    def _search_lines(self) -> Iterator[str]:
        """How far the cuts are from the best ones, where they were searched."""
        if self.slowest is None or self.bound is None or self.best is None:
            return
        slowest = time_text(self.slowest)
        bound = time_text(self.bound)
        best = time_text(self.best)
        others = f"the cuts with the shortest step that were found make it {best}"
        if best == time_text(self.seconds):
            others = "no cuts were found that make the step shorter"
        yield (
            f"the slowest rank spends {slowest} on a micro-batch with its links, and no cuts can bring that "
            f"below {bound}; {others}"
        )

    def _saved_lines(self) -> Iterator[str]:
        """What graphs save of all micro-batches in flight: as they are set, and in other ways."""
        rows = [
            (str(stage.index), *stage.saved.row())
            for stage in self.stages
            if stage.saved is not None
        ]
        if rows:
            yield ""
            yield table([("stage", *KeptByGraphs.HEAD), *rows])

    def to_svg(self) -> str:
        """Two bars for each stage, its time and its memory by kind, as an SVG picture."""
        row = 56
        left = 90
        wide = 640
        seconds: list[float] = []
        nbytes: list[int] = []
        for s in self.stages:
            seconds.append(s.seconds)
            nbytes.append(sum(s.memory.values()))
        slowest = max(seconds, default=0.0) or 1.0
        fullest = max(nbytes, default=0) or 1
        over = {index for overfull in self.too_large for index in overfull.stages}
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 150}" '
            f'height="{row * len(self.stages) + 60}" '
            'font-family="Helvetica, sans-serif" font-size="12">'
        ]
        for i, (name, color) in enumerate(
            [
                ("forward", _COLORS[0]),
                ("backward", _COLORS[1]),
                ("host alone", _COLORS[2]),
                *zip(_KINDS, _COLORS[3:], strict=True),
            ]
        ):
            x = left + 100 * i
            parts.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{color}"/>')
            parts.append(f'<text x="{x + 17}" y="19">{name}</text>')
        for number, s in enumerate(self.stages):
            top = 36 + row * number
            parts.append(f"<g><title>{escape(', '.join(s.modules))}</title>")
            parts.append(f'<text x="8" y="{top + 25}">stage {s.index}</text>')
            times = [s.forward, s.backward, s.seconds - s.device]
            parts += _bar(
                left, top, wide / slowest, times, _COLORS[:3], time_text(s.seconds)
            )
            memory = s.memory
            sizes = [float(memory[kind]) for kind in _KINDS]
            label = size_text(sum(memory.values()))
            if s.index in over:
                label += ", too large"
            parts += _bar(left, top + 20, wide / fullest, sizes, _COLORS[3:], label)
            parts.append("</g>")
        return "\n".join([*parts, "</svg>\n"])


def _row(s: StageReport) -> tuple[str, ...]:
    return (
        str(s.index),
        str(s.rank),
        time_text(s.seconds),
        f"{100 * s.share:.1f} %",
        time_text(s.forward),
        time_text(s.backward),
        time_text(s.host),
        count_text(s.flops),
        count_text(s.parameters),
        size_text(sum(s.memory.values())),
        size_text(s.memory["activations"]),
        size_text(s.received),
        size_text(s.sent),
        str(s.ops),
        ", ".join(s.modules),
    )


def _crossing_row(c: Crossing) -> tuple[str, ...]:
    source = "input" if c.source is None else str(c.source)
    size = "dynamic" if c.bytes is None else size_text(c.bytes)
    why = f"from {c.module}: {c.why}" if c.module else c.why
    return c.value, f"{source} -> {c.target}", c.route, size, why


_KINDS = ("parameters", "gradients", "optimizer", "activations", "passing")
_COLORS = (
    "#4c78a8",
    "#9ecae9",
    "#bab0ac",
    "#54a24b",
    "#88d27a",
    "#b79a20",
    "#f2cf5b",
    "#e45756",
)


def _bar(
    left: float,
    top: float,
    scale: float,
    sizes: list[float],
    colors: tuple[str, ...],
    label: str,
) -> Iterator[str]:
    x = left
    for size, color in zip(sizes, colors, strict=True):
        width = size * scale
        yield (
            f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="17" fill="{color}"/>'
        )
        x += width
    yield f'<text x="{x + 6:.1f}" y="{top + 13}">{label}</text>'


def report(
    program: Program,
    setting: Setting,
    plan: Plan | None = None,
    sizes: Mapping[str, int] | None = None,
    bindings: Bindings | None = None,
    loss: LossCost | None = None,
    measured: Sequence[Timing[float]] | None = None,
    splits: bool = True,
    saved: Sequence[KeptByGraphs | None] = (),
) -> Report:
    """The costs of the stages of a linked program under `setting`, with the loss on the last one. `measured`:
    the seconds of each stage where they are known; `splits`: whether torch can split their backwards;
    `saved`: for each stage what graphs save, where they run it.

    Raises InputError when the stages do not fit their schedule.
    """
    count = len(program.stages)
    placement = setting.placement(count)
    devices = setting.devices(count)
    flights = setting.flights(count)
    by_graphs = saved or [None] * count
    lines = _lines_of(program, setting, sizes, bindings, loss)
    timings = measured or [
        line.total(where) for line, where in zip(lines, devices, strict=True)
    ]
    seconds = [timing.device for timing in timings]
    run = [as_run(s, i, splits) for i, s in enumerate(seconds)]
    hosts = [as_run(timing.host, i, splits) for i, timing in enumerate(timings)]
    crossings = tuple(_crossings(program))
    homes = homes_of(program)
    on_device = [_both_ways(timing.device) for timing in timings]
    on_host = [_both_ways(timing.host) for timing in timings]
    limits = [*map(max, on_device, on_host)]
    total = sum(limits) or 1.0
    between = [_bytes_between(program, i) for i in range(count - 1)]
    stages: list[StageReport] = []
    for i, (stage, line) in enumerate(zip(program.stages, lines, strict=True)):
        time = seconds[i]
        sources = ["measured"] * len(line.ops)
        if measured is None:
            sources = [cost.source for cost in line.costs]
        stages.append(
            StageReport(
                i,
                placement[i],
                tuple(modules_text(program, stage, homes)),
                len(stage.ops),
                sum(cost.flops for cost in line.costs),
                time.forward,
                time.backward,
                on_host[i],
                limits[i] / total,
                sum(_elements(e.type) for e in stage.state if e.kind == "param"),
                _memory(stage, line, setting, flights[i], by_graphs[i]),
                between[i - 1] if i else 0,
                between[i] if i < count - 1 else 0,
                _sources(sources),
                by_graphs[i],
            )
        )
    delays: list[float] = []
    for size, where in zip(between, devices, strict=False):
        delays.append(where.delay(size))
    searched = plan
    if plan is not None and plan.setting != setting:
        searched = None
    line_of_time = simulate(
        setting,
        [s.forward for s in run],
        [s.backward for s in run],
        delays,
        [(s.inputs, s.weights) for s in run],
        hosts,
    )
    ranks = by_rank(placement, limits)
    alone = max(sum(on_device), sum(on_host))
    shares = tuple(
        shares_of(line, where, spent, made.memory["activations"])
        for line, where, spent, made in zip(
            lines, devices, seconds, stages, strict=True
        )
    )
    return Report(
        tuple(stages),
        crossings,
        ", ".join(dict.fromkeys(d.name for d in devices)),
        setting.schedule,
        setting.n_microbatches,
        line_of_time.seconds,
        line_of_time.bubble,
        setting.n_microbatches * alone / (line_of_time.seconds or 1.0),
        sum(ranks) / len(ranks) / (max(ranks) or 1.0),
        searched.bottleneck if searched else None,
        searched.bound if searched else None,
        searched.choice.anywhere.seconds if searched and searched.choice else None,
        lines[-1].loss_name,
        tuple(_too_large(stages, devices)),
        line_of_time,
        shares,
        _units(program, lines, timings, delays, splits, measured is not None),
    )


def _both_ways(seconds: Parts[float]) -> float:
    return seconds.forward + seconds.backward


def _units(
    program: Program,
    lines: Sequence[Line],
    timings: Sequence[Timing[float]],
    delays: Sequence[float],
    splits: bool,
    is_measured: bool,
) -> Units | None:
    """The program in units, with the seconds of these stages."""
    setting = lines[0].setting
    where, *others = dict.fromkeys(setting.devices(len(lines)))
    if others:
        return None
    whole = Line(
        [op for line in lines for op in line.ops],
        [cost for line in lines for cost in line.costs],
        setting,
        frozenset(program.output.operands),
        lines[-1].loss,
        lines[-1].sizes,
    )
    ends = [*itertools.accumulate(len(line.ops) for line in lines)]
    if is_measured:
        whole.calibrate([*itertools.pairwise([0, *ends])], timings)
    return units_of(whole, timings, delays, splits, where)


def _lines_of(
    program: Program,
    setting: Setting,
    sizes: Mapping[str, int] | None,
    bindings: Bindings | None,
    loss: LossCost | None,
) -> list[Line]:
    """Each stage as a line; the last one has the loss."""
    ops = program_ops(program)
    costs = dict(zip(ops, op_costs(ops, sizes, bindings), strict=True))
    last = program.stages[-1]
    own = returns_loss(program)
    return [
        Line(
            stage.ops,
            [costs[op] for op in stage.ops],
            setting,
            frozenset(stage.outputs),
            loss if stage is last else None,
            sizes or {},
            own,
        )
        for stage in program.stages
    ]


def bindings_of(pipe: Staged) -> Bindings:
    """The user's modules and functions that the stages of a pipe call."""
    bindings = Bindings()
    for stage in pipe.stages:
        bindings.functions |= stage._code.functions
        for op in pipe.program.stages[stage.index].ops:
            if path := module_path(op):
                bindings.modules[path] = stage.get_submodule(path)
    return bindings


def _memory(
    stage: Stage,
    line: Line,
    setting: Setting,
    flight: Flight,
    saved: KeptByGraphs | None,
) -> dict[str, int]:
    size, trained = state_bytes(stage.state)
    trained = trained if setting.training else 0
    _, kept, passing = line.memory(0, len(stage.ops), flight)
    if saved is not None:
        kept = saved.chosen
        if line.loss is not None:
            kept += line.loss.kept * flight.weights
    optimizer = trained * STATE_OF[setting.optimizer]
    return {
        "parameters": size,
        "gradients": trained,
        "optimizer": optimizer,
        "activations": kept,
        "passing": passing,
    }


def _too_large(stages: list[StageReport], devices: list[Device]) -> Iterator[TooLarge]:
    """The ranks whose stages need more than their device has."""
    device_of_rank: dict[int, Device] = {}
    for stage, where in zip(stages, devices, strict=True):
        device_of_rank[stage.rank] = where
    for rank, where in sorted(device_of_rank.items()):
        own = [s for s in stages if s.rank == rank]
        sums = {kind: sum(s.memory[kind] for s in own) for kind in _KINDS}
        if sum(sums.values()) > where.memory:
            most = max(sums, key=lambda kind: sums[kind])
            yield TooLarge(
                rank,
                tuple(s.index for s in own),
                sum(sums.values()),
                where.name,
                int(where.memory),
                most,
            )


def _elements(tensor_type: Any) -> int:
    count = 1
    for dim in getattr(tensor_type, "shape", (0,)):
        count *= dim if isinstance(dim, int) else 0
    return count


def _sources(sources: list[str]) -> dict[str, int]:
    return {source: sources.count(source) for source in dict.fromkeys(sources)}


def _bytes_between(program: Program, stage: int) -> int:
    """Bytes forward between a stage and the next: each value once, however many stages read it."""
    return sum(value_bytes(value.type) or 0 for value in crossing(program, stage))


def _crossings(program: Program) -> Iterator[Crossing]:
    names = value_names(program)
    for t in sorted(
        program.transfers,
        key=lambda t: (t.target, -1 if t.source is None else t.source),
    ):
        yield Crossing(
            names[t.value],
            t.source,
            t.target,
            t.route or "",
            value_bytes(t.value.type),
            carries_grad(t.value.type),
            _why(t),
            maker_of(t.value),
        )


def _why(t: Transfer) -> str:
    if t.route == "feed":
        return "an input, given to the stage"
    if t.route == "recompute":
        return "costs less to compute again than to send"
    if t.source is None:
        return "an input that was asked to travel from the first stage"
    through = ""
    if t.via:
        through = f", handed on by {', '.join(map(str, t.via))}"
    if not isinstance(t.value.owner, Op):
        return "a tied parameter that is sent" + through
    reason = "costs more to compute again"
    if carries_grad(t.value.type):
        reason = "its gradient comes back"
    return reason + through
