"""What dump-ir is given to show: odd sources, users' mistakes by their line, modules kept whole."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagecut.frontend.capture.quiet import quiet_torch
from stagecut.tools.dump_ir.main import main

FILES = {
    "wrong_syntax.py": "import torch\ndef make(:\n    pass\n",
    "imports_wrong_syntax.py": "import wrong_syntax\n",
    "misses.py": "import torch\nimport nothing_of_that_name\n",
    "factories.py": """
import json
import torch

def make():
    return torch.nn.Linear("a", 3), (), {}

def reads():
    return json.loads("{")

def needs(x, y=1, *, z):
    return None

def two():
    return torch.nn.Linear(2, 2), ()

def _own():
    return None
""",
    "none.py": "import torch\n",
    "package/__init__.py": "",
    "package/inside.py": "def make():\n    return 1\n",
    "broken/__init__.py": "raise RuntimeError('not today')\n",
    "exported.pt2/data": "",
    "nothing/here.txt": "",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with these files, and Python's imports as before afterwards."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - known:
        if name.partition(".")[0] in ("package", "broken") or f"{name}.py" in FILES:
            del sys.modules[name]


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err


@pytest.mark.parametrize(
    ("source", "what", "where"),
    [
        ("wrong_syntax.py:make", "SyntaxError: ", "wrong_syntax.py:2: def make(:"),
        ("imports_wrong_syntax.py:make", "SyntaxError: ", "wrong_syntax.py:2: def make(:"),
        ("misses.py:make", "No module named 'nothing_of_that_name'", "misses.py:2: import nothing_of_that_name"),
        ("misses:make", "No module named 'nothing_of_that_name'", "misses.py:2: import nothing_of_that_name"),
        ("broken.inside", "RuntimeError: not today", "__init__.py:1: raise RuntimeError('not today')"),
        ("factories.py:make", "TypeError: ", 'factories.py:6: return torch.nn.Linear("a", 3), (), {}'),
        ("factories.py:reads", "JSONDecodeError: ", 'factories.py:9: return json.loads("{")'),
        ("factories.py:needs", "takes arguments: x, z", "factories.py:11: def needs(x, y=1, *, z):"),
        ("factories.py:two", "returned a tuple of 2", "factories.py:14: def two():"),
    ],
)
def test_a_mistake_is_shown_at_the_users_line(source: str, what: str, where: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = failure(capsys, source).splitlines()
    assert what in first
    assert second.startswith("  at: ")
    assert second.endswith(where)


@pytest.mark.parametrize(
    ("source", "what", "hint"),
    [
        ("", "SOURCE is empty: it must be FILE.py:FACTORY", "dump-ir model.py:make"),
        (":", "':' is no SOURCE", "dump-ir model.py:make"),
        (":make", "':make' is no SOURCE", "dump-ir model.py:make"),
        ("hf:", "'hf:' is no SOURCE", "dump-ir model.py:make"),
        ("nonsense", "'nonsense' is no SOURCE", "dump-ir model.py:make"),
        ("package.nonsense", "'package.nonsense' is no SOURCE", "dump-ir model.py:make"),
        ("factories.py:make:again", "is no SOURCE", "dump-ir model.py:make"),
        ("factories.py", "names no function that makes the model", "factories.py:make or factories.py:reads or factories.py:two"),
        ("factories.py:", "names no function that makes the model", "factories.py:make or factories.py:reads or factories.py:two"),
        (
            "none.py",
            "names no function",
            "write a function without arguments there that returns (module, args, kwargs), and name it: none.py:make",
        ),
        ("wrong_syntax.py", "names no function", "write a function without arguments"),
        ("package.inside", "names no function", "package.inside:make"),
        ("package", "'package' is a directory", "package/__init__.py:FACTORY or package/inside.py:FACTORY"),
        ("nothing", "'nothing' is a directory", "nothing/model.py:make"),
        ("exported.pt2", "'exported.pt2' is a directory", "torch.export.save writes one file"),
    ],
)
def test_odd_sources(source: str, what: str, hint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = failure(capsys, source)
    assert what in shown.splitlines()[0]
    assert f"  try: {hint}" in shown or shown.endswith(f"{hint}\n")


FILES_OF_OTHER_NAMES = {
    "text.txt": ("program @P phase=traced {\n  output ()\n}\n", "this is IR text: call it text.ir, or dump-ir - < text.txt"),
    "my text": ("# mine\nprogram @P phase=traced {\n  output ()\n}\n", "this is IR text: call it my text.ir, or dump-ir - < 'my text'"),
    "config.json": ('{"model_type": "llama"}', "this is a config of transformers: dump-ir hf:NAME --config config.json"),
    "weights.safetensors": ("", "weights have no code: name the function that makes the model, model.py:make"),
    "notes.txt": ("to do", "dump-ir model.py:make"),
}


@pytest.mark.parametrize("name", FILES_OF_OTHER_NAMES)
def test_a_file_of_another_name_is_told_how_to_be_shown(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, hint = FILES_OF_OTHER_NAMES[name]
    (folder / name).write_text(content)
    assert failure(capsys, name).endswith(f"  try: {hint}\n")


NEAR_FILES = {
    "factorise.py:make": "did you mean 'factories.py'?",
    "factorise:make": "did you mean 'factories'?",
    "nothing/factories.py:make": "no file in 'nothing' ends in .py",
    "befor.ir": "did you mean 'before.ir'?",
}


@pytest.mark.parametrize("source", NEAR_FILES)
def test_a_file_that_is_not_there_has_others_of_like_names(source: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "before.ir").touch()
    assert failure(capsys, source).endswith(f"  try: {NEAR_FILES[source]}\n")


def test_text_that_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "standard input is no text" in failure(capsys, "-")


KEPT = """
import sys
import torch
from torch import nn

class Branches(nn.Module):
    def forward(self, x):
        print("seen", file=sys.stderr)
        return x if x.sum() > 0 else -x

def make():
    return nn.Sequential(nn.Linear(4, 4), Branches()), (torch.ones(2, 4),), {}
"""


def test_a_module_kept_whole_is_told_in_one_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kept_whole.py"
    path.write_text(KEPT)
    assert main([f"{path}:make"]) == 0
    shown = capsys.readouterr()
    assert "module.1" in shown.out
    told = [line for line in shown.err.splitlines() if line != "seen"]
    assert len(told) == 2
    assert told[0].startswith(
        "dump-ir: note: module '1' and all of its class are kept whole: what its code does depends on the data in a tensor (GuardOn"
    )
    assert told[0].endswith("kept_whole.py:9 in forward: return x if x.sum() > 0 else -x")
    assert told[1] == "  try: --leaf NAME keeps a module whole without this note"
    assert "seen" in shown.err  # what the model says itself is heard
    assert main([f"{path}:make", "--leaf", "1"]) == 0
    assert "note" not in capsys.readouterr().err


def test_torch_is_heard_again_afterwards_and_where_it_was_asked_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torch.of_a_test")
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    with quiet_torch():
        logger.warning("one")
    logger.warning("two")
    monkeypatch.setenv("TORCH_LOGS", "+export")
    with quiet_torch():
        logger.warning("three")
    logger.removeHandler(handler)
    assert handler.stream.getvalue() == "two\nthree\n"
