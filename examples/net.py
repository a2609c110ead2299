"""A small model with a skip connection and a parameter used in two stages.

dump-ir examples/net.py:make
dump-ir examples/net.py:make --format svg > stages.svg
"""

from typing import Any

import torch
from torch import nn

from stagecut import pipe_split


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mm = nn.Parameter(torch.randn(512, 512))
        self.lin = nn.Linear(512, 512)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x @ self.mm
        skip = x
        x = torch.relu(x + y)
        pipe_split()
        x = self.lin(x @ self.mm)
        pipe_split()
        return torch.relu(x) + skip


def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and example inputs of one micro-batch."""
    return Net(), (torch.randn(16, 512), torch.randn(16, 512)), {}
