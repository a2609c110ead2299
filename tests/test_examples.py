"""The examples run as their docstrings say: as commands, on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """`command` on so many processes of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
    return subprocess.run(launch, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("ranks", "command", "said"),
    [
        (2, "examples/train_gpt.py --schedule 1f1b --steps 3 --microbatches 2 --compare", "after 3 steps, as in one process"),
        (2, "examples/finetune_hf.py --steps 2 --microbatches 2", "step   1: loss"),
    ],
)
def test_an_example_runs(ranks: int, command: str, said: str) -> None:
    done = torchrun(ranks, *command.split())
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
