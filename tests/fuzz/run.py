"""Draws random models, cuts them at random places and holds the stages to what the model does.

    python tests/fuzz/run.py --programs 20000 --seed 1 --jobs 2

Every failure is made smaller and printed as a script that shows it by itself. Exit status 1 when there was one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, it finds its neighbours

from fuzz.judge import DEEP, FAILED, PASSED, REFUSED, UNTRACEABLE, Verdict, draw, judge, quiet, reproducer, shrink
from fuzz.plans import source

CHUNK = 20
BY_GRAPHS = ""
"""The note of a stage that ran by graphs."""
GRAPHS = 0.25
"""Which share of programs is handed over as fx graphs, unless the command line says otherwise."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: the seed, every how many programs the slow checks run too, and whether a bug is planted.

    `only`: the one check that every program is held to, '' for all of them.
    `graphs` is the share of programs that are traced symbolically first.
    Scripts that show failures go to the folder `scripts`, if there is one.
    """

    seed: int
    deep_every: int = 10
    shrink_seconds: float = 120
    plant: bool = False
    scripts: Path | None = None
    graphs: float = 0.0
    only: str = ""


@dataclass
class Failure:
    """One way to fail: which programs do, and a script for the smallest one found."""

    indices: list[int]
    lines: list[str]
    script: str = ""
    sizes: tuple[int, int] = (0, 0)


@dataclass
class Report:
    """What a run found. Counters are by message, `ops` by op name; `backwards` counts stages, by why no graphs ran them."""

    kinds: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    untraceable: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    backwards: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Failure] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def programs(self) -> int:
        """How many programs were judged."""
        return sum(self.kinds.values())

    def add(self, index: int, verdict: Verdict) -> bool:
        """Counts a verdict; True when it is a failure of a kind not seen before."""
        self.kinds[verdict.kind] += 1
        self.ops.update(verdict.ops)
        self.backwards.update(verdict.notes)
        (self.untraceable if verdict.kind == UNTRACEABLE else self.refusals).update(verdict.refusals)
        if verdict.kind != FAILED:
            return False
        known = verdict.signature in self.failures
        self.failures.setdefault(verdict.signature, Failure([], verdict.lines)).indices.append(index)
        return not known

    def __str__(self) -> str:
        return "\n".join(self._text())

    def _text(self) -> Iterator[str]:
        kinds, rate = self.kinds, 1000 * self.seconds / max(1, self.programs)
        yield f"{self.programs} programs in {self.seconds:.0f} s, {rate:.1f} s per 1000"
        yield f"{kinds[PASSED]} passed, {kinds[FAILED]} failed, {kinds[REFUSED]} refused, {kinds[UNTRACEABLE]} untraceable"
        for title, counts in (("refused", self.refusals), ("untraceable", self.untraceable)):
            for message, count in counts.most_common():
                yield f"  {title} {count:>6}  {message}"
        yield f"{self.backwards[BY_GRAPHS]} of {self.backwards.total()} stages that were to run by graphs did"
        for message, count in (self.backwards - Counter({BY_GRAPHS: self.backwards[BY_GRAPHS]})).most_common():
            yield f"  without {count:>10}  {message}"
        rarest = ", ".join(name for name, _ in self.ops.most_common()[-5:])
        yield f"{len(self.ops)} different ops, {sum(self.ops.values())} in all; rarest: {rarest}"
        for signature, failure in self.failures.items():
            yield f"  FAILED {len(failure.indices):>6}  {signature}  (programs {', '.join(map(str, failure.indices[:8]))})"


# --- workers ------------------------------------------------------------------------------------------


def run_chunk(job: Job, indices: list[int]) -> list[tuple[int, Verdict]]:
    """Index and verdict of each program."""
    return [(index, judge(draw(job.seed, index, job.plant, job.graphs)[0], _is_deep(job, index), index, job.only)) for index in indices]


def _is_deep(job: Job, index: int) -> bool:
    return job.only in DEEP or (job.deep_every > 0 and index % job.deep_every == 0)


def run_shrink(job: Job, index: int, verdict: Verdict) -> Failure:
    """The failing program `index`, made smaller, with its script."""
    plan, made_of = draw(job.seed, index, job.plant, job.graphs)
    small, found = shrink(plan, made_of, verdict, index, job.shrink_seconds, job.plant, job.graphs)
    return Failure([index], found.lines, reproducer(small, found, index), (len(source(plan)), len(source(small))))


def fuzz(programs: Iterable[int], job: Job, jobs: int, progress: Progress) -> Report:
    """Judges the programs of those numbers, here when `jobs` is 0, else in that many processes."""
    report = Report()
    start = time.perf_counter()
    if jobs == 0:
        quiet()
        for index in programs:
            for _, verdict in run_chunk(job, [index]):
                if report.add(index, verdict):
                    _take(report, verdict.signature, run_shrink(job, index, verdict), job.scripts)
            progress.advance(1, report)
    else:
        _in_processes(list(programs), job, jobs, progress, report)
    report.seconds = time.perf_counter() - start
    return report


def _in_processes(programs: list[int], job: Job, jobs: int, progress: Progress, report: Report) -> None:
    context = multiprocessing.get_context("spawn")
    chunks = [programs[i : i + CHUNK] for i in range(0, len(programs), CHUNK)]
    with ProcessPoolExecutor(jobs, context, quiet, max_tasks_per_child=150) as pool:
        pending: dict[Future[Any], Any] = {}
        while chunks or pending:
            while chunks and len(pending) < 2 * jobs:
                chunk = chunks.pop(0)
                pending[pool.submit(run_chunk, job, chunk)] = chunk
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                what = pending.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    report.failures[f"a worker died at or before programs {what}"] = Failure([], [])
                    return
                if isinstance(result, Failure):
                    _take(report, what, result, job.scripts)
                    continue
                for index, verdict in result:
                    if report.add(index, verdict):
                        pending[pool.submit(run_shrink, job, index, verdict)] = verdict.signature
                progress.advance(len(result), report)


def _take(report: Report, signature: str, found: Failure, folder: Path | None) -> None:
    """The script of a failure is known: it is printed at once, and written to a file of `folder`."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"program_{found.indices[0]}.py").write_text(found.script, encoding="utf-8")
    failure = report.failures[signature]
    failure.lines, failure.script, failure.sizes = found.lines, found.script, found.sizes
    print(f"\n# --- program {found.indices[0]}: {signature} ({found.sizes[0]} characters -> {found.sizes[1]})\n{found.script}", flush=True)


# --- progress -----------------------------------------------------------------------------------------


class Progress(Protocol):
    """Shows how far a run is."""

    def advance(self, count: int, report: Report) -> None:
        """`count` more programs are judged."""


class Silent:
    """Shows nothing."""

    def advance(self, count: int, report: Report) -> None:
        """Nothing."""


class Bar:
    """A bar of rich."""

    def __init__(self, bar: Any, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("programs", total=total, failed=0)

    def advance(self, count: int, report: Report) -> None:
        """A longer bar."""
        self._bar.update(self._task, advance=count, failed=report.kinds[FAILED])


@contextmanager
def show_progress(total: int) -> Iterator[Progress]:
    """A bar, or nothing when nobody looks at a terminal."""
    if not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"))
    with Rich(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield Bar(bar, total)


# --- command line -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the fuzzer; 1 when a program failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Cuts random models and compares the stages with the model.")
    parser.add_argument("--programs", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same programs (default 0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first program (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0 stays in this one (default 2)")
    parser.add_argument(
        "--deep-every",
        type=int,
        default=10,
        help="every how many programs single passes and the backward by graphs are checked too; 0 never (default 10)",
    )
    parser.add_argument(
        "--graphs", type=float, default=GRAPHS, help=f"share of programs that are fx graphs, from 0 to 1 (default {GRAPHS})"
    )
    parser.add_argument("--only", default="", metavar="CHECK", help="hold every program to this check alone: mailbox, backward, ...")
    parser.add_argument("--shrink-seconds", type=float, default=120, help="time to make one failure smaller (default 120)")
    parser.add_argument("--coverage", type=Path, help="write op names and how often they were seen to this JSON file")
    parser.add_argument("--scripts", type=Path, help="write the script of every failure to this folder as well")
    parser.add_argument("--show", action="store_true", help="print the source of the programs instead of running them")
    options = parser.parse_args(argv)
    job = Job(options.seed, options.deep_every, options.shrink_seconds, scripts=options.scripts, graphs=options.graphs, only=options.only)
    programs = range(options.start, options.start + options.programs)
    if options.show:
        quiet()
        for index in programs:
            print(f"# --- program {index}\n{source(draw(job.seed, index, graphs=job.graphs)[0])}")
        return 0
    with show_progress(len(programs)) as progress:
        report = fuzz(programs, job, options.jobs, progress)
    print(report)
    if options.coverage:
        options.coverage.write_text(json.dumps(dict(report.ops.most_common()), indent=1) + "\n", encoding="utf-8")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
