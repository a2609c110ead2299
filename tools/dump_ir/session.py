"""One run of `dump-ir`: trace, run the passes, show the program in between, write the requested output."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stagecut.backend.tables import table
from stagecut.ir.check.validator import Trace, validate
from stagecut.ir.errors import InputError
from stagecut.ir.graph import LINKED, Program
from stagecut.ir.text.printer import excerpt, text
from stagecut.passes.base import Pass
from stagecut.passes.fold_blocks import folded_text
from stagecut.passes.runner import PassRecord, run_passes
from stagecut.tools.dump_ir.cache import cached, computed, digest_of
from stagecut.tools.dump_ir.options import is_text, spelled
from stagecut.tools.dump_ir.search import balanced
from stagecut.tools.dump_ir.show import (
    Stats,
    Steps,
    Writer,
    diff,
    name_files_from_here,
    only,
    shown_source,
    stats_of,
    times,
)
from stagecut.tools.dump_ir.sources import Source, load

if TYPE_CHECKING:
    from stagecut.backend.costs.report import Report

MOST_DRAWN = 50_000
"""The number of timeline steps that a browser still shows."""

MOST_RECKONED = 1_000_000
"""The number of timeline steps that are computed within seconds."""


@dataclass
class Snapshot:
    """The program after a pass, or after the tracer: its text, when it was asked for, and its numbers."""

    name: str
    title: str
    seconds: float
    text: str
    stats: Stats | None
    changed: bool = True


def needs_model(options: Namespace) -> bool:
    """True for a look that needs the model's tensors or code."""
    return bool(options.roles or options.check_each or options.bisect)


def source_of(options: Namespace) -> Source:
    """The source, traced where the model itself is needed, or the time that tracing takes."""
    return opened(options, needs_model(options) or options.time)


def opened(options: Namespace, fresh: bool) -> Source:
    """The source, with `fresh` always traced. What cannot be searched is refused before that."""

    def traced() -> Source:
        if options.stages is not None:
            balanced(options).refuse_wrong()
        return load(options)

    if is_text(options.source):
        return load(options)
    source = cached(options, traced, fresh)
    name_files_from_here(source.program)
    return source


class ComparedText(NamedTuple):
    """The text of a program, and the same without the files and lines that ops come from."""

    whole: str
    bare: str


class Session:
    """The requests of the command line, done in order."""

    def __init__(
        self,
        options: Namespace,
        passes: Callable[[bool], list[Pass]],
        source: Callable[[Namespace], Source] | None = None,
    ) -> None:
        self._options = options
        self._source = source or source_of
        self._writer = Writer(options.directory)
        self._choose = passes
        wanted = (
            options.print_after,
            options.print_before,
            options.diff,
            options.format == "html",
        )
        self._texts = any(wanted)
        self._history: list[Snapshot] = []
        self._notes: Sequence[str] = ()

    def program(self) -> Program:
        """The program after the passes; nothing is written."""
        with Steps() as self._steps:
            source = self._source(self._options)
            self._run_passes(source, self._choose(source.is_model))
        self._notes = source.notes
        return source.program

    def text(self) -> ComparedText:
        """The text of the program after the passes, or of the part that `--only` names. Nothing is written
        but notes.
        """
        program = self.program()
        with Steps() as self._steps:
            self._note(self._notes)
        with shown_source(program, not self._options.no_source):
            whole = self._final(program)
        with shown_source(program, False):
            return ComparedText(whole, self._final(program))

    def run(self) -> None:
        """Everything is written. Raises StagecutError when something cannot be written."""
        with Steps() as self._steps:
            start = time.perf_counter()
            source = self._steps.do("trace", lambda: self._source(self._options))
            self._note(source.notes)
            program, passes = source.program, self._choose(source.is_model)
            if program.phase != "traced" and (
                self._options.stages is not None or self._options.split_at
            ):
                raise InputError(
                    f"where to cut is said, and the text is {program.phase}: its cuts are made",
                    hint="dump-ir the model",
                )
            self._keep("input", "input", time.perf_counter() - start, program)
            trace = Trace(program) if source.is_model else None
            self._run_passes(source, passes)
            if trace is not None and program.phase == "linked":
                validate(trace, program)
            if self._options.bisect:
                self._writer.final(
                    "bisect.txt",
                    f"no pass changes what the program computes: {', '.join(p.name for p in passes)}\n",
                )
                return
            if self._options.roles:
                program = self._steps.do("roles", lambda: _differentiated(source))
            with shown_source(program, not self._options.no_source):
                self._show(program)

    def _note(self, notes: Sequence[str]) -> None:
        """A note of tracing; `--leaf` is the way to make the same choice beforehand."""
        for note in notes:
            self._steps.say(f"dump-ir: note: {spelled(note)}")
        if any("kept whole" in note for note in notes):
            self._steps.say("  try: --leaf NAME keeps a module whole without this note")

    def _run_passes(self, source: Source, passes: Sequence[Pass]) -> None:
        options = self._options
        self._is_kept = source.is_kept
        self._steps.expect(len(passes))
        if not (options.check_each or options.bisect):
            run_passes(
                source.program, passes, check=options.verify_each, after=self._after
            )
            if options.search is not None:
                self._tell_why("searched", options.search.why)
            return
        from stagecut.tools.dump_ir.pass_check import Feed, check_passes, random_feed

        if source.bindings is not None and source.inputs is not None:
            feed = Feed(source.inputs, source.bindings)
        else:
            feed = random_feed(source.program)
        check_passes(source.program, passes, feed, self._after)

    def _after(self, record: PassRecord, program: Program) -> None:
        self._steps.done(record.name)
        self._keep(
            record.name,
            f"{record.index:02}-{record.name}",
            record.seconds,
            program,
            record.changed,
        )

    def _keep(
        self,
        name: str,
        title: str,
        seconds: float,
        program: Program,
        changed: bool = True,
    ) -> None:
        last = self._history[-1].text if self._history else ""
        printed = last if self._texts else ""
        if changed and self._texts:
            with shown_source(program, not self._options.no_source):
                printed = text(program)
        stats = stats_of(program) if self._options.stats else None
        self._history.append(Snapshot(name, title, seconds, printed, stats, changed))

    # --- what to show -----------------------------------------------------------------------------

    def _show(self, program: Program) -> None:
        options = self._options
        shown = [self._prints(), self._diffs(), self._tables(), self._lives(program)]
        if any(shown) and options.directory is None:
            return
        if options.report:
            self._report(program)
        elif options.timeline:
            self._timeline(program)
        else:
            name = (
                "index.html"
                if options.format == "html"
                else f"program.{'ir' if options.format == 'text' else options.format}"
            )
            self._writer.final(
                name, self._steps.do("write", lambda: self._final(program))
            )

    def _prints(self) -> bool:
        after, before = set(self._options.print_after), set(self._options.print_before)
        following = [snapshot.name for snapshot in self._history[1:]] + [""]
        for snapshot, next_name in zip(self._history, following, strict=True):
            names = {snapshot.name} & after or {next_name} & before
            is_after_all = "all" in after and snapshot.changed
            is_before_all = "all" in before and next_name and snapshot.changed
            if names or is_after_all or is_before_all:
                self._writer.show(f"{snapshot.title}.ir", snapshot.text)
        return bool(after or before)

    def _diffs(self) -> bool:
        if self._options.diff:
            for old, new in zip(self._history, self._history[1:], strict=False):
                if new.changed:
                    self._writer.colored(
                        f"{new.title}.diff",
                        diff(old.text, new.text, old.title, new.title),
                    )
        return bool(self._options.diff)

    def _tables(self) -> bool:
        if self._options.stats:
            rows = [
                (
                    snapshot.title,
                    "yes" if snapshot.changed else "no",
                    *snapshot.stats.cells(),
                )
                for snapshot in self._history
                if snapshot.stats is not None
            ]
            self._writer.final(
                "stats.txt", table([("after", "changed", *Stats.HEAD), *rows]) + "\n"
            )
        if self._options.time:
            steps = [(snapshot.title, snapshot.seconds) for snapshot in self._history]
            self._writer.final("time.txt", times(steps))
        return bool(self._options.stats or self._options.time)

    def _lives(self, program: Program) -> bool:
        value, state = self._options.trace_value, self._options.trace_param
        if value is None and state is None:
            return False
        from stagecut.ir.text.life import life_of_state, life_of_value

        if value is not None:
            self._writer.final("value.txt", f"{life_of_value(program, value)}\n")
        if state is not None:
            self._writer.final("param.txt", f"{life_of_state(program, state)}\n")
        return True

    def _final(self, program: Program) -> str:
        options = self._options
        format = options.format
        keep = only(program, options.only)
        if format == "text":
            if keep is not None:
                return excerpt(program, keep)
            return text(program) if options.unfold else folded_text(program)
        if format == "json":
            from stagecut.backend.pictures.data import to_json

            return to_json(program, keep or (lambda op: True))
        if format == "html":
            return self._page(program)
        return self._graph(program)

    def _graph(self, program: Program) -> str:
        from stagecut.backend.pictures.dot import to_dot, to_svg

        options = self._options
        if program.phase not in LINKED and (options.level == "stages" or options.only):
            raise InputError(
                f"a picture of stages is of a linked program, this one is {program.phase}",
                hint="run all passes, --passes all; or draw the whole of it, --level modules or --level ops",
            )
        stage = int(options.only[0].removeprefix("stage=")) if options.only else None
        level = (
            "modules"
            if stage is not None and options.level == "stages"
            else options.level
        )
        make = to_svg if options.format == "svg" else to_dot
        return make(program, level=level, stage=stage, depth=options.depth)

    # --- what needs costs -------------------------------------------------------------------------

    def _report(self, program: Program) -> None:
        format = self._options.format

        def told() -> str:
            costs = self._costs(program, MOST_RECKONED)
            if format == "json":
                return costs.to_json() + "\n"
            return costs.to_svg() if format == "svg" else f"{costs}\n"

        name = "report.txt" if format == "text" else f"report.{format}"
        self._writer.final(name, self._reckoned("report", program, told))

    def _timeline(self, program: Program) -> None:
        format = self._options.format

        def told() -> str:
            timeline = self._costs(program, MOST_DRAWN).timeline
            if format == "svg":
                return timeline.to_svg()
            return json.dumps(timeline.chrome_trace()) + "\n"

        self._writer.final(
            f"timeline.{format}", self._reckoned("timeline", program, told)
        )

    def _reckoned(self, look: str, program: Program, told: Callable[[], str]) -> str:
        """What a look at the costs shows, as an earlier one has shown it if nothing has changed."""
        options, search = self._options, self._options.search
        question = {
            "look": look,
            "format": options.format,
            "program": digest_of(program),
            "setting": [options.device, options.schedule, options.microbatches],
            "search": None if search is None else search.question,
        }
        needs = ("stagecut.backend.costs.balance", "stagecut.backend.costs.report")
        answer = computed(options, "reports", question, told, needs)
        self._tell_why("reckoned", answer.why)
        return str(answer.content)

    def _tell_why(self, done: str, why: str) -> None:
        """Says why something was done again. What made the trace be done again has been said."""
        if why and self._is_kept:
            self._steps.say(f"dump-ir: note: {done} again: {why}")

    def _costs(self, program: Program, most: int) -> Report:
        from stagecut.backend.costs.loss import counted_loss
        from stagecut.backend.costs.report import report
        from stagecut.backend.costs.setting import Setting

        options = self._options
        if program.phase != "linked":
            raise InputError(
                f"costs are those of linked programs, this one is {program.phase}",
                hint="dump-ir the model"
                if program.phase in LINKED
                else "run all passes: --passes all",
            )
        stages, count = len(program.stages), options.microbatches
        steps = 2 * stages * count  # a forward and a backward of each
        if steps > most:
            what = (
                f"{count} micro-batches in {stages} stages take {steps} steps, and no more than {most} are "
                "shown"
            )
            raise InputError(what, hint=f"--microbatches {most // (2 * stages)}")
        setting = Setting(options.device, options.schedule, count)
        loss = counted_loss(program, None, {}, setting)
        plan = None if options.search is None else options.search.plan()
        return report(program, setting, plan, loss=loss)

    def _page(self, program: Program) -> str:
        from stagecut.backend.page.page import to_html
        from stagecut.backend.pictures.dot import to_svg
        from stagecut.backend.pictures.render import find_renderer

        history = [(s.title, s.text, s.seconds) for s in self._history]
        if program.phase != "linked":
            return to_html(history, program, title=program.name)
        costs = self._costs(program, MOST_DRAWN)
        # without a renderer the page has no picture: its tables say the same
        graph = to_svg(program) if find_renderer() else None
        return to_html(history, program, costs, graph_svg=graph, title=program.name)


def _differentiated(source: Source) -> Program:
    """The program of a model, with the backward of each stage. Raises InputError for one that is not
    linked.
    """
    from stagecut.ir.run.call import check_inputs
    from stagecut.pipe import Pipe

    program = source.program
    if program.phase != "linked" or source.bindings is None:
        raise InputError(
            f"stages have roles in a linked program, this one is {program.phase}",
            hint="run all passes: --passes all",
        )
    pipe = Pipe(program, source.bindings)
    if source.inputs is not None:
        pipe._sizes = check_inputs(program.inputs, source.inputs)
    return pipe.differentiated()[0]
