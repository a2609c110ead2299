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
BELOW: dict[str, tuple[str, ...]] = {
    "ir": (),
    "ir.text": ("ir",),
    "ir.check": ("ir", "ir.text"),
    "ir.run": ("ir",),
    "passes": ("ir", "ir.text", "ir.check"),
    "frontend": ("ir", "ir.text", "ir.check", "ir.run"),
    "frontend.watch": ("frontend",),
    "frontend.fold": ("frontend.watch",),
    "frontend.capture": ("frontend.fold",),
    "frontend.lower": ("frontend.capture",),
    "backend": ("ir", "ir.text", "ir.check", "ir.run"),
    "backend.stages": ("backend",),
    "backend.ranks": ("backend.stages",),
    "backend.serve": ("backend.ranks",),
    "backend.pictures": ("backend.stages",),
    "backend.files": ("backend.ranks", "backend.pictures"),
    "backend.costs": ("backend.ranks", "backend.pictures"),
    "backend.page": ("backend.files", "backend.costs"),
    "stagecut": ("passes", "frontend.lower", "backend.page", "backend.serve"),
    "tools": ("stagecut",),
    "tools.dump_ir": ("tools",),
    "tools.bench": ("tools.dump_ir",),
}
"""Room -> the rooms right below it. A file imports files of its own room and of all rooms below it, and nothing else of ours."""

TORCH_FREE = ("ir", "ir.text", "ir.check", "passes")
"""Rooms that load without torch."""

LATE = ("stagecut/__init__.py", "stagecut/pipe.py")
"""Files that load a part of the compiler when it is asked for. So may commands, in tools: each loads what it needs."""

FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")) + sorted((ROOT / "stagecut").glob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name of a file, below `stagecut`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(path: Path) -> str:
    """The folder of a file, dotted."""
    return ".".join(path.parent.relative_to(ROOT).parts)


def below(room: str) -> set[str]:
    """A room, and all rooms below it."""
    return {room}.union(*(below(other) for other in BELOW[room]))


def imports_of(path: Path) -> Iterator[tuple[Path, ast.AST, bool]]:
    """Each file of ours that a file imports, where, and whether that is outside of functions and conditions."""
    for node in (tree := ast.parse(path.read_text(encoding="utf-8"))).body:
        yield from _ours(node, True)
    tops = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) not in tops:
            yield from _ours(node, False)


def _ours(node: ast.AST, top: bool) -> Iterator[tuple[Path, ast.AST, bool]]:
    names: list[str] = []
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    for name in names:
        if name.split(".")[0] == "stagecut":
            yield _file(name), node, top


def _file(name: str) -> Path:
    """The file behind a dotted name that is imported: of the module, or of the module that has it."""
    while name.removeprefix("stagecut.") not in MODULES and name not in MODULES:
        name = name.rpartition(".")[0]
    return MODULES.get(name.removeprefix("stagecut."), MODULES.get(name, ROOT))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    allowed = below(room_of(path))
    wrong = [str(other.relative_to(ROOT)) for other, _, _ in imports_of(path) if room_of(other) not in allowed]
    assert not wrong
    names = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names | modules} & set(LAYERS)
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top(path: Path) -> None:
    """Inside a function or for types only they hide a circle."""
    if str(path.relative_to(ROOT)) not in LATE and not room_of(path).startswith("tools"):
        assert [ast.unparse(node) for _, node, top in imports_of(path) if not top] == []


def test_no_circle_of_files() -> None:
    needs = {path: {other for other, _, top in imports_of(path) if top and other != path} for path in FILES}
    while ready := [path for path, others in needs.items() if not others]:
        for path in ready:
            del needs[path]
        needs = {path: others.difference(ready) for path, others in needs.items()}
    assert not needs


def test_the_rule_sees_what_it_forbids() -> None:
    assert "backend.ranks" not in below("backend.pictures")
    assert "frontend" not in below("passes") | below("backend.page")
    assert "stagecut" not in set().union(*(below(room) for room in BELOW if room != "stagecut" and not room.startswith("tools")))
    assert {room_of(path) for path in FILES} == set(BELOW)


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in TORCH_FREE], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_and_the_passes_know_no_torch(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "torch" not in {name.split(".")[0] for name in names}


def test_the_core_and_the_passes_load_without_torch() -> None:
    names = ["stagecut", *(f"stagecut.{module_of(path)}" for path in FILES if room_of(path) in TORCH_FREE)]
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
    assert {config["package-dir"][name] for name in config["packages"]} == on_disk - {"tools/bench"}  # what only maintainers run
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


ASKED = """
import importlib, pkgutil, torch

def refuse(*_):
    raise AssertionError("a GPU is asked for")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
import stagecut
for module in pkgutil.walk_packages(stagecut.__path__, "stagecut."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in stagecut.__all__:
    getattr(stagecut, name)
"""


def test_no_import_asks_for_a_gpu() -> None:
    """A process that has asked for one cannot be forked to use it, and no longer minds CUDA_VISIBLE_DEVICES."""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", ASKED], capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode == 0, found.stderr
