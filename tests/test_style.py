"""How dense the code is: few syntax nodes a line and a statement, short functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parent.parent
FOLDERS = ("ir", "passes", "frontend", "backend", "stagecut")
CONTEXTS = (ast.Load, ast.Store, ast.Del)
COMPOUND = (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)

LINE, STATEMENT, MEDIAN, NINETIETH = 6.0, 130, 9, 30


def sources() -> Iterator[tuple[Path, ast.Module, set[int]]]:
    """Every file of the compiler, its tree, and the numbers of its lines of code: no comments, no docstrings, nothing blank."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "stagecut" and path.parent.name != "stagecut":
                continue  # a link
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            code = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
            for node in ast.walk(tree):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                    code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            yield path, tree, code


def nodes(tree: ast.AST) -> int:
    """Syntax nodes in a tree. Whether a name is read or written is none."""
    return sum(not isinstance(node, CONTEXTS) for node in ast.walk(tree))


def test_lines_hold_little() -> None:
    files = list(sources())
    assert sum(nodes(tree) for _, tree, _ in files) / sum(len(code) for _, _, code in files) <= LINE


def test_functions_are_short() -> None:
    lengths = [
        len(code.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
        for _, tree, code in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    assert median(lengths) <= MEDIAN
    assert quantiles(lengths, n=10)[-1] <= NINETIETH


def test_statements_are_simple() -> None:
    large = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {nodes(node)} nodes"
        for path, tree, _ in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and not isinstance(node, COMPOUND) and nodes(node) > STATEMENT and not _is_table(node)
    ]
    assert large == []


def _is_table(node: ast.stmt) -> bool:
    """True for an assignment of a tuple, list, set or dict of literals."""
    value = getattr(node, "value", None)
    return isinstance(value, (ast.Tuple, ast.List, ast.Set, ast.Dict))
