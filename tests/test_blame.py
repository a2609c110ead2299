"""Bugs of ours come out as they are: none keeps a module whole, none is tried again, none is told as a limit of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from stagecut import pipe_split, pipeline
from stagecut.frontend import markers, policy, source
from stagecut.frontend.capture import (
    aside,
    batch,
    capture,
    draws,
    eager,
    example,
    functions,
    joint,
    quiet,
    rewrites,
    samples,
    scopes,
    together,
    whole,
)
from stagecut.frontend.fold import body, calls, kinds, reads, repeats, results, runs, values
from stagecut.frontend.lower import (
    align,
    both_modes,
    contexts,
    folded,
    from_export,
    from_fx,
    from_joint,
    fx_run,
    lower,
    merge,
    order,
    subclasses,
    types,
)
from stagecut.frontend.watch import (
    attribute_reads,
    attributes,
    checks,
    forbidden,
    generators,
    known,
    line,
    lost_lines,
    prints,
    training,
    watch,
)
from stagecut.frontend.watch import globals as globals_
from stagecut.ir.blame import OWN_DIR, OnPurpose, raise_ours
from stagecut.ir.errors import StagecutError
from stagecut.ir.run.call import check_inputs

FRONTEND = Path(source.__file__).parent


class Squared(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The square."""
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Its derivative."""
        return 2 * ctx.saved_tensors[0] * gradients[0]


class Repeated(nn.Module):
    """Is traced twice, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Chooses(nn.Module):
    """Is kept whole: it branches on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, doubled where it is positive."""
        return x * 2 if x.sum() > 0 else x


class Switches(nn.Linear):
    """Has a train() of its own."""

    def train(self, mode: bool = True) -> Switches:
        """As any other."""
        return super().train(mode)


class Everything(nn.Module):
    """Does something for each part of the frontend."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.chooses, self.last = nn.Linear(4, 4), Chooses(), Switches(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.rng = torch.Generator()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What all of it makes of the input."""
        self.mean = self.mean * 0.5 + x.detach().mean(0)
        with torch.no_grad():
            shift = self.mean.data.contiguous()
        x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
        x = F.alpha_dropout(Squared.apply(x), 0.1, self.training) + shift  # type: ignore[no-untyped-call]
        if x.shape[0] and self.training:
            x = self.chooses(x)
        pipe_split()
        return {"y": self.last(x)}


def cut() -> None:
    pipeline(Everything(), (torch.ones(2, 4),), check=None)


def repeat() -> None:
    model = nn.Sequential(*(Repeated() for _ in range(4)))
    pipeline(model, (torch.ones(2, 4),), check=None, fold=True)


def repeat_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(Repeated() for _ in range(5)))
    pipeline(model, (torch.ones(2, 4, device="meta"),), check=None, fold=True)


def differentiate() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    pipeline(model, (torch.ones(2, 4),), stages=2, check=None).differentiated()


def cut_graph() -> None:
    pipeline(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), (torch.ones(2, 4),), check=None)


def cut_by_policy() -> None:
    def cuts(graph: fx.GraphModule) -> fx.GraphModule:
        return graph

    pipeline(nn.Linear(4, 4), (torch.ones(2, 4),), split_policy=cuts, check=None)


SEEN: list[int] = []


class Appends(nn.Module):
    """Is refused: it changes a list that lies around it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        SEEN.append(1)
        return x


def refuse() -> None:
    pipeline(Appends(), (torch.ones(2, 4),), check=None)


class Asks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, on the eager path."""
        if torch.compiler.is_compiling() or torch.arange(3).sum() != 3:
            raise ValueError("no path of the eager run")
        return x.sin()


def ask() -> None:
    pipeline(Asks(), (torch.ones(2, 4),), check=None)


class TwoWays(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Something else in each mode."""
        return x.sin() if self.training else x.cos() * 2


def choose() -> None:
    pipeline(TwoWays(), (torch.ones(2, 4),), check=None)


def planted(code: CodeType, error: str) -> CodeType:
    """Code that does nothing but raise, and stands where `code` stands."""
    scope: dict[str, Any] = {}
    exec(compile(f"def broken(*args, **kwargs):\n    raise TypeError({error!r})", code.co_filename, "exec"), scope)
    broken: CodeType = scope["broken"].__code__
    return broken.replace(co_name=code.co_name, co_freevars=code.co_freevars)


@contextmanager
def broken(victim: Any, error: str) -> Iterator[None]:
    """While open, a function raises."""
    victim = getattr(victim, "__wrapped__", victim)
    before = victim.__code__
    victim.__code__ = planted(before, error)
    try:
        yield
    finally:
        victim.__code__ = before


class Drops(nn.Linear):
    """Is dropped with probability 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer, or nothing."""
        return x if torch.rand([]) < 0.0 else super().forward(x)


def drop() -> None:
    """A draw whose outcome is known."""
    pipeline(nn.Sequential(Drops(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),), stages=2)


PLACES: list[tuple[Callable[..., Any], Callable[[], None]]] = [
    (align.Alignment._walk, choose),
    (align._aligned, choose),
    (batch._mark, cut),
    (batch.varying_sizes, cut),
    (draws._is_one, drop),
    (both_modes.in_other_mode, choose),
    (both_modes._merge, choose),
    (example.check_example, cut),
    (example.giving_sizes, cut),
    (capture.distinct_tensors, cut),
    (capture._failing_module, cut),
    (generators._state, cut),
    (generators.Generators.drawn, cut),
    (eager.EagerPath._call, ask),
    (eager._subclasses, ask),
    (from_export._placeholders, cut),
    (order._free, cut),
    (from_export._write_back, cut),
    (from_fx._bind, cut_graph),
    (results._tensor, repeat),
    (kinds.Kind.fits, repeat),
    (runs.Ran.again, repeat_on_meta),
    (aside._aside, cut),
    (body.Replay._reserved, repeat),
    (body.Body.equals, repeat),
    (calls._names, repeat),
    (reads._uses, repeat),
    (reads.Reads.includes, repeat),
    (repeats._frames, repeat),
    (values.Values._of_class, repeat),
    (folded.Again.twin, repeat),
    (contexts._grad_mode, cut),
    (subclasses.access_where_used, cut),
    (from_joint.lower_joint, differentiate),
    (joint._traced, differentiate),
    (from_fx._GraphLowering.node, cut_graph),
    (fx_run.FakeRun.run_node, cut_graph),
    (fx_run._WriteObserver.see, cut_graph),
    (functions._one_op, cut),
    (functions._function_fake, cut),
    (attribute_reads.AttributeReads.remembered, cut),
    (prints.noting_prints, cut),
    (lost_lines.LostLines.__init__, cut),
    (attributes.Containers._keep, cut),
    (source.user_line, cut),
    (known.KnownValues.value, ask),
    (known._cone, ask),
    (whole._leaf_fake, cut),
    (whole.EffectObserver.see, cut),
    (whole.Leaves._stand_in, cut),
    (whole.Leaves._record, cut),
    (lower.Lowering._leaf, cut),
    (markers.is_marker, cut),
    (markers.pipe_split, cut),
    (merge.Merge._by_mode, choose),
    (together.Search._static, cut),
    (together._grown, cut),
    (training.last_node, cut),
    (training.node_of, cut),
    (training._empty, cut),
    (training.ModeReads._note, cut),
    (training.ModeReads._switch_grad, cut),
    (line.LineFinder._look, refuse),
    (line.LineFinder.start, refuse),
    (quiet.quiet_torch, cut),
    (samples.Runs._twin, cut),
    (samples._steady, cut),
    (samples.Example.longer, cut),
    (scopes._classes_with_forward, cut),
    (policy._nodes_behind_splits, cut_by_policy),
    (globals_.Surroundings.changed, cut),
    (globals_._reached, cut),
    (types.type_of, cut),
    (forbidden.refusing, cut),
    (rewrites._DataAsOp.__torch_function__, cut),
    (forbidden.GradFlags.__torch_function__, cut),
    (checks._outcome_that_goes_on, cut),
    (watch.TraceWatch._begin, cut),
    (watch.TraceWatch._write_back, cut),
    (watch._children, cut),
]


@pytest.mark.parametrize(("victim", "run"), PLACES, ids=lambda item: getattr(item, "__qualname__", str(item)))
def test_a_bug_of_ours_comes_out_as_it_is(victim: Callable[..., Any], run: Callable[[], None]) -> None:
    with broken(victim, "planted"), pytest.raises(TypeError, match="planted"):
        run()


def test_each_file_that_runs_during_capture_has_a_place() -> None:
    files = {path.name for path in FRONTEND.rglob("*.py") if "def " in path.read_text(encoding="utf-8")}
    assert {Path(victim.__code__.co_filename).name for victim in (getattr(v, "__wrapped__", v) for v, _ in PLACES)} == files


def test_no_module_is_kept_whole_for_a_bug_of_ours() -> None:
    """As on a version of torch in which something that we call is another."""
    with broken(training.last_node, "planted"), pytest.raises(TypeError, match="planted") as caught:
        pipeline(nn.Sequential(nn.Linear(4, 4), Everything()), (torch.ones(2, 4),))
    assert caught.traceback[-1].path.name == "training.py"


@pytest.mark.parametrize("victim", [check_inputs, source.gpus, globals_.random_state])
def test_a_bug_of_ours_is_no_reason_not_to_compare(victim: Callable[..., Any]) -> None:
    with broken(victim, "planted"), pytest.raises(TypeError, match="planted"):
        pipeline(nn.Linear(4, 4), (torch.ones(2, 4),))


CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a text is added": lambda x: torch.add("a", x),  # type: ignore[call-overload]
    "a text multiplies": lambda x: x * "a",  # type: ignore[operator]
    "no such argument": lambda x: F.dropout(x, probability=0.5),  # type: ignore[call-arg]
    "no such dim": lambda x: x.sum(7),
    "shapes that do not fit": lambda x: x @ x,
    "a grad mode": lambda x: torch.set_grad_enabled("yes") and x,  # type: ignore[arg-type]
    "a function of the user's own": lambda x: Squared.apply(x, x),  # type: ignore[no-untyped-call]
    "in a checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.add, x, "a", use_reentrant=False),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("whole", [False, True])
def test_what_the_model_calls_wrongly_is_no_bug_of_ours(what: str, whole: bool) -> None:
    """Torch raises such errors in C, where the last frame of Python's is the one of ours that handed the call on."""

    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return CALLS[what](x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.last = Calls(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(self.calls(x))

    with pytest.raises(StagecutError, match=re.escape(__file__)):
        pipeline(Outer(), (torch.ones(2, 4),), leaf_modules=["calls"] if whole else [])


def raised(source: str, ours: bool, **scope: Any) -> BaseException:
    """What `f()` of the source raises, which stands in a file of ours or in one of the user's."""
    exec(compile(source, f"{OWN_DIR}frontend/made_up.py" if ours else "/home/user/model.py", "exec"), scope)
    try:
        scope["f"]()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


BUG = "def bug():\n    return {}['key']\n"
WRAPS = "def f():\n    try:\n        bug()\n    except Exception as error:\n        raise ValueError('wrapped')"


def bug() -> Any:
    """A function of ours that has a bug."""
    scope: dict[str, Any] = {}
    exec(compile(BUG, f"{OWN_DIR}frontend/made_up.py", "exec"), scope)
    return scope["bug"]()


@pytest.mark.parametrize("way", ["", " from error"])
def test_a_bug_of_ours_that_others_wrap_is_found(way: str) -> None:
    error = raised(WRAPS + way, ours=False, bug=bug)
    with pytest.raises(KeyError):
        raise_ours(error)


def test_what_our_code_catches_it_expected() -> None:
    raise_ours(raised(WRAPS.replace("ValueError('wrapped')", "user()"), ours=True, bug=bug, user=lambda: int("no number")))


def test_what_is_hidden_on_purpose_stays_hidden() -> None:
    raise_ours(raised(WRAPS + " from None", ours=False, bug=bug))


@pytest.mark.parametrize("error", [StagecutError("refused"), OnPurpose("no trace holds it"), RecursionError(), MemoryError()])
def test_what_we_raise_on_purpose_is_no_bug(error: BaseException) -> None:
    raise_ours(raised("def f():\n    raise error", ours=True, error=error))


def test_a_call_that_is_handed_on_fails_for_who_made_it() -> None:
    raise_ours(raised("def f():\n    given('a', 'b')\ndef given(*args):\n    return int(*args)", ours=True))
    with pytest.raises(TypeError):
        raise_ours(raised("def f():\n    return int('a', 'b')", ours=True))
