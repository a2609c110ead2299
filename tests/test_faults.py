"""A rank fails or is killed: all others stop, long before their group would, with an error that names it. Real processes, on gloo."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from cluster.ranks import read_work, start
from test_other_calls import Tied
from torch import nn
from zoo.cuts import equal_ops

from stagecut import Driver, RankError, StagecutError, pipe_split, pipeline
from stagecut.backend.files import checkpoint
from stagecut.backend.ranks import faults

LIMIT = 300
"""Seconds after which a rank hangs: far more than any takes, far less than the half hour after which the group itself gives up."""

OTHERS_ENDED = "others ended"
"""The file that says so to the first rank."""


class Chain(nn.Module):
    """Three stages, and a lookup in the middle one that fails for the number 99."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.table = nn.Embedding(8, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        pipe_split()
        x = x + self.table(number)
        pipe_split()
        return self.last(x)  # type: ignore[no-any-return]


def chain() -> Any:
    """Its pipe, always the same."""
    torch.manual_seed(0)
    return pipeline(Chain(), (torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)), check=None)


def outcomes(ranks: int, meet: str, work: Callable[..., Any], *args: Any) -> list[str]:
    """What each rank ended with: its answer, its error, or the signal. Fails when one is still there after LIMIT seconds."""
    with tempfile.TemporaryDirectory() as folder:
        where = f"tcp://localhost:{_free_port()}" if meet == "tcp" else f"file://{folder}/meet"
        processes = start(ranks, Path(folder), partial(_enter, where), work, args)
        end = time.monotonic() + LIMIT
        for process in reversed(processes):
            if process is processes[0]:
                (Path(folder) / OTHERS_ENDED).touch()
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not hanging
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        return [file.read_text() if file.exists() else f"exit {p.exitcode}" for file, p in zip(files, processes, strict=True)]


def _wait_for(file: Path) -> None:
    """Returns when another rank has made the file. Fails after half of LIMIT seconds."""
    end = time.monotonic() + LIMIT / 2
    while not file.exists():
        assert time.monotonic() < end, f"nobody made {file.name}"
        time.sleep(0.05)


def _enter(where: str, rank: int, ranks: int, folder: Path) -> None:
    work = read_work(folder)
    faults.INTERVAL = 0.1  # the shorter it is, the more of GRACE is left to a machine that is busy
    faults.GRACE = 4.0
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
    try:
        answer = str(work())
    except StagecutError as error:
        answer = f"{type(error).__name__}: {error}\n  from {type(error.__cause__).__name__}"
    (folder / str(rank)).write_text(answer)
    if rank == 0 and where.startswith("tcp"):  # it holds the store
        _wait_for(folder / OTHERS_ENDED)
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def _steps(pipe: Any, rank: int, step: int, bad: Callable[[Any], None], schedule: str = "1F1B", loss: Any = None) -> str:
    """Five steps, in one of which `bad` happens to one rank."""
    driver = Driver(pipe, schedule, 4, loss or (lambda out: out.square().mean()), compare_steps=0)
    number = torch.zeros(8, dtype=torch.int64)
    for now in range(5):
        if now == step and dist.get_rank() == rank:
            bad((pipe, number))
        driver.step(torch.randn(8, 4), number)
    return "ok"


def _killed_in_forward(where: Any) -> None:
    """The third micro-batch of this step is its last."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    where[0].stages[dist.get_rank()].register_forward_pre_hook(hook)


@pytest.mark.parametrize(("rank", "meet"), [(0, "file"), (2, "tcp")])
def test_a_rank_that_is_killed_in_a_step_is_named(rank: int, meet: str) -> None:
    found = outcomes(3, meet, _steps, chain(), rank, 2, _killed_in_forward)
    assert found[rank] == "exit -9"
    for other in {0, 1, 2} - {rank}:
        assert found[other].startswith(f"RankError: rank {rank} (stage {rank}) does not answer: it was killed, has ended, or hangs")
        assert "checkpoint.latest" in found[other]


def test_the_rank_that_holds_the_store_is_named_too() -> None:
    found = outcomes(3, "tcp", _steps, chain(), 0, 2, _killed_in_forward)
    assert found[0] == "exit -9"
    assert all(text.startswith("RankError: the store of the group does not answer: rank 0 (stage 0)") for text in found[1:])


def _fails_in_a_hook(where: Any) -> None:
    where[0].stages[2].get_submodule("last").register_forward_hook(_boom)


def test_an_error_in_a_forward_is_told_to_all_with_its_place() -> None:
    found = outcomes(3, "tcp", _steps, chain(), 2, 1, _fails_in_a_hook)
    for text in found:
        assert text.startswith(
            "RankError: rank 2 (stage 2) failed: ValueError: boom\n  at: module 'last', which was given float32[2, 4], test_faults.py:"
        )
    assert found[2].endswith("from ValueError")


def _begins_again(pipe: Any) -> str:
    """What a new driver says after a step that failed."""
    with pytest.raises(RankError, match="boom"):
        _steps(pipe, 2, 1, _fails_in_a_hook)
    Driver(pipe, "1F1B", 4, lambda out: out.square().mean())
    return "nothing"


def test_a_broken_group_takes_no_new_driver() -> None:
    for text in outcomes(3, "tcp", _begins_again, chain()):
        assert text.startswith("RankError: a rank of this group failed before")
        assert "checkpoint.latest" in text


class TiedEnds(nn.Module):
    """Three stages; the first and the last share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(8, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        pipe_split()
        x = self.block(x)
        pipe_split()
        return self.head(x)  # type: ignore[no-any-return]


def test_an_update_with_parts_of_a_tied_gradient_stops_also_the_ranks_that_hold_none() -> None:
    torch.manual_seed(0)
    pipe = pipeline(TiedEnds(), (torch.zeros(2, dtype=torch.int64),), check=None)
    found = outcomes(3, "file", _forgets_to_sum, pipe)
    for text in found:
        assert "failed: an optimizer would step with a part of the gradient of 'embedding.weight' and 'head.weight'" in text
    assert [text.splitlines()[-1].strip() for text in found][::2] == ["from TiedError", "from TiedError"]


def _forgets_to_sum(pipe: Any) -> str:
    driver = Driver(pipe, "1F1B", 4, lambda out: out.square().mean())
    optimizer = torch.optim.SGD(driver.parameters(), 0.1)
    before = [p.clone() for p in driver.parameters()]
    try:
        for _ in range(2):
            driver.step(torch.zeros(8, dtype=torch.int64))
            optimizer.step()
    finally:
        assert dist.get_rank() == 1 or all(torch.equal(*both) for both in zip(before, driver.parameters(), strict=True))
    return "nothing"


def _unknown_number(where: Any) -> None:
    where[1].fill_(99)


def test_an_error_in_an_op_names_the_line_of_the_model() -> None:
    found = outcomes(3, "file", _steps, chain(), 1, 1, _unknown_number)
    line = Path(__file__).read_text().splitlines().index("        x = x + self.table(number)") + 1
    for text in found:
        assert text.startswith("RankError: rank 1 (stage 1) failed: IndexError: index out of range in self")
        assert f"at: module 'table', which was given int64[2], test_faults.py:{line}\n" in text
    assert found[1].endswith("from IndexError")


def _bad_loss(output: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("no loss")


def test_an_error_in_the_loss_is_told_to_all() -> None:
    for text in outcomes(3, "file", _steps, chain(), 0, 9, _unknown_number, "GPipe", _bad_loss):
        assert text.startswith("RankError: rank 2 (stage 2) failed: ZeroDivisionError: no loss\n  at: test_faults.py:")


def test_who_waits_for_a_rank_that_waits_comes_out(tmp_path: Path) -> None:
    """Rank 2 fails and lives on until all are out: rank 0 waits for rank 1, and rank 1 for what rank 2 would have sent."""
    found = outcomes(3, "file", _lives_on, chain(), tmp_path)
    assert all(text.startswith("rank 2 (stage 2) failed: ValueError") for text in found)


def _lives_on(pipe: Any, out: Path) -> str:
    with pytest.raises(faults.RankError) as caught:
        _steps(pipe, 2, 1, _fails_in_a_hook)
    (out / str(dist.get_rank())).touch()
    for rank in range(3):
        _wait_for(out / str(rank))
    return str(caught.value)


def test_a_rank_that_is_busy_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Rank 0 is in a backward before rank 2 is killed, and until rank 1 has its verdict."""
    found = outcomes(3, "tcp", _killed_while_one_is_busy, chain(), tmp_path / "busy", tmp_path / "verdict")
    assert found[2] == "exit -9"
    for text in found[:2]:
        assert text.startswith("RankError: rank 2 (stage 2) does not answer")


def _killed_while_one_is_busy(pipe: Any, busy: Path, verdict: Path) -> str:
    calls, rank = count(1), dist.get_rank()
    if rank == 0:
        pipe.stages[0].first.weight.register_hook(lambda _: _busy(busy, verdict) if next(calls) == 2 else None)
    if rank == 2:
        pipe.stages[2].register_forward_pre_hook(lambda *_: _wait_for(busy) if next(calls) == 3 else None)
    try:
        return _steps(pipe, 2, 0, _killed_in_forward)
    finally:
        if rank == 1:
            verdict.touch()


def _busy(busy: Path, verdict: Path) -> None:
    busy.touch()
    _wait_for(verdict)


def test_pipelines_side_by_side_know_their_own_ranks() -> None:
    """Two pipelines of two ranks each: one fails, the other goes on. Groups can be destroyed afterwards."""
    torch.manual_seed(0)
    pipe = pipeline(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),), split_policy=equal_ops(2), check=None)
    found = outcomes(4, "file", _side_by_side, pipe)
    assert found[:2] == ["ok", "ok"]
    assert all(text.startswith("(3,) rank 3 (stage 1) failed: ValueError: boom") for text in found[2:])


def _side_by_side(pipe: Any) -> str:
    rank = dist.get_rank()
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    driver = Driver(pipe, "GPipe", 2, lambda out: out.mean(), group=group)
    answer = "ok"
    if rank == 3:
        pipe.stages[1].register_forward_hook(_boom)
    try:
        driver.step(torch.randn(4, 4))
    except faults.RankError as error:
        answer = f"{error.ranks} {error}"
    dist.destroy_process_group()
    return answer


def _boom(*_: Any) -> None:
    raise ValueError("boom")


def _other_arguments(where: Any) -> None:
    where[1].resize_(7)


def test_arguments_that_only_one_rank_is_given_are_told_to_all() -> None:
    words = r"InputError: the ranks were called with different data: args[1] is int64[7] on rank 1, and int64[8] on rank 0"
    assert all(text.startswith(words) for text in outcomes(3, "file", _steps, chain(), 1, 1, _other_arguments))


def test_arguments_that_all_ranks_refuse_leave_the_group_whole() -> None:
    assert outcomes(3, "file", _all_refuse, chain()) == ["ok"] * 3


def _all_refuse(pipe: Any) -> str:
    driver = Driver(pipe, "GPipe", 4, lambda out: out.mean())
    for _ in range(2):
        with pytest.raises(StagecutError, match="input 'x' has a batch of 7, which 4 micro-batches do not divide"):
            driver.step(torch.randn(7, 4), torch.zeros(7, dtype=torch.int64))
        driver.step(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    return "ok"


def test_a_rank_that_is_killed_in_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    found = outcomes(3, "file", _killed_save, chain(), tmp_path)
    assert found[1] == "exit -9"
    assert all(found[rank].startswith("RankError: rank 1 (stage 1) does not answer") for rank in (0, 2))
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"


def _killed_save(pipe: Any, folder: Path) -> None:
    driver = Driver(pipe, "GPipe", 2)
    checkpoint.save(driver, None, folder / "step-1")
    if dist.get_rank() == 1:
        checkpoint._Writer.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
    checkpoint.save(driver, None, folder / "step-2")


def test_a_run_that_goes_on_from_the_last_checkpoint_has_the_losses_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole = on_ranks(3, _train, chain(), tmp_path / "whole", 99)[2]
    found = outcomes(3, "file", _train, chain(), tmp_path / "run", 4)
    assert found[1] == "exit -9"
    assert checkpoint.latest(tmp_path / "run") == tmp_path / "run" / "step-4"
    resumed = on_ranks(3, _train, chain(), tmp_path / "run", 99)[2]
    assert list(whole) == [0, 1, 2, 3, 4, 5, 6]
    assert list(resumed) == [4, 5, 6]
    assert all(resumed[step] == whole[step] for step in resumed)


def _train(pipe: Any, folder: Path, death: int) -> dict[int, float]:
    """Seven steps with a checkpoint after every second, from the last one there is; rank 1 dies in step `death`."""
    driver = Driver(pipe, "1F1B", 4, lambda out: out.square().mean())
    optimizer = torch.optim.Adam(driver.parameters(), 0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    last, first = checkpoint.latest(folder), 0
    if last is not None:
        extra = checkpoint.load(driver, optimizer, last)
        scheduler.load_state_dict(extra["scheduler"])
        first = extra["step"]
    losses = {}
    for step in range(first, 7):
        if step == death and dist.get_rank() == 1:
            _killed_in_forward((pipe, None))
        torch.manual_seed(step)
        x, number = torch.randn(8, 4), torch.randint(8, (8,))
        optimizer.zero_grad()
        _, found = driver.step(x, number)
        optimizer.step()
        scheduler.step()
        losses[step] = sum(map(float, found))
        if step % 2 == 1:
            checkpoint.save(driver, optimizer, folder / f"step-{step + 1}", {"step": step + 1, "scheduler": scheduler.state_dict()})
    return losses


def _saves_alone(pipe: Any) -> str:
    driver = Driver(pipe, "1F1B", 4, lambda out: out.square().mean())
    if dist.get_rank() == 0:
        checkpoint.save(driver, None, "never")
    return "ok"


def test_a_rank_that_ends_without_a_call_of_all_ranks_is_told_with_that_call() -> None:
    found = outcomes(3, "file", _saves_alone, chain())
    assert found[1:] == ["ok", "ok"]
    assert "do not answer: they were killed, have ended, or hang\n  try: every rank calls checkpoint.save, as this one did" in found[0]


def test_a_sum_that_one_of_its_ranks_leaves_out_is_told_on_all_ranks() -> None:
    found = outcomes(3, "file", _leaves_out, pipeline(Tied(), (torch.ones(2, 4),), stages=3, check=None))
    for text in found:
        assert "rank 2 (stage 2) calls driver.step, and not optimizer.step before, as rank 0 does\n  try: every rank makes" in text


def _leaves_out(pipe: Any) -> str:
    driver = Driver(pipe, "1F1B", 3, lambda out: out.square().mean())
    optimizer = torch.optim.SGD(driver.parameters(), lr=0.0)
    driver.attach(optimizer)
    for _ in range(2):
        driver.step(torch.ones(6, 4))
        optimizer.step()
    driver.step(torch.ones(6, 4))
    if dist.get_rank() < 2:
        optimizer.step()
    driver.step(torch.ones(6, 4))
    return "ok"
