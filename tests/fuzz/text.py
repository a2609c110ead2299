"""Damages IR texts and saved pipes, and holds parser, verifier, emitter and loader to one rule: right, or refused by a StagecutError.

    python tests/fuzz/text.py --inputs 100000 --seed 1 --jobs 2

Each input has a limit in time and memory; opening a socket, starting a process or writing a file is a failure. A failing text is made
smaller and printed. Exit status 1 when there was one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn

import stagecut
from stagecut.backend.files.untrusted import digest_of
from stagecut.backend.stages.emit import emit
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import StagecutError
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.call import check_inputs
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import fingerprint, text
from stagecut.pipe import pipeline

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, it finds its neighbours

from fuzz.judge import FAILED, PASSED, REFUSED, quiet
from fuzz.run import Failure, Report, show_progress

CASES = Path(__file__).resolve().parent.parent / "cases"
SECONDS = 20
"""What one input may take."""
MEMORY = 4 << 30
"""By how many bytes one process may grow."""
CHUNK = 250
_BAD_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.bind", "shutil.rmtree")


class TooSlow(BaseException):
    """An input took longer than it may."""


class Escaped(BaseException):
    """An input did something that reading must not do."""


# --- what is damaged ------------------------------------------------------------------------------------


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.norm(self.emb(ids)) * self.scale
        stagecut.pipe_split()
        with torch.no_grad():
            y = x.relu()
        return {"logits": self.head(x) * scale, "others": [y, (x.sort().values, None)]}


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
        x = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))
        stagecut.pipe_split()
        with torch.autocast("cpu", torch.bfloat16):
            z: torch.Tensor = self.lin(x) + y
        return z


def save_models(folder: Path) -> None:
    """Saved pipes of a few small models lie in `folder`."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=2, max=8)
    stagecut.pipeline(_Tied(), (torch.arange(4),)).save(folder / "tied")
    pipeline(_Branches(), (torch.ones(4, 4),), {"y": torch.ones(4, 4)}).save(folder / "branches")
    pair = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    pipeline(pair, (torch.ones(4, 4),), stages=2, dynamic_shapes=({0: batch},)).save(folder / "sized")


@cache
def texts(folder: Path) -> tuple[str, ...]:
    """The texts to damage: the cases of the tests, and those of the saved pipes."""
    paths = [*sorted(CASES.glob("*.ir")), *sorted(folder.glob("*/program.ir"))]
    return tuple(path.read_text(encoding="utf-8") for path in paths)


# --- how it is damaged ----------------------------------------------------------------------------------

_TOKENS = """
%x %1 %_ @w @"" @"a.b" @__class__ @forward @training @a._modules "" "\\n" "\\u0000" "\\ud800" "__import__('os').system('true')" (
) [ ] { } < > , : = -> ... -inf nan None True 0 -1 9999999999999999999999 1e999 1e-999 0.0 f32[] f32[4] f32[s0] f32[9**9**9]
f32[exec(1)] int(s0) str('x') none object grad @cuda:0 torch.float32 torch.load device("cuda:7") mode(True) slice(1,2,3)
complex(inf,nan) <0> <7> form((0,)) form("tensors") view(%x) views(-) writes(%x) renews(%x->%x.1) random effect with no_grad
autocast("cpu") checkpoint(1,True) transform(0) in a/b~1 "_modules.clear" at model.py:1 split stage 0 1 holds transfer input
output state file region yield program phase=linked phase=traced stages=9 names(@q) nonpersistent tensor(1) storage(1)
share=replicate send relay(1) feed recompute(%x) param buffer const aten.add.Tensor aten.from_file.default torch.ops.aten.save
builtins.getattr method.__class__ method.view module.lin extern.f os.system operator.getitem torch.ops.higher_order.cond aten..x #
\\ ' ` $ \x00 \ud800 \u2028 é 😀
""".split()
_KINDS = (
    *map(re.compile, (r"%[\w.]+", r"@[\w.]+", r"\w+\.\w+\.\w+", r"\b\d+\b", r"\w+\[[^]]*\]")),
    *map(re.compile, (r'"[^"\n]*"', r"\b(?:views?|writes|with|in|form) ?\S+")),
)
"""Values, state, ops, numbers, types, strings, clauses."""
Damage = Callable[[random.Random, str, str], str]


def _span(draw: random.Random, source: str, most: int = 40) -> tuple[int, int]:
    start = draw.randrange(len(source) + 1)
    return start, min(len(source), start + draw.randrange(1, most))


def _flip(draw: random.Random, source: str, other: str) -> str:
    place = draw.randrange(len(source))
    return source[:place] + chr(ord(source[place]) ^ (1 << draw.randrange(8))) + source[place + 1 :]


def _delete(draw: random.Random, source: str, other: str) -> str:
    start, end = _span(draw, source, draw.choice([3, 40, 400]))
    return source[:start] + source[end:]


def _double(draw: random.Random, source: str, other: str) -> str:
    start, end = _span(draw, source, draw.choice([3, 40, 400]))
    return source[:end] + source[start:end] * draw.choice([1, 1, 2, 50]) + source[end:]


def _cut_off(draw: random.Random, source: str, other: str) -> str:
    return source[: draw.randrange(len(source))]


def _splice(draw: random.Random, source: str, other: str) -> str:
    place = draw.randrange(len(source))
    start, end = _span(draw, other, 300)
    return source[:place] + other[start:end] + source[place + draw.choice([0, end - start]) :]


def _swap_lines(draw: random.Random, source: str, other: str) -> str:
    lines = source.split("\n")
    one, two = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[one], lines[two] = lines[two], lines[one]
    return "\n".join(lines)


def _word(draw: random.Random, source: str, other: str) -> str:
    """One token becomes another, of this text or of the list."""
    words = source.split(" ")
    words[draw.randrange(len(words))] = draw.choice([draw.choice(_TOKENS), draw.choice(words), draw.choice(other.split(" "))])
    return " ".join(words)


def _kin(draw: random.Random, source: str, other: str) -> str:
    """One word becomes another of its kind, so that more of what comes out can be read."""
    kind = draw.choice(_KINDS)
    mine = [*kind.finditer(source)]
    others: list[str] = kind.findall(source + other)
    if not mine:
        return source
    found = draw.choice(mine)
    return source[: found.start()] + draw.choice(others) + source[found.end() :]


def _insert(draw: random.Random, source: str, other: str) -> str:
    place = draw.randrange(len(source) + 1)
    return source[:place] + draw.choice(["", " "]) + draw.choice(_TOKENS) + draw.choice(["", " ", ", "]) + source[place:]


def _number(draw: random.Random, source: str, other: str) -> str:
    places = [place for place, char in enumerate(source) if char.isdigit()]
    if not places:
        return source
    place = draw.choice(places)
    great = draw.choice(["9" * 20, "9" * 4500, "0", "-1", "1e400", str(2**31), str(2**63), "1" * draw.randrange(1, 5000)])
    return source[:place] + great + source[place + 1 :]


def _nest(draw: random.Random, source: str, other: str) -> str:
    place = draw.randrange(len(source) + 1)
    depth = draw.choice([10, 60, 70, 1000, 20_000])
    opening, closing = draw.choice(
        [("(", ")"), ("[", "]"), ("{1: ", "}"), ("a.", ""), ("a/", ""), ("slice(", ")"), ("{", "}"), ("-", ""), ("f32[", "]")]
    )
    return source[:place] + opening * depth + draw.choice(["", "1", "%x"]) + closing * depth + source[place:]


DAMAGES: tuple[Damage, ...] = (
    *(_flip, _delete, _double, _cut_off, _splice, _swap_lines, _word, _word, _insert, _insert, _number, _nest),
    *[_kin] * 8,
)


def damaged(draw: random.Random, source: str, other: str) -> str:
    """`source` after one to four damages, mostly few."""
    for _ in range(draw.choice([1, 1, 1, 2, 2, 3, 4])):
        source = draw.choice(DAMAGES)(draw, source or " ", other or " ")
    return source


# --- what must hold -------------------------------------------------------------------------------------


def judge_text(source: str) -> str:
    """Whether a text is right or refused; raises whatever else comes out."""
    try:
        program = parse(source)
        printed = text(program)
        if text(parse(printed)) != printed:
            raise AssertionError("what is printed does not print back")
        verify(program)
        if program.phase == "linked":
            emit(program, Bindings(tensors=dict.fromkeys(program.name_owners(), torch.empty(0, device="meta"))))
            check_inputs(program.inputs, [torch.ones(4)] * len(program.inputs))
    except StagecutError:
        return REFUSED
    return PASSED


def judge_folder(folder: Path) -> str:
    """Whether a saved pipe is right or refused; raises whatever else comes out."""
    found = [
        _loads(lambda: stagecut.load(folder)),
        _loads(lambda: stagecut.load_stage(folder, 1)),
        _loads(lambda: stagecut.load(folder, [0])),
    ]
    return PASSED if all(found) else REFUSED


def _loads(step: Callable[[], Any]) -> bool:
    try:
        step()
    except StagecutError:
        return False
    return True


def damage_folder(draw: random.Random, source: Path, folder: Path, other: str) -> None:
    """`folder` is a copy of `source` with one or two files damaged; mostly the digests are made right again."""
    shutil.copytree(source, folder)
    for path in draw.choices(sorted(folder.iterdir()), k=draw.choice([1, 1, 1, 2])):
        raw = path.read_bytes()
        path.write_bytes(damaged(draw, raw.decode("latin-1"), other).encode("latin-1", "replace"))
        if path.suffix == ".ir":
            path.write_bytes(damaged(draw, raw.decode("utf-8"), other).encode("utf-8", "replace"))
    if draw.random() < 0.8:
        _retell(folder)


def _retell(folder: Path) -> None:
    """Every digest is right where the JSON around it can still be read, as a stranger would see to."""
    told: dict[str, Any] = {"sha256": digest_of(folder / "program.ir")}
    with suppress(Exception):  # what fails here fails again where it is judged
        told["fingerprint"] = fingerprint(parse((folder / "program.ir").read_text(encoding="utf-8")))
    _update(folder / "manifest.json", "program", told)
    for side in folder.glob("stage-*.json"):
        mine = {"sha256": digest_of(side.with_suffix(".safetensors"))}
        _update(side, None, mine | {key: told[key] for key in ("fingerprint",) if key in told})


def _update(path: Path, key: str | None, new: dict[str, Any]) -> None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        (data if key is None else data[key]).update(new)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    path.write_text(json.dumps(data), encoding="utf-8")


# --- limits ---------------------------------------------------------------------------------------------

_watched = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched and (event in _BAD_EVENTS or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))):
        raise Escaped(f"{event} {args!r}")


@cache
def _install_audit() -> None:
    sys.addaudithook(_audit)


@contextmanager
def limits(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Inside, time and memory are bounded, and what reading must not do raises Escaped."""
    global _watched  # noqa: PLW0603  # an audit hook can never be removed

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TooSlow

    _install_audit()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (_used() + memory, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _watched = True
    try:
        yield
    finally:
        _watched = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _used() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()


def outcome(step: Callable[[], str]) -> tuple[str, str]:
    """PASSED, REFUSED or FAILED, and where a failure came from."""
    try:
        with limits():
            return step(), ""
    except (Exception, TooSlow, Escaped) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tools/" not in f.filename]
        place = next((f for f in reversed(frames) if "stagecut/" in f.filename), frames[-1] if frames else None)
        where = f"{Path(place.filename).name} {place.name}" if place and not isinstance(error, TooSlow) else ""
        return FAILED, f"{type(error).__name__} {where}: {str(error)[:60]}"


# --- running --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """Input number `index` of a seed. Every fifth is a folder."""

    seed: int
    index: int
    corpus: Path

    def judge(self) -> tuple[str, str, str]:
        """Its verdict, the signature of a failure, and the text that shows it."""
        draw = random.Random(f"{self.seed} {self.index}")
        pool = texts(self.corpus)
        if self.index % 5:
            source = damaged(draw, draw.choice(pool), draw.choice(pool))
            return *outcome(lambda: judge_text(source)), source
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            path = Path(folder) / "saved"
            damage_folder(draw, draw.choice(sorted(self.corpus.iterdir())), path, draw.choice(pool))
            return *outcome(lambda: judge_folder(path)), f"folder of --seed {self.seed} --start {self.index} --inputs 1"


def shrink(source: str, signature: str, seconds: float = 30) -> str:
    """A smaller text that fails in the same way: parts are left out while it does."""
    stop = time.monotonic() + seconds
    step = max(1, len(source) // 2)
    while step and time.monotonic() < stop:
        place = 0
        while place < len(source) and time.monotonic() < stop:
            less = source[:place] + source[place + step :]
            if outcome(lambda less=less: judge_text(less))[1] == signature:  # type: ignore[misc]
                source = less
            else:
                place += step
        step //= 2
    return source


def run_chunk(inputs: list[Input]) -> list[tuple[int, str, str, str]]:
    """Index, verdict, signature and text of each input; texts only of failures, which are made smaller once for each signature."""
    found, seen = [], set()
    for item in inputs:
        kind, signature, source = item.judge()
        if kind == FAILED and item.index % 5 and signature not in seen:
            source = shrink(source, signature)
            seen.add(signature)
        found.append((item.index, kind, signature, source if kind == FAILED else ""))
    return found


class TextReport(Report):
    """Counts of inputs, and the failures by signature, each with its smallest text."""

    def take(self, index: int, kind: str, signature: str, source: str) -> None:
        """One more input is judged."""
        self.kinds[kind] += 1
        if kind != FAILED:
            return
        failure = self.failures.setdefault(signature, Failure([], [], source))
        failure.indices.append(index)
        failure.script = min(failure.script, source, key=len)

    def _text(self) -> Iterator[str]:
        kinds = self.kinds
        yield f"{self.programs} inputs in {self.seconds:.0f} s: {kinds[PASSED]} right, {kinds[REFUSED]} refused, {kinds[FAILED]} failed"
        for signature, failure in self.failures.items():
            yield f"  FAILED {len(failure.indices):>6}  {signature}  (inputs {', '.join(map(str, failure.indices[:8]))})"
            yield f"    {failure.script[:600]!r}"


def fuzz(inputs: range, seed: int, jobs: int) -> TextReport:
    """Judges the inputs of those numbers, here when `jobs` is 0, else in that many processes."""
    quiet()
    report, start = TextReport(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder, show_progress(len(inputs)) as progress:
        corpus = Path(folder)
        save_models(corpus)
        chunks = [[Input(seed, i, corpus) for i in inputs[at : at + CHUNK]] for at in range(0, len(inputs), CHUNK)]
        for found in _results(chunks, jobs):
            for item in found:
                report.take(*item)
            progress.advance(len(found), report)
    report.seconds = time.perf_counter() - start
    return report


def _results(chunks: list[list[Input]], jobs: int) -> Iterator[list[tuple[int, str, str, str]]]:
    if jobs == 0:
        yield from map(run_chunk, chunks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), quiet) as pool:
        yield from pool.map(run_chunk, chunks)


def main(argv: list[str] | None = None) -> int:
    """Runs the fuzzer; 1 when an input failed."""
    parser = argparse.ArgumentParser(prog="fuzz_text", description="Damages IR texts and saved pipes, and reads them.")
    parser.add_argument("--inputs", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same inputs (default 0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first input (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0 stays in this one (default 2)")
    options = parser.parse_args(argv)
    report = fuzz(range(options.start, options.start + options.inputs), options.seed, options.jobs)
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
