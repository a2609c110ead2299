"""README and docs: links lead somewhere, names are public, every page is in the site, and what the pages show runs.

`pytest --bless` writes what the snippets print, and the picture of the README.
"""

from __future__ import annotations

import ast
import builtins
import re
import runpy
import shlex
import symtable
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.commands import torchrun

import stagecut
from stagecut.ir.errors import StagecutError
from stagecut.tools.dump_ir.main import main as dump_ir

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / ".github").rglob("*.md")), *sorted(DOCS.rglob("*.md"))]
USERS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
"""Pages for users: not the decisions."""

RUN_HERE = ("README.md", "docs/CUT.md", "docs/COMING_FROM.md", "docs/TROUBLESHOOTING.md")
RUN_ELSEWHERE = {
    "docs/BACKWARD.md": "test_tool_docs.py",
    "docs/BALANCE.md": "test_balance_docs.py",
    "docs/CHECKPOINTS.md": "test_serving_docs.py",
    "docs/DISTRIBUTED.md": "test_distributed_docs.py",
    "docs/DUMP_IR.md": "test_tool_docs.py",
    "docs/FIND_A_SLOW_STAGE.md": "test_tool_docs.py",
    "docs/FIND_A_WRONG_GRADIENT.md": "test_tool_docs.py",
    "docs/HTML.md": "test_page.py",
    "docs/INFERENCE.md": "test_serving_docs.py",
    "docs/LORA.md": "test_lora_docs.py",
    "docs/PICTURES.md": "test_pictures.py",
    "docs/READ_THE_IR.md": "test_tool_docs.py",
    "docs/SAVED.md": "test_saved.py",
    "docs/TRAINERS.md": "test_trainers.py",
    "docs/TRAINING.md": "test_training_docs.py",
    "docs/TUTORIAL.md": "test_docs.py",
}
"""Page -> the test that runs its code."""


def named(path: Path) -> str:
    """A page, from the root."""
    return str(path.relative_to(ROOT))


# --- links --------------------------------------------------------------------------------------------


def prose(path: Path) -> str:
    """The text of a page without code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "`code`", text)


def slugs(path: Path) -> set[str]:
    """The anchors of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading of it."""
    wrong: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue  # no network here
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in slugs(path)):
            wrong.append(link)
    assert wrong == []


def site() -> str:
    return (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_site_once() -> None:
    """What is not for readers in order, the decisions, is reached by links."""
    shown = re.findall(r"([\w/.-]+\.md)$", site().partition("\nnav:")[2], re.MULTILINE)
    pages = [path.name for path in DOCS.glob("*.md")] + ["index.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    assert sorted(shown) == sorted(pages)


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", USERS, ids=named)
def test_names_that_pages_use_are_public(page: Path) -> None:
    """Code imports from `stagecut` itself, and what it imports is there."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    names = {name.strip() for group in re.findall(r"from stagecut import ([\w, ]+)", code) for name in group.split(",")}
    names.update(re.findall(r"\b(?:stagecut|pp)\.([A-Za-z_]\w*)", code))
    assert names - {*stagecut.__all__, "__version__"} == set()
    assert "from stagecut." not in code


EXAMPLES = sorted((ROOT / "examples").glob("*.py")) + sorted((ROOT / "examples").glob("*.ipynb"))


def modules_of(code: str) -> set[str]:
    """The modules of stagecut that code imports from or reaches into."""
    inside = re.findall(r"(?:from|import) (stagecut\.[\w.]+)", code)
    return {*inside, *re.findall(r"\b(stagecut\.(?:backend|frontend|ir|passes|tools)\.\w+)", code)}


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_examples_use_public_names(path: Path) -> None:
    """As pages do: from `stagecut` itself."""
    code = path.read_text(encoding="utf-8")
    assert modules_of(code) == set()
    groups = re.findall(r"from stagecut import (?:\(([^)]*)\)|([\w, ]+))", code)
    names = {name.strip() for group in groups for name in "".join(group).split(",")} - {""}
    names.update(re.findall(r"\bstagecut\.([A-Za-z_]\w*)", code))
    assert names - {*stagecut.__all__, "__version__", "__file__"} == set()


def test_an_example_that_reaches_inside_is_found() -> None:
    assert EXAMPLES
    assert modules_of("from stagecut.ir.graph import Op") == {"stagecut.ir.graph"}
    assert modules_of("x = stagecut.backend.costs") == {"stagecut.backend.costs"}


def test_the_reference_has_every_public_name_once() -> None:
    shown = re.findall(r"^::: stagecut\.(\w+)$", (DOCS / "API.md").read_text(encoding="utf-8"), re.MULTILINE)
    ours = [name for name in stagecut.__all__ if getattr(getattr(stagecut, name), "__module__", "stagecut").startswith("stagecut")]
    errors = [name for name in ours if _is_error(getattr(stagecut, name))]
    assert sorted(shown) == sorted(ours)
    assert [name for name in shown if name in errors] == shown[-len(errors) :]


def test_every_error_has_a_cure() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "TROUBLESHOOTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(name for name in stagecut.__all__ if _is_error(getattr(stagecut, name)))


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, StagecutError)


# --- code ---------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"```python\n(.*?)```(\n\n```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", [page for page in USERS if "```python" in page.read_text(encoding="utf-8")], ids=named)
def test_the_first_example_stands_or_the_page_says_what_goes_before(page: Path) -> None:
    """Names that it does not make are named above it, and so is the process group that a driver runs on."""
    before, code = re.split(r"^```python.*\n", page.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)
    code, _, _ = code.partition("```")
    assert _unknown(code) - {*re.findall(r"`(\w+)`", before)} == set()
    if re.search(r"\bDriver\(", code):
        assert "init_process_group" in before + code


def _unknown(code: str) -> set[str]:
    """The names that code reads and that nothing in it makes."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    table = symtable.symtable(code, "page", "exec")
    made = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    waiting = [*table.get_children()]
    for inner in waiting:  # names of functions and comprehensions are theirs
        made |= {symbol.get_name() for symbol in inner.get_symbols() if symbol.is_local() or symbol.is_imported()}
        waiting += inner.get_children()
    return used - made - {*dir(builtins)}


def test_a_name_that_nothing_makes_is_found() -> None:
    assert _unknown("import a\nb = [c for c in range(2)]\ndef d(e): return e + f\nlen(b), a, d, g") == {"f", "g"}


def test_every_page_with_code_is_run() -> None:
    with_code = {named(page) for page in USERS if "```python" in page.read_text(encoding="utf-8")}
    assert with_code <= {*RUN_HERE, *RUN_ELSEWHERE}
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / "tests" / test).read_text(encoding="utf-8")


@cache
def ran(page: str) -> tuple[str, dict[str, Any]]:
    """A page with what its snippets print now, and the names that they leave."""
    names: dict[str, Any] = {"__name__": "page"}

    def real(block: re.Match[str]) -> str:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(block[1], names)
        if block[2] is None:
            return block[0]
        return f"```python\n{block[1]}```\n\n```text\n{printed.getvalue()}```"

    return _BLOCK.sub(real, (ROOT / page).read_text(encoding="utf-8")), names


@pytest.mark.parametrize("page", RUN_HERE)
def test_snippets_print_what_the_page_says(page: str, request: pytest.FixtureRequest) -> None:
    path = ROOT / page
    shown, _ = ran(page)
    if request.config.getoption("--bless"):
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8"), f"{page} shows something else; pytest --bless rewrites it"


def test_the_readme_cuts_a_model_that_computes_the_same(bless: Any) -> None:
    """The same logits, and the picture that it shows. It fits on two screens."""
    _, names = ran("README.md")
    expected = names["model"](input_ids=names["ids"], use_cache=False).logits
    assert torch.equal(names["logits"], expected)
    bless("../../docs/pictures/readme.svg", names["pipe"].to_svg(renderer="graphviz-pure"))
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


# --- the tutorial -------------------------------------------------------------------------------------


def parts(kind: str) -> Iterator[tuple[str, str]]:
    """The files of the tutorial, or what they print: name -> text."""
    text = (DOCS / "TUTORIAL.md").read_text(encoding="utf-8")
    yield from re.findall(rf'^```{kind} title="([\w.]+)"\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def test_the_tutorial_can_be_followed(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, in an empty folder, print what it says, on two processes where it says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, code in parts("python"):
        (tmp_path / name).write_text(code, encoding="utf-8")
    page = DOCS / "TUTORIAL.md"
    text = page.read_text(encoding="utf-8")
    printed: dict[str, str] = {}
    commands = re.findall(r"^```\n((?:python|torchrun|dump-ir) .*?)^```", text, re.DOTALL | re.MULTILINE)
    for command in "".join(commands).splitlines():
        printed[command.split()[-1]] = run(command)
    del sys.modules["cut"]
    assert "1F1B with 8 micro-batches" in printed["--report"]
    assert "<svg" in (tmp_path / "pipe.html").read_text(encoding="utf-8")

    def real(block: re.Match[str]) -> str:
        return f'```text title="{block[1]}"\n{printed[block[1]]}```'

    shown = re.sub(r'```text title="([\w.]+)"\n.*?```', real, text, flags=re.DOTALL)
    if request.config.getoption("--bless"):
        page.write_text(shown, encoding="utf-8")
    assert shown == page.read_text(encoding="utf-8"), "docs/TUTORIAL.md shows something else; pytest --bless rewrites it"


def run(command: str) -> str:
    """What a command of the tutorial prints. Python and `dump-ir` run in this process: starting one takes longer than all they do."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        assert words[0] == "--nproc-per-node"
        done = torchrun(int(words[1]), *words[2:])
        assert done.returncode == 0, done.stderr
        return done.stdout
    printed = StringIO()
    with redirect_stdout(printed):
        if program == "dump-ir":
            assert dump_ir(words) == 0
        elif words[0] == "-c":
            exec(words[1], {})
        else:
            runpy.run_path(words[0], run_name="__main__")
    return printed.getvalue()


# --- sentences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_sentences_begin_with_their_subject(page: Path) -> None:
    """None begins with "Of" or "What", but for questions."""
    text = re.sub(r"^[|#].*$", "", prose(page), flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n *- ", text):
        line = " ".join(paragraph.split()).removeprefix("- ")
        found = re.findall(r"(?:^|(?<=[.!?] ))(?:Of|What) [^.?!]*[.!:]", line)
        assert found == []
