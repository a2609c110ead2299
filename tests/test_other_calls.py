"""Ranks that do not make the same call are told so before anything is exchanged, whichever calls these are; then they go on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from torch import nn

from stagecut import Driver, InputError, Pipe, checkpoint, pipeline, record

X = torch.ones(4, 4)


class Tied(nn.Module):
    """Its first and its last stage share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)).relu())  # type: ignore[no-any-return]


def cut() -> Pipe:
    return pipeline(Tied(), (X[:2],), stages=2, check=None)


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def test_every_call_that_ranks_make_together_is_compared_with_that_of_the_others() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert on_ranks(2, _each_against_a_step, cut(), folder) == ["ok", "ok"]


def _each_against_a_step(pipe: Pipe, folder: str) -> str:
    """One rank makes another call than the other; each time the losses of the next steps are as if nothing had been."""
    driver = Driver(pipe, "1F1B", 2, mse)
    moving = Driver(pipe, "1F1B", 2, mse, data_on="ends")
    optimizer = torch.optim.SGD(driver.parameters(), lr=0.0)
    driver.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    driver.attach_scaler(scaler)

    def timed() -> None:
        with record(driver):
            driver.step(X, target=X)

    calls: dict[str, Callable[[], Any]] = {
        "driver.eval": lambda: driver.eval(X, target=X),
        "driver.clip_grad_norm_": lambda: driver.clip_grad_norm_(1.0),
        "driver.sync_shared_gradients": driver.sync_shared_gradients,
        "optimizer.step": optimizer.step,
        "step or unscale_ of a GradScaler": lambda: scaler.step(optimizer),
        "checkpoint.save": lambda: checkpoint.save(driver, optimizer, Path(folder) / "never"),
        "checkpoint.load": lambda: checkpoint.load(driver, optimizer, Path(folder) / "never"),
        "save_pretrained": lambda: checkpoint.save_pretrained(driver, Path(folder) / "never"),
        "save_adapter": lambda: checkpoint.save_adapter(driver, Path(folder) / "never"),
        "load_adapter": lambda: checkpoint.load_adapter(driver, Path(folder) / "never"),
        "record": timed,
        "Driver(...)": lambda: Driver(pipe, "1F1B", 2, mse),
    }
    _, first = driver.step(X, target=X)
    for other in range(2):
        for name, call in calls.items():
            mine = call if dist.get_rank() == other else lambda: driver.step(X, target=X)
            by_rank = [name, "driver.step"] if other == 0 else ["driver.step", name]
            with pytest.raises(InputError) as caught:
                mine()
            assert f"rank 1 calls {by_rank[1]}, rank 0 calls {by_rank[0]}\n" in str(caught.value)
            _, losses = driver.step(X, target=X)
            assert torch.equal(torch.stack(losses), torch.stack(first)), name
    with pytest.raises(InputError, match=r"rank 1 calls driver\.step, rank 0 calls driver\.eval"):
        (moving.step if dist.get_rank() else moving.eval)(X, target=X)
    moving.step(X, target=X)
    assert not list(Path(folder).iterdir())
    return "ok"
