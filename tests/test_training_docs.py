"""docs/TRAINING.md: its Python runs on two processes, each half with the model that it begins with."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch

import pytest
from cluster.matrix import on_ranks

PAGE = (Path(__file__).parent.parent / "docs" / "TRAINING.md").read_text(encoding="utf-8")
SECOND = "## Update: clip, accumulate, step"
HALVES = dict(zip(("loop", "update"), PAGE.split(SECOND), strict=True))


@pytest.mark.parametrize("half", HALVES)
def test_the_python_on_the_page_runs(half: str, tmp_path: Path) -> None:
    assert on_ranks(2, _run_half, half, tmp_path) == ["ok", "ok"]


def _run_half(half: str, folder: Path) -> str:
    with patch("torch.distributed.init_process_group"):  # the ranks have joined
        exec("\n".join(re.findall(r"```python\n(.*?)```", HALVES[half], re.DOTALL)), {"__name__": "page", "folder": folder})
    return "ok"
