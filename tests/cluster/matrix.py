"""Trains a model on several ranks and beside it the unsplit model: losses, gradients, buffers and replicas must agree.

The parent traces and cuts the model, and the ranks are given the pipe, so that nothing is traced twice.
"""

from __future__ import annotations

import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cluster.models import SUBJECTS, Subject
from cluster.ranks import read_work, start
from torch import nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from zoo.cuts import equal_ops

from stagecut import Driver, Pipe, pipeline

SCHEDULES = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
STEPS, MICRO_BATCH = 3, 2


def stages_of(schedule: str, ranks: int) -> int:
    """How many stages a schedule is tried with on so many ranks."""
    return ranks if issubclass(get_schedule_class(schedule), PipelineScheduleSingle) else 2 * ranks


def cut(subject: Subject, stages: int) -> tuple[nn.Module, Pipe]:
    """The model, always the same, and its pipe."""
    torch.manual_seed(3)
    model = subject.make()
    pipe = pipeline(model, (), subject.inputs(MICRO_BATCH), split_policy=equal_ops(stages), check=None, **subject.options)
    assert pipe.num_stages == stages
    return model, pipe


def try_all(name: str, schedules: tuple[str, ...], ranks: int) -> dict[str, str]:
    """Schedule -> 'ok', or what was wrong."""
    subject = SUBJECTS[name]
    found: dict[str, str] = {}
    for count in dict.fromkeys(stages_of(s, ranks) for s in schedules):
        model, pipe = cut(subject, count)
        chosen = [s for s in schedules if stages_of(s, ranks) == count]
        answers = on_ranks(ranks, _train_each, model, pipe, subject, chosen)
        for place, schedule in enumerate(chosen):
            wrong = [answer[place] for answer in answers if answer[place] != "ok"]
            found[schedule] = wrong[0] if wrong else "ok"
    return found


def on_ranks(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` gives on each of so many ranks of a gloo group. Raises RanksFailed when one gives nothing."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start(ranks, Path(folder), _enter, work, args)
        wait(processes)
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        failed = [rank for rank, file in enumerate(files) if processes[rank].exitcode or not file.exists()]
        if failed:
            told = [file.with_suffix(".error").read_text() for file in files if file.with_suffix(".error").exists()]
            raise RanksFailed("\n".join([f"ranks {failed} of {ranks}", *told]))
        return [torch.load(file, weights_only=False) for file in files]


class RanksFailed(Exception):
    """Ranks ended without an answer; the message has what they raised."""


def wait(processes: Sequence[Any]) -> None:
    """All have ended; when one fails the others are killed."""
    # asked once: to wait for none of them is to wait for ever
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        multiprocessing.connection.wait(alive)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
    for process in processes:
        process.join()


def _enter(rank: int, ranks: int, folder: Path) -> None:
    try:
        work = read_work(folder)
        dist.set_debug_level_from_env()
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
        torch.save(work(), folder / str(rank))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise


def _train_each(model: nn.Module, pipe: Pipe, subject: Subject, schedules: list[str]) -> list[str]:
    start = deepcopy(model.state_dict())
    answers = []
    for schedule in schedules:
        model.load_state_dict(start)
        for parameter in model.parameters():
            parameter.grad = None
        answers.append(_train(model, pipe, subject, schedule))
    return answers


def _train(model: nn.Module, pipe: Pipe, subject: Subject, schedule: str) -> str:
    """'ok', or the first thing that differs from the unsplit model in some optimizer steps."""
    count = 4 * dist.get_world_size()
    reference = deepcopy(model)
    driver = Driver(pipe, schedule, count, subject.loss)
    mine = torch.optim.SGD(driver.parameters(), 0.05, momentum=0.9)
    theirs = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9)
    driver.attach(mine)
    for step in range(STEPS):
        torch.manual_seed(step)
        inputs = subject.inputs(MICRO_BATCH * count)
        mine.zero_grad()
        theirs.zero_grad()
        output, losses = driver.step(**inputs)
        expected = [_one(reference, subject, inputs, i, count) for i in range(count)]
        wrong = _compare_outputs(driver, output, losses, expected)
        mine.step()
        wrong = wrong or _compare_state(driver, reference)
        theirs.step()
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, wrong)
        if any(everywhere):
            return f"step {step}: {next(filter(None, everywhere))}"
    return _compare_replicas(driver) or "ok"


def _one(reference: nn.Module, subject: Subject, inputs: dict[str, Any], index: int, count: int) -> tuple[Any, torch.Tensor]:
    """One micro-batch of the unsplit model, and its backward."""
    part = {
        name: item.chunk(count)[index] if isinstance(item, torch.Tensor) and item.shape[0] == MICRO_BATCH * count else item
        for name, item in inputs.items()
    }
    output = reference(**part)
    loss = subject.loss(output)
    (loss / count).backward()
    return output, loss.detach()


def _compare_outputs(driver: Driver, output: Any, losses: list[torch.Tensor], expected: list[tuple[Any, torch.Tensor]]) -> str:
    if not driver.is_last and output is not None:
        return "a rank without the last stage returns an output"
    if driver.is_last and type(output) is not type(expected[0][0]):
        return f"the output is a {type(output).__name__}"
    if not _near(torch.stack(losses), torch.stack([loss for _, loss in expected])):
        return f"losses {losses} for {[loss for _, loss in expected]}"
    if not driver.is_last:
        return ""
    first = output if isinstance(output, torch.Tensor) else next(iter(output.values())) if isinstance(output, dict) else output[0]
    return "" if isinstance(first, torch.Tensor) else "the first output is no tensor"


def _compare_state(driver: Driver, reference: nn.Module) -> str:
    parameters, buffers = dict(reference.named_parameters(remove_duplicate=False)), dict(reference.named_buffers())
    for index in driver.stage_indices:
        stage = driver.pipe.stages[index]
        for name, parameter in stage.named_parameters():
            want = parameters[name].grad
            if (parameter.grad is None) != (want is None) or (want is not None and not _near(parameter.grad, want)):
                return f"gradient of '{name}' on stage {index}"
        for name, buffer in stage.named_buffers():
            if not _near(buffer, buffers[name]):
                return f"buffer '{name}' on stage {index}"
    return ""


def _compare_replicas(driver: Driver) -> str:
    """Every replica of a tied parameter is the same on all ranks, bit for bit."""
    held = {name: p.detach() for i in driver.stage_indices for name, p in driver.pipe.stages[i].named_parameters()}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, held)
    names = [{n: entry.name for entry in driver.pipe.program.state for n in entry.names}[n] for n in held]
    for other in everywhere:
        for name, own in zip(held, names, strict=True):
            for theirs, tensor in other.items():
                entry = next(e for e in driver.pipe.program.state if theirs in e.names)
                if entry.name == own and not torch.equal(tensor, held[name]):
                    return f"replicas of '{name}' differ"
    return ""


def _near(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and torch.allclose(one.double(), other.double(), rtol=1e-7, atol=1e-9)
