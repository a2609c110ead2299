"""The printer: names, files, literals, sizes."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import load

from stagecut.ir.graph import (
    CONTEXTS,
    KINDS,
    PHASES,
    ROLES,
    ROUTES,
    SHARES,
    Effects,
    Frame,
    Loc,
    Mode,
    Op,
    Place,
    Program,
    RegionRef,
    Target,
    Token,
    Value,
)
from stagecut.ir.text.printer import file_names, fqn_text, line_of, literal_text, scope_text, size_text, target_text, text, value_names
from stagecut.ir.types import ANY, DTYPES, ITEM, MEAN, NONE, SCALAR_KINDS, SUM, TensorType

F32 = TensorType("f32", (4,))


def test_equal_hints_get_names_of_their_own() -> None:
    program = Program("P")
    x = program.add_input(F32, "x")
    for hint in ("x", "x_1", "", "", "a b/c"):
        op = Op("aten.neg.default", (x,))
        op.add_result(F32, hint)
        program.ops.append(op)
    assert list(value_names(program).values()) == ["%x", "%x_1", "%x_1_1", "%v", "%v_1", "%a_b_c"]


def test_text_does_not_depend_on_identity() -> None:
    assert text(load("everything")) == text(load("everything"))


def test_files_with_one_name_are_told_apart() -> None:
    ops = [Op("a.b", place=Place(loc=Loc(path, 1))) for path in ("/a/m.py", "/b/m.py", "/a/m.py", "<string>")]
    assert file_names(ops) == {"/a/m.py": "m.py", "/b/m.py": "m.py_1", "<string>": "_string_"}


@pytest.mark.parametrize(
    ("item", "printed"),
    [
        ('a\n"b"', '"a\\n\\"b\\""'),
        (True, "True"),
        (None, "None"),
        (..., "..."),
        (-1e-05, "-1e-05"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (complex(1, -math.inf), "complex(1.0, -inf)"),
        (Token("torch.float32"), "torch.float32"),
        (Mode(False), "mode(False)"),
        (RegionRef(2), "<2>"),
    ],
)
def test_literal(item: Any, printed: str) -> None:
    assert literal_text(item) == printed


@pytest.mark.parametrize(
    ("size", "printed"),
    [
        (None, "dynamic"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (15 << 20, "15 MiB"),
        (1 << 30, "1 GiB"),
        (3 << 50, "3072 TiB"),
    ],
)
def test_size(size: int | None, printed: str) -> None:
    assert size_text(size) == printed


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("layers.0.weight", "@layers.0.weight"),
        ("a b", '@"a b"'),
        ("", '@""'),
        (".a", '@".a"'),
        ("a.", '@"a."'),
        ("ü", '@"\\u00fc"'),
        ("a\n", '@"a\\n"'),
    ],
)
def test_fqn(name: str, printed: str) -> None:
    assert fqn_text(name) == printed


def test_scope() -> None:
    assert scope_text((Frame("layers.0"), Frame("odd name", 2), Frame("lin", 1))) == 'layers.0/"odd name"~2/lin~1'


def test_target() -> None:
    assert target_text(Target("module.layers.0")) == "module.layers.0"
    assert target_text(Target("module.we ird")) == 'module."we ird"'


def test_line_of_shows_broken_ops_too() -> None:
    """Messages print ops with undefined operands and effects that point nowhere."""
    program = load("clean")
    op = program.ops[0]
    op.set_operands((Value(NONE, "ghost"),), {})
    op.effects = Effects(writes=(Value(NONE, "one"),), views=(Value(NONE, "other"),))
    line = line_of(program, op)
    assert "%<undefined ghost>" in line
    assert "view(%<undefined other>) writes(%<undefined one>)" in line


def test_transfers_say_how_much_they_carry() -> None:
    assert "  transfer %skip : 0 -> 2 relay(1)  # 16 B\n" in text(load("linked"))


# --- the page about the text --------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
NOT_PRINTED = {"defined", "undefined", "beyond"}
"""Words of the printer's own errors, and of a size that no memory has."""
NOTATIONS = ("~1", "{1,16}", "@cuda:0", "%.x", "-> output", "->", "<0>", "view(", "form(", "device(", "gradient(", "# ")


def words_of(path: Path) -> Iterator[str]:
    """The words in the texts of a file, those of its docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs and "\\" not in node.value:
            yield from re.findall(r"(?<![%\w])[a-z][a-z_]{3,}(?!\w)", node.value)


def read_by(path: Path) -> Iterator[str]:
    """The words that the parser accepts or expects."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("_accept", "_expect"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield from re.findall(r"[a-z][a-z_]+", argument.value)


def test_the_page_has_every_word_of_the_text() -> None:
    page = (ROOT / "docs" / "READ_THE_IR.md").read_text()
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", page, re.DOTALL))
    words = {*words_of(ROOT / "ir" / "text" / "printer.py"), *read_by(ROOT / "ir" / "text" / "parser.py")} - NOT_PRINTED
    words |= {*SHARES, *ROUTES, *PHASES, *ROLES, *KINDS, *CONTEXTS, *SCALAR_KINDS, *DTYPES, ANY, ITEM, MEAN, SUM}
    assert {"share", "nonpersistent", "renews", "lane", "left"} <= words
    missing = sorted(word for word in words if not re.search(rf"(?<!\w){word}(?!\w)", code))
    assert missing == []
    assert [notation for notation in NOTATIONS if notation not in code] == []
