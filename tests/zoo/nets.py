"""Networks written by hand: long skips, BatchNorm, dense connections, recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Double(nn.Sequential):
    """Two convolutions with BatchNorm and in-place relus."""

    def __init__(self, conv: Any, norm: Any, given: int, made: int) -> None:
        super().__init__(
            conv(given, made, 3, padding=1, bias=False), norm(made), nn.ReLU(inplace=True),
            conv(made, made, 3, padding=1, bias=False), norm(made), nn.ReLU(inplace=True),
        )  # fmt: skip


class _UNet(nn.Module):
    """Down, through the middle and up again; every level going up concatenates what the level going down made."""

    def __init__(self, conv: Any, norm: Any, pool: Any, lift: Any, channels: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(Double(conv, norm, a, b) for a, b in zip([channels, *widths], widths[:-1], strict=False))
        self.pool = pool(2)
        self.middle = Double(conv, norm, widths[-2], widths[-1])
        self.lift = nn.ModuleList(lift(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(Double(conv, norm, 2 * w, w) for w in reversed(widths[:-1]))
        self.drop = nn.Dropout(0.1)
        self.head = conv(width, channels, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        bottom = x.flatten(2).mean(-1)
        for lift, block in zip(self.lift, self.up, strict=True):
            x = block(torch.cat([skips.pop(), lift(x)], dim=1))
        return {"out": self.head(self.drop(x)), "bottom": bottom}


class UNet2d(_UNet):
    """For images."""

    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ConvTranspose2d, 3, width, depth)


class UNet1d(_UNet):
    """For signals."""

    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__(nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.ConvTranspose1d, 2, width, depth)


class DenseNet(nn.Module):
    """Every layer sees the outputs of all before it."""

    def __init__(self, width: int = 4, layers: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width * (i + 1)) for i in range(layers))
        self.layers = nn.ModuleList(nn.Conv2d(width * (i + 1), width, 3, padding=1) for i in range(layers))
        self.head = nn.Linear(width * (layers + 1), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            seen.append(layer(torch.relu(norm(torch.cat(seen, dim=1)))))
        return self.head(torch.cat(seen, dim=1).mean((2, 3)))  # type: ignore[no-any-return]


class RecurrentNet(nn.Module):
    """An LSTM, a GRU, and a cell of its own that every step calls; the first input returns at the end."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=0.1)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(2 * width, width)
        self.head = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        y, state = self.lstm(x)
        y, _ = self.gru(y)
        hidden = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in y.unbind(1):
            hidden = self.cell(step, hidden)
        return self.head(hidden) + x[:, -1], state
