"""Imports point one way, the IR and the passes load without torch, and the package is what is on disk."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("ir", "passes", "frontend", "backend", "tools")
MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "frontend": {"ir", "frontend"},
    "backend": {"ir", "backend"},
    "pipe": {"ir", "passes", "frontend", "backend"},
    "tools": {"ir", "passes", "frontend", "backend", "pipe", "tools"},
}
TORCH_FREE_IR = ("graph", "types", "parser", "printer", "verifier", "outline", "errors", "blame", "bindings", "life", "ops")
SOURCES = [*sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")), ROOT / "stagecut" / "pipe.py"]


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(path: Path) -> str:
    """The layer a source file belongs to."""
    return "pipe" if path.name == "pipe.py" and path.parent.name == "stagecut" else path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("stagecut.") and name.split(".")[1] in MAY_IMPORT}
    assert ours <= MAY_IMPORT[layer_of(path)]
    assert not {name.split(".")[0] for name in imported(path)} & set(LAYERS)


@pytest.mark.parametrize("path", [p for p in SOURCES if layer_of(p) == "passes"], ids=lambda path: path.name)
def test_passes_know_no_torch(path: Path) -> None:
    assert "torch" not in {name.split(".")[0] for name in imported(path)}


def test_ir_and_passes_load_without_torch() -> None:
    names = ["stagecut", *(f"stagecut.ir.{name}" for name in TORCH_FREE_IR)]
    names += [f"stagecut.passes.{path.stem}" for path in sorted((ROOT / "passes").glob("*.py")) if path.stem != "__init__"]
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint('torch' in sys.modules, len(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split()[0] == "False"


def test_the_check_for_torch_would_see_it() -> None:
    code = "import sys, stagecut.pipe\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "True"


def test_package_list_is_what_is_on_disk() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for layer in ("stagecut", *LAYERS) for path in (ROOT / layer).rglob("__init__.py")]
    on_disk = {folder.as_posix() for folder in folders if folder.parts[0] != "stagecut" or len(folder.parts) == 1}
    assert {config["package-dir"][name] for name in config["packages"]} == on_disk
    assert set(config["packages"]) == set(config["package-dir"])
    assert {name: name.removeprefix("stagecut.").replace(".", "/") for name in config["packages"]} == config["package-dir"]


@pytest.mark.parametrize("layer", LAYERS)
def test_links_are_there_and_relative(layer: str) -> None:
    link = ROOT / "stagecut" / layer
    assert link.is_symlink()
    assert os.readlink(link) == f"../{layer}"
    assert (link / "__init__.py").samefile(ROOT / layer / "__init__.py")


def test_tests_are_flat_and_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
