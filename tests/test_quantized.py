"""Weights that are no plain tensors: of a class that holds others, packed, or of 8 bits in torch's own modules."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.adapters import base, inputs, lora
from cluster.matrix import on_ranks
from torch import nn
from torch.nn import functional as F
from zoo.cuts import equal_ops

from stagecut import CaptureError, CheckpointError, Driver, Pipe, SplitPoint, StagecutError, checkpoint, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Scaled(torch.Tensor):
    """A matrix as integers of 8 bits, and a scale for each row."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor, scale: torch.Tensor) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=whole.device)
        return made

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor) -> None:
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["whole", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inside: dict[str, torch.Tensor], _context: None, _size: Any, _stride: Any) -> Scaled:
        return Scaled(inside["whole"], inside["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.whole.to(x.dtype) * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        ops = torch.ops.aten
        if func in (ops.detach.default, ops.clone.default, ops._to_copy.default, ops.alias.default):
            moved = {name: item for name, item in (kwargs or {}).items() if name == "device"}
            return Scaled(*(func(inside, **moved) for inside in (args[0].whole, args[0].scale)))
        raise NotImplementedError(f"{func} of {cls.__name__}")

    @classmethod
    def of(cls, weight: torch.Tensor) -> Scaled:
        """That which is nearest to a matrix."""
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)


class Net(nn.Module):
    """Linears of 8 bits, each with two narrow ones beside it that are trained."""

    def __init__(self, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Sequential(nn.Linear(width, 2), nn.Linear(2, width)) for _ in range(depth))
        for layer in self.layers:
            layer.requires_grad_(False)
            layer.weight = nn.Parameter(Scaled.of(layer.weight), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, narrow in zip(self.layers, self.narrow, strict=True):
            x = torch.tanh(layer(x) + narrow(x))
        return x


class Twice(Net):
    """The first weight is that of the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3].weight = self.layers[0].weight


def _cut(make: type[Net]) -> tuple[Net, Pipe]:
    torch.manual_seed(0)
    model = make()
    return model, pipeline(model, (torch.randn(2, 8),), split_spec={"layers.2": SplitPoint.BEGINNING})


def test_a_weight_stays_in_the_stages_that_read_it() -> None:
    """torch.export takes a weight apart before the first op, but no stage has, or sends, that of another."""
    model, pipe = _cut(Net)
    for index, names in enumerate((("layers.0", "layers.1"), ("layers.2", "layers.3"))):
        held = dict(pipe.stages[index].named_parameters())
        assert {name for name in held if name.startswith("layers")} == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        assert all(held[f"{name}.weight"] is model.get_parameter(f"{name}.weight") for name in names)
    assert len(pipe.program.stages[1].inputs) == 1
    _, pipe = _cut(Twice)
    assert [len(stage.inputs) for stage in pipe.program.stages] == [1, 1]
    shared = next(entry for entry in pipe.program.state if len(entry.names) == 2)
    assert shared.stages == [0, 1] or tuple(shared.stages) == (0, 1)


def test_adapters_on_weights_of_eight_bits_train_and_resume_as_in_one_process(tmp_path: Path) -> None:
    model, pipe = _cut(Net)
    losses = _steps(model, range(6))
    for answers in on_ranks(2, _begin, *_cut(Net), tmp_path / "run"):
        torch.testing.assert_close(answers, losses[:3])
    for answers in on_ranks(1, _go_on, _cut(Net)[1], tmp_path / "run"):
        torch.testing.assert_close(answers, losses[3:])
    assert pipe.stages


def test_only_the_adapter_of_a_quantized_base_is_written(tmp_path: Path) -> None:
    """Its own files need no plain weights below it; others name the weight that is none."""
    model: Any = lora().float()
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight = nn.Parameter(Scaled.of(module.base_layer.weight), requires_grad=False)
    pipe = pipeline(model, (), inputs(2), split_policy=equal_ops(2), check=None)
    checkpoint.save_adapter(pipe, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "theirs"))
    assert ours == theirs
    checkpoint.load_adapter(pipe, tmp_path / "adapter")
    with pytest.raises(StagecutError, match=r"base_layer.weight' is a Scaled of layout"):
        pipe.save(tmp_path / "pipe")
    merged = model.base_model.model
    with pytest.raises(CheckpointError, match=r"has an adapter, whose tensors no class of transformers has"):
        checkpoint.save_pretrained(pipe, tmp_path / "folder", model=merged)


def test_a_quantized_model_of_transformers_is_not_written_as_a_folder(tmp_path: Path) -> None:
    model: Any = base(torch.float32)
    head = model.model.layers[0].self_attn.q_proj
    head.weight = nn.Parameter(Scaled.of(head.weight), requires_grad=False)
    pipe = pipeline(model, (), inputs(2), split_policy=equal_ops(2), check=None)
    with pytest.raises(CheckpointError, match=r"q_proj.weight' is a Scaled of layout torch.strided\n.*plain dense tensors"):
        checkpoint.save_pretrained(pipe, tmp_path / "folder")


def _batch(step: int) -> torch.Tensor:
    torch.manual_seed(step)
    return torch.randn(8, 8)


def _steps(model: Net, steps: range) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(_batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def _begin(model: Net, pipe: Pipe, folder: Path) -> torch.Tensor:
    driver = Driver(pipe, "1F1B", 4, _loss, backward="graph")
    optimizer = torch.optim.AdamW(driver.parameters(), 0.01)
    losses = _train(driver, optimizer, range(3))
    assert "runs by autograd" in driver.notes[0]
    checkpoint.save(driver, optimizer, folder, frozen=False)
    return losses


def _go_on(pipe: Pipe, folder: Path) -> torch.Tensor:
    driver = Driver(pipe, "LoopedBFS", 4, _loss)
    optimizer = torch.optim.AdamW(driver.parameters(), 0.01)
    checkpoint.load(driver, optimizer, folder, frozen=False)
    return _train(driver, optimizer, range(3, 6))


def _train(driver: Driver, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
    losses: list[Any] = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(driver.step(_batch(step))[1].batch)
        optimizer.step()
    return torch.stack(losses)


def test_stages_move_though_a_trace_still_looks_at_their_weights() -> None:
    """torch swaps the contents of such a parameter, which nobody else may look at."""
    model, pipe = _cut(Twice)
    seen = [weakref.ref(layer.weight) for layer in model.layers]
    pipe.stages[0].to("cpu")
    assert pipe.stages[0].get_parameter("layers.0.weight") is seen[0]()
    pipe.stages[1].to("meta")
    moved: Any = pipe.stages[1].get_parameter("layers.2.weight")
    assert type(moved) is type(seen[2]())
    assert moved.whole.is_meta
    assert not moved.requires_grad
    assert not model.layers[2].weight.is_meta


class Told(Net):
    """Counts on a train() of its own."""

    def train(self, mode: bool = True) -> Told:
        super().train(mode)
        return self


def test_a_model_with_a_train_of_its_own_is_switched() -> None:
    _, pipe = _cut(Told)
    assert not pipe.eval().training


def test_another_scale_in_the_pipe_is_seen_by_the_check() -> None:
    model, pipe = _cut(Net)
    weight: Any = pipe.stages[1].get_parameter("layers.3.weight")
    assert pipe.verify(torch.randn(2, 8)).ok
    stage = pipe.stages[1].get_submodule("layers.3")
    stage.weight = nn.Parameter(Scaled(weight.whole, weight.scale * 2), requires_grad=False)
    assert not pipe.verify(torch.randn(2, 8)).ok
    assert model is not None


@pytest.mark.filterwarnings("ignore:.*quantization:DeprecationWarning", "ignore:.*:UserWarning")
def test_packed_weights_of_torch_are_kept_whole_with_a_note() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).eval(), {nn.Linear}, torch.qint8)
    pipe = pipeline(model, (x := torch.randn(2, 8),), split_spec={"2": SplitPoint.BEGINNING})
    assert "its weights are packed by torch.jit" in pipe.notes[0]
    assert torch.equal(pipe(x)[0], model(x))


@dataclass(frozen=True)
class Config:
    """How a function rounds."""

    steps: int


class Rounded(torch.autograd.Function):
    """Rounds, with the gradient of no rounding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, config: Config) -> torch.Tensor:
        return (x * config.steps).round() / config.steps

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class Rounding(nn.Linear):
    """A linear whose weight is rounded, as a config says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, Rounded.apply(self.weight, Config(16)))


def test_an_object_in_a_call_is_refused_with_the_module_to_keep_whole() -> None:
    model, x = nn.Sequential(Rounding(4, 4), nn.Tanh(), Rounding(4, 4)), torch.randn(2, 4)
    with pytest.raises(CaptureError, match=r"type Config cannot be written.*\n.*module '0', .*test_quantized.py.*\n.*leaf_modules"):
        pipeline(model, (x,), split_spec={"1": SplitPoint.BEGINNING})
    pipe = pipeline(model, (x,), split_spec={"1": SplitPoint.BEGINNING}, leaf_modules=["0", "2"])
    assert torch.equal(pipe(x)[0], model(x))
