"""Stages on meta get the values of the unsplit model from its own code, whatever the cut and however many ranks there are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from cluster.models import _gpt, _llama, _t5
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import ScheduleGPipe
from zoo.cuts import equal_ops

from stagecut import Driver, InputError, MaterializeError, Pipe, SplitPoint, StagecutError, pipe_split, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

WIDTH = 8


class Block(nn.Module):
    """A buffer that no checkpoint holds, set by the block's own code, and draws of several kinds."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.register_buffer("scale", torch.empty(WIDTH), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.orthogonal_(self.gate)
            self.gate[:, :3].normal_()
            self.gate.add_(torch.randn(WIDTH, device=self.gate.device) * 0.1)
            self.scale.copy_(torch.linspace(0.5, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x)) @ self.gate * self.scale


class Net(nn.Module):
    """Its head has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH, padding_idx=0)
        self.first, self.statistics, self.second = Block(), nn.BatchNorm1d(WIDTH), Block()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embedding(tokens))
        pipe_split()
        x = self.second(self.statistics(x.transpose(1, 2)).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        pipe_split()
        return self.head(x)  # type: ignore[no-any-return]


TOKENS = torch.zeros(2, 6, dtype=torch.long, device="meta")


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not persistent and tied names too."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def twin(pipe: Pipe) -> Pipe:
    """A pipe of the same model that shares nothing with this one."""
    copied = deepcopy(pipe)
    copied._model = pipe._model
    return copied


def one_by_one(model: nn.Module, seed: int, **options: Any) -> dict[str, torch.Tensor]:
    """The state of all stages, each made real in a pipe of its own, as on ranks of their own."""
    held: dict[str, torch.Tensor] = {}
    traced = pipeline(model, check=None, **options)
    for index in range(traced.num_stages):
        pipe = twin(traced)
        pipe.initialize(index, seed=seed)
        mine = state(pipe.stages[index])
        assert all(torch.equal(tensor, held[name]) for name, tensor in mine.items() if name in held)
        assert {tensor.is_meta for stage in pipe.stages if stage.index != index for tensor in stage.buffers()} <= {True}
        held |= mine
    return held


def test_values_are_those_of_a_model_that_was_built_on_the_cpu() -> None:
    """Bit for bit, with all kinds of draws, ties, statistics and buffers. The random state stays as it was."""
    torch.manual_seed(7)
    built = state(Net())
    before = torch.get_rng_state()
    found = one_by_one(on_meta(Net), 7, mb_args=(TOKENS,))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.keys() == built.keys()
    assert [name for name in built if not torch.equal(found[name], built[name])] == []
    other = one_by_one(on_meta(Net), 8, mb_args=(TOKENS,))
    assert not torch.equal(other["first.gate"], found["first.gate"])


@pytest.mark.parametrize(("make", "stages"), [(_llama, 3), (_gpt, 2), (_t5, 3)])
def test_models_of_transformers_have_the_values_of_their_own_code(make: Callable[[], Any], stages: int) -> None:
    """Those of the unsplit model, bit for bit: weights, ties, rotary buffers."""
    inputs: dict[str, Any] = {"input_ids": TOKENS, "use_cache": False}
    if make is _t5:
        inputs["decoder_input_ids"] = TOKENS
    model: Any = on_meta(make)
    found = one_by_one(model, 3, mb_args=(), mb_kwargs=inputs, split_policy=equal_ops(stages))
    alone = deepcopy(model).to_empty(device="cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        alone.apply(alone._init_weights)
    alone.tie_weights()
    expected = state(alone)
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    assert {*found, "encoder.embed_tokens.weight"} >= {*expected}
    buffers = dict(make().named_buffers())  # made on the CPU; nothing of them is drawn
    assert [name for name, tensor in buffers.items() if not torch.equal(found[name], tensor)] == []


def test_ranks_have_the_values_of_one_process_sharded_or_not() -> None:
    model = on_meta(Net)
    pipe = pipeline(model, (TOKENS,), check=None)
    pipe.initialize(range(3), seed=5)
    expected = {name: tensor.detach() for name, tensor in state(pipe.module()).items()}
    for held in on_ranks(3, _initialise_own, model):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
    assert on_ranks(2, _initialise_shards, model, expected) == [[], []]


def _initialise_own(model: nn.Module) -> dict[str, torch.Tensor]:
    pipe = pipeline(model, (TOKENS,), check=None)
    pipe.initialize(dist.get_rank(), seed=5)
    return {name: tensor.detach() for name, tensor in state(pipe.stages[dist.get_rank()]).items()}


def _initialise_shards(model: nn.Module, expected: dict[str, torch.Tensor]) -> list[str]:
    """The tensors of stages, sharded on meta, that are not those of one process; and their output, run by a driver."""
    torch.manual_seed(dist.get_rank())  # the seed of `initialize` counts
    pipe = pipeline(model, (TOKENS,), check=None)
    wrong = []
    for index in range(3):
        stage: Any = fully_shard(pipe.stages[index], mesh=init_device_mesh("cpu", (2,)))
        pipe.initialize(index, seed=5)
        full = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in state(stage).items()}
        wrong += [name for name, tensor in full.items() if not torch.equal(tensor, expected[name])]
        wrong += [f"'{name}' is whole" for name, tensor in stage.named_parameters() if tensor.to_local().shape == tensor.shape]
    alone = Net().eval()
    alone.load_state_dict({name: expected[name] for name in alone.state_dict()})
    tokens = torch.arange(24).view(4, 6) % 12
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    output, _ = Driver(pipe, "Interleaved1F1B", 2, group=group, eval_mode=True).eval(tokens)
    return wrong + ["the output"] * (not torch.allclose(output, alone(tokens), atol=1e-5))


def test_a_stage_that_was_trained_starts_anew_in_its_own_tensors() -> None:
    model = on_meta(Net)
    pipe = pipeline(model, (TOKENS,), check=None)
    pipe.initialize([0, 1, 2])
    parameter, fresh = pipe.stages[0].get_parameter("first.gate"), deepcopy(pipe.state_dict())
    assert pipe.stages[0].get_parameter("embedding.weight") is pipe.stages[2].get_parameter("head.weight")
    with torch.no_grad():
        for tensor in state(pipe.module()).values():
            tensor.add_(1)
    pipe.initialize([0, 1, 2])
    assert pipe.stages[0].get_parameter("first.gate") is parameter
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in pipe.state_dict().items())


class Bare(nn.Module):
    """A norm as people write it, and nothing that sets its weight but `__init__`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        pipe_split()
        return x * self.weight + self.bias


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Bare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


def test_a_tensor_that_no_code_sets_is_named_with_the_class_of_its_module() -> None:
    pipe = pipeline(on_meta(Holder), (torch.empty(2, WIDTH, device="meta"),), check=None)
    pipe.initialize(0)
    words = r"(?s)'norm.weight' was found, nor 1 more.*module 'norm', a Bare.*give Bare a reset_parameters\(\)"
    with pytest.raises(MaterializeError, match=words):
        pipe.initialize(1)
    assert all(parameter.is_meta for parameter in pipe.stages[1].parameters())


def test_code_that_fails_is_named_with_its_module() -> None:
    class Failing(Holder):
        def reset_parameters(self) -> None:
            raise ValueError("no gain is known")

    pipe = pipeline(on_meta(Failing), (torch.empty(2, WIDTH, device="meta"),), check=None)
    with pytest.raises(MaterializeError, match=r"the initialisation of '', a Failing, fails: no gain is known"):
        pipe.initialize(1)


class Reading(Holder):
    """Its code reads a weight of another module, and puts a new tensor in the place of one."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.norm.weight.fill_(self.norm.linear.weight.sum().item())
        self.norm.bias = nn.Parameter(torch.rand(WIDTH))


def test_code_that_reads_other_modules_is_right_or_refused() -> None:
    """It is right where the tensors are initialised together; elsewhere the values that it reads are gone."""
    torch.manual_seed(2)
    alone = Reading()
    alone.reset_parameters()
    pipe = pipeline(on_meta(Reading), (torch.empty(2, WIDTH, device="meta"),), check=None)
    with pytest.raises(
        MaterializeError, match=r"reads 'norm\.linear\.weight', of another stage, whose values are not kept(?s:.)*in one call"
    ):
        pipe.initialize(1, seed=2)
    pipe.initialize([0, 1], seed=2)
    assert all(torch.equal(tensor, pipe.state_dict()[name]) for name, tensor in alone.state_dict().items())


class Whole(nn.Module):
    """The model's own code goes through all layers at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def init_weights(self) -> None:
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.5)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[1](self.layers[0](x))
        pipe_split()
        return self.layers[3](self.layers[2](x))  # type: ignore[no-any-return]


@settings(max_examples=6, deadline=None)
@given(st.sets(st.integers(1, 3)), st.integers(0, 2**62))
def test_values_depend_on_the_seed_and_not_on_the_cut(cuts: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    alone = Whole()
    alone.init_weights()
    spec = {f"layers.{index}": SplitPoint.BEGINNING for index in cuts}
    found = one_by_one(on_meta(Whole), seed, mb_args=(torch.empty(2, WIDTH, device="meta"),), split_spec=spec)
    assert [name for name, tensor in alone.state_dict().items() if not torch.equal(found[name], tensor)] == []


def test_code_that_goes_through_the_whole_model_never_has_all_of_it_in_memory() -> None:
    torch.manual_seed(6)
    alone = Whole()
    alone.init_weights()
    model = on_meta(Whole)
    memory: list[int] = []

    original = Whole.init_weights

    def init_weights(self: Whole) -> None:
        original(self)
        memory.append(sum(tensor.untyped_storage().nbytes() for tensor in self.parameters()))

    Whole.init_weights = init_weights  # type: ignore[method-assign]
    try:
        found = one_by_one(model, 6, mb_args=(torch.empty(2, WIDTH, device="meta"),))
    finally:
        Whole.init_weights = original  # type: ignore[method-assign]
    assert [name for name, tensor in alone.state_dict().items() if not torch.equal(found[name], tensor)] == []
    layer = 4 * (WIDTH * WIDTH + WIDTH)
    assert max(memory) <= 3 * layer  # two of the stage, one of the other


def test_what_is_no_stage_or_has_no_model_is_refused() -> None:
    pipe = pipeline(on_meta(Net), (TOKENS,), check=None)
    for wrong in ("0", None, 1.5):
        with pytest.raises(InputError, match=r"is no stage(?s:.)*such as 0 or \[0, 3\]"):
            pipe.initialize(wrong)  # type: ignore[arg-type]
    for call in (pipe.initialize, pipe.materialize):
        with pytest.raises(InputError, match="nothing is real on the meta device"):
            call(0, device="meta")
    with pytest.raises(ValueError, match="Invalid stage index 3"):
        pipe.initialize(3)
    with pytest.raises(MaterializeError, match=r"there is no model(?s:.)*a copy of a pipe"):
        deepcopy(pipe).initialize(0)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * torch.tensor([1.0, 2.0] * 4)


def test_constants_of_the_code_outlive_to_empty() -> None:
    model, x = Constant(), torch.randn(2, WIDTH)
    pipe = pipeline(model, (x,))
    expected = model(x)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pipe.stages[0].to_empty(device="meta").to_empty(device="cpu")
    pipe.load_state_dict(weights)
    assert not torch.equal(expected, torch.zeros_like(expected))
    with pytest.raises(StagecutError, match=r"stage 0 is on the meta device: '.*tensor_0' has no values"):
        pipe(x)
    again = pipeline(model, (x,))
    again.stages[0].to_empty(device="cpu")
    again.load_state_dict(weights)
    assert torch.equal(again(x)[0], expected)


def test_a_stage_is_built_on_meta_and_must_be_real_when_it_runs() -> None:
    assert on_ranks(2, _run_built, on_meta(Holder)) == ["", ""]


def _run_built(model: nn.Module) -> str:
    """What is wrong with torch's schedule over stages that become real after they are built."""
    torch.manual_seed(0)
    pipe = pipeline(model, (torch.empty(2, WIDTH, device="meta"),), check=None)
    rank, x = dist.get_rank(), torch.randn(4, WIDTH)
    stage = pipe.build_stage(rank, "cpu")
    schedule = ScheduleGPipe(stage, 2)
    values = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    if rank == 0:  # the other one would wait for what is not sent
        with pytest.raises(StagecutError, match=r"stage 0 is on the meta device: 'norm\.linear\.weight' has no values"):
            stage.values((x[:2],), {})
    pipe.materialize(rank, values=values)
    output = schedule.step(*((x,) if rank == 0 else ()))
    alone = Holder()
    alone.load_state_dict(values)
    return "" if rank == 0 or torch.allclose(output, alone(x)) else f"{output} for {alone(x)}"
