"""away: state that several stages read and write is the same on ranks as in one process."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from torch import nn

from stagecut import InputError, SplitPoint, StagecutError
from stagecut.backend.serve.faster import Graphed, faster
from stagecut.backend.serve.line import Seat
from stagecut.programs import Programs

X = torch.linspace(-1, 1, 96).view(24, 4)  # more elements than a counter has
KINDS = ("replaced", "written", "part", "read", "none")
SPEC = {"layers.1": SplitPoint.BEGINNING, "layers.2": SplitPoint.BEGINNING}


@dataclass
class Holder:
    """An object with state."""

    sum: torch.Tensor


class Three(nn.Module):
    """Three layers that share state, each in one way."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in kinds)

    def forward(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        for place, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            x = torch.tanh(layer(x))
            if kind == "replaced":
                _put(state, _sum(state) * 0.5 + x)
            if kind == "written":
                _sum(state).mul_(0.5).add_(x)
            if kind == "part":
                _sum(state)[place] = _sum(state)[place] * 0.5 + x[place]
            if kind != "none":
                x = x + _sum(state)
        return x


def _sum(state: Any) -> torch.Tensor:
    found: torch.Tensor = state["sum"] if isinstance(state, dict) else state.sum
    return found


def _put(state: Any, tensor: torch.Tensor) -> None:
    if isinstance(state, dict):
        state["sum"] = tensor
    else:
        state.sum = tensor


def three(kinds: tuple[str, ...]) -> Three:
    torch.manual_seed(0)
    return Three(kinds).eval()


def seat() -> Seat:
    assert dist.group.WORLD is not None
    return Seat(dist.group.WORLD, torch.device("cpu"))


def test_state_of_several_stages_is_what_one_process_has() -> None:
    ways = random.Random(0).sample([*itertools.product(KINDS, KINDS, KINDS)], 24)
    ways += [("written", "none", "none"), ("written", "written", "written"), ("read", "none", "replaced")]
    cases = [(kinds, kind) for kinds, kind in zip(ways, itertools.cycle([dict, Holder]), strict=False)]
    for rank, results in enumerate(on_ranks(3, _steps, cases)):
        for case, found in zip(cases, results, strict=True):
            assert found == ([True] * 4 if rank == 2 else ["meta"] * 4), case


def _steps(cases: list[tuple[tuple[str, ...], type]]) -> list[Any]:
    """Whether the results of four steps in a row are those of the model, case by case."""
    results = []
    with torch.no_grad():
        for kinds, kind in cases:
            model = three(kinds)
            programs = Programs(model, SPEC, None, seat())
            ours, theirs = kind(sum=X.clone()), kind(sum=X.clone())
            found: list[Any] = []
            for step in range(4):
                call = {"x": X + step, "state": ours}
                result = programs.fitting(call).run(call)
                expected = model(X + step, theirs)
                found.append("meta" if result.is_meta else torch.equal(result, expected))
            programs.finish()
            results.append(found)
    return results


def test_what_was_made_of_a_stand_in_is_refused() -> None:
    messages = on_ranks(2, _from_a_stand_in)
    assert "stage 0 reads state_sum, which another rank holds" in messages[0]
    assert "as it is" in messages[0]
    assert messages[1] == ""


def _from_a_stand_in() -> str:
    programs = Programs(three(("read", "replaced", "none")), {"layers.1": SplitPoint.BEGINNING}, None, seat())
    state = {"sum": X.clone()}
    with torch.no_grad():
        call: dict[str, Any] = {"x": X, "state": state}
        programs.fitting(call).run(call)
        call["state"] = {"sum": state["sum"] * 2}
        if dist.get_rank():
            return ""
        with pytest.raises(StagecutError) as raised:
            programs.fitting(call).run(call)
    return str(raised.value)


class Two(nn.Module):
    """One stage writes the first input, the other one reads the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        first.add_(x[:2])
        result: torch.Tensor = self.layers[1](x) + second.sum()
        return result


@pytest.mark.parametrize(("start", "shares"), [(1, True), (2, False)])
def test_a_write_that_would_not_show_on_another_rank_is_refused(start: int, shares: bool) -> None:
    for message in on_ranks(2, _overlapping, start):
        assert message.startswith("input 'first' is written, and shares memory with input 'second'") == shares


def _overlapping(start: int) -> str:
    programs = Programs(Two().eval(), {"layers.1": SplitPoint.BEGINNING}, None, seat())
    memory = torch.zeros(4, 4)
    call = {"x": X, "first": memory[:2], "second": memory[start : start + 2]}
    with torch.no_grad():
        try:
            programs.fitting(call).run(call)
        except InputError as error:
            return str(error)
    programs.finish()
    return ""


def test_a_stage_that_writes_what_it_receives_is_not_recorded() -> None:
    programs = Programs(three(("written", "written", "none")), {"layers.1": SplitPoint.BEGINNING}, None)
    call = {"x": X, "state": Holder(X.clone())}
    with torch.no_grad():
        programs.fitting(call).run(call)
    pipe = programs.pipes[0]

    def record(_: Any) -> Any:
        raise AssertionError

    assert [isinstance(faster(pipe, stage, False, record), Graphed) for stage in range(2)] == [True, False]
