"""Stages under torch's own schedule classes: gradients, scaling, what TORCH_DISTRIBUTED_DEBUG=DETAIL checks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import SCHEDULES, on_ranks, stages_of, try_all
from torch import nn
from torch.distributed.pipelining import build_stage as torch_build_stage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from stagecut import Driver, Pipe, StagecutError, pipe_split, pipeline
from stagecut.backend.schedules import V, homes

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

MICRO_BATCHES = 8


class Tied(nn.Module):
    """Four layers. The head has the weight of the embedding, and every layer the same scale."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.every = 4 // stages

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for place, layer in enumerate(self.layers):
            if place and place % self.every == 0:
                pipe_split()
            x = x + torch.tanh(layer(x)) * self.scale
        return self.head(x)  # type: ignore[no-any-return]


class Aside(nn.Module):
    """What stage 0 makes besides reaches an output that the loss does not read, so that no gradient comes back for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        early = self.first(x)
        aside = early * 2
        pipe_split()
        return self.second(early) + y, aside * 3


def _mean(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def _trained(model: nn.Module, pipe: Pipe, schedule: str, loss_fn: Any, inputs: tuple[Any, ...], target: Any) -> dict[str, torch.Tensor]:
    """The gradients of this rank's parameters after one step of a schedule of torch's, replicas summed as a user of torch sums them."""
    rank, ranks, kind = dist.get_rank(), dist.get_world_size(), get_schedule_class(schedule)
    mine = [i for i, home in enumerate(homes(pipe.num_stages, ranks, schedule in V)) if home == rank]
    pipe.zero_grad()
    stages = [pipe.build_stage(i, "cpu") for i in mine]
    made = kind(stages[0] if issubclass(kind, PipelineScheduleSingle) else stages, MICRO_BATCHES, loss_fn=loss_fn)
    made.step(*(inputs if 0 in mine else ()), target=target if pipe.num_stages - 1 in mine else None)
    for names in pipe.replicated_params:
        held = {pipe.stages[i].get_parameter(names[f"submod_pp_{i}"]) for i in mine if f"submod_pp_{i}" in names}
        total = sum((p.grad for p in held if p.grad is not None), torch.zeros(next(iter(held)).shape if held else ()))
        shapes: list[Any] = [None] * ranks
        dist.all_gather_object(shapes, total)
        total = sum((t for t in shapes if t.dim()), torch.zeros(()))
        for parameter in held:
            parameter.grad = total
    return {name: p.grad for i in mine for name, p in pipe.stages[i].named_parameters() if p.grad is not None}


def _compare(model: nn.Module, pipe: Pipe, schedules: tuple[str, ...]) -> list[str]:
    """What each schedule gets wrong in the gradients of two steps of a tied model."""
    wrong = []
    for schedule in schedules:
        for step in range(2):
            torch.manual_seed(step)
            tokens, target = torch.randint(8, (2 * MICRO_BATCHES, 3)), torch.randint(8, (2 * MICRO_BATCHES, 3))
            reference = deepcopy(model)
            reference.zero_grad()
            _mean(reference(tokens), target).backward()
            expected = dict(reference.named_parameters(remove_duplicate=False))
            found = _trained(model, pipe, schedule, _mean, (tokens,), target)
            wrong += [f"{schedule}: {name}" for name, grad in found.items() if not torch.allclose(grad, expected[name].grad, atol=1e-6)]  # type: ignore[arg-type]
    return wrong


@pytest.mark.parametrize("stages", [2, 4])
def test_a_parameter_of_several_stages_of_a_rank_is_scaled_once(stages: int) -> None:
    """With torch's default scale_grads=True. torch divides it for each stage, also before the other one has added its part."""
    torch.manual_seed(0)
    model = Tied(stages)
    pipe = pipeline(model, (torch.randint(8, (2, 3)),), check=None)
    schedules = tuple(s for s in SCHEDULES if stages_of(s, 2) == stages)
    assert on_ranks(2, _compare, model, pipe, schedules) == [[], []]


def test_the_driver_scales_a_parameter_of_several_stages_once() -> None:
    """Its loss is scaled, and not the gradients."""
    for schedule in ("LoopedBFS", "InterleavedZeroBubble", "DualPipeV"):
        assert try_all("GPT-2, tied", (schedule,), 2) == {schedule: "ok"}
    assert try_all("ALBERT", ("ZBVZeroBubble",), 2) == {"ZBVZeroBubble": "ok"}


@pytest.fixture
def detail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks check more, as torch does for who looks for a fault."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")


@pytest.mark.usefixtures("detail")
@pytest.mark.parametrize("stages", [2, 4])
def test_debug_detail_takes_what_the_stages_exchange(stages: int) -> None:
    """The first stage is given the model's arguments and receives nothing."""
    model = Tied(stages)
    pipe = pipeline(model, (torch.randint(8, (2, 3)),), check=None)
    schedules = tuple(s for s in SCHEDULES if stages_of(s, 2) == stages)
    assert on_ranks(2, _compare, model, pipe, schedules) == [[], []]


@pytest.mark.usefixtures("detail")
def test_debug_detail_takes_a_value_for_which_no_gradient_comes_back() -> None:
    """Zeros are sent for it."""
    model = Aside()
    pipe = pipeline(model, (torch.randn(2, 4), torch.randn(2, 4)), check=None)
    assert on_ranks(2, _aside, model, pipe) == ["ok", "ok"]


def _aside(model: nn.Module, pipe: Pipe) -> str:
    assert "DETAIL" in str(dist.get_debug_level())  # type: ignore[attr-defined]
    x, target = torch.randn(2 * MICRO_BATCHES, 4), torch.randn(2 * MICRO_BATCHES, 4)
    reference = deepcopy(model)
    nn.functional.mse_loss(reference(x, x)[0], target).backward()
    for schedule in ("GPipe", "1F1B"):
        for name, grad in _trained(model, pipe, schedule, lambda out, want: nn.functional.mse_loss(out[0], want), (x, x), target).items():
            torch.testing.assert_close(grad, reference.get_parameter(name).grad)
    return "ok"


# --- what torch tests of its own stages -----------------------------------------------------------------


class Deep(nn.Module):
    """Four blocks, a default argument, a skip from the first to the last one, a buffer that is read in two stages."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.register_buffer("shift", torch.randn(4))
        self.every = 4 // stages

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        start = x if y is None else x + y
        for place, block in enumerate(self.blocks):
            if place and place % self.every == 0:
                pipe_split()
            x = torch.relu(block(x)) + self.shift
        return x + start


def _schedule(pipe: Pipe, name: str, loss_fn: Any = None) -> tuple[Any, list[Any], list[int]]:
    """A schedule of torch's with this rank's stages, the stages, and their numbers."""
    kind = get_schedule_class(name)
    mine = [i for i, home in enumerate(homes(pipe.num_stages, dist.get_world_size(), name in V)) if home == dist.get_rank()]
    stages = [pipe.build_stage(i, "cpu") for i in mine]
    return kind(stages[0] if issubclass(kind, PipelineScheduleSingle) else stages, MICRO_BATCHES, loss_fn=loss_fn), stages, mine


def _returned(made: Any, mine: list[int], last: int, args: Any, kwargs: Any, how: str, **target: Any) -> Any:
    """One step or eval on this rank: the model's arguments on the first stage's, the target on the last one's."""
    given = (args, kwargs) if 0 in mine else ((), {})
    return getattr(made, how)(*given[0], **given[1], **(target if last in mine else {}))


@pytest.mark.parametrize("stages", [2, 4])
def test_steps_and_evals_take_turns_on_one_schedule(stages: int) -> None:
    """Outputs, losses and gradients are the model's in each; nothing is left in a stage behind a step."""
    torch.manual_seed(0)
    model = Deep(stages)
    pipe = pipeline(model, (torch.randn(2, 4),), {"y": torch.randn(2, 4)}, check=None)
    schedules = tuple(s for s in SCHEDULES if stages_of(s, 2) == stages)
    assert on_ranks(2, _turns, model, pipe, schedules) == ["ok", "ok"]


def _turns(model: nn.Module, pipe: Pipe, schedules: tuple[str, ...]) -> str:
    loss_fn, last = nn.MSELoss(reduction="sum"), pipe.num_stages - 1
    for name in schedules:
        made, stages, mine = _schedule(pipe, name, loss_fn)
        reference = deepcopy(model)
        pipe.zero_grad()
        for how in ("step", "step", "eval", "step"):
            x, y, target = (torch.randn(2 * MICRO_BATCHES, 4) for _ in range(3))
            losses: list[torch.Tensor] = []
            output = _returned(made, mine, last, (x,), {"y": y}, how, target=target, losses=losses)
            expected = reference(x, y=y)
            if last in mine:
                torch.testing.assert_close(output, expected)
                torch.testing.assert_close(sum(losses), loss_fn(expected, target))
            if how == "step":
                reference.zero_grad()
                (loss_fn(expected, target) / MICRO_BATCHES).backward()
                for stage in stages:
                    assert (stage.fwd_cache, stage.backward_state) == ({}, {})
                    assert not any(grad is not None for grads in stage.bwd_cache.values() for grad in grads)
                    for path, parameter in stage.submod.named_parameters():
                        torch.testing.assert_close(parameter.grad, reference.get_parameter(path).grad)
                        parameter.grad = None
        for stage in stages:
            stage.clear_runtime_states()
            assert not stage.output_chunks
    return "ok"


def test_the_driver_evaluates_under_every_schedule() -> None:
    """Before, between and behind steps."""
    for stages in (2, 4):
        model = Deep(stages)
        pipe = pipeline(model, (torch.randn(2, 4),), {"y": torch.randn(2, 4)}, check=None)
        schedules = tuple(s for s in SCHEDULES if stages_of(s, 2) == stages)
        assert on_ranks(2, _driven, model, pipe, schedules) == ["ok", "ok"]


def _driven(model: nn.Module, pipe: Pipe, schedules: tuple[str, ...]) -> str:
    for name in schedules:
        driver = Driver(pipe, name, MICRO_BATCHES, lambda out: out.square().mean())
        for how in ("eval", "step", "eval", "eval", "step"):
            x, y = torch.randn(2 * MICRO_BATCHES, 4), torch.randn(2 * MICRO_BATCHES, 4)
            output, losses = getattr(driver, how)(x, y=y)
            if driver.is_last:
                torch.testing.assert_close(output, model(x, y))
                torch.testing.assert_close(torch.stack(losses).mean(), output.square().mean())
    return "ok"


def test_forward_only_in_a_ring() -> None:
    """What the last stage returns goes into the first one again."""
    model = Deep(2).eval()
    pipe = pipeline(model, (torch.randn(2, 4),), check=None)
    assert on_ranks(2, _ring, model, pipe) == ["ok", "ok"]


def _ring(model: nn.Module, pipe: Pipe) -> str:
    from torch.distributed.pipelining import _ScheduleForwardOnly

    stage = pipe.build_stage(dist.get_rank(), "cpu")
    made = _ScheduleForwardOnly(stage, MICRO_BATCHES)
    expected = torch.randn(2 * MICRO_BATCHES, 4) / 10
    x = expected.clone()
    for _ in range(5):
        if stage.is_first:
            made.step(x)
            dist.recv(x, src=1)
        else:
            dist.send(made.step().detach(), dst=0)
        with torch.no_grad():
            expected = model(expected)
        if stage.is_first:
            torch.testing.assert_close(x, expected)
    return "ok"


# --- torch's own build_stage ---------------------------------------------------------------------------


class Chain(nn.Module):
    """Two values cross, one of them without gradient; an input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x)) + y
        shift = self.shift * 2  # type: ignore[operator]
        pipe_split()
        return self.second(x) + shift  # type: ignore[no-any-return]


def test_torch_s_own_build_stage_takes_a_stage_of_ours() -> None:
    """The stage is given as the module, `pipe.info()` as what torch asks of a pipe."""
    torch.manual_seed(0)
    model = Chain()
    pipe = pipeline(model, (torch.randn(2, 4),), {"y": torch.randn(2, 4)}, check=None)
    assert on_ranks(2, _torchs_stage, model, pipe) == ["ok", "ok"]


def _torchs_stage(model: nn.Module, pipe: Pipe) -> str:
    rank, device = dist.get_rank(), torch.device("cpu")
    x, y, target = (torch.randn(2 * MICRO_BATCHES, 4) for _ in range(3))
    reference = deepcopy(model)
    expected = reference(x, y=y)
    nn.functional.mse_loss(expected, target).backward()
    for schedule in ("GPipe", "1F1B"):
        pipe.zero_grad()
        stage = torch_build_stage(pipe.get_stage_module(rank), rank, pipe.info(), device)  # type: ignore[arg-type]
        made = get_schedule_class(schedule)(stage, MICRO_BATCHES, loss_fn=nn.functional.mse_loss)  # type: ignore[call-arg, arg-type]
        out = made.step(x, y=y) if rank == 0 else made.step(target=target)
        if rank == 1:
            torch.testing.assert_close(out, expected)
        for name, parameter in pipe.stages[rank].named_parameters():
            torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad)
    return "ok"


class Skip(Chain):
    """The input is read again behind the cut."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.relu(self.first(x))
        pipe_split()
        return self.second(z) + y  # type: ignore[no-any-return]


class Turned(Chain):
    """What crosses is a transposed view."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = (torch.relu(self.first(x)) + y).t()
        pipe_split()
        return self.second(z.t())  # type: ignore[no-any-return]


class Early(Chain):
    """The first stage makes an output."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        z = torch.relu(self.first(x)) + y
        pipe_split()
        return self.second(z), z


class Shared(Chain):
    """One layer in both stages."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.relu(self.first(x)) + y
        pipe_split()
        return self.first(z)  # type: ignore[no-any-return]


class Twice(Chain):
    """One weight meets what was received in two places, where torch's split of the backward takes the graph apart twice."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.relu(self.first(x)) + y
        pipe_split()
        return self.second(torch.relu(self.second(z)))  # type: ignore[no-any-return]


class Writing(Chain):
    """The second stage writes into what it receives."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.relu(self.first(x)) + y
        pipe_split()
        return self.second(z.mul_(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Skip, "the first stage does not take the model's inputs"),
        (Turned, "torch sends tensors of known sizes that are contiguous"),
        (Early, "the last stage does not return the model's outputs"),
        (Shared, "scales the gradient of 'first.weight' once for each stage"),
        (Twice, "its split of the backward misses weights"),
        (Writing, "is written again while torch sends or keeps it"),
    ],
)
def test_torch_s_own_build_stage_is_refused_what_it_gets_wrong(kind: type[nn.Module], why: str) -> None:
    """By name, and with what to call instead; before a rank waits for another."""
    pipe = pipeline(kind(), (torch.randn(2, 4),), {"y": torch.randn(2, 4)}, check=None)
    with pytest.raises(StagecutError, match=why) as caught:
        _ = pipe.info().graph
    assert "pipe.build_stage(" in caught.value.hint
