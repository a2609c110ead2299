"""What torch wraps around modules goes around stages: FSDP, DDP, checkpointing, torch.compile, tensor parallelism.

Each trains on processes of gloo beside the unsplit model; gradients and weights must be the same. The embedding is the head,
and the first block is the last, so that replicas of one parameter meet under every wrapper.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cluster.matrix import on_ranks, stages_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from stagecut import Driver, Pipe, SplitPoint, StagecutError, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo looks at its inputs
]
Wrap = Callable[[nn.Module, int], nn.Module]
WIDTH, HEADS, DEPTH, VOCABULARY = 8, 2, 5, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if shared:
            self.blocks[-1] = self.blocks[0]
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def cut(stages: int, shared: bool = True, **options: Any) -> tuple[nn.Module, Pipe]:
    torch.manual_seed(0)
    model = Net(shared)
    at = {f"blocks.{DEPTH * i // stages}": SplitPoint.BEGINNING for i in range(1, stages)}
    return model, pipeline(model, (torch.zeros(2, 5, dtype=torch.long),), split_spec=at, check=None, **options)


def blocks(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(stage.get_submodule("blocks").named_children())


def plain(mesh: DeviceMesh) -> Wrap:
    return lambda stage, index: stage


def shard_blocks(mesh: DeviceMesh) -> Wrap:
    def wrap(stage: nn.Module, index: int) -> nn.Module:
        for _, block in blocks(stage):
            fully_shard(block, mesh=mesh["data"])
        return fully_shard(stage, mesh=mesh["data"])

    return wrap


def shard_stages(mesh: DeviceMesh) -> Wrap:
    return lambda stage, index: fully_shard(stage, mesh=mesh["data"])


def replicate(mesh: DeviceMesh) -> Wrap:
    return lambda stage, index: DistributedDataParallel(stage, process_group=mesh.get_group("data"))


def checkpoint(mesh: DeviceMesh) -> Wrap:
    def wrap(stage: nn.Module, index: int) -> nn.Module:
        for name, block in blocks(stage):
            setattr(stage.get_submodule("blocks"), name, checkpoint_wrapper(block))
        return stage

    return wrap


def compile_blocks(mesh: DeviceMesh) -> Wrap:
    def wrap(stage: nn.Module, index: int) -> nn.Module:
        for _, block in blocks(stage):
            block.compile(backend="aot_eager")
        return stage

    return wrap


def compile_stages(mesh: DeviceMesh) -> Wrap:
    def wrap(stage: nn.Module, index: int) -> nn.Module:
        stage.compile(backend="aot_eager")
        return stage

    return wrap


def split_layers(mesh: DeviceMesh) -> Wrap:
    def wrap(stage: nn.Module, index: int) -> nn.Module:
        columns = {f"blocks.{name}.{layer}": ColwiseParallel() for name, _ in blocks(stage) for layer in ("q", "k", "v", "up")}
        rows = {f"blocks.{name}.{layer}": RowwiseParallel() for name, _ in blocks(stage) for layer in ("o", "down")}
        return parallelize_module(stage, mesh["data"], {**columns, **rows})

    return wrap


@pytest.mark.parametrize(
    ("how", "schedule"),
    [
        (plain, "1F1B"),
        (shard_blocks, "1F1B"),
        (shard_blocks, "ZBVZeroBubble"),
        (shard_stages, "Interleaved1F1B"),
        (replicate, "GPipe"),
        (replicate, "ZBVZeroBubble"),
        (checkpoint, "1F1B"),
        (checkpoint, "ZBVZeroBubble"),
        (compile_blocks, "Interleaved1F1B"),
        (compile_stages, "1F1B"),
        (compile_stages, "ZBVZeroBubble"),
    ],
)
def test_training_equals_the_unsplit_model(how: Callable[[DeviceMesh], Wrap], schedule: str) -> None:
    data = 2 if how in (shard_blocks, shard_stages, replicate) else 1
    model, pipe = cut(stages_of(schedule, 2))
    assert set(on_ranks(2 * data, _train, model, pipe, how, schedule, data, True)) == {"ok"}


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_ddp_averages_what_graphs_compute(schedule: str) -> None:
    model, pipe = cut(stages_of(schedule, 2))
    assert set(on_ranks(4, _train, model, pipe, replicate, schedule, 2, True, "graph")) == {"ok"}


class TwoResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.first(x))
        return self.one(x), self.other(x)


def test_ddp_around_graphs_says_what_it_cannot_do() -> None:
    pipe = pipeline(TwoResults(), (torch.zeros(2, 4),), split_spec={"one": SplitPoint.BEGINNING}, check=None)
    for rank, (error, notes) in enumerate(on_ranks(4, _unused_result, pipe)):
        if rank % 2:
            assert "(stage 1) failed: the last micro-batch has no gradient for some weights" in error
        assert all("DistributedDataParallel looks for the weights that forward uses" in note for note in notes)
        assert len(notes) == 1


def _unused_result(pipe: Pipe) -> tuple[str, tuple[str, ...]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    groups = {"group": mesh.get_group("pipe"), "backward": "graph"}
    x, loss_fn = torch.ones(4, 4), lambda results: results[0].square().mean()

    def looks(stage: nn.Module, index: int) -> nn.Module:
        return DistributedDataParallel(stage, process_group=mesh.get_group("data"), find_unused_parameters=True)

    driver = Driver(deepcopy(pipe), "1F1B", 2, loss_fn, wrap=looks, **groups)
    driver.step(x)
    notes = driver.notes
    with pytest.raises(StagecutError) as raised:
        Driver(pipe, "1F1B", 2, loss_fn, wrap=replicate(mesh), **groups).step(x)
    return raised.value.what, notes


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_tensor_parallel_blocks_equal_the_unsplit_model(schedule: str) -> None:
    """The blocks are kept whole: their layers are the user's own, and their code takes fewer heads."""
    model, pipe = cut(stages_of(schedule, 2), False, leaf_modules=[f"blocks.{i}" for i in range(DEPTH)])
    assert set(on_ranks(4, _train, model, pipe, split_layers, schedule, 2, False)) == {"ok"}


def _train(
    model: nn.Module,
    pipe: Pipe,
    how: Callable[[DeviceMesh], Wrap],
    schedule: str,
    data: int,
    own_batch: bool,
    backward: str = "autograd",
) -> str:
    """'ok', or the first thing that differs. With `own_batch`, each replica of the pipeline trains on a part of the batch."""
    mesh = init_device_mesh("cpu", (data, dist.get_world_size() // data), mesh_dim_names=("data", "pipe"))
    reference = deepcopy(model)
    driver = Driver(pipe, schedule, 4, loss_of, group=mesh.get_group("pipe"), wrap=how(mesh), backward=backward)
    mine, theirs = (torch.optim.SGD(parameters, 0.1) for parameters in (driver.parameters(), reference.parameters()))
    driver.attach(mine)
    for step in range(2):
        torch.manual_seed(step)
        place, parts = (mesh.get_local_rank("data"), data) if own_batch else (0, 1)
        tokens, target = torch.randint(VOCABULARY, (2, 8 * parts, 5))
        driver.step(tokens.chunk(parts)[place], target=target.chunk(parts)[place])
        loss_of(reference(tokens), target).backward()
        norm, want_norm = driver.clip_grad_norm_(0.5), nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        if not torch.allclose(norm, want_norm, rtol=1e-5):
            return f"step {step}: norm {norm}, expected {want_norm}"
        mine.step()
        theirs.step()
        for index in driver.stage_indices:
            for name, parameter in pipe.stages[index].named_parameters():
                want = reference.get_parameter(clean_tensor_name(name))
                assert want.grad is not None
                if parameter.grad is None or not _near(parameter.grad, want.grad) or not _near(parameter, want):
                    return f"step {step}, stage {index}: '{name}'"
        mine.zero_grad()
        theirs.zero_grad()
    return "; ".join(driver.notes) if backward == "graph" and driver.notes else "ok"


def _near(found: torch.Tensor, want: torch.Tensor) -> bool:
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    return torch.allclose(whole, want, atol=1e-6)


def test_ddp_goes_around_a_stage_of_torch_s_own_schedules() -> None:
    model, pipe = cut(2, False)
    assert on_ranks(4, _own_schedule, model, pipe) == ["ok"] * 4


def _own_schedule(model: nn.Module, pipe: Pipe) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    stage = pipe.build_stage(mesh.get_local_rank("pipe"), "cpu", mesh.get_group("pipe"))
    stage.submod = DistributedDataParallel(stage.submod, process_group=mesh.get_group("data"))
    tokens, target = torch.randint(VOCABULARY, (2, 16, 5), generator=torch.Generator().manual_seed(0))
    place = mesh.get_local_rank("data")
    schedule = Schedule1F1B(stage, 4, loss_fn=loss_of)
    if stage.is_first:
        schedule.step(tokens.chunk(2)[place])
    else:
        schedule.step(target=target.chunk(2)[place])
    reference = deepcopy(model)
    loss_of(reference(tokens), target).backward()
    wrong = [name for name, p in stage.submod.module.named_parameters() if not _near(p.grad, reference.get_parameter(name).grad)]  # type: ignore[arg-type]
    return f"differs: {wrong}" if wrong else "ok"


def test_identical_blocks_compile_once() -> None:
    """One graph for all blocks of a stage, and none more for those of the next."""
    _, pipe = cut(2, False)
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    for stage in pipe.stages:
        for _, block in blocks(stage):
            block.compile(backend=count)
    pipe(torch.zeros(2, 5, dtype=torch.long))
    assert len(graphs) == 1


def test_as_many_different_modules_compile_as_there_are() -> None:
    """torch.compile takes only so many variants of one piece of code (eight), so different modules must not share one."""

    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.depth, self.linear = depth, nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.depth):
                x = torch.relu(x)
            return self.linear(x)  # type: ignore[no-any-return]

    pipe = pipeline(nn.Sequential(*(Deep(depth) for depth in range(10))), (torch.randn(2, 4),))
    compiled = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    for depth in range(10):
        pipe.stages[0].get_submodule(str(depth)).compile(backend=count)
    pipe(torch.randn(2, 4))
    assert len(compiled) == 10
