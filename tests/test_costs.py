"""costs: FLOPs by torch's formulas, bytes moved, what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stagecut.backend.costs.ops import DEVICES, Device, OpCost, device, op_costs, program_ops
from stagecut.ir.aliases import storage_root
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Op, Program
from stagecut.passes.pipeline import PASSES
from stagecut.pipe import lower, pipeline


def _costed(module: nn.Module, *args: Any, **options: Any) -> tuple[Program, list[Op], list[OpCost]]:
    program, bindings, _ = lower(module, args, None, options.pop("dynamic_shapes", None), options.pop("leaf_modules", ()))
    for step in PASSES[:4]:
        step().run(program)
    ops = program_ops(program)
    return program, ops, op_costs(ops, options.pop("sizes", {}), bindings, **options)


class Attention(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        scores = torch.softmax(q @ k.transpose(-1, -2), -1)
        return x + self.out(F.gelu((scores @ v).transpose(1, 2).flatten(2)))


MODELS = {
    "attention": (Attention(), (torch.randn(2, 16, 32),)),
    "convolution": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), (torch.randn(2, 3, 16, 16),)),
    "layers": (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Softplus()), (torch.randn(5, 8),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_what_torch_counts_for_the_model(name: str) -> None:
    model, args = MODELS[name]
    _, _, costs = _costed(model, *args)
    with FlopCounterMode(display=False) as counter:
        output = model(*args)
        forward = counter.get_total_flops()
        output.sum().backward()
        total = counter.get_total_flops()
    model.zero_grad()
    assert sum(c.flops for c in costs) == forward
    assert sum(c.backward_flops for c in costs) == total - forward


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_autograd_saves(name: str) -> None:
    """Each storage once, parameters and inputs left out: as many bytes as autograd's own hooks see in a run of the model."""
    model, args = MODELS[name]
    program, _, costs = _costed(model, *args)
    outside = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *args)}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            saved[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(*args)
    del output
    roots = {v: v.type.nbytes() for c in costs for v in c.kept}  # type: ignore[union-attr]
    assert sum(roots.values()) + sum(c.extra for c in costs) == pytest.approx(sum(saved.values()), rel=0.1)
    assert all(storage_root(v) is v for v in roots)
    assert program


def test_a_fused_attention_keeps_a_row_of_sums_instead_of_scores() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x)
            return F.scaled_dot_product_attention(q, q, q)

    _, ops, costs = _costed(Fused(), torch.randn(2, 4, 64, 8))
    cost = next(c for op, c in zip(ops, costs, strict=True) if "scaled_dot" in op.target)
    assert cost.flops == 2 * 2 * (2 * 4) * 64 * 64 * 8
    assert cost.extra == 2 * 4 * 64 * 4


def test_views_are_free_and_a_frozen_model_has_no_backward() -> None:
    model = Attention().requires_grad_(False)
    _, ops, costs = _costed(model, torch.randn(2, 16, 32))
    for op, cost in zip(ops, costs, strict=True):
        if op.effects.views and None not in op.effects.views:
            assert cost.on(DEVICES["H100"]) == 0
        assert cost.backward_flops == cost.backward_moved == 0
        assert not cost.kept


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_reads_the_rows_that_it_takes(kind: type[nn.Module]) -> None:
    indices = torch.arange(6).view(2, 3)
    _, ops, costs = _costed(kind(1000, 8), indices)
    cost = next(c for op, c in zip(ops, costs, strict=True) if "embedding" in op.target)
    assert 6 * 8 * 4 < cost.moved < 1000
    # its gradient is one of the whole table
    assert 1.5 * 1000 * 8 * 4 < cost.backward_moved < 1.5 * (1000 * 8 * 4 + 1000)


def test_the_bytes_of_an_embedding() -> None:
    _, ops, costs = _costed(nn.Embedding(1000, 8), torch.arange(6))
    cost = next(c for op, c in zip(ops, costs, strict=True) if "embedding" in op.target)
    rows, indices = 6 * 8 * 4, 6 * 8
    assert cost.moved == rows + indices + rows
    # its gradient is one of the whole table
    assert cost.backward_moved == 1.5 * (1000 * 8 * 4 + indices + rows)


def test_a_checkpoint_keeps_its_input_and_computes_again() -> None:
    class Checkpointed(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x * 2, use_reentrant=False)

    _, _, plain = _costed(Attention(), torch.randn(2, 16, 32))
    _, _, costs = _costed(Checkpointed(), torch.randn(2, 16, 32))
    assert sum(c.backward_flops for c in costs) == sum(c.backward_flops + c.flops for c in plain)
    assert len({v for c in costs for v in c.kept}) == 1


def test_sizes_that_vary_are_given() -> None:
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    fixed = _costed(Attention(), torch.randn(6, 16, 32))[2]
    program, ops, _ = _costed(Attention(), torch.randn(6, 16, 32), dynamic_shapes=shapes)
    symbol = program.inputs[0].type.shape[0]  # type: ignore[union-attr]
    free = op_costs(ops, {symbol: 6})
    assert sum(c.flops for c in free) == sum(c.flops for c in fixed)
    assert sum(c.moved for c in free) == pytest.approx(sum(c.moved for c in fixed), rel=0.01)


def test_a_module_kept_whole_is_counted_too() -> None:
    model = nn.Sequential(Attention(), nn.Linear(32, 32))
    whole = _costed(model, torch.randn(2, 16, 32), leaf_modules=["0"])[2]
    apart = _costed(model, torch.randn(2, 16, 32))[2]
    assert sum(c.flops for c in whole) == sum(c.flops for c in apart)


def test_devices() -> None:
    assert device("H100") is DEVICES["H100"]
    own = Device("own", 1e12, 1e11, 1e9, 1e10, 0.0, 1.0)
    assert device(own) is own
    assert own.seconds(2e12, 0, "bf16") == 2.0
    assert own.seconds(2e12, 0, "f32") == 4.0
    assert own.seconds(1, 1e11) == 1.0
    with pytest.raises(InputError, match="did you mean 'H200'"):
        device("H20")


class State:
    """An object that torch takes for one leaf, whatever is in it."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self.parts = list(parts)


class ReturnsState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor) -> dict[str, Any]:
        x = self.embed(tokens)
        return {"state": State(x.mean(), x.sum()), "logits": self.head(x)}


@pytest.mark.parametrize("profile_on", [None, "cpu"])
def test_a_loss_is_assumed_behind_an_object_with_tensors(profile_on: str | None) -> None:
    """The place of the logits was sought among fewer leaves than the program has."""
    pipe = pipeline(ReturnsState(), (torch.zeros(2, 5, dtype=torch.long),), stages=2, check=None)
    assert "cross-entropy" in str(pipe.report(profile_on=profile_on))
