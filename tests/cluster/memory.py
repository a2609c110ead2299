"""Prints the memory that making one stage of four real takes, in MB, for each source. The model is cut on meta and never whole.

The peak is that of the process while the stage is made, less what it had before (Linux: /proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from stagecut import SplitPoint, pipeline

STAGES, LAYERS = 4, 16
SOURCES = ("safetensors", "distributed", "init", "initialize")


class Deep(nn.Module):
    """Square layers, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def initialise(module: nn.Module) -> None:
    """torch's own initial values."""
    if isinstance(module, nn.Linear):
        module.reset_parameters()


def measure(source: str, width: int, folder: Path) -> dict[str, int]:
    """What stage 1 takes."""
    write(source, width, folder)
    with torch.device("meta"):
        model = Deep(width)
        cuts = {f"layers.{LAYERS // STAGES * i}": SplitPoint.BEGINNING for i in range(1, STAGES)}
        pipe = pipeline(model, (torch.empty(2, width),), split_spec=cuts)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is what there is now
    before = _kilobytes("VmRSS")
    if source == "initialize":
        pipe.initialize(1)
    else:
        pipe.materialize(1, folder if source != "init" else None, init_fn=initialise if source == "init" else None)
    taken = _kilobytes("VmHWM") - before
    whole, stage = (sum(p.nbytes for p in m.parameters()) for m in (model, pipe.stages[1]))
    return {"model": whole >> 20, "stage": stage >> 20, "before": before >> 10, "peak": taken >> 10}


def write(source: str, width: int, folder: Path) -> None:
    """A checkpoint of the whole model."""
    folder.mkdir()
    if source == "safetensors":
        from safetensors.torch import save_file

        save_file(Deep(width).state_dict(), folder / "model.safetensors")
    elif source == "distributed":
        from torch.distributed.checkpoint import state_dict_saver

        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_saver.save(Deep(width).state_dict(), checkpoint_id=folder)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> int:
    """One line for each source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    width = parser.parse_args().width
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            print(json.dumps({"source": source} | measure(source, width, Path(folder) / source)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
