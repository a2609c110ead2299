"""Ranks that do not make the same call are told so before anything is exchanged, whichever calls these are; then they go on."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from torch import nn

from stagecut import Driver, InputError, Pipe, StagecutError, checkpoint, pipeline, record
from stagecut.backend.ranks import faults

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


def test_mistakes_that_all_ranks_make_alike_or_one_makes_leave_the_group_whole() -> None:
    assert on_ranks(2, _mistakes, cut()) == ["ok", "ok"]


def _mistakes(pipe: Pipe) -> str:
    rank = dist.get_rank()
    for bad in (lambda module: module, lambda: None):
        with pytest.raises(InputError, match=r"wrap is called as wrap\(module, index\), and .*<lambda> takes \((module)?\)\n  try: "):
            Driver(pipe, "1F1B", 2, mse, wrap=bad)  # type: ignore[arg-type]
    forgetful = Driver(pipe, "1F1B", 2, mse, wrap=lambda module, index: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match=rf"wrap\(module, {rank}\) returned None, and no module to run\n  try: return the module"):
        forgetful.step(X, target=X)
    driver = Driver(pipe, "1F1B", 2, mse)
    _, first = driver.step(X, target=X)

    def goes_on() -> None:
        _, losses = driver.step(X, target=X)
        assert torch.equal(torch.stack(losses), torch.stack(first))

    for without in (torch.no_grad, torch.inference_mode):
        with pytest.raises(InputError, match=r"driver\.step makes gradients.*\n  try: driver\.eval"), without():
            driver.step(X, target=X)
        goes_on()
        with pytest.raises(InputError, match=r"driver\.step makes gradients"), torch.set_grad_enabled(rank == 0):
            driver.step(X, target=X)
        goes_on()
    words = r"^rank 1 was given no arguments of the model, rank 0 was\n  try: .*data_on='ends'"
    for call in (driver.step, driver.eval):
        with pytest.raises(InputError, match=words):
            call(X) if rank == 0 else call(target=X)
        goes_on()
    with pytest.raises(InputError, match=words):
        driver.step(arg_mbs=[(X[:2],)] * 2) if rank == 0 else driver.step(target_mbs=[X[:2]] * 2)
    driver.train(rank == 0)  # which one rank alone changes
    driver.eval(X)
    with pytest.raises(InputError, match=r"nothing is divided among|have 4 along dim 0"):
        driver.eval(X[:2])
    driver.train()
    driver.step(X, target=X) if rank == 0 else driver.step(x=X, target=X)  # by position and by name
    goes_on()
    return "ok"


@pytest.mark.parametrize(
    ("schedules", "counts", "words"),
    [
        (("GPipe", "1F1B"), (2, 2), "rank 1 has schedule 1F1B, rank 0 has schedule GPipe\n  try: give every rank the same schedule"),
        (
            ("GPipe", "1F1B"),
            (2, 4),
            "rank 1 has schedule 1F1B, n_microbatches 4, rank 0 has schedule GPipe, n_microbatches 2\n"
            "  try: give every rank the same schedule and n_microbatches",
        ),
    ],
)
def test_only_what_differs_between_ranks_is_said(schedules: tuple[str, str], counts: tuple[int, int], words: str) -> None:
    said = on_ranks(2, _differently, cut(), schedules, counts)
    assert said == [f"the ranks do not run the same program: {words}"] * 2


def _differently(pipe: Pipe, schedules: tuple[str, str], counts: tuple[int, int]) -> str:
    rank = dist.get_rank()
    with pytest.raises(StagecutError) as caught:
        Driver(pipe, schedules[rank], counts[rank], mse)
    return str(caught.value)


class Waited(io.StringIO):
    """Standard error, from which a file is made as soon as something is said."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def flush(self) -> None:
        self._file.write_text(self.getvalue())


def test_a_rank_that_does_not_come_is_named_while_the_others_wait() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (said, _) = on_ranks(2, _late, cut(), folder)
    assert re.fullmatch(
        r"stagecut: rank 0 \(stage 0\) calls driver\.clip_grad_norm_ and waits: rank 1 \(stage 1\) has not come to it in \d+ s; "
        r"every rank calls it\n",
        said,
    )


def _late(pipe: Pipe, folder: str) -> str:
    faults.INTERVAL, faults.GRACE = 0.02, 0.1
    driver = Driver(pipe, "1F1B", 2, mse)
    driver.step(X, target=X)
    told = Path(folder) / "told"
    if dist.get_rank() == 1:
        while not told.exists():
            time.sleep(0.02)
        driver.clip_grad_norm_(1.0)
        return ""
    with contextlib.redirect_stderr(Waited(told)):
        driver.clip_grad_norm_(1.0)
    return told.read_text()
