"""Stages on torch.distributed, in processes on gloo. `make distributed` runs the whole matrix."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks, stages_of, try_all
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.export import Dim

from stagecut import Driver, InputError, StagecutError, build_stage, pipe_split, pipeline
from stagecut.backend.ranks.agree import agree_on_program
from stagecut.backend.ranks.placement import placement
from stagecut.backend.ranks.posts import shares_a_stream
from stagecut.backend.ranks.stage import MismatchError
from stagecut.ir.text.printer import _ON_DEVICE


@pytest.mark.parametrize(
    ("name", "schedules"),
    [
        ("UNet", ("1F1B",)),
        ("GPT-2, tied", ("Interleaved1F1B", "ZBVZeroBubble")),
        ("ALBERT", ("InterleavedZeroBubble",)),
        ("two towers", ("GPipe", "LoopedBFS", "DualPipeV")),
    ],
)
def test_training_on_two_ranks_equals_the_unsplit_model(name: str, schedules: tuple[str, ...]) -> None:
    assert try_all(name, schedules, 2) == dict.fromkeys(schedules, "ok")


class Seen:
    """An object of no class that pytrees know."""

    def __init__(self, early: torch.Tensor) -> None:
        self.early, self.dtype = [early], early.dtype


class Net(nn.Module):
    """A skip, a keyword argument that both stages read, an output of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        x = torch.relu(self.first(x)) + y
        early = x * 2
        pipe_split()
        return {"late": self.second(x) * y, "early": early, "same": [early, 5, None], "seen": Seen(early + 1)}


class Plain(Net):
    """The same, of one output."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = torch.relu(self.first(x)) + y
        pipe_split()
        return self.second(x) * y  # type: ignore[no-any-return]


def test_the_stages_run_on_torch_s_own_schedules() -> None:
    """Rank 0 is given the model's arguments and hands on what stage 1 reads of them."""
    torch.manual_seed(0)
    model = Plain()
    pipe = pipeline(model, (torch.randn(2, 4),), {"y": torch.randn(2, 4)}, check=None)
    assert on_ranks(2, _own_schedules, model, pipe) == ["ok", "ok"]


def _own_schedules(model: nn.Module, pipe: Any) -> str:
    rank, x, y, target = dist.get_rank(), torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 4)
    loss = nn.MSELoss(reduction="sum")
    for schedule_class in (ScheduleGPipe, Schedule1F1B):
        reference = deepcopy(model)
        stage = build_stage(pipe.get_stage_module(rank), rank, pipe.info(), "cpu")
        assert set(stage.submod.state_dict()) <= set(model.state_dict())
        schedule = schedule_class(stage, 4, loss_fn=loss, scale_grads=False)
        pipe.get_stage_module(rank).zero_grad()
        losses: list[torch.Tensor] = []
        output = schedule.step(x, y=y) if rank == 0 else schedule.step(target=target, losses=losses)
        expected = reference(x, y)
        loss(expected, target).backward()
        if rank == 1:
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(torch.stack(losses).sum(), loss(expected, target))
        for name, parameter in pipe.get_stage_module(rank).named_parameters():
            torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad)
    return "ok"


class Turned(Net):
    """Complex numbers and a transposed tensor come out of the last stage."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        x = torch.relu(self.first(x)) + y
        pipe_split()
        late = self.second(x)
        return {"complex": torch.complex(late, x), "transposed": late.t().reshape(4, -1).t()}


def test_what_the_last_stage_returns_is_what_the_model_returns() -> None:
    torch.manual_seed(0)
    model, inputs = Turned(), (torch.randn(4, 4), torch.randn(4, 4))
    pipe = pipeline(model, tuple(x[:2] for x in inputs), check=None)
    assert on_ranks(2, _returned, model, pipe, inputs) == ["ok", "ok"]


def _returned(model: nn.Module, pipe: Any, inputs: tuple[torch.Tensor, ...]) -> str:
    driver = Driver(pipe, "1F1B", 2, lambda output, target: (output["complex"].abs() - target).square().mean())
    output, _ = driver.step(*inputs, target=torch.ones(4, 4))
    expected = [model(*(x[i : i + 2] for x in inputs)) for i in (0, 2)]
    for name in expected[0] if driver.is_last else ():
        torch.testing.assert_close(output[name], torch.cat([part[name] for part in expected]).detach())
    sum((part["complex"].abs() - 1).square().mean() / 2 for part in expected).backward()
    for name, parameter in pipe.get_stage_module(dist.get_rank()).named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)
    return "ok"


def test_a_boundary_of_another_type_is_noticed_before_it_is_sent() -> None:
    pipe = pipeline(Plain(), (torch.randn(2, 4),), {"y": torch.randn(2, 4)}, check=None)
    assert on_ranks(2, _wrong_types, pipe) == ["ok", "ok"]


def _wrong_types(pipe: Any) -> str:
    if dist.get_rank() == 0:
        stage = pipe.build_stage(0, "cpu")
        stage.has_backward = False
        stage._prepare_forward_infra = None
        x = torch.randn(2, 4)
        with pytest.raises(MismatchError, match="dtype mismatch"):
            stage.forward_one_chunk(0, (x.int(),), {"y": x})
        with pytest.raises(MismatchError, match="shape mismatch"):
            stage.forward_one_chunk(0, (x[:1],), {"y": x})
        hook = stage.submod.register_forward_hook(lambda module, given, made: made.flatten())
        with pytest.raises(MismatchError, match="shape mismatch"):
            stage.forward_one_chunk(0, (x,), {"y": x})
        hook.remove()
        stage.submod.register_forward_hook(lambda module, given, made: made.bfloat16())
        with pytest.raises(MismatchError, match="dtype mismatch"):
            stage.forward_one_chunk(0, (x,), {"y": x})
    return "ok"


@pytest.mark.parametrize(("schedule", "alone"), [("Interleaved1F1B", True), ("ZBVZeroBubble", True), ("1F1B", False)])
def test_messages_are_begun_one_by_one_under_schedules_with_several_stages_a_rank(schedule: str, alone: bool) -> None:
    """A batch goes over one stream of the device with all others, on which a message that is late holds up the rest."""
    for batched, equal, waiting in on_ranks(3, _train_and_count_batches, schedule):
        assert (batched == 0) is alone
        assert equal
        assert not waiting


@pytest.mark.parametrize(("bound", "device", "shares"), [("cuda:0", "cuda", True), (None, "cuda", False), ("cuda:0", "cpu", False)])
def test_a_group_that_is_bound_to_a_device_has_one_stream(bound: str | None, device: str, shares: bool) -> None:
    """It has one communicator for all messages, whatever is begun by itself."""
    group: Any = SimpleNamespace(bound_device_id=bound)
    assert shares_a_stream(group, torch.device(device)) is shares


def _train_and_count_batches(schedule: str) -> tuple[int, bool, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    x = torch.randn(24, 8)
    driver = Driver(pipeline(model, (x[:4],), stages=3 if schedule == "1F1B" else 6), schedule, 6, loss_fn=_square)
    driver.step(x)
    begun: list[Any] = []
    batch = dist.batch_isend_irecv
    try:
        dist.batch_isend_irecv = lambda operations: begun.append(operations) or batch(operations)
        _, losses = driver.step(x)
    finally:
        dist.batch_isend_irecv = batch
    (_, stages), *_ = driver._schedules.values()
    waiting = [posts for stage in stages if (posts := vars(stage).get("posts")) and (posts._arriving or posts._leaving)]
    return len(begun), torch.allclose(losses.batch, _square(model(x)).detach()), waiting


def _square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def test_the_driver_gives_the_model_s_own_output_and_takes_other_sizes() -> None:
    model = Net().eval()
    sizes = {"x": {0: Dim("batch", min=1, max=64)}, "y": {0: Dim("batch", min=1, max=64)}}
    pipe = pipeline(model, (torch.randn(2, 4), torch.randn(2, 4)), dynamic_shapes=sizes, check=None)
    assert on_ranks(2, _infer, model, pipe) == ["ok", "ok"]


def _infer(model: nn.Module, pipe: Any) -> str:
    driver = Driver(pipe, "GPipe", 2)
    for batch in (4, 6, 4, 2):
        x, y = torch.randn(batch, 4), torch.randn(batch, 4)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output, losses = driver.eval(x, y=y)
            if driver.is_last:
                expected = model(x, y)
                assert list(output) == list(expected)
                torch.testing.assert_close(output["late"], expected["late"])
                torch.testing.assert_close(output["same"][0], expected["early"])
                assert output["same"][1:] == [5, None]
                assert type(output["seen"]) is Seen
                torch.testing.assert_close(output["seen"].early[0], expected["early"] + 1)
                assert output["seen"].dtype is torch.float32
            assert not losses
    silent = Driver(pipe, "GPipe", 2, lambda out: out["late"].sum(), return_outputs=False)
    output, losses = silent.step(torch.randn(4, 4), y=torch.randn(4, 4))
    assert output is None
    assert len(losses) == 2
    return "ok"


def test_ranks_with_other_programs_are_told_so_before_the_first_step() -> None:
    pipes = [pipeline(Plain(), (torch.randn(2, 4), torch.randn(2, n)), check=None) for n in (4, 1)]
    assert on_ranks(2, _disagree, pipes) == ["ok", "ok"]


def _disagree(pipes: list[Any]) -> str:
    with pytest.raises(StagecutError, match="do not run the same program: rank 1"):
        Driver(pipes[dist.get_rank()], "GPipe", 2)
    return "ok"


def test_one_micro_batch_of_several_is_told_how_many_there_are() -> None:
    pipe = pipeline(Plain(), (torch.randn(2, 4), torch.randn(2, 4)))
    assert on_ranks(2, _several, pipe) == ["ok", "ok"]


def _several(pipe: Any) -> str:
    batch = torch.randn(8, 4)
    with pytest.raises(InputError, match=r"1 micro-batches of .*have 2 along dim 0") as caught:
        Driver(pipe, "GPipe", 1).eval(batch, batch)
    assert caught.value.hint.startswith("n_microbatches=4, or ")
    return "ok"


def test_each_rank_may_trace_on_a_device_of_its_own() -> None:
    pipes = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            pipes.append(pipeline(Plain(), (torch.randn(2, 4), torch.randn(2, 4)), check=None))
    assert pipes[0].ir() != pipes[1].ir()
    assert on_ranks(2, _agree_on, pipes) == ["ok", "ok"]


def test_the_device_is_no_part_of_the_program() -> None:
    """Types with and without strides, and device literals."""
    texts = [f'%a : f32[2,3]{{1,2}}@{d} grad, %b : f32[2]@{d}, device("{d}"), @w' for d in ("cuda:0", "cuda:1", "cpu")]
    assert {_ON_DEVICE.sub("", text) for text in texts} == {"%a : f32[2,3]{1,2} grad, %b : f32[2], , @w"}


def _agree_on(pipes: list[Any]) -> str:
    agree_on_program(pipes[dist.get_rank()].program, {}, None)
    return "ok"


@pytest.mark.parametrize(
    ("schedule", "stages", "ranks", "expected"),
    [("1F1B", 2, 2, [0, 1]), ("Interleaved1F1B", 4, 2, [0, 1, 0, 1]), ("ZBVZeroBubble", 4, 2, [0, 1, 1, 0])],
)
def test_placement(schedule: str, stages: int, ranks: int, expected: list[int]) -> None:
    from torch.distributed.pipelining.schedules import get_schedule_class

    assert placement(stages, ranks, get_schedule_class(schedule)) == expected
    assert stages_of(schedule, ranks) == stages
    with pytest.raises(StagecutError, match="stages"):
        placement(stages + 1, ranks, get_schedule_class(schedule))
