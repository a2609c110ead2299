"""Steps in other dtypes than those of the trace, on processes: autocast, casts after the cut, FSDP's mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cluster.matrix import SCHEDULES, on_ranks, stages_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from stagecut import Driver, Pipe, SplitPoint, pipeline
from stagecut.backend.ranks.faults import RankError
from stagecut.backend.ranks.precision import PrecisionError

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),  # a relu, of torch's own view
]
WIDTH, DEPTH, COUNT = 8, 9, 8
BF16 = torch.bfloat16


class Net(nn.Module):
    """Blocks with a norm, dropout and BatchNorm; the mean over what went in is read again at the end. With `names`, a dtype is named."""

    def __init__(self, names: bool = False, draws: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(DEPTH))
        self.batch_norm, self.dropout = nn.BatchNorm1d(WIDTH) if draws else None, nn.Dropout(0.5)
        self.last = nn.Linear(WIDTH, 5)
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean()
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        if self.batch_norm is not None:
            x = self.dropout(self.batch_norm(x))
        if self.names:
            x = torch.softmax(x, -1, dtype=torch.float32).to(self.last.weight.dtype)
        return torch.relu(self.last(x)) + mean


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.float(), target)


def around(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype) if dtype is not None else nullcontext()


def cut(stages: int, traced: torch.dtype | None = None, **options: bool) -> tuple[nn.Module, Pipe]:
    torch.manual_seed(0)
    model = Net(**options)
    at = {f"blocks.{DEPTH * i // stages}": SplitPoint.BEGINNING for i in range(1, stages)}
    with around(traced):
        return model, pipeline(model, (torch.randn(2, WIDTH),), split_spec=at, check=None)


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    seeded = torch.Generator().manual_seed(1)
    return torch.randn(2 * COUNT, WIDTH, generator=seeded).to(dtype), torch.randint(5, (2 * COUNT,), generator=seeded)


def compare(driver: Driver, model: nn.Module, dtype: torch.dtype | None, x: torch.Tensor, target: torch.Tensor, tolerance: float) -> str:
    """'', or what of a step differs from the model, which is given one micro-batch after the other."""
    with around(dtype):
        output, _ = driver.step(x, target=target)
    wanted = []
    for part, labels in zip(x.chunk(COUNT), target.chunk(COUNT), strict=True):
        with around(dtype):
            wanted.append(model(part))
            loss = loss_of(wanted[-1], labels) / COUNT
        loss.backward()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, _differs(driver, model, output, torch.cat(wanted), tolerance))
    return next(filter(None, everywhere), "")


def _differs(driver: Driver, model: nn.Module, output: torch.Tensor | None, want: torch.Tensor, tolerance: float) -> str:
    if output is not None and (output.dtype != want.dtype or not torch.allclose(output, want, rtol=tolerance, atol=tolerance)):
        return f"output is {output.dtype}, expected {want.dtype}: off by {(output - want).abs().max()}"
    parameters = dict(model.named_parameters())
    for index in driver.stage_indices:
        for name, mine in driver.pipe.stages[index].named_parameters():
            grad = parameters[name].grad
            assert mine.grad is not None
            assert grad is not None
            if mine.grad.dtype != grad.dtype or not torch.allclose(mine.grad, grad, rtol=tolerance, atol=tolerance):
                return f"gradient of '{name}' is {mine.grad.dtype}, off by {(mine.grad - grad).abs().max()}"
    return ""


# --- autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_autocast_around_the_step_the_trace_or_both_equals_one_process_under_every_schedule(ranks: int) -> None:
    counts = {stages_of(schedule, ranks) for schedule in SCHEDULES}
    subjects = {(count, traced): cut(count, traced) for count in counts for traced in (None, BF16)}
    assert set(on_ranks(ranks, _autocast_each, subjects)) == {"ok"}


def _autocast_each(subjects: dict[tuple[int, torch.dtype | None], tuple[nn.Module, Pipe]]) -> str:
    for schedule in SCHEDULES:
        for traced in (None, BF16):
            model, pipe = subjects[stages_of(schedule, dist.get_world_size()), traced]
            driver = Driver(pipe, schedule, COUNT, loss_of)
            for dtype in (BF16, None, BF16):
                model.zero_grad()
                pipe.zero_grad()
                wrong = compare(driver, model, dtype, *batch(), 1e-6)
                if wrong:
                    return f"{schedule} {traced=} {dtype=}: {wrong}"
                with around(dtype):
                    output, _ = driver.eval(batch()[0], target=batch()[1])
                    if driver.is_last and output.dtype != model(batch()[0]).dtype:
                        return f"{schedule}: eval is {output.dtype}"
    return "ok"


def test_weights_that_were_updated_are_cast_anew() -> None:
    assert on_ranks(2, _update, *cut(2)) == ["ok", "ok"]


def _update(model: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "1F1B", COUNT, loss_of)
    for _ in range(3):
        pipe.zero_grad()
        model.zero_grad()
        wrong = compare(driver, model, BF16, *batch(), 1e-6)
        if wrong:
            return wrong
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        pipe.load_state_dict(model.state_dict())
    return "ok"


def test_a_rehearsal_leaves_no_trace() -> None:
    """Buffers and random numbers are what they would be without it."""
    assert on_ranks(2, _rehearse, *cut(2, draws=True)) == ["ok", "ok"]


def _rehearse(_: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", COUNT, loss_of)
    before = deepcopy(pipe.state_dict())
    found = []
    for _ in range(2):  # the first step of the two has a rehearsal
        pipe.load_state_dict(before)
        torch.manual_seed(0)
        with around(BF16):
            output, _ = driver.step(batch()[0], target=batch()[1])
        found.append((output, deepcopy(pipe.state_dict()), torch.get_rng_state()))
    (output, state, drawn), (again, after, later) = found
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert torch.equal(drawn, later)
    assert not driver.is_last or (torch.equal(output, again) and int(state["batch_norm.num_batches_tracked"]) == COUNT)
    return "ok"


class Apart(nn.Module):
    """A part that autocast leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            return self.b(x.float())  # type: ignore[no-any-return]


def test_a_backward_runs_without_autocast_as_torch_advises() -> None:
    torch.manual_seed(0)
    model = Apart()
    with around(BF16):
        pipe = pipeline(model, (torch.randn(2, WIDTH),), split_spec={"b": SplitPoint.BEGINNING}, check=None)
    assert on_ranks(2, _backward, model, pipe) == ["ok", "ok"]


def _backward(model: nn.Module, pipe: Pipe) -> str:
    return compare(Driver(pipe, "1F1B", COUNT, loss_of), model, BF16, *batch(), 1e-6) or "ok"


# --- casts --------------------------------------------------------------------------------------------


def by_pipe(pipe: Pipe, dtype: torch.dtype) -> None:
    pipe.to(dtype)


def by_stage(pipe: Pipe, dtype: torch.dtype) -> None:
    pipe.get_stage_module(dist.get_rank()).to(dtype)


@pytest.mark.parametrize(("cast", "dtype"), [(by_pipe, BF16), (by_stage, torch.float16), (by_stage, torch.float64)])
def test_stages_that_are_cast_after_the_cut_equal_the_model_that_is(cast: Callable[[Pipe, torch.dtype], None], dtype: torch.dtype) -> None:
    assert on_ranks(2, _cast, *cut(2), cast, dtype) == ["ok", "ok"]


def _cast(model: nn.Module, pipe: Pipe, cast: Callable[[Pipe, torch.dtype], None], dtype: torch.dtype) -> str:
    driver = Driver(pipe, "1F1B", COUNT, loss_of)
    wrong = compare(driver, model, None, *batch(), 1e-6)
    cast(pipe, dtype)
    pipe.zero_grad()
    model.zero_grad()
    return wrong or compare(driver, model.to(dtype), None, *batch(dtype), {BF16: 2e-2, torch.float16: 1e-3}.get(dtype, 1e-9)) or "ok"


# --- FSDP ---------------------------------------------------------------------------------------------

POLICIES = (
    MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32),
    MixedPrecisionPolicy(param_dtype=BF16, output_dtype=torch.float32),
    MixedPrecisionPolicy(reduce_dtype=torch.float32),
)


def shard(module: nn.Module, mesh: Any, policy: MixedPrecisionPolicy, blocks: bool) -> nn.Module:
    if blocks:
        inner = replace(policy, output_dtype=None)
        for block in module.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh, mp_policy=inner)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_mixed_precision_of_fsdp_equals_that_around_the_model(schedule: str) -> None:
    assert set(on_ranks(4, _shard_each, [cut(stages_of(schedule, 2)) for _ in range(2 * len(POLICIES))], schedule)) == {"ok"}


def _shard_each(subjects: list[tuple[nn.Module, Pipe]], schedule: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    for number, (model, pipe) in enumerate(subjects):
        policy, blocks = POLICIES[number // 2], bool(number % 2)
        for part in pipe.stages:
            if not hasattr(part, "blocks"):
                return "a stage has no blocks"
        driver = Driver(
            pipe,
            schedule,
            COUNT,
            loss_of,
            group=mesh.get_group("pipe"),
            wrap=lambda stage, index, policy=policy, blocks=blocks: shard(stage, mesh["data"], policy, blocks),  # type: ignore[misc]
        )
        driver.step(*batch()[:1], target=batch()[1])
        shard(model, mesh["data"], policy, blocks)
        for part, labels in zip(batch()[0].chunk(COUNT), batch()[1].chunk(COUNT), strict=True):
            (loss_of(model(part), labels) / COUNT).backward()
        norm = driver.clip_grad_norm_(0.1)
        want = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if not torch.allclose(norm, want.full_tensor(), rtol=2e-2):  # type: ignore[attr-defined]
            return f"{policy} {blocks=}: norm {norm}, expected {want}"
        parameters = dict(model.named_parameters())
        for index in driver.stage_indices:
            for name, mine in pipe.stages[index].named_parameters():
                if not torch.allclose(mine.grad.full_tensor(), parameters[name].grad.full_tensor(), atol=2e-3):  # type: ignore[union-attr]
                    return f"{policy} {blocks=}: gradient of '{name}'"
    return "ok"


# --- refused ------------------------------------------------------------------------------------------


def test_a_named_dtype_is_refused_before_the_first_step_and_the_remedies_work() -> None:
    subjects = [cut(2, names=True), cut(2, BF16, names=True)]
    torch.manual_seed(0)
    model = Net(names=True).to(BF16)
    cast = model, pipeline(model, (batch(BF16)[0][:2],), split_spec={"blocks.4": SplitPoint.BEGINNING}, check=None)
    assert on_ranks(2, _refuse, *subjects, cast) == ["ok", "ok"]


def _refuse(plain: tuple[nn.Module, Pipe], traced: tuple[nn.Module, Pipe], cast: tuple[nn.Module, Pipe]) -> str:
    def refused(pipe: Pipe, words: str, dtype: torch.dtype | None, x: torch.Tensor) -> None:
        with around(dtype), pytest.raises(PrecisionError, match=words) as raised:
            Driver(pipe, "1F1B", COUNT, loss_of).step(x, target=batch()[1])
        assert "test_precision.py:" in str(raised.value)
        dist.barrier()

    kept = "but a stage keeps torch.float32 where the model may mean the dtype of a tensor"
    refused(plain[1], f"traced without autocast, and a step runs under autocast to torch.bfloat16, {kept}", BF16, batch()[0])
    refused(traced[1], "traced under autocast to torch.bfloat16, and a step runs without autocast, but", None, batch()[0])
    wrong = compare(Driver(traced[1], "1F1B", COUNT, loss_of), traced[0], BF16, *batch(), 1e-6)
    plain[1].to(BF16)
    refused(plain[1], rf"'\w+.*' is torch.bfloat16, and was traced as torch.float32, {kept}", None, batch(BF16)[0])
    return wrong or compare(Driver(cast[1], "1F1B", COUNT, loss_of), cast[0], None, *batch(BF16), 2e-2) or "ok"


def test_ranks_that_step_under_different_autocasts_are_told_so() -> None:
    assert on_ranks(2, _differ, *cut(2)) == ["ok", "ok"]


def _differ(_: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "1F1B", COUNT, loss_of)
    driver.step(batch()[0], target=batch()[1])
    with around(BF16 if dist.get_rank() else None), pytest.raises(PrecisionError, match="rank 0 steps without autocast, and rank 1 under"):
        driver.step(batch()[0], target=batch()[1])
    driver.step(batch()[0], target=batch()[1])
    return "ok"


def test_a_part_that_cannot_run_in_the_new_dtype_is_named() -> None:
    """One stage is cast, and takes what the other has in float32."""
    with pytest.raises(Exception, match="stage 1 does not run in other dtypes than it was traced in"):
        on_ranks(2, _half_cast, *cut(2))


def _half_cast(_: nn.Module, pipe: Pipe) -> str:
    if dist.get_rank() == 1:
        pipe.stages[1].to(BF16)
    try:
        Driver(pipe, "1F1B", COUNT, loss_of).step(batch()[0], target=batch()[1])
    except RankError as error:
        raise RuntimeError(str(error)) from None
    return "ok"
