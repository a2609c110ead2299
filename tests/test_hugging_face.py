"""hf: a small config of any architecture runs, and what is given stays."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from stagecut.tools.dump_ir.hugging_face import make


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "swin", "gemma3", "wav2vec2", "bert", "t5", "whisper", "clip", "llava"])
def test_small_configs_run(name: str) -> None:
    model, args, kwargs = make(name, Namespace(config=[], meta=False, batch=2, length=8, named=()))
    assert sum(p.numel() for p in model.parameters()) < 20_000_000
    with torch.no_grad():
        model(*args, **kwargs)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_what_is_given_stays(name: str) -> None:
    """gpt2 has other names for it; qwen2 a list with an item for each layer."""
    config = ["num_hidden_layers=3", "vocab_size=77", "hidden_size=96"]
    model, _, kwargs = make(name, Namespace(config=config, meta=False, batch=2, length=8, named=()))
    assert (model.config.num_hidden_layers, model.config.vocab_size, model.config.hidden_size) == (3, 77, 96)
    assert len(getattr(model.config, "layer_types", "abc")) == 3
    assert kwargs["input_ids"].max() < 77


def test_special_tokens_lie_in_the_small_vocabulary() -> None:
    model, _, _ = make("llava", Namespace(config=[], meta=True, batch=2, length=8, named=()))
    assert model.config.image_token_id < model.config.text_config.vocab_size
