"""The main job on real architectures: cut into four stages, compare with the model, write IR and pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagecut.frontend.markers import SplitPoint
from stagecut.ir.text.printer import text
from stagecut.pipe import Pipe, lower, pipeline
from stagecut.tools.bench.architectures import ARCHITECTURES, Architecture

OUT = Path("out")


def main() -> int:
    """Prints one line an architecture; 0 when all of them are equal in every respect."""
    OUT.mkdir(exist_ok=True)
    print(
        f"{'architecture':28}{'stages':>8}{'forward':>9}{'gradients':>11}{'names':>7}"
    )
    wrong = 0
    for architecture in ARCHITECTURES:
        pipe, forward, gradients, names = _check(architecture)
        cells = [
            f"{'equal' if ok else 'DIFFER':>{width}}"
            for ok, width in ((forward, 9), (gradients, 11), (names, 7))
        ]
        print(f"{architecture.name:28}{pipe.num_stages:>8}{''.join(cells)}")
        wrong += not (forward and gradients and names)
    print(f"\nIR before and after the passes and the stage graphs are in {OUT}/")
    return 1 if wrong else 0


def _check(architecture: Architecture) -> tuple[Pipe, bool, bool, bool]:
    torch.manual_seed(0)
    model = architecture.make().eval()
    kwargs = architecture.inputs()
    expected = model(**kwargs)
    wanted = _gradients(model, expected.loss)
    program, _, _ = lower(model, (), kwargs)
    _write(f"{architecture.name}-before.ir", text(program))
    pipe = pipeline(
        model,
        (),
        kwargs,
        split_spec=dict.fromkeys(architecture.cuts, SplitPoint.BEGINNING),
    )
    _write(f"{architecture.name}-after.ir", pipe.ir())
    _write(f"{architecture.name}.svg", pipe.to_svg())
    got = pipe.module()(**kwargs)
    found = _gradients(model, got.loss)  # the stages hold the model's own parameters
    stage_names = {
        name
        for i in range(pipe.num_stages)
        for name in pipe.get_stage_module(i).state_dict()
    }
    forward = type(got) is type(expected) and all(
        torch.equal(expected[key], got[key]) for key in expected
    )
    gradients = wanted.keys() == found.keys() and all(
        torch.equal(wanted[n], found[n]) for n in wanted
    )
    return pipe, forward, gradients, stage_names == set(model.state_dict())


def _gradients(model: nn.Module, loss: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _write(name: str, content: str) -> None:
    (OUT / name).write_text(content)


if __name__ == "__main__":
    sys.exit(main())
