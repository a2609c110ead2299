"""A whole compile as one HTML page that needs no other file and no network: stages, graph, timeline, passes,
lives of values.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from html import escape
from importlib.resources import files
from typing import Any

from stagecut.backend.costs.report import Report, StageReport
from stagecut.backend.costs.shares import OpShare
from stagecut.backend.costs.timeline import Timeline
from stagecut.backend.costs.units import orders_of, packed
from stagecut.backend.page.columns import columns_of
from stagecut.backend.page.source import source_of
from stagecut.backend.pictures.stages import PART, LayerRun, homes_of, layer_runs
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Op, Program, nested_ops, scope_fqn
from stagecut.ir.keywords import near_names
from stagecut.ir.text.life import Crossing, Lives, Site, StateLife, Use, ValueLife
from stagecut.ir.text.printer import (
    file_names,
    fqn_text,
    size_text,
    value_names,
)

History = Sequence[tuple[str, str, float]]
"""(pass, IR text after it, seconds), beginning with ("input", text, 0)."""

_SCRIPTS = (
    "data.js",
    "text.js",
    "columns.js",
    "tables.js",
    "tree.js",
    "life.js",
    "picture.js",
    "timeline.js",
    "step.js",
    "whatif.js",
    "against.js",
    "search.js",
    "beside.js",
    "main.js",
)
_SVG = re.compile(r"<svg[\s>].*</svg>", re.DOTALL)


@near_names
def to_html(
    history: History,
    program: Program,
    report: Report | None = None,
    timeline_svg: str | None = None,
    graph_svg: str | None = None,
    title: str | None = None,
    measured: Timeline | None = None,
    against: tuple[Program, Report] | None = None,
    source: bool = True,
) -> str:
    """A compile as one HTML page that needs no other file. `program` is the program that the last text of
    `history` shows; `history` has (pass, IR text after it, seconds). `pipe.to_html()` makes the page of a
    pipe.

    Raises InputError for a picture that is no SVG.

    The id and the classes of a part of a picture tell what it stands for (`stage-2`, `value-relu_3`,
    `module-layers.3`), else its title. Without graph_svg there is no graph, without report no costs. The page
    draws the timeline of the report, and above each other with it `measured`, a timeline that
    `stagecut.record` gave; timeline_svg is a picture in their place. against: another cut of the same model
    and its costs, which the page shows beside this one where it has a report. source: whether the page has
    the lines of Python that ops come from, with those around them, where they can be read.
    """
    title = title or f"stagecut: {program.name}"
    script = f"(async () => {{\n{''.join(_read(name) for name in _SCRIPTS)}}})();\n"
    parts = {
        "title": escape(title),
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": _read("page.css"),
        "graph": _picture(graph_svg),
        "timeline": _picture(timeline_svg),
        "data": _data(page_data(history, program, report, measured, against, source)),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _picture(svg: str | None) -> str:
    """The SVG without what stands before it in a file of its own. The policy of the page keeps scripts and
    addresses in it from doing anything.
    """
    if not svg:
        return ""
    picture = _SVG.search(svg)
    if picture is None:
        raise InputError(
            "the picture is no SVG", hint="to_svg and Timeline.to_svg make one"
        )
    return picture[0]


PACKED = 2**18
"""Characters of data from which on the page holds them deflated."""


def _data(data: Any) -> str:
    """The element with the data of the page: JSON, or where that is long, JSON deflated, in base64."""
    text = _json(data)
    form = ""
    if len(text) > PACKED:
        form = " data-packed"
        text = packed(text)
    return f'<script type="application/json" id="data"{form}>{text}</script>'


def _read(name: str) -> str:
    return (files("stagecut.backend.page") / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that no HTML parser takes for a tag or a comment."""
    return (
        json.dumps(data, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
    )


def page_data(
    history: History,
    program: Program,
    report: Report | None = None,
    measured: Timeline | None = None,
    against: tuple[Program, Report] | None = None,
    source: bool = True,
) -> dict[str, Any]:
    """The contents of the page as plain data. Frequent strings are numbers into the list `strings`."""
    lives = Lives(program)
    strings = _Strings()
    columns = columns_of(history)
    sites = lives.places()
    values = [*lives.values()]
    states = [*lives.states()]
    renamed = {version.name for life in states for version in life.versions}
    files = file_names(nested_ops(program.all_ops()))
    last: list[str] = []
    if history:
        _, text, _ = history[-1]
        last = [line.strip() for line in text.splitlines()]
    costs = _Costs(program, report, lives)
    return {
        "name": program.name,
        "phase": program.phase,
        "ops": [
            _op(site, line, files, strings)
            for site, line in zip(sites, _lines_of(sites, last), strict=True)
        ],
        "costs": costs.rows,
        "cost_of": [costs.of_op.get(site.number, -1) for site in sites],
        "loss": costs.loss,
        "values": [_value(life, strings) for life in values],
        "state": [_state(life, strings) for life in states],
        "chains": [
            *_chains(states),
            *_chains([life for life in values if life.name not in renamed]),
        ],
        "ways": [*_ways(values, states, report)],
        "stages": [*_stages(program, report)],
        "report": _totals(report),
        "findings": [*findings(program, report)],
        "units": _units(report),
        "against": _other_cut(program, *against) if against and report else None,
        "timelines": [*_timelines(report, measured)],
        "files": {short: path for path, short in files.items()},
        "source": source_of(files, sites) if source else {},
        "lines": columns.lines,
        "columns": [asdict(column) for column in columns.columns],
        "strings": strings.all,
    }


class _Strings:
    """Numbers strings in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    @property
    def all(self) -> list[str]:
        return [*self._numbers]


class _Costs:
    """The costs of ops. Each different one is a row: seconds forward and backward, FLOPs, bytes moved, bytes
    of state and bytes kept. of_op: the number of an op -> its row. loss: its name and its row, where it was
    counted.
    """

    def __init__(self, program: Program, report: Report | None, lives: Lives) -> None:
        self._numbers: dict[tuple[float, ...], int] = {}
        self.of_op: dict[int, int] = {}
        self.loss: tuple[str, int] | None = None
        if report is None:
            return
        for stage, shares in zip(program.stages, report.shares, strict=False):
            rows = [self._row(share) for share in shares]
            numbers = [lives.number(op) for op in stage.ops]
            self.of_op |= dict(zip(numbers, rows, strict=False))
            if len(rows) > len(numbers):
                self.loss = (report.loss, rows[-1])

    @property
    def rows(self) -> list[tuple[float, ...]]:
        return [*self._numbers]

    def _row(self, share: OpShare) -> int:
        row = tuple(map(_rounded, astuple(share)))
        return self._numbers.setdefault(row, len(self._numbers))


def _lines_of(sites: list[Site], lines: list[str]) -> Iterator[int]:
    """The line of the text that shows each op, -1 for none. Ops are in the same order there."""
    next_line = 0
    rest: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        rest.setdefault(line.removesuffix(" {"), []).append(number)
    for site in sites:
        numbers = rest.get(site.text, [])
        number = next((number for number in numbers if number >= next_line), -1)
        next_line = max(next_line, number + 1)
        yield number


def _op(
    site: Site, line: int, files: dict[str, str], strings: _Strings
) -> list[int | None]:
    loc = ""
    if site.loc:
        file = site.loc.file
        loc = f"{files.get(file, file)}:{site.loc.line}"
    return [
        site.stage,
        strings(site.target),
        strings(site.module),
        strings(loc),
        line,
    ]


def _value(life: ValueLife, strings: _Strings) -> dict[str, Any]:
    data = {
        "name": life.name,
        "kind": life.kind,
        "type": strings(life.type),
        "bytes": life.bytes,
        "uses": _uses(life.uses),
        "born": life.born.number if life.born else None,
        "view": life.view_of,
        "copy": life.copy_of,
        "copies": life.copies,
        "returned": life.returned,
    }
    return {
        key: field
        for key, field in data.items()
        if field not in (None, (), [], "result")
    }


def _chains(lives: list[ValueLife] | list[StateLife]) -> Iterator[list[str]]:
    """Every chain of versions once; its members share it."""
    lines = {
        id(life.versions): life.versions for life in lives if len(life.versions) > 1
    }
    return ([version.name for version in line] for line in lines.values())


def _state(life: StateLife, strings: _Strings) -> dict[str, Any]:
    data = {
        "name": fqn_text(life.name),
        "names": [fqn_text(n) for n in life.names],
        "kind": life.kind,
        "type": strings(life.type),
        "bytes": life.bytes,
        "trained": life.trained,
        "transient": [fqn_text(n) for n in life.transient],
        "share": life.share,
        "held": [
            [holding.stage, [fqn_text(n) for n in holding.names]]
            for holding in life.held
        ],
        "overlaps": [fqn_text(n) for n in life.overlaps],
        "uses": _uses(life.uses),
        "returned": life.returned,
    }
    return {
        key: field for key, field in data.items() if field not in (None, (), [], False)
    }


def _uses(uses: tuple[Use, ...]) -> list[list[Any]]:
    """[op], or [op, use] where the use is more than reading."""
    return [
        [use.place.number] if use.how == "reads" else [use.place.number, use.how]
        for use in uses
    ]


def _ways(
    values: list[ValueLife], states: list[StateLife], report: Report | None
) -> Iterator[dict[str, Any]]:
    why: dict[tuple[str, int], str] = {}
    if report:
        why = {(c.value, c.target): c.why for c in report.crossings}
    crossings = [
        (life.name, crossing) for life in values for crossing in life.crossings
    ]
    crossings += [
        (fqn_text(life.name), crossing)
        for life in states
        for crossing in life.crossings
    ]
    for name, crossing in sorted(
        crossings, key=lambda pair: (pair[1].target, _source(pair[1]))
    ):
        yield {
            "value": name,
            "why": why.get((name, crossing.target)),
            **asdict(crossing),
        }


def _source(crossing: Crossing) -> int:
    if crossing.source is None:
        return -1
    return crossing.source


def _stages(program: Program, report: Report | None) -> Iterator[dict[str, Any]]:
    costs: dict[int, StageReport] = {}
    if report:
        costs = {stage.index: stage for stage in report.stages}
    names = value_names(program)
    homes = homes_of(program)
    for stage in program.stages:
        cost = costs.get(stage.index)
        yield {
            **(asdict(cost) if cost else {"index": stage.index, "ops": len(stage.ops)}),
            "modules": [*map(_modules, layer_runs(program, stage, homes))],
            "inputs": [names[v] for v in stage.inputs],
            "outputs": [names[v] for v in stage.outputs],
        }


def _modules(run: LayerRun) -> dict[str, Any]:
    """The text of modules that run one after the other, as the page makes references of it: what stands in
    front of the first path, what behind it, and the last path.
    """
    if not run.paths:
        return {"text": run.text}
    first, last = run.paths
    before = PART if run.text.startswith(PART) else ""
    return {"text": run.text, "before": before, "first": first, "last": last}


def _totals(report: Report | None) -> dict[str, Any] | None:
    if report is None:
        return None
    kept = (
        "device",
        "schedule",
        "n_microbatches",
        "seconds",
        "bubble",
        "speed_up",
        "balance",
        "bound",
        "best",
    )
    too_large = [index for overfull in report.too_large for index in overfull.stages]
    return {**{name: getattr(report, name) for name in kept}, "too_large": too_large}


def _timelines(
    report: Report | None, measured: Timeline | None
) -> Iterator[dict[str, Any]]:
    """The predicted timeline and the measured one, as far as they are there."""
    if report is not None:
        yield {"title": "predicted", **_timeline(report.timeline)}
    if measured is not None:
        yield {"title": "measured", **_timeline(measured)}


def _timeline(timeline: Timeline) -> dict[str, Any]:
    """Steps as [kind, stage, micro-batch, rank, start, end], what is sent as [boundary, micro-batch, 1 for
    gradients, start, end], the seconds of each rank's host.
    """
    return {
        "ranks": timeline.ranks,
        "hosts": [*map(_rounded, timeline.hosts)],
        "events": [
            [
                event.step.kind,
                event.step.stage,
                event.step.microbatch,
                event.rank,
                _rounded(event.start),
                _rounded(event.end),
            ]
            for event in timeline.events
        ],
        "sent": [
            [
                sent.boundary,
                sent.microbatch,
                int(sent.is_gradient),
                _rounded(sent.start),
                _rounded(sent.end),
            ]
            for sent in timeline.sent
        ],
    }


def _other_cut(program: Program, other: Program, report: Report) -> dict[str, Any]:
    """Another cut, and the modules that are in other stages in it: [module, its stages here, there]."""
    here = _places(program)
    there = _places(other)
    return {
        "stages": [*_stages(other, report)],
        "report": _totals(report),
        "timeline": {"title": "the other cut", **_timeline(report.timeline)},
        "moved": [
            [path, here[path], there[path]]
            for path in here
            if path in there and here[path] != there[path]
        ],
    }


def _places(program: Program) -> dict[str, list[int]]:
    """Block, or module outside of blocks -> the stages that run its ops."""
    places: dict[str, dict[int, None]] = {}
    for stage in program.stages:
        for op in stage.ops:
            path = scope_fqn(op.scope)
            block = _BLOCK.match(path)
            name = block[0] if block else path
            if name:
                places.setdefault(name, {})[stage.index] = None
    return {path: [*stages] for path, stages in places.items()}


_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
"""The path of the outermost module of a list in that of a module."""


def _units(report: Report | None) -> dict[str, Any] | None:
    """The program in units, and the orders of schedules for the numbers that a reader may choose."""
    if report is None or report.units is None:
        return None
    units = report.units
    keys, orders = orders_of(units, len(report.stages))
    where = units.device
    return {
        "units": [astuple(unit) for unit in units.units],
        "stages": [[list(timing.device), list(timing.host)] for timing in units.stages],
        "delays": units.delays,
        "splits": units.splits,
        "training": units.setting.training,
        "by_graphs": units.setting.by_graphs,
        "device": asdict(where),
        "ranks": max(stage.rank for stage in report.stages) + 1,
        "keys": keys,
        "orders": orders,
    }


def _rounded(amount: float) -> float:
    """A number with as many digits as anybody reads."""
    return float(f"{amount:.6g}")


Finding = tuple[str, str]
"""A sentence, and its subject as the page names it: `stage:3`, `value:%x`, `state:@w`, or nothing."""


def findings(program: Program, report: Report | None) -> Iterator[Finding]:
    """The facts that a person with a slow or unbalanced pipeline should look at first."""
    if report is not None and report.stages:
        if report.lacks_most is not None:
            yield report.too_large_text, f"stage:{report.lacks_most.stages[0]}"
        yield from _time_findings(report)
        yield from _memory_findings(report)
        yield from _source_findings(report)
    yield from _way_findings(program)
    for entry in program.state:
        if len(entry.stages) > 1 or entry.share:
            stages = ", ".join(map(str, entry.stages))
            yield (
                f"{fqn_text(entry.name)} is used by several stages (held by {stages}): {entry.share}",
                f"state:{fqn_text(entry.name)}",
            )


def _time_findings(report: Report) -> Iterator[Finding]:
    slowest = max(report.stages, key=lambda s: s.seconds)
    total = sum(s.seconds for s in report.stages)
    mean = total / len(report.stages) or 1.0
    over = 100 * (slowest.seconds / mean - 1)
    others = "the others wait for it" if over >= 2 else "the stages are balanced"
    yield (
        f"stage {slowest.index} is the slowest, {over:.0f} % above the mean: {others}",
        f"stage:{slowest.index}",
    )
    if waiting := report.host_text:
        yield waiting, ""
    if report.bubble > 0.2:
        more = f"{report.n_microbatches} micro-batches for {len(report.stages)} stages"
        yield (
            f"{100 * report.bubble:.0f} % of the ranks' time is waiting: {more}; more micro-batches make it "
            "less",
            "",
        )
    if report.best is not None and report.best < 0.95 * report.seconds:
        gain = 100 * (1 - report.best / report.seconds)
        yield f"other cuts make the step {gain:.0f} % shorter", ""


def _memory_findings(report: Report) -> Iterator[Finding]:
    fullest = max(report.stages, key=lambda s: sum(s.memory.values()))
    size = sum(fullest.memory.values())
    kind = max(fullest.memory, key=lambda k: fullest.memory[k])
    part = 100 * fullest.memory[kind] / (size or 1)
    yield (
        f"stage {fullest.index} needs the most memory, {size_text(size)}, {part:.0f} % of it {kind}",
        f"stage:{fullest.index}",
    )


def _source_findings(report: Report) -> Iterator[Finding]:
    guessed = sum(s.sources.get("bytes only", 0) for s in report.stages)
    total = sum(s.ops for s in report.stages)
    if guessed > total / 4:
        yield (
            f"the times of {guessed} of {total} ops are reckoned from their bytes only",
            "",
        )


def _way_findings(program: Program) -> Iterator[Finding]:
    names = value_names(program)
    sent = [t for t in program.transfers if t.route in ("send", "relay")]
    far = max(sent, key=lambda t: len(t.via), default=None)
    if far is not None and far.via:
        longest = f"{names[far.value]} through {len(far.via)}, to stage {far.target}"
        relayed = len({t.value for t in sent if t.via})
        yield (
            f"values that other stages hand on: {relayed}, the farthest {longest}",
            f"{_kind(far.value.owner)}:{names[far.value]}",
        )


def _kind(owner: object) -> str:
    if owner is None or isinstance(owner, Op):
        return "value"
    return "state"
