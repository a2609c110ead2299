"""Draws the pictures of docs/PICTURES.md, the same bytes on every machine.

python -m stagecut.tools.bench.pictures [FOLDER [NAME ...]]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.timeline import simulate
from stagecut.backend.pictures.render import PURE
from stagecut.frontend.markers import SplitPoint, pipe_split
from stagecut.pipe import pipeline
from stagecut.tools.bench.models import MODELS, UNet

FOLDER = Path("docs/pictures")


class Net(nn.Module):
    """A skip over a stage, a head tied to the embedding, buffers that are written."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.inner = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        pipe_split()
        y = self.norm(torch.relu(self.inner(x)))
        pipe_split()
        return self.head(self.last(y) + x)  # type: ignore[no-any-return]


def _net(**view: Any) -> str:
    pipe = pipeline(Net(), (torch.zeros(8, dtype=torch.long),))
    return pipe.to_svg(**view, renderer=PURE)


def _unet() -> str:
    return pipeline(
        UNet(8, 4), (torch.randn(2, 3, 64, 64),), stages=4, check=None
    ).to_svg(renderer=PURE)


def _llama() -> str:
    """Stage 3 of 16 of Llama 405B: eight equal layers."""
    example = MODELS["Llama 405B"]()
    cuts = dict.fromkeys(example.layers[8::8], SplitPoint.BEGINNING)
    pipe = pipeline(
        example.model, example.args, example.kwargs, split_spec=cuts, check=None
    )
    return pipe.to_svg(level="modules", stage=3, renderer=PURE)


def _schedule(name: str, stages: int) -> str:
    setting = Setting(schedule=name, n_microbatches=8, ranks=None if stages == 4 else 4)
    return simulate(
        setting, [0.01] * stages, [0.02] * stages, [0.0005] * (stages - 1)
    ).to_svg()


PICTURES: dict[str, Callable[[], str]] = {
    "stages": _net,
    "modules": lambda: _net(level="modules", stage=1),
    "ops": lambda: _net(level="ops", stage=2),
    "unet": _unet,
    "llama": _llama,
    "1f1b": lambda: _schedule("1F1B", 4),
    "gpipe": lambda: _schedule("GPipe", 4),
    "interleaved": lambda: _schedule("Interleaved1F1B", 8),
    "zbv": lambda: _schedule("ZBVZeroBubble", 8),
}


def main(arguments: Sequence[str]) -> int:
    """Writes the named pictures, or all, as FOLDER/NAME.svg."""
    folder = Path(arguments[0]) if arguments else FOLDER
    names = arguments[1:] or list(PICTURES)
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        print(
            f"there is no picture '{unknown[0]}'; known: {', '.join(PICTURES)}",
            file=sys.stderr,
        )
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        torch.manual_seed(0)
        (folder / f"{name}.svg").write_text(PICTURES[name](), encoding="utf-8")
        print(folder / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
