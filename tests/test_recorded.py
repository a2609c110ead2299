"""recorded: a step is recorded once, and replayed with other data.

There is no CUDA device here. A recording is stood in for by one that runs the step again into the tensors that the first
run left, as a graph writes the memory that it wrote when it was captured.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cluster.matrix import on_ranks, stages_of
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from stagecut import Driver, InputError, Pipe, StagecutError, pipeline
from stagecut.backend.ranks.losses import Losses
from stagecut.backend.ranks.recorded import MOST, WARM_UP, Step, StepGraphs, refuse_unrecordable


class Fake:
    """Records a step of a driver on CPUs."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self.step: Step

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        step, data = self.step, self.step.data
        self.recordings += 1
        buffers = [buffer for stage in step.stages for buffer in stage.submod.buffers()]
        before = [buffer.clone() for buffer in buffers]
        run()
        for buffer, content in zip(buffers, before, strict=True):
            buffer.copy_(content)  # nothing runs while a graph is captured
        grads, left = {p: p.grad for p in step.graded}, step.left

        def replay() -> None:
            self.replays += 1
            now, held = step.data, {p: p.grad for p in step.graded}
            step.data = data
            for parameter in step.graded:
                parameter.grad = None
            run()
            outer = [p.grad for p in step.graded], step.left
            for old, new in zip(tree_leaves([[*grads.values()], left]), tree_leaves(outer), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
            step.data = now
            for parameter in step.graded:
                parameter.grad = held[parameter]

        return replay, None


class Watched(StepGraphs):
    """Steps that are recorded by a Fake."""

    def __init__(self) -> None:
        self.fake = Fake()
        super().__init__(torch.device("cpu"), self.fake)

    def run(self, step: Step) -> None:
        self.fake.step = step
        super().run(step)


class Net(nn.Module):
    """Four blocks that write state, the first of which is used again by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(4))
        self.last = nn.Linear(6, 6)
        self.last.weight = self.blocks[0][0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)  # type: ignore[no-any-return]


def loss_of(output: torch.Tensor, target: torch.Tensor, weight: float) -> Any:
    loss = weight * F.mse_loss(output, target)
    return loss, {"largest": output.detach().amax()}


def _trained(pipe: Pipe, schedule: str, backward: str, graphs: bool, zero: str, drop: int | None = None) -> tuple[list[Any], Any]:
    """Losses, metrics, outputs, gradients and weights of some steps. In front of step `drop` no recording is left."""
    torch.manual_seed(0)
    driver = Driver(deepcopy(pipe), schedule, 4, loss_of, backward=backward, device="cpu")
    if graphs:
        driver._step_graphs = Watched()
    optimizer = torch.optim.SGD(driver.parameters(), lr=0.1, momentum=0.9)
    driver.attach(optimizer)
    seen: list[Any] = []
    for number in range(8):
        if number == drop:
            driver.drop_recordings()
        x = torch.randn(16, 6).double()
        weight = {"weight": 2.0 if number == 6 else 1.0}
        output, losses = driver.step(x, target=x.flip(0), loss_kwargs=weight)
        driver.clip_grad_norm_(1.0)
        seen += [output, losses.batch, list(losses), losses.metrics]
        seen += [p.grad.clone() for p in driver.parameters() if p.grad is not None]
        optimizer.step()
        if zero == "none" or (zero == "every second" and number % 2):
            optimizer.zero_grad()
        if zero == "zeros":
            optimizer.zero_grad(set_to_none=False)
        seen += [p.detach().clone() for p in driver.parameters()]
    return seen, driver._step_graphs


@pytest.mark.parametrize("backward", ["autograd", "graph"])
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_replayed_steps_train_as_steps_do(schedule: str, backward: str) -> None:
    torch.manual_seed(0)
    pipe = pipeline(Net().double(), (torch.randn(4, 6).double(),), stages=stages_of(schedule, 2), check=None)
    assert on_ranks(2, _compared, pipe, schedule, backward) == ["ok", "ok"]


def _compared(pipe: Pipe, schedule: str, backward: str) -> str:
    for zero in ("none", "zeros", "every second") if schedule == "1F1B" else ("every second",):
        expected, _ = _trained(pipe, schedule, backward, False, zero)
        actual, graphs = _trained(pipe, schedule, backward, True, zero)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert (graphs.fake.recordings, graphs.fake.replays) == (1, 8 - 1 - WARM_UP)
    if schedule == "1F1B":
        dropped, graphs = _trained(pipe, schedule, backward, True, "none", drop=4)
        torch.testing.assert_close(dropped, _trained(pipe, schedule, backward, False, "none")[0], rtol=1e-12, atol=1e-12)
        assert graphs.fake.recordings == 2
    return "ok"


def test_a_loss_with_weights_of_its_own_and_sizes_that_change() -> None:
    assert on_ranks(2, _of_sizes) == ["ok", "ok"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output * self.scale, target)


def _of_sizes() -> str:
    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        pipe = pipeline(model, (torch.randn(4, 6),), stages=2, dynamic_shapes=({0: Dim("rows", min=2)},))
        loss = Scaled()
        driver = Driver(pipe, "GPipe", 2, loss, device="cpu", share_losses=False)
        watched = Watched()
        if graphs:
            driver._step_graphs = watched
        seen: list[Any] = []
        for number in range(3 * (MOST + 2)):
            rows = 8 + 2 * (number % (MOST + 2))
            x = torch.randn(rows, 6)
            driver.step(x, target=x)
            seen += [p.grad.clone() for p in (*driver.parameters(), loss.scale) if p.grad is not None]
            loss.zero_grad()
            for parameter in driver.parameters():
                parameter.grad = None
        results.append(seen)
        assert watched.fake.recordings == (MOST if graphs else 0)
    torch.testing.assert_close(*results)
    return "ok"


def test_drawing_and_other_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))
    assert on_ranks(2, _refused, pipeline(model, (torch.randn(4, 6),), stages=2)) == ["ok", "ok"]


def _refused(pipe: Pipe) -> str:
    with pytest.raises(InputError, match="stages run on cpu"):
        Driver(pipe, "1F1B", 2, F.mse_loss, device="cpu", cuda_graphs=True)
    with patch("torch.cuda.device_count", lambda: 1), pytest.raises(InputError, match="draw random numbers"):
        Driver(pipe, "1F1B", 2, F.mse_loss, device="cuda", cuda_graphs=True)
    return "ok"


def _hooked(stage: nn.Module, x: torch.Tensor) -> None:
    next(stage.parameters()).register_post_accumulate_grad_hook(lambda _: None)


def _carrying(stage: nn.Module, x: torch.Tensor) -> None:
    x.requires_grad_()


@pytest.mark.parametrize(("change", "why"), [(_hooked, "a parameter has hooks"), (_carrying, "an input carries gradient")])
def test_a_step_that_does_more_is_refused(change: Callable[[nn.Module, torch.Tensor], None], why: str) -> None:
    stage, x = nn.Linear(6, 6), torch.randn(4, 6)
    losses = Losses(F.mse_loss, 1, 1.0, None)
    losses.begin([x.detach()], [])
    built: Any = SimpleNamespace(submod=stage, stage_index=0, microbatches=[[x]], results={})
    step = Step(lambda: None, [built], losses, list(stage.parameters()))
    refuse_unrecordable(step)
    change(stage, x)
    with pytest.raises(StagecutError, match=why):
        refuse_unrecordable(step)
