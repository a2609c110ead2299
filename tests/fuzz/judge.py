"""Holds one drawn model to all checks, makes a failing one smaller, and writes the script that shows the failure."""

from __future__ import annotations

import copy
import logging
import random
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from compare import Call, Near, Seen, differences, names, observe_all, snapshot
from fuzz import check as fuzz_check
from fuzz.draw import plans
from fuzz.plans import EXAMPLE_BATCH, OTHER_BATCH, ModelPlan, build, inputs, options, route_costs, source, tolerance
from hypothesis import Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase
from profiles import FUZZ
from torch import nn
from torch.utils._pytree import tree_flatten

from stagecut.ir.errors import CaptureError, SplitError, StagecutError
from stagecut.passes.find_splits import FindSplits
from stagecut.pipe import Pipe, _other_names, _split_points, lower, pipeline

PASSED, FAILED, REFUSED, UNTRACEABLE = "passed", "failed", "refused", "untraceable"
TRACE_REFUSALS = (
    "cannot be traced",
    "DataDependentOutputException",
    "a view of another size",
    "returns what it writes as a tensor of another history",
    "shares memory with something else that it returned",
    "is written in place and then assigned, and",
)
CUT_REFUSALS = (
    "no op of the program runs in a call of module",
    "which may or may not be the tensor it was given",
    "which is kept whole",
    "has a part of a tensor that is written",
    "writes one of several views of a tensor that earlier stages made",
    "which the model does not have",  # a graph has the modules that it calls
)
RUN_REFUSALS = (
    "is written in one stage and read or written in another",
    "writes in a way that torch refuses",
    "is written, and shares memory with input",
)
"""What stagecut says when it declines, as documented, to cut or to run a program like that."""

SWITCH_REFUSALS = (*RUN_REFUSALS, "in this call, which the trace does not show")
"""What it says in the other mode, of a module kept whole that does something else there."""

DEEP = ("passes", "shuffled", "backward")
"""The slow checks."""

TESTS = Path(__file__).parent.parent

OF_STATE = ("aliases of state",)
"""What is not compared: a stage keeps the tensor of a buffer that forward assigns, so what is returned is not the buffer."""

NOISE = 1 << 13
"""Of how many bytes a program is made at most."""

LIMIT = 30
"""Seconds a program may take."""

MORE_CALLS = 2
"""How often a model is called again with each of its inputs before it counts as one that runs."""


@dataclass
class Verdict:
    """What became of a program: `check` and `lines` say what failed, `refusals` what was declined, `ops` what was in it.

    `notes`: of each stage that was to run by graphs, why none did, '' where they did.
    """

    kind: str
    check: str = ""
    lines: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def signature(self) -> str:
        """The way it fails, without names and numbers: failures of one cause agree in it."""
        line = self.lines[0].split(" differs:")[0] if self.lines else ""
        line = re.sub(r"\baten\.[\w.]+", "_", re.sub(r"\S+:\d+(:\d+)?,? ?", "", line)).replace("module '", "'")
        line = re.sub(r"'[^']*', |'[^']*'|\[[^\]]*\]|[%@][\w.]+|\d+", "_", line)
        line = re.sub(r"(gradient of|buffer|parameter|state) (?!input|after)[\w.]+", r"\1 _", line)
        return f"{self.check}: {line[:120]}"


class _Failed(Exception):
    def __init__(self, check: str, lines: list[str]) -> None:
        super().__init__(check)
        self.check, self.lines = check, lines


def quiet() -> None:
    """Sets up a process that runs programs: one thread, and no warnings about drawn models."""
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")


def programs(plant: bool = False, graphs: float = 0.0) -> st.SearchStrategy[ModelPlan]:
    """Models that run forward and backward as they are."""
    return plans(plant, graphs).filter(lambda plan: runs(plan) is not None)


@cache
def _reader(plant: bool, graphs: float) -> tuple[Callable[[bytes], Any], list[ModelPlan]]:
    """What reads a program from bytes, and the list to which it adds it."""
    read: list[ModelPlan] = []

    @FUZZ
    @given(programs(plant, graphs))
    def reads(plan: ModelPlan) -> None:
        read.append(plan)

    return reads.hypothesis.fuzz_one_input, read


def draw(seed: int, index: int, plant: bool = False, graphs: float = 0.0) -> tuple[ModelPlan, bytes]:
    """Program `index` of `seed`, and the bytes from which hypothesis makes it."""
    reads, read = _reader(plant, graphs)
    noise = random.Random(f"{seed}:{index}")
    for _ in range(200):
        made_of = noise.randbytes(NOISE)
        reads(made_of)
        if read:
            return read.pop(), made_of
    raise StagecutError(f"no program {index} of seed {seed} runs")


def calls(plan: ModelPlan) -> list[Call]:
    """The example call, and a second one: other values, and with a dynamic batch another batch size."""
    return [inputs(plan, EXAMPLE_BATCH, 0), inputs(plan, OTHER_BATCH if plan.dynamic else EXAMPLE_BATCH, 1)]


@lru_cache(maxsize=1)
def runs(plan: ModelPlan) -> Seen | None:
    """What the model itself does, None when it cannot even run: then there is nothing to hold a pipe to."""
    try:
        with torch.enable_grad():  # a graph that fails leaves the mode as it is
            model = build(plan)
            expected = observe_all(model, calls(plan))
            for args, kwargs in calls(plan) * MORE_CALLS:  # what it counts may run out of a range
                model(*args, **kwargs)
    except Exception:
        return None
    if any(p.grad_fn is not None for p in model.parameters()) or any(b.requires_grad for b in model.buffers()):
        return None  # its state has become part of a graph: it cannot be copied any more
    twice = any(g.code.startswith("x") for g in plan.given)
    return None if twice and _writes_inputs(plan) else expected


def _writes_inputs(plan: ModelPlan) -> bool:
    args, kwargs = calls(plan)[0]
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    before = [t._version for t in given]
    build(plan)(*args, **kwargs)
    return before != [t._version for t in given]


def judge(plan: ModelPlan, deep: bool = False, seed: int = 0, only: str = "") -> Verdict:
    """Holds `plan` to the checks, or to `only` one of them; with `deep` also to those of single passes, of another order of ops and of
    the backward by graphs."""
    expected = runs(plan)
    if expected is None:
        return Verdict("invalid")
    verdict = Verdict(PASSED)
    try:
        with _time_limit(), route_costs(plan), torch.enable_grad():
            _judge(plan, expected, verdict, deep, seed, only)
    except _Failed as failed:
        verdict.kind, verdict.check, verdict.lines = FAILED, failed.check, failed.lines
    except CaptureError as error:
        verdict.kind, verdict.refusals = UNTRACEABLE, [error.what]
    except StagecutError as error:
        verdict.kind, verdict.refusals = REFUSED, [_blank(error)]
    except Exception as error:
        verdict.kind, verdict.check, verdict.lines = FAILED, "fuzzer", _lines(error)
    return verdict


def _judge(plan: ModelPlan, expected: Seen, verdict: Verdict, deep: bool, seed: int, only: str) -> None:
    model = build(plan)
    before = snapshot(model)
    pipe: Pipe = _guard("pipeline", lambda: pipeline(model, *inputs(plan), **options(plan)))
    verdict.ops = Counter(op.target for op in pipe.program.all_ops())
    near = Near(tolerance(plan))
    check = partial(_check, only)
    check("pipeline", lambda: differences(before, snapshot(model)))
    check("names", lambda: names(model, pipe))
    check("text", lambda: fuzz_check.round_trip(pipe.program))
    for name in ("mailbox", "switched"):
        try:
            check(name, lambda name=name: getattr(fuzz_check, name)(copy.deepcopy(model), pipe, inputs(plan), inputs(plan), near))
        except StagecutError as error:
            verdict.refusals.append(_blank(error))
    check("run", lambda: differences(expected, observe_all(pipe.module(), calls(plan)), near, OF_STATE))
    if seed % 5 == 0:
        check("verify", lambda: fuzz_check.verified(pipe, inputs(plan)))
    check("boundaries", lambda: fuzz_check.boundaries(pipe, *inputs(plan)))
    if deep:
        splits = find_splits(plan, model)
        flat = pipe.flatten(*inputs(plan))
        check("passes", lambda: fuzz_check.passes(lambda: _lowered(plan), splits, flat))
        check("shuffled", lambda: fuzz_check.shuffled(lambda: _lowered(plan), splits, flat, seed))
        try:
            check("backward", lambda: _backward(plan, pipe, verdict, seed))
        except StagecutError as error:
            verdict.refusals += {_blank(error)} - {*verdict.refusals}


def _backward(plan: ModelPlan, pipe: Pipe, verdict: Verdict, seed: int) -> list[str]:
    wrong, notes = fuzz_check.backward(pipe, lambda: calls(plan), recompute(seed))
    verdict.notes = [_blank(note) for note in notes]
    return wrong


def recompute(seed: int) -> bool:
    """Whether the backward of that program computes light ops again: with every tenth program, every other one."""
    return seed // 10 % 2 == 1


def _lowered(plan: ModelPlan) -> Any:
    args, kwargs = inputs(plan)
    return lower(build(plan), args, kwargs, options(plan).get("dynamic_shapes"), plan.whole)[:2]


def find_splits(plan: ModelPlan, model: nn.Module) -> FindSplits:
    """The first pass of cutting, set up as `pipeline` does it for `plan`."""
    chosen = options(plan)
    return FindSplits(_split_points(chosen.get("split_spec", {}), model), chosen.get("split_policy"), _other_names(model))


def _check(only: str, name: str, find: Callable[[], list[str]]) -> None:
    if only and name != only:
        return
    lines = _guard(name, find)
    if lines:
        raise _Failed(name, lines)


def _guard(name: str, action: Callable[[], Any]) -> Any:
    """What `action` gives. An error in it is a failure of that check, unless it says that tracing failed or is a refusal."""
    try:
        return action()
    except CaptureError as error:
        if any(known in error.what for known in TRACE_REFUSALS):
            raise
        raise _Failed(name, _lines(error)) from error
    except StagecutError as error:
        if isinstance(error, SplitError) and any(known in str(error) for known in CUT_REFUSALS):
            raise
        refusals = {"mailbox": RUN_REFUSALS, "switched": SWITCH_REFUSALS, "backward": RUN_REFUSALS}.get(name, ())
        if any(known in str(error) for known in refusals):
            raise
        raise _Failed(name, _lines(error)) from error
    except _Failed:
        raise
    except Exception as error:
        raise _Failed(name, _lines(error)) from error


def _lines(error: Exception) -> list[str]:
    text = str(error).splitlines() or [""]
    # of a list of violations the first says more than their number
    first = text[1].strip() if text[0].endswith("violation(s)") and len(text) > 1 else text[0]
    return [f"{type(error).__name__}: {first}", *traceback.format_exception(error)]


def _blank(message: StagecutError | str) -> str:
    first = next(iter(str(message).splitlines()), "")
    return re.sub(r"'[^']*'|\bmodule\.[\w.]+|%\w+|\d+", "_", first)


@contextmanager
def _time_limit() -> Iterator[None]:
    def expire(number: int, frame: Any) -> None:
        raise _Failed("time", [f"took more than {LIMIT} seconds"])

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# --- failures -----------------------------------------------------------------------------------------


class _Shown(Exception):
    """A program fails as the one that is made smaller."""


class _TimeIsUp(BaseException):
    """Hypothesis lets it through."""


def shrink(
    plan: ModelPlan, made_of: bytes, verdict: Verdict, number: int, seconds: float, plant: bool = False, graphs: float = 0.0
) -> tuple[ModelPlan, Verdict]:
    """The smallest program found in that time that fails in the same way as `plan`, drawn from `made_of`, and how it fails."""
    deep = verdict.check in DEEP
    only = verdict.check if verdict.check not in ("time", "fuzzer") else ""
    end = time.monotonic() + seconds
    failing = [(plan, verdict)]

    @cache
    def is_alike(candidate: ModelPlan) -> bool:
        if time.monotonic() > end:
            raise _TimeIsUp
        found = judge(candidate, deep, number, only)
        if found.kind != FAILED or found.signature != verdict.signature:
            return False
        failing.append((candidate, found))
        return True

    @settings(FUZZ, database=InMemoryExampleDatabase(), verbosity=Verbosity.quiet, report_multiple_bugs=False)
    @given(programs(plant, graphs))
    def fails(candidate: ModelPlan) -> None:
        if candidate == plan or is_alike(candidate):
            raise _Shown  # here alone: to hypothesis, another line is another failure

    with suppress(_Shown):
        fails.hypothesis.fuzz_one_input(made_of)
    with suppress(_Shown, _TimeIsUp):
        fails()
    return min(failing, key=lambda pair: len(source(pair[0])))


_HEAD = '''"""{title}"""

import copy
import sys

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from stagecut import SplitPoint, pipe_split, pipeline
from stagecut.passes.find_splits import FindSplits
from stagecut.pipe import lower

sys.path.append({tests!r})
from compare import Near, differences, names, observe_all, snapshot
from fuzz import check as fuzz_check
from fuzz.graphs import symbolic
'''
_COMPUTE_AGAIN = "from stagecut.passes import recompute\n\nrecompute.START, recompute.MEMORY = 0, 1 << 40\n\n"
_CUT = """model = make()
twin = copy.deepcopy(model)
pipe = pipeline(model, *inputs({first}), **options)
print(pipe.ir())
"""
_LOWERED = """spec = [(path, {{1: "beginning", 2: "end"}}[side.value]) for path, side in options.get("split_spec", {{}}).items()]
splits = FindSplits(tuple(spec), options.get("split_policy"))
lowered = lambda: lower(make(), *inputs({first}), options.get("dynamic_shapes"), options.get("leaf_modules", ()))[:2]
flat = pipe.flatten(*inputs({first}))
"""
_RUN = """expected = observe_all(twin, [inputs({first}, 0), inputs({second}, 1)])
found = observe_all(pipe.module(), [inputs({first}, 0), inputs({second}, 1)])
wrong = differences(expected, found, Near({rtol}), {of_state})
"""
_CHECKS = {
    "pipeline": "wrong = differences(snapshot(twin), snapshot(model))\n",
    "names": "wrong = names(model, pipe)\n",
    "text": "wrong = fuzz_check.round_trip(pipe.program)\n",
    "mailbox": "wrong = fuzz_check.mailbox(twin, pipe, inputs({first}), inputs({first}), Near({rtol}))\n",
    "switched": "wrong = fuzz_check.switched(twin, pipe, inputs({first}), inputs({first}), Near({rtol}))\n",
    "verify": "wrong = fuzz_check.verified(pipe, inputs({first}))\n",
    "boundaries": "wrong = fuzz_check.boundaries(pipe, *inputs({first}))\n",
    "passes": _LOWERED + "wrong = fuzz_check.passes(lowered, splits, flat)\n",
    "backward": "wrong, notes = fuzz_check.backward(pipe, lambda: [inputs({first}, 0), inputs({second}, 1)], {recompute})\nprint(notes)\n",
    "shuffled": _LOWERED + "wrong = fuzz_check.shuffled(lowered, splits, flat, {seed})\n",
}


def reproducer(plan: ModelPlan, verdict: Verdict, seed: int = 0) -> str:
    """A script that builds the model of `plan`, cuts it, and exits with 1 when what failed still fails."""
    head = _HEAD.format(title=verdict.signature.replace('"', "'").replace("\\", "/"), tests=str(TESTS))
    second = OTHER_BATCH if plan.dynamic else EXAMPLE_BATCH
    body = (_CUT + _CHECKS.get(verdict.check, _RUN)).format(
        first=EXAMPLE_BATCH, second=second, rtol=tolerance(plan), seed=seed, of_state=OF_STATE, recompute=recompute(seed)
    )
    again = _COMPUTE_AGAIN if plan.again else ""
    return f'{head}\n\n{source(plan)}\n\n{again}{body}print("\\n".join(wrong))\nsys.exit(1 if wrong else 0)\n'
