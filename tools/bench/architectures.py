"""Real architectures at small sizes with random weights, for the demo, the benchmark and the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_BATCH, _LENGTH, _VOCABULARY = 2, 16, 128


@dataclass(frozen=True)
class Architecture:
    """A model factory, example keyword arguments, and the modules in front of which the model is cut into
    four.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    cuts: tuple[str, ...]


def _tokens() -> torch.Tensor:
    return torch.randint(3, _VOCABULARY, (_BATCH, _LENGTH))


def _with_labels() -> dict[str, Any]:
    return {"input_ids": _tokens(), "labels": _tokens(), "use_cache": False}


def _masked() -> dict[str, Any]:
    return {
        "input_ids": _tokens(),
        "attention_mask": torch.ones(_BATCH, _LENGTH, dtype=torch.long),
        "labels": _tokens(),
    }


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=_VOCABULARY,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()  # it warns of a loss that is the default
    config = GPT2Config(
        n_embd=64,
        n_layer=4,
        n_head=4,
        vocab_size=_VOCABULARY,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_layers=4,
        num_heads=4,
        vocab_size=_VOCABULARY,
        pad_token_id=0,
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=_VOCABULARY,
            max_position_embeddings=64,
        )
    )


def llama_8b() -> tuple[nn.Module, dict[str, Any]]:
    """A model of the size of Llama 8B on the meta device, and its inputs."""
    return _llama_on_meta(4096, 14336, layers=32, heads=32)


def llama_70b() -> tuple[nn.Module, dict[str, Any]]:
    """A model of the size of Llama 70B on the meta device, and its inputs."""
    return _llama_on_meta(8192, 28672, layers=80, heads=64)


def llama_405b() -> tuple[nn.Module, dict[str, Any]]:
    """A model of the size of Llama 405B on the meta device, and its inputs: 126 layers, hidden size 16384."""
    return _llama_on_meta(16384, 53248, layers=126, heads=128)


def _llama_on_meta(
    hidden: int, intermediate: int, layers: int, heads: int
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval(), {
            "input_ids": torch.zeros(1, 4096, dtype=torch.long),
            "use_cache": False,
        }


ARCHITECTURES = (
    Architecture(
        "LlamaForCausalLM",
        _llama,
        _with_labels,
        ("model.layers.1", "model.layers.2", "model.layers.3"),
    ),
    Architecture(
        "GPT2LMHeadModel",
        _gpt2,
        _with_labels,
        ("transformer.h.1", "transformer.h.2", "transformer.h.3"),
    ),
    Architecture(
        "T5ForConditionalGeneration",
        _t5,
        _with_labels,
        ("encoder.block.2", "decoder.block.0", "decoder.block.2"),
    ),
    Architecture(
        "BertForMaskedLM",
        _bert,
        _masked,
        ("bert.encoder.layer.1", "bert.encoder.layer.2", "bert.encoder.layer.3"),
    ),
)
