"""examples/first_look.ipynb: every cell runs, and shows what it shows here. `pytest --bless` writes what it shows now."""

from __future__ import annotations

import ast
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from stagecut.backend.pictures import render

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_look.ipynb"


def run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The outputs of a cell, as a notebook stores them: what it prints, and the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data = {"text/html": lines(value._repr_html_()), **data}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def lines(text: str) -> list[str]:
    """A text as a notebook stores it."""
    return text.splitlines(keepends=True)


def test_the_notebook_runs_and_shows_what_it_shows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Python alone: what a kernel adds are counters and times. Pictures are by the program that draws them alike everywhere."""
    monkeypatch.setattr(render, "RENDERERS", (render.PURE,))
    stored = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(stored)
    names: dict[str, Any] = {"__name__": "notebook"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["outputs"] = run_cell("".join(cell["source"]), names, number)
        cell["execution_count"] = number
    shown = json.dumps(notebook, indent=1) + "\n"
    if request.config.getoption("--bless"):
        NOTEBOOK.write_text(shown, encoding="utf-8")
    assert shown == NOTEBOOK.read_text(encoding="utf-8"), "the notebook shows something else; pytest --bless rewrites it"
