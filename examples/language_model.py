"""A small language model with a large vocabulary: its head costs as much as many layers.
docs/FIND_A_SLOW_STAGE.md cuts it.

dump-ir examples/language_model.py:make --stages 4 --report
"""

from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    def __init__(
        self, vocabulary: int = 32_000, width: int = 512, layers: int = 8
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model on the meta device, and tokens of one micro-batch."""
    with torch.device("meta"):
        return LanguageModel(), (torch.zeros(4, 1024, dtype=torch.long),), {}
