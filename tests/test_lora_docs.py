"""docs/LORA.md: its Python runs on two processes, with a small Llama for a base."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch

import pytest
from cluster.adapters import base
from cluster.matrix import on_ranks

PAGE = (Path(__file__).parent.parent / "docs" / "LORA.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_python_on_the_page_runs(tmp_path: Path) -> None:
    base().float().save_pretrained(tmp_path / "base")
    assert on_ranks(2, _run, tmp_path) == ["ok", "ok"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "step-3"}


def _run(folder: Path) -> str:
    names = {"__name__": "page", "folder": folder, "base": str(folder / "base")}
    with patch("torch.distributed.init_process_group"):  # the ranks have joined
        exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), names)
    return "ok"
