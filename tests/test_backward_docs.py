"""docs/BACKWARD.md: its script runs on two processes, and its lines of a driver on the pipe of that script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cluster.commands import torchrun
from cluster.matrix import on_ranks
from torch import nn

from stagecut import Driver, pipeline

PAGE = (Path(__file__).parent.parent / "docs" / "BACKWARD.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SCRIPTS = [block for block in BLOCKS if block.startswith("#")]
IMPORT = "from stagecut import Driver\n\n"
LINES = [block.removeprefix(IMPORT) for block in BLOCKS if block.removeprefix(IMPORT).startswith("driver = ")]


def test_the_page_has_no_other_python() -> None:
    assert len(SCRIPTS) == 1
    assert len(SCRIPTS) + len(LINES) == len(BLOCKS)


def test_the_script_trains(tmp_path: Path) -> None:
    file = tmp_path / "order.py"
    file.write_text(SCRIPTS[0])
    done = torchrun(2, str(file))
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_page_makes_a_driver(line: str) -> None:
    assert on_ranks(2, _make, line, 4 if "ZBV" in line else 2) == [True, True]


def _make(line: str, stages: int) -> bool:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(stages)))
    pipe = pipeline(model, (torch.ones(2, 4),), stages=stages)
    names = {"Driver": Driver, "pipe": pipe, "loss": nn.functional.mse_loss}
    exec(line, names)
    return isinstance(names["driver"], Driver)
