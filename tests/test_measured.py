"""measured: blocks are timed once each, as they run, and kept; a search uses their seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_balance import IDS, Blocks, _line
from torch import nn

from stagecut import Balanced, Setting, StagecutError, pipeline
from stagecut.backend.costs import measured
from stagecut.backend.costs.measured import measure
from stagecut.backend.costs.runtime import Parts, Timing, as_run
from stagecut.backend.costs.way import Way
from stagecut.backend.stages.roles import RoleCode
from stagecut.ir.graph import Block

CPU = Setting("CPU", "ZBVZeroBubble", 4, ranks=1)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[tuple[int, int]]:
    """The stages that are timed, as (how many stages, which one), with an empty store."""
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path / "new" / "folder"))
    stages: list[tuple[int, int]] = []

    def spy(pipe: Any, index: int, *rest: Any) -> Any:
        stages.append((pipe.num_stages, index))
        return measure(pipe, index, *rest)

    monkeypatch.setattr(measured, "measure", spy)
    return stages


def _cut(model: nn.Module, **options: Any) -> Any:
    return pipeline(model, (IDS,), split_policy=Balanced(2, CPU, profile_on="cpu", **options))


def test_equal_blocks_are_timed_once_and_never_again(timed: list[tuple[int, int]]) -> None:
    pipe = _cut(Blocks(8))
    # the embedding, the first of the blocks with what adds to it, ..., the head
    assert 3 <= len(timed) <= 4
    assert pipe.num_stages == 2
    timed.clear()
    assert _cut(Blocks(8)).plan.cuts == pipe.plan.cuts
    assert timed == []
    _cut(Blocks(8, 32))
    assert timed


def test_another_form_is_timed_anew(timed: list[tuple[int, int]]) -> None:
    indices: list[int] = []

    def wrap(module: nn.Module, index: int) -> nn.Module:
        indices.append(index)
        return module

    _cut(Blocks(4))
    timed.clear()
    _cut(Blocks(4), wrap=wrap)
    assert len(timed) == len(indices) > 2


def test_a_slow_block_gets_fewer_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """What no roofline knows: a block that takes long though it computes little."""

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    def spy(pipe: Any, index: int, *_: Any) -> Timing[float]:
        slow = any("sin" in op.target for op in pipe.program.stages[index].ops)
        seconds = 4.0 if slow else 1.0
        return Timing(Parts(seconds, seconds, seconds, 0.0), Parts(0.0, 0.0, 0.0, 0.0))

    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "measure", spy)
    beside: list[set[str]] = []
    for first in (nn.Identity(), Slow()):
        model = Blocks(8)
        model.blocks[0] = first
        policy = Balanced(2, Setting("CPU", "1F1B", 4), profile_on="cpu")
        stage = pipeline(model, (IDS,), split_policy=policy).stages[0]
        beside.append({name.split(".")[1] for name in stage.state_dict() if "blocks" in name})
    assert len(beside[1]) < len(beside[0])


def test_the_seconds_of_a_stage_as_it_runs() -> None:
    pipe = pipeline(Blocks(4), (IDS,), stages=3)
    device = torch.device("cpu")
    whole, split = (measure(pipe, 1, Way(device, splits=s), {}) for s in (False, True))
    assert whole.device.weights == 0
    assert whole.device.inputs == whole.device.backward > 0
    assert split.device.inputs > 0
    assert split.device.weights > 0
    assert measure(pipe, 1, Way(device, training=False), {}).device.backward < whole.device.backward
    assert all(p.grad is None for p in pipe.parameters())


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The functions that are made, as (role, how many ops)."""
    made: list[tuple[str, int]] = []
    function = RoleCode.function

    def spy(code: RoleCode, block: Block, bindings: Any) -> Any:
        made.append((block.name, len(block.ops)))
        return function(code, block, bindings)

    monkeypatch.setattr(RoleCode, "function", spy)
    return made


def _parts(index: int, **options: Any) -> Parts[float]:
    pipe = pipeline(Blocks(4), (IDS,), stages=3)
    way = Way(torch.device("cpu"), splits=True, backward="graph", **options)
    timing = measure(pipe, index, way, {}, (IDS,))
    assert all(p.grad is None for p in pipe.parameters())
    return timing.device


SECONDS = st.floats(0, 100)


@given(SECONDS, SECONDS, SECONDS, st.integers(0, 3), st.booleans())
def test_no_work_is_lost_by_when_it_is_done(forward: float, inputs: float, weights: float, stage: int, splits: bool) -> None:
    parts = Parts(forward, inputs + weights, inputs, weights)
    run = as_run(parts, stage, splits)
    assert (run.forward, run.backward) == (forward, inputs + weights)
    assert run.inputs + run.weights == inputs + weights
    assert (run.inputs == 0) >= (stage == 0)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_stage_is_timed_as_its_three_functions(index: int, roles: list[tuple[str, int]]) -> None:
    parts = _parts(index)
    names = [name for name, _ in roles]
    assert names == ["forward", "backward_input", "backward_weight"]
    # nothing comes before the first stage that waits for a gradient
    assert (roles[1][1] == 0) == (index == 0)
    assert parts.backward == parts.inputs + parts.weights
    assert parts.weights > 0


def test_a_stage_is_timed_as_it_computes_again(roles: list[tuple[str, int]]) -> None:
    for recompute in (False, True):
        _parts(1, recompute=recompute)
    before, after = roles[:3], roles[3:]
    assert sum(ops for _, ops in after) > sum(ops for _, ops in before)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)


def test_a_stage_that_no_graph_stands_for_is_timed_by_autograd(roles: list[tuple[str, int]]) -> None:
    parts = _parts(1, wrap=lambda module, index: Around(module))
    assert roles == []
    assert parts.inputs == parts.backward > 0
    assert parts.weights == 0


def test_a_search_times_blocks_as_the_driver_runs_them(timed: list[tuple[int, int]], roles: list[tuple[str, int]]) -> None:
    def search(setting: Setting) -> int:
        """How many stages were timed."""
        timed.clear()
        pipeline(Blocks(4), (IDS,), split_policy=Balanced(2, setting, profile_on="cpu"))
        return len(timed)

    assert search(CPU) > 2
    assert roles == []
    by_graphs = replace(CPU, backward="graph")
    assert 3 * search(by_graphs) == len(roles) > 6
    assert search(by_graphs) == 0


def test_a_loss_that_fails_is_an_error_of_that_stage() -> None:
    pipe = pipeline(Blocks(2), (IDS,), stages=2)

    def bad(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such target")

    with pytest.raises(StagecutError, match="stage 1 could not be timed on cpu: no such target"):
        measure(pipe, 1, Way(torch.device("cpu"), loss_fn=bad), {})


def test_a_folder_that_cannot_be_written_costs_the_store_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path / "file"))
    assert _cut(Blocks(2)).num_stages == 2


def test_a_span_in_which_nothing_is_estimated_has_what_was_measured() -> None:
    """Views cost nothing by the roofline. Shares of nothing were no numbers."""
    setting = Setting("CPU", "1F1B", 4)
    line = _line([1, 1, 0, 0], [0] * 4, setting)
    line.calibrate([(0, 2), (2, 4)], [Timing(Parts(1.0, 2.0, 2.0, 0.0), Parts(0.5, 0.5, 0.5, 0.0))] * 2)
    assert line.measured is not None
    device, host = line.measured[..., 2:].sum(2).tolist()
    assert device == pytest.approx([1.0, 2.0, 2.0, 0.0])
    assert host == pytest.approx([0.5, 0.5, 0.5, 0.0])


def test_the_place_in_the_store_has_all_that_decides() -> None:
    def made(mode: object) -> Any:
        return lambda module, index: (module, mode)[0]

    def key(sizes: dict[str, int], mode: object) -> str:
        return Way(torch.device("cpu"), made(mode)).key("ops", 1, sizes)

    assert key({"batch": 2}, "eager") == key({"batch": 2}, "eager")
    assert key({"batch": 2}, "eager") != key({"batch": 64}, "eager")
    assert key({"batch": 2}, "eager") != key({"batch": 2}, "compiled")


def test_the_place_in_the_store_knows_the_backward() -> None:
    cpu = torch.device("cpu")
    ways = [
        Way(cpu),
        Way(cpu, backward="graph"),
        Way(cpu, backward="graph", compile=True),
        Way(cpu, backward="graph", recompute=True),
        Way(cpu, backward="graph", compile=True, recompute=True),
    ]
    assert len({way.key("ops", 1, {}) for way in ways}) == len(ways)
