"""The models have the published sizes, their layers are there, and the cheapest of them are traced."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from stagecut.ir.graph import scope_fqn
from stagecut.pipe import lower
from stagecut.tools.bench.models import MODELS

BILLIONS = {
    "GPT-2 XL": (1.558, 48),
    "Llama 8B": (8.030, 32),
    "Llama 70B": (70.554, 80),
    "Llama 405B": (405.853, 126),
    "Gemma 7B": (8.538, 28),
    "Mixtral 8x7B": (46.703, 32),
    "T5-XL": (2.850, 48),
    "Whisper-large": (1.543, 64),
    "ViT-H/14": (0.632, 32),
    "Swin-L": (0.197, 24),
    "ResNet-152": (0.060, 50),
    "UNet": (0.031, 9),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_its_size_and_its_layers(name: str) -> None:
    model, args, kwargs, layers = MODELS[name]()
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in model.named_modules()}
    assert (round(sizes[""] / 1e9, 3), len(set(layers))) == BILLIONS[name]
    assert [path for path in sizes if path in layers] == layers
    assert sum(sizes[path] for path in layers) > 0.8 * sizes[""]
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves((args, kwargs))]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["UNet", "ResNet-152"])
def test_the_cheapest_are_traced_and_their_layers_run_in_order(name: str) -> None:
    model, args, kwargs, layers = MODELS[name]()
    program, _, _ = lower(model, args, kwargs)
    paths = [f"{scope_fqn(op.scope)}." for op in program.ops]
    first = [next(i for i, path in enumerate(paths) if path.startswith(f"{layer}.")) for layer in layers]
    assert first == sorted(set(first))
