"""What people train with pipelines, small: a model, its batches, its loss. The matrix of tests/test_training_matrix.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, WORDS, IGNORED = 8, 20, -100
PATCH = WORDS


@dataclass(frozen=True)
class Recipe:
    """inputs(samples): the arguments of the model and the target. `loss` returns a loss, or a sum where `per` names the metric that it is
    a sum over. `alone`: a whole batch is no sum of its micro-batches, so that one process runs them one after the other."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[torch.Tensor, ...], Any]]
    loss: Callable[..., Any]
    per: str | None = None
    alone: bool = False


class Block(nn.Module):
    """Attention and an MLP; samples lie along dim 0, or along dim 1."""

    def __init__(self, causal: bool = True, samples: int = 0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal, self.samples = causal, samples

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.first(x)).chunk(3, -1)
        parts = [part.transpose(0, self.samples) for part in parts]
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal).transpose(0, self.samples)
        x = x + self.out(mixed)
        return x + torch.tanh(self.mlp(self.norm(x)))


class Decoder(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self, tied: bool = True, **options: Any) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(WORDS + 1, WIDTH), nn.Linear(WIDTH, WORDS + 1, bias=False)
        self.blocks = nn.Sequential(*(Block(**options) for _ in range(3)))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.tokens(tokens)))  # type: ignore[no-any-return]


class Preferences(Decoder):
    """Two answers are scored in one go, first all that were chosen, then all that were not."""

    def forward(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([chosen, rejected])
        logits = super().forward(tokens).log_softmax(-1)
        return logits.gather(-1, tokens.unsqueeze(-1)).sum((1, 2))


class Experts(Decoder):
    """Each block is followed by experts that a router weighs. The auxiliary loss is one of the whole micro-batch."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.routers = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in self.blocks)
        self.experts = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for _ in self.blocks)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, auxiliary = self.tokens(tokens), torch.zeros((), dtype=self.head.weight.dtype)
        for block, router, experts in zip(self.blocks, self.routers, self.experts, strict=True):
            x = block(x)
            weights = router(x).softmax(-1)
            x = x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(experts))  # type: ignore[arg-type]
            share = weights.mean((0, 1))
            auxiliary = auxiliary + 3 * (share * share).sum()
        return self.head(x), auxiliary


class Seeing(Decoder):
    """The patches of all images lie one after the other; tokens say where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(6, WIDTH)

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = x.masked_scatter((tokens == PATCH).unsqueeze(-1), self.tower(patches))
        return self.head(self.blocks(x))  # type: ignore[no-any-return]


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(WORDS, shape)


def _language(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return loss, {"entropy": loss, "right": (logits.argmax(-1) == target).sum()}


def _masked(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    labelled = target != IGNORED
    return loss, {"tokens": labelled.sum(), "right": ((logits.argmax(-1) == target) & labelled).sum()}


def _preferred(scores: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    chosen, rejected = scores.chunk(2)
    margin = chosen - rejected
    return -F.logsigmoid(margin).mean(), {"margin": margin.mean(), "won": (margin > 0).sum()}


def _with_auxiliary(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits, auxiliary = output
    loss, metrics = _language(logits, target)
    return loss + 0.1 * auxiliary, metrics | {"auxiliary": auxiliary}


def _hidden_words(samples: int) -> tuple[tuple[torch.Tensor], torch.Tensor]:
    target = _words(samples, 6)
    for row in range(samples):
        target[row, : row % 6] = IGNORED
    return (_words(samples, 6),), target


def _pictured(samples: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    tokens = _words(samples, 6)
    tokens[:, 1:4] = PATCH
    return (tokens, torch.randn(3 * samples, 6, dtype=torch.float64)), _words(samples, 6)


RECIPES = {
    "GPT, tied": Recipe(Decoder, lambda n: ((_words(n, 6),), _words(n, 6)), _language),
    "encoder, sequence first": Recipe(
        lambda: Decoder(False, causal=False, samples=1), lambda n: ((_words(6, n),), _words(6, n)), _language
    ),
    "preference pairs": Recipe(Preferences, lambda n: ((_words(n, 6), _words(n, 6)), None), _preferred),
    "experts with an auxiliary loss": Recipe(Experts, lambda n: ((_words(n, 6),), _words(n, 6)), _with_auxiliary, alone=True),
    "vision and language": Recipe(Seeing, _pictured, _language),
    "masked words": Recipe(lambda: Decoder(causal=False), _hidden_words, _masked, per="tokens"),
}
