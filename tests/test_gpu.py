"""What only a GPU shows; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from batches import Patches, Positions, marks, tokens, with_patches
from safetensors.torch import load_file
from torch import nn

from stagecut import SplitPoint, pipeline
from stagecut.backend.files.streamed import write_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_dropout_on_a_gpu_draws_the_models_stream() -> None:
    with torch.device("cuda"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5)).train()
        x = torch.randn(4, 8)
    before = torch.cuda.get_rng_state()
    pipe = pipeline(model, (x,), split_spec={"2": SplitPoint.BEGINNING}, check="gradients")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert pipe.verify(x).ok
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(pipe(x)[0], expected)


class Needle(nn.Module):
    """Runs on a GPU alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_cuda
        return x * torch.ones(1, device="cuda")


@pytest.mark.parametrize("kind", [Patches, Positions, Needle])
def test_the_search_for_the_batch_does_not_break_the_gpu(kind: type[nn.Module]) -> None:
    """It runs the model on inputs that do not fit together; on a GPU an index that is too large ends everything."""
    torch.manual_seed(0)
    inputs = {Patches: with_patches(2), Positions: (torch.arange(6), tokens(3, 6)), Needle: (torch.randn(2, 4),)}[kind]
    pipe = pipeline(kind().cuda(), tuple(x.cuda() for x in inputs), check=None)
    assert marks(pipe)[1] == ["batch(0)"]
    torch.ones(1, device="cuda").item()


def test_a_module_kept_whole_on_a_gpu() -> None:
    with torch.device("cuda"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        x = torch.randn(4, 8)
    assert pipeline(model, (x,), leaf_modules=["1"]).verify(x).ok


def test_a_file_of_tensors_of_a_gpu_has_their_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.randn(size, device="cuda") for name, size in {"a": 40 << 20, "b": 1, "c": 3 << 20}.items()}
    write_file(tensors, tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in tensors.items())
