"""Models for runs on several ranks: skips, tied and shared layers, BatchNorm, two inputs that meet late. Nothing draws random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from zoo.nets import UNet1d

VOCABULARY = 32


@dataclass(frozen=True)
class Subject:
    """A model, the keyword arguments of one call with a batch of that size, and its loss."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    loss: Callable[[Any], torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable[[str], Subject], tuple[str]]:
        """Other processes know it by its name."""
        return subject_of, (next(name for name, subject in SUBJECTS.items() if subject is self),)


def subject_of(name: str) -> Subject:
    """The one of that name."""
    return SUBJECTS[name]


class Masked(nn.Module):
    """Every layer adds a mask of 2 MiB to its scores, which costs less to compute again than to send."""

    def __init__(self, width: int = 4, depth: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = torch.where(positions[:, None] >= positions[None, :], self.bias, -1e9)
        for layer in self.layers:
            scores = (layer(x) @ x.transpose(1, 2)).mul(0.01).add(mask)
            x = (x + torch.softmax(scores, -1) @ x) / 2
        return x


class TwoTower(nn.Module):
    """Two towers that know nothing of each other until their last layers; the first input is used again at the end."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.document = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, query: torch.Tensor, document: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = query, document
        for layer in self.query:
            a = torch.tanh(layer(a))
        for layer in self.document:
            b = torch.tanh(layer(b)) * weight
        return (a @ b.transpose(-1, -2)) * self.scale + query.sum(), a


class Residual(nn.Module):
    """A small ResNet: BatchNorm in training mode, in-place relus."""

    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.relu(norm(conv(x)) + x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _double(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make().double().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    return made


def _gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=4, n_head=2, vocab_size=VOCABULARY, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=VOCABULARY, pad_token_id=0, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def _albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    return AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, 6))


def _language(count: int) -> dict[str, Any]:
    return {"input_ids": _tokens(count), "labels": _tokens(count)}


def _real(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _own_loss(output: Any) -> torch.Tensor:
    loss: torch.Tensor = output["loss"]
    return loss


SUBJECTS = {
    "UNet": Subject(_double(UNet1d), lambda n: {"x": _real(n, 2, 16)}, lambda out: out["out"].square().mean() + out["bottom"].mean()),
    "GPT-2, tied": Subject(_double(_gpt), lambda n: _language(n) | {"use_cache": False}, _own_loss),
    "Llama": Subject(_double(_llama), lambda n: _language(n) | {"use_cache": False}, _own_loss),
    "T5": Subject(_double(_t5), lambda n: _language(n) | {"use_cache": False}, _own_loss),
    "ResNet": Subject(_double(Residual), lambda n: {"x": _real(n, 3, 6, 6)}, lambda out: out.square().mean()),
    "ALBERT": Subject(_double(_albert), _language, _own_loss),
    "two towers": Subject(
        _double(TwoTower),
        lambda n: {"query": _real(n, 4, 8), "document": _real(n, 4, 8), "weight": _real(8)},
        lambda out: out[0].square().mean() + out[1].mean(),
    ),
    "GPT-2, sent": Subject(
        _double(_gpt), lambda n: _language(n) | {"use_cache": False}, _own_loss, {"tied": "transmit", "routes": {"labels": "relay"}}
    ),
    "masks": Subject(
        _double(Masked),
        lambda n: {"x": _real(n, 512, 4), "positions": torch.arange(512)},
        lambda out: out.square().mean(),
        {"routes": {"positions": "relay"}},
    ),
}
