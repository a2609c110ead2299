"""docs/training_gradients.part.md: its Python runs on two processes."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.matrix import on_ranks

PAGE = (Path(__file__).parent.parent / "docs" / "training_gradients.part.md").read_text()


def test_the_python_on_the_page_runs(tmp_path: Path) -> None:
    assert on_ranks(2, _run_page, tmp_path) == ["ok", "ok"]


def _run_page(folder: Path) -> str:
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), {"__name__": "page", "folder": folder})
    return "ok"
