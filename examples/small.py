"""A stage with a norm, a layer and a skip connection, small enough to read its backward.

dump-ir examples/small.py:make --roles
"""

from typing import Any

import torch
from torch import nn

from stagecut import pipe_split


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        pipe_split()
        return x + self.second(self.norm(x))


def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and example inputs of one micro-batch."""
    return Small(), (torch.randn(8, 64),), {}
