"""Holds one drawn model to all checks, makes a failing one smaller, and writes the script that shows the failure."""

from __future__ import annotations

import copy
import inspect
import logging
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz import check as fuzz_check
from fuzz.draw import draw_plan
from fuzz.plans import (
    EXAMPLE_BATCH,
    OTHER_BATCH,
    ModelPlan,
    build,
    inputs,
    options,
    route_costs,
    size,
    source,
    tolerance,
)
from fuzz.shrink import smaller
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
)
CUT_REFUSALS = (
    "no op of the program runs in a call of module",
    "which may or may not be the tensor it was given",
    "which is kept whole",
    "has a part of a tensor that is written",
    "which the model does not have",  # a graph has the modules that it calls
)
RUN_REFUSALS = ("is written in one stage and read or written in another", "writes in a way that torch refuses")
"""What stagecut says when it declines, as documented, to cut or to run a program like that."""

SWITCH_REFUSALS = (*RUN_REFUSALS, "in this call, which the trace does not show")
"""What it says in the other mode, of a module kept whole that does something else there."""

TESTS = Path(__file__).parent.parent

LIMIT = 30
"""Seconds a program may take."""

MORE_CALLS = 2
"""How often a model is called again with each of its inputs before it counts as one that runs."""


@dataclass
class Verdict:
    """What became of a program: `check` and `lines` say what failed, `refusals` what was declined, `ops` what was in it."""

    kind: str
    check: str = ""
    lines: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)

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


def draw(seed: int, index: int, plant: bool = False, graphs: float = 0.0) -> tuple[ModelPlan, int]:
    """Plan `index` of `seed`, which runs forward and backward as it is, and how many attempts that took."""
    for attempt in range(200):
        with suppress(Exception):  # a model that does not even draw or run is of no use
            plan = draw_plan(seed, index, attempt, plant, graphs)
            if runs(plan) is not None:
                return plan, attempt
    raise StagecutError(f"no plan {index} of seed {seed} runs")


def calls(plan: ModelPlan) -> list[fuzz_check.Call]:
    """The example call, and a second one: other values, and with a dynamic batch another batch size."""
    return [inputs(plan, EXAMPLE_BATCH, 0), inputs(plan, OTHER_BATCH if plan.dynamic else EXAMPLE_BATCH, 1)]


def runs(plan: ModelPlan) -> dict[str, Any] | None:
    """What the model itself does, None when it cannot even run: then there is nothing to hold a pipe to."""
    try:
        with torch.enable_grad():  # a graph that fails leaves the mode as it is
            model = build(plan)
            expected = fuzz_check.outcome(model, model, calls(plan))
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


def judge(plan: ModelPlan, deep: bool = False, seed: int = 0) -> Verdict:
    """Holds `plan` to the checks; with `deep` also to those of single passes and of another order of ops."""
    expected = runs(plan)
    if expected is None:
        return Verdict("invalid")
    verdict = Verdict(PASSED)
    try:
        with _time_limit(), route_costs(plan), torch.enable_grad():
            _judge(plan, expected, verdict, deep, seed)
    except _Failed as failed:
        verdict.kind, verdict.check, verdict.lines = FAILED, failed.check, failed.lines
    except CaptureError as error:
        verdict.kind, verdict.refusals = UNTRACEABLE, [error.what]
    except StagecutError as error:
        verdict.kind, verdict.refusals = REFUSED, [_blank(error)]
    except Exception as error:
        verdict.kind, verdict.check, verdict.lines = FAILED, "fuzzer", _lines(error)
    return verdict


def _judge(plan: ModelPlan, expected: dict[str, Any], verdict: Verdict, deep: bool, seed: int) -> None:
    model = build(plan)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    pipe: Pipe = _guard("pipeline", lambda: pipeline(model, *inputs(plan), **options(plan)))
    verdict.ops = Counter(op.target for op in pipe.program.all_ops())
    rtol = tolerance(plan)
    changed = [f"pipeline() changed '{n}'" for n, t in model.state_dict().items() if not torch.equal(t.nan_to_num(), state[n].nan_to_num())]
    _check("pipeline", lambda: changed)
    _check("names", lambda: fuzz_check.names(model, pipe))
    _check("text", lambda: fuzz_check.round_trip(pipe.program))
    try:
        _check("mailbox", lambda: fuzz_check.mailbox(copy.deepcopy(model), pipe, inputs(plan), inputs(plan), rtol))
    except StagecutError as error:
        verdict.refusals.append(_blank(error))
    try:
        _check("switched", lambda: fuzz_check.switched(copy.deepcopy(model), pipe, inputs(plan), inputs(plan), rtol))
    except StagecutError as error:
        verdict.refusals.append(_blank(error))
    _check("run", lambda: fuzz_check.differences(expected, fuzz_check.outcome(model, pipe.module(), calls(plan)), rtol))
    if seed % 5 == 0:
        _check("verify", lambda: fuzz_check.verified(pipe, inputs(plan)))
    _check("boundaries", lambda: fuzz_check.boundaries(pipe, *inputs(plan)))
    if deep:
        splits = find_splits(plan, model)
        flat = pipe.flatten(*inputs(plan))
        _check("passes", lambda: fuzz_check.passes(lambda: _lowered(plan), splits, flat))
        _check("shuffled", lambda: fuzz_check.shuffled(lambda: _lowered(plan), splits, flat, seed))


def _lowered(plan: ModelPlan) -> Any:
    args, kwargs = inputs(plan)
    return lower(build(plan), args, kwargs, options(plan).get("dynamic_shapes"), plan.whole)[:2]


def find_splits(plan: ModelPlan, model: nn.Module) -> FindSplits:
    """The first pass of cutting, set up as `pipeline` does it for `plan`."""
    chosen = options(plan)
    return FindSplits(_split_points(chosen.get("split_spec", {}), model), chosen.get("split_policy"), _other_names(model))


def _check(name: str, check: Callable[[], list[str]]) -> None:
    lines = _guard(name, check)
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
        refusals = {"mailbox": RUN_REFUSALS, "switched": SWITCH_REFUSALS}.get(name, ())
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


def _blank(error: StagecutError) -> str:
    return re.sub(r"'[^']*'|\d+", "_", str(error).splitlines()[0])


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


def shrink(plan: ModelPlan, verdict: Verdict, seed: int = 0, seconds: float = 60) -> tuple[ModelPlan, Verdict]:
    """The smallest plan found in that time that fails in the same way, and how it fails."""
    deep = verdict.check in ("passes", "shuffled")
    end = time.monotonic() + seconds
    again = True
    while again:
        again = False
        for candidate in smaller(plan):
            if time.monotonic() > end:
                return plan, verdict
            if size(candidate) >= size(plan):
                continue
            found = judge(candidate, deep, seed)
            if found.kind == FAILED and found.signature == verdict.signature:
                plan, verdict, again = candidate, found, True
                break
    return plan, verdict


_HEAD = '''"""{title}"""

import copy
import sys

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from stagecut import SplitPoint, pipe_split, pipeline

sys.path.append({tests!r})
from fuzz import check as fuzz_check
from fuzz.graphs import symbolic
'''
_RUN = """calls = lambda: [inputs({first}, 0), inputs({second}, 1)]
expected = outcome(twin, twin, calls())
pipe = pipeline(model, *inputs({first}), **options)
print(pipe)
wrong = differences(expected, outcome(model, pipe.module(), calls()), {rtol})
"""
_OTHERS = {
    "pipeline": """state = {{n: t.clone() for n, t in model.state_dict().items()}}
pipe = pipeline(model, *inputs({first}), **options)
wrong = [n for n, t in model.state_dict().items() if not torch.equal(t.nan_to_num(), state[n].nan_to_num())]
""",
    "names": """wrong = fuzz_check.names(model, pipeline(model, *inputs({first}), **options))
""",
    "text": """pipe = pipeline(model, *inputs({first}), **options)
print(pipe)
wrong = fuzz_check.round_trip(pipe.program)
""",
    "mailbox": """pipe = pipeline(model, *inputs({first}), **options)
print(pipe)
wrong = fuzz_check.mailbox(twin, pipe, inputs({first}), inputs({first}), {rtol})
""",
    "switched": """pipe = pipeline(model, *inputs({first}), **options)
print(pipe)
wrong = fuzz_check.switched(twin, pipe, inputs({first}), inputs({first}), {rtol})
""",
    "verify": """pipe = pipeline(model, *inputs({first}), **options)
print(pipe)
wrong = fuzz_check.verified(pipe, inputs({first}))
""",
    "boundaries": """pipe = pipeline(model, *inputs({first}), **options)
print(pipe)
wrong = fuzz_check.boundaries(pipe, *inputs({first}))
""",
    "passes": """spec = [(path, {{1: "beginning", 2: "end"}}[side.value]) for path, side in options.get("split_spec", {{}}).items()]
splits = FindSplits(tuple(spec), options.get("split_policy"))
lowered = lambda: lower(model, *inputs({first}), options.get("dynamic_shapes"), options.get("leaf_modules", ()))[:2]
flat = pipeline(twin, *inputs({first}), **options).flatten(*inputs({first}))
wrong = fuzz_check.passes(lowered, splits, flat)
""",
}
_OTHERS["shuffled"] = _OTHERS["passes"].replace("passes(lowered, splits, flat)", "shuffled(lowered, splits, flat, {seed})")


def reproducer(plan: ModelPlan, verdict: Verdict, seed: int = 0) -> str:
    """A script that builds the model of `plan`, cuts it, and exits with 1 when what failed still fails."""
    head = _HEAD.format(title=verdict.signature.replace('"', "'").replace("\\", "/"), tests=str(TESTS))
    parts = [source(plan)]
    if verdict.check in _OTHERS:
        head += "from stagecut.passes.find_splits import FindSplits\nfrom stagecut.pipe import lower\n"
        body = _OTHERS[verdict.check]
    else:
        functions = (fuzz_check.outcome, fuzz_check.backward, fuzz_check.differences)
        parts += ["\n\n".join(_plain(f) for f in functions)]
        body = _RUN
    second = OTHER_BATCH if plan.dynamic else EXAMPLE_BATCH
    body = body.format(first=EXAMPLE_BATCH, second=second, rtol=tolerance(plan), seed=seed)
    if plan.again:
        parts.append("from stagecut.passes import recompute\n\nrecompute.START, recompute.MEMORY = 0, 1 << 40")
    tail = f'model = make()\ntwin = copy.deepcopy(model)\n{body}print("\\n".join(wrong))\nsys.exit(1 if wrong else 0)\n'
    return "\n\n".join([head, *parts, tail])


def _plain(function: Callable[..., Any]) -> str:
    """The source of a function without its annotations."""
    lines = inspect.getsource(function).splitlines()
    parameters = inspect.signature(function).parameters.values()
    names = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    body = "\n".join(lines[1:]) + "\n"
    body = re.sub(r"^(\s+\w+): [^=\n]+ = ", r"\1 = ", body, flags=re.M)
    return f"def {function.__name__}({names}):\n" + re.sub(r"  # type: ignore\S*", "", body)
