"""Checkpoints: saved by several ranks, loaded by the unsplit model and by other numbers of stages, bit for bit."""

from __future__ import annotations

import os
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import RanksFailed, cut, on_ranks, stages_of
from cluster.models import SUBJECTS
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

from stagecut import Driver, SplitPoint, StagecutError, pipeline
from stagecut.backend.files import checkpoint
from stagecut.backend.stages.modules import StageModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01, betas=(0.8, 0.9))


def _run(driver: Driver, optimizer: torch.optim.Optimizer, subject: Any, steps: range) -> list[torch.Tensor]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        _, found = driver.step(**subject.inputs(4))
        optimizer.step()
        losses += found
    return losses


def _train(pipe: Any, subject: Any, schedule: str, folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, and one step more; what this rank holds at the checkpoint, and the losses behind it."""
    driver = Driver(pipe, schedule, 2, subject.loss)
    optimizer = _adam(driver.parameters())
    driver.attach(optimizer)
    _run(driver, optimizer, subject, range(3))
    checkpoint.save(driver, optimizer, folder, {"step": 3, "scheduler": {"last": [1, 2]}})
    held = _held(driver, optimizer)
    return {"held": held, "losses": _run(driver, optimizer, subject, range(3, 5))}


def _resume(pipe: Any, subject: Any, schedule: str, folder: Path) -> dict[str, Any]:
    driver = Driver(pipe, schedule, 2, subject.loss)
    optimizer = torch.optim.AdamW(driver.parameters(), 0.5)
    driver.attach(optimizer)
    assert checkpoint.load(driver, optimizer, folder) == {"step": 3, "scheduler": {"last": [1, 2]}}
    held = _held(driver, optimizer)
    return {"held": held, "losses": _run(driver, optimizer, subject, range(3, 5))}


def _held(driver: Driver, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of a rank, by its first name."""
    found: dict[str, torch.Tensor] = {}
    firsts = {name: entry.name for entry in driver.pipe.program.state for name in entry.names}
    for index in driver.stage_indices:
        stage = driver.pipe.stages[index]
        found |= {firsts[name]: tensor.clone() for name, tensor in stage.state_dict().items()}
        for name, parameter in stage.named_parameters():
            found |= {f"{firsts[name]} {key}": item.clone() for key, item in optimizer.state[parameter].items()}
    return found


def _merged(answers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: tensor for answer in answers for name, tensor in answer["held"].items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("name", "schedule", "other", "ranks"), [("GPT-2, tied", "1F1B", "Interleaved1F1B", 2), ("ResNet", "ZBVZeroBubble", "GPipe", 3)]
)
def test_a_checkpoint_loads_anywhere_bit_for_bit(name: str, schedule: str, other: str, ranks: int, tmp_path: Path) -> None:
    subject, folder = SUBJECTS[name], tmp_path / "run" / "step-3"
    _, pipe = cut(subject, stages_of(schedule, 2))
    answers = on_ranks(2, _train, pipe, subject, schedule, folder)
    saved = _merged(answers)
    assert [path.name for path in folder.parent.iterdir()] == ["step-3"]

    model, again = cut(subject, stages_of(other, ranks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    resumed = on_ranks(ranks, _resume, again, subject, other, folder)
    assert _same(_merged(resumed), saved)
    went_on, want = (torch.stack(next(a["losses"] for a in run if a["losses"])) for run in (resumed, answers))
    torch.testing.assert_close(went_on, want, rtol=1e-12, atol=0)

    optimizer = torch.optim.AdamW(model.parameters(), 0.5)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    state: dict[str, Any] = {"model": model.state_dict(), "optim": optimizer_state}
    state_dict_loader.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optim"], options=FLAT)
    first = {other: entry.name for entry in again.program.state for other in entry.names}
    mine = {first[name]: tensor for name, tensor in model.state_dict().items()}
    for path, parameter in model.named_parameters():
        mine |= {f"{path} {key}": item for key, item in optimizer.state[parameter].items()}
    assert _same(mine, saved)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (0.01, (0.8, 0.9))


def test_a_tied_tensor_is_written_once_and_read_under_all_its_names(tmp_path: Path) -> None:
    model, pipe = cut(SUBJECTS["GPT-2, tied"], 2)
    on_ranks(2, _save_only, pipe, tmp_path / "1")
    written = sum(path.stat().st_size for path in (tmp_path / "1").iterdir())
    tensors = {"model": {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}}
    state_dict_loader.load(tensors, checkpoint_id=tmp_path / "1")
    assert all(torch.equal(tensor, tensors["model"][name]) for name, tensor in model.state_dict().items())
    index = FileSystemReader(tmp_path / "1").read_metadata().storage_data
    places = [(place.relative_path, place.offset) for key, place in index.items() if key.fqn.endswith(("wte.weight", "lm_head.weight"))]
    assert len(places) == 2
    assert len(set(places)) == 1
    assert written > sum(p.nbytes for p in model.parameters())


def _save_only(pipe: Any, *folders: Path) -> None:
    for folder in folders:
        checkpoint.save(Driver(pipe, "GPipe", 2), None, folder)


def test_a_checkpoint_of_the_unsplit_model_loads_into_stages(tmp_path: Path) -> None:
    subject = SUBJECTS["GPT-2, tied"]
    model, pipe = cut(subject, 2)
    reference = deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.5)
    for parameter in reference.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {"model": reference.state_dict(), "optim": get_optimizer_state_dict(reference, optimizer, options=FLAT)}
    state_dict_saver.save(state, checkpoint_id=tmp_path / "whole")
    want = {name: item["momentum_buffer"] for name, p in reference.named_parameters() for item in [optimizer.state[p]]}
    for answer in on_ranks(2, _load_sgd, pipe, tmp_path / "whole"):
        assert answer
        for name, (parameter, momentum) in answer.items():
            assert torch.equal(parameter, reference.get_parameter(name))
            assert torch.equal(momentum, want[name])


def _load_sgd(pipe: Any, folder: Path) -> dict[str, Any]:
    driver = Driver(pipe, "GPipe", 2)
    optimizer = torch.optim.SGD(driver.parameters(), 0.3, momentum=0.9)
    assert checkpoint.load(driver, optimizer, folder) == {}
    assert optimizer.param_groups[0]["momentum"] == 0.5
    firsts = {name: entry.name for entry in pipe.program.state for name in entry.names}
    named = [(firsts[n], p) for i in driver.stage_indices for n, p in pipe.stages[i].named_parameters()]
    return {name: (p.detach(), optimizer.state[p]["momentum_buffer"]) for name, p in named}


def test_what_does_not_fit_is_named_on_every_rank(tmp_path: Path) -> None:
    _, pipe = cut(SUBJECTS["ResNet"], 2)
    assert on_ranks(2, _misfits, pipe, tmp_path) == ["ok", "ok"]


def _misfits(pipe: Any, folder: Path) -> str:
    driver = Driver(pipe, "GPipe", 2)
    optimizer = _adam(driver.parameters())
    checkpoint.save(driver, None, folder / "1")
    with pytest.raises(StagecutError, match="is there already"):
        checkpoint.save(driver, None, folder / "1")
    with pytest.raises(StagecutError, match="no checkpoint in"):
        checkpoint.load(driver, None, folder / "2")
    with pytest.raises(StagecutError, match="no optimizer state of '"):
        checkpoint.load(driver, optimizer, folder / "1")
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1)
    with pytest.raises(StagecutError, match=r"parameter of shape \[3\] that no stage"):
        checkpoint.save(driver, foreign, folder / "3")
    last = dist.get_rank() == 1
    if last:
        pipe.stages[1].get_submodule("head").bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    with pytest.raises(StagecutError, match=r"'head.bias' has shape \[3\], that of the model \[5\]"):
        checkpoint.load(driver, None, folder / "1")
    if last:
        pipe.stages[1].get_submodule("head").bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(StagecutError, match=r"'head.bias' is torch.float64, that of the model torch.float32"):
        checkpoint.load(driver, None, folder / "1")
    return "ok"


def _save_and_die(pipe: Any, folder: Path) -> None:
    checkpoint.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    _save_only(pipe, folder)


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path: Path) -> None:
    _, pipe = cut(SUBJECTS["ResNet"], 2)
    assert checkpoint.latest(tmp_path) is None
    on_ranks(2, _save_only, pipe, tmp_path / "step-9", tmp_path / "step-10")
    with pytest.raises(RanksFailed):
        on_ranks(2, _save_and_die, pipe, tmp_path / "step-11")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-11.partial", "step-10", "step-9"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"
    on_ranks(2, _save_only, pipe, tmp_path / "step-11")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-11"
    assert not list(tmp_path.glob(".*"))


def _checkpointed(stage: nn.Module, index: int) -> nn.Module:
    """Every linear layer of a stage is wrapped."""
    for module in list(stage.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, StageModule) and child._get_name() == "Linear":
                setattr(module, name, checkpoint_wrapper(child))
    return stage


def _train_wrapped(pipe: Any, subject: Any, folder: Path) -> dict[str, Any]:
    driver = Driver(pipe, "GPipe", 2, subject.loss, wrap=_checkpointed)
    optimizer = _adam(driver.parameters())
    driver.attach(optimizer)
    _run(driver, optimizer, subject, range(1))
    checkpoint.save(driver, optimizer, folder)
    held = {name: tensor.clone() for i in driver.stage_indices for name, tensor in pipe.stages[i].state_dict().items()}
    checkpoint.load(driver, optimizer, folder)
    return {"held": held, "wrappers": sum(isinstance(m, CheckpointWrapper) for i in driver.stage_indices for m in pipe.stages[i].modules())}


def test_what_is_wrapped_is_saved_under_the_models_names(tmp_path: Path) -> None:
    model, pipe = cut(SUBJECTS["two towers"], 2)
    answers = on_ranks(2, _train_wrapped, pipe, SUBJECTS["two towers"], tmp_path / "1")
    assert sum(answer["wrappers"] for answer in answers) == 6
    state = {"model": model.state_dict()}
    state_dict_loader.load(state, checkpoint_id=tmp_path / "1")
    assert _same(state["model"], _merged(answers))


def _save_sharded(pipe: Any, folder: Path) -> str:
    mesh = init_device_mesh("cpu", (2,))
    driver = Driver(pipe, "GPipe", 1, group=dist.new_subgroups(1)[0], wrap=lambda stage, _: fully_shard(stage, mesh=mesh))
    driver.parameters()
    try:
        checkpoint.save(driver, None, folder / str(dist.get_rank()))
    except checkpoint.CheckpointError as error:
        return str(error)
    return ""


def test_what_is_sharded_over_other_pipelines_is_refused(tmp_path: Path) -> None:
    _, pipe = cut(SUBJECTS["ResNet"], 1)
    for message in on_ranks(2, _save_sharded, pipe, tmp_path):
        assert "is sharded over ranks of other pipelines" in message


class Training:
    """Two optimizers, one of them with two groups, and averages of all weights."""

    def __init__(self, pipe: Any, subject: Any, schedule: str, rate: float) -> None:
        self.driver, self.subject = Driver(pipe, schedule, 2, subject.loss), subject
        parameters = self.driver.parameters()
        wide = [p for p in parameters if p.dim() > 1 and p.shape[0] > 16]
        narrow = [p for p in parameters if p.dim() > 1 and p.shape[0] <= 16]
        rest = [p for p in parameters if p.dim() <= 1]
        groups = [{"params": wide, "lr": rate}, {"params": narrow, "lr": rate / 2}]
        self.optimizers = [torch.optim.SGD(groups, momentum=0.9), _adam([{"params": rest}])]
        self.averages = {i: AveragedModel(pipe.stages[i], use_buffers=True) for i in self.driver.stage_indices}
        for optimizer in self.optimizers:
            self.driver.attach(optimizer)

    def copies(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"ema": {name: tensor for average in self.averages.values() for name, tensor in average.module.state_dict().items()}}

    def run(self, steps: range) -> list[torch.Tensor]:
        losses = []
        for step in steps:
            torch.manual_seed(step)
            _, found = self.driver.step(**self.subject.inputs(4))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for index, average in self.averages.items():
                average.update_parameters(self.driver.pipe.stages[index])
            losses += found
        return losses

    def held(self) -> dict[str, torch.Tensor]:
        """All tensors and settings, under the first names of the model's."""
        firsts = {name: entry.name for entry in self.driver.pipe.program.state for name in entry.names}
        found = {f"average of {firsts[name]}": tensor.clone() for name, tensor in self.copies()["ema"].items()}
        names = {p: firsts[n] for i in self.driver.stage_indices for n, p in self.driver.pipe.stages[i].named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                found |= {f"{names[p]} lr": torch.tensor(group["lr"]) for p in group["params"]}
            for parameter, state in optimizer.state.items():
                found |= {f"{names[parameter]} {key}": item.clone() for key, item in state.items() if item is not None}
        return found


def _train_more(pipe: Any, subject: Any, schedule: str, folder: Path) -> dict[str, Any]:
    training = Training(pipe, subject, schedule, 0.01)
    training.run(range(3))
    checkpoint.save(training.driver, training.optimizers, folder, copies=training.copies())
    return {"held": training.held(), "losses": training.run(range(3, 5))}


def _resume_more(pipe: Any, subject: Any, schedule: str, folder: Path) -> dict[str, Any]:
    training = Training(pipe, subject, schedule, 0.7)
    for name, copies, words in (
        ("ema", {"no.such": torch.ones(1)}, "no stage of this rank has 'no.such', of which 'ema' has a copy"),
        ("optim", {}, "copies cannot be called 'optim'"),
        ("mean", dict(list(training.copies()["ema"].items())[:1]), "is not in the checkpoint"),
    ):
        with pytest.raises(StagecutError, match=words):
            checkpoint.load(training.driver, training.optimizers, folder, {name: copies})
    checkpoint.load(training.driver, training.optimizers, folder, training.copies())
    return {"held": training.held(), "losses": training.run(range(3, 5))}


def test_several_optimizers_groups_and_averages_go_into_one_checkpoint(tmp_path: Path) -> None:
    subject, folder = SUBJECTS["GPT-2, tied"], tmp_path / "step-3"
    answers = on_ranks(2, _train_more, cut(subject, 4)[1], subject, "ZBVZeroBubble", folder)
    resumed = on_ranks(3, _resume_more, cut(subject, 3)[1], subject, "GPipe", folder)
    assert _same(_merged(resumed), _merged(answers))
    went_on, want = (torch.stack(next(a["losses"] for a in run if a["losses"])) for run in (resumed, answers))
    torch.testing.assert_close(went_on, want, rtol=1e-12, atol=0)


def test_a_rank_that_trains_nothing_saves_and_loads_without_an_optimizer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    pipe = pipeline(model, (torch.randn(2, 4),), split_spec={"1": SplitPoint.BEGINNING}, check=None)
    assert on_ranks(2, _save_nothing, pipe, tmp_path / "step-1") == ["ok", "ok"]


def _save_nothing(pipe: Any, folder: Path) -> str:
    driver = Driver(pipe, "1F1B", 2, lambda output: output.square().mean())
    optimizer = _adam(driver.parameters()) if driver.parameters() else None
    driver.attach(optimizer)
    driver.step(torch.ones(4, 4))
    if optimizer is not None:
        optimizer.step()
    checkpoint.save(driver, optimizer, folder)
    checkpoint.load(driver, optimizer, folder)
    return "ok"
