"""Models whose every format is kept as golden files: see test_dump_ir_formats.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Tied(nn.Module):
    """A head tied to the embedding, a norm that writes buffers, dropout, a mask that several stages read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.inner = nn.Embedding(50, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, *, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        x = nn.functional.dropout(self.norm(self.embed(tokens)), 0.1, self.training) * keep
        hidden = self.inner(x)
        return {"logits": self.head(hidden * keep), "hidden": hidden}


class Bottleneck(nn.Module):
    """Long skips over two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(16, 8), nn.Linear(8, 4)])
        self.up = nn.ModuleList([nn.Linear(4, 8), nn.Linear(16, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outer = self.down[0](x).relu()
        inner = self.up[0](self.down[1](outer)).relu_()
        return self.up[1](torch.cat([inner, outer], -1)) + x  # type: ignore[no-any-return]


class Repeated(nn.Module):
    """Six equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def tied() -> Made:
    """Its calls need a keyword."""
    return Tied(), (torch.zeros(4, dtype=torch.long),), {"keep": torch.ones(4, 1)}


def bottleneck() -> Made:
    """Small."""
    return Bottleneck(), (torch.ones(2, 16),), {}


def repeated() -> Made:
    """Smaller."""
    return Repeated(), (torch.ones(2, 8),), {}
