"""The page as text: it is whole, alone, safe, and holds what a compile has to show."""

from __future__ import annotations

import hashlib
import json
import re
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import load
from pages import BAD, CLOSE, History, linked, long, tampered

from stagecut.backend.page.page import findings, page_data, to_html
from stagecut.ir.errors import InputError
from stagecut.ir.graph import Program
from stagecut.ir.text.printer import text

VOID = {"meta", "input", "br", "img", "link", "hr"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><title>drawn</title></svg>'
MAKERS: list[Callable[[], tuple[History, Program]]] = [linked, tampered, long]


class Tags(HTMLParser):
    """All tags with their attributes; `open` are those never closed, `scripts` the contents of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def data_of(page: str) -> dict[str, Any]:
    """The data inside a page."""
    found: dict[str, Any] = json.loads(Tags(page).scripts[0])
    return found


@pytest.mark.parametrize("make", MAKERS)
def test_tags_are_balanced_and_nothing_comes_from_elsewhere(make: Callable[[], tuple[History, Program]]) -> None:
    tags = Tags(to_html(*make(), timeline_svg=SVG))
    assert tags.open == []
    assert len(tags.scripts) == 2
    assert not {"img", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in tags.found}
    for _, attributes in tags.found:
        assert not [name for name in attributes if name in ("src", "href", "action") or name.startswith("on")]


def test_only_the_script_of_the_page_may_run() -> None:
    tags = Tags(to_html(*linked()))
    policy = next(a["content"] or "" for tag, a in tags.found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    digest = b64encode(hashlib.sha256(tags.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "http" not in "".join(re.findall(r"https?://\S+", tags.scripts[1]))


def test_names_cannot_leave_their_place() -> None:
    page = to_html(*tampered(), title=BAD + CLOSE, timeline_svg=SVG.replace("drawn", "&lt;img&gt;"))
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert page.count("<script") == 2
    data = data_of(page)
    assert data["name"] == CLOSE
    assert data["state"][0]["names"] == [f'@"{BAD}"', f'@"{CLOSE}"']


def test_lives_in_the_data() -> None:
    data = page_data(*linked())
    skip = next(value for value in data["values"] if value["name"] == "%skip")
    stage, target, _, _, line = data["ops"][skip["born"]]
    assert (stage, data["strings"][target]) == (0, "aten.neg.default")
    assert data["lines"][line].startswith("%skip = ")
    assert [data["ops"][number][0] for (number,) in skip["uses"]] == [2]
    assert [way["via"] for way in data["ways"] if way["value"] == "%skip"] == [(1,)]
    assert data["chains"] == [["@buf", "%buf.1"]]
    tied = data["state"][0]
    assert (tied["held"], tied["share"]) == ([[0, ["@w"]], [2, ["@tied.w"]]], "replicate")


@pytest.mark.parametrize("make", MAKERS)
def test_every_op_knows_its_line(make: Callable[[], tuple[History, Program]]) -> None:
    history, program = make()
    lines = [line.strip() for line in history[-1][1].splitlines()]
    data = page_data(history, program)
    for _, target, *_, line in data["ops"]:
        assert data["strings"][target] in lines[line]


def test_regions_know_their_lines() -> None:
    program = load("everything")
    data = page_data([("input", text(program), 0)], program)
    yields = [line for _, target, *_, line in data["ops"] if data["strings"][target] == "yield"]
    starts = ["yield (%b", "yield [%w", "yield (1,", "yield (%s", "yield (%s"]
    assert [text(program).splitlines()[line].strip()[:9] for line in yields] == starts


def test_a_picture_of_the_caller_is_shown() -> None:
    assert "<title>drawn</title>" in to_html(*linked(), graph_svg=SVG)


@pytest.mark.parametrize("svg", ["<p>", "no picture", "<svg", "<html><body/></html>"])
def test_what_is_no_svg_is_refused(svg: str) -> None:
    with pytest.raises(InputError, match="no SVG"):
        to_html(*linked(), graph_svg=svg)


def test_a_picture_loses_what_stands_before_it_in_a_file() -> None:
    page = to_html(*linked(), graph_svg=f'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD" "x.dtd">\n<!-- made -->\n{SVG}\n')
    assert f'<div class="picture">{SVG}</div>' in page
    assert page.count("<!DOCTYPE") == 1
    assert "<?xml" not in page


def test_without_a_picture_there_is_none() -> None:
    assert "<svg" not in to_html(*linked())


def test_a_traced_program_and_no_history() -> None:
    page = to_html([], load("everything"))
    assert data_of(page)["columns"] == []
    assert Tags(page).open == []


def test_findings_without_costs() -> None:
    assert [*findings(load("linked"), None)] == [
        ("values that other stages hand on: 1, the farthest %skip through 1, to stage 2", "value:%skip"),
        ("@w is used by several stages (held by 0, 2): replicate", "state:@w"),
    ]


def test_long_texts_are_stored_once() -> None:
    history, program = long(2000)
    page = to_html(history, program)
    assert len(page) < 0.4 * sum(len(content) for _, content, _ in history)


def test_time_is_linear() -> None:
    times = []
    for ops in (2000, 8000):
        history, program = long(ops)
        start = time.process_time()
        to_html(history, program)
        times.append(time.process_time() - start)
    assert times[1] < 12 * times[0] + 0.5


def test_costs() -> None:
    from test_balance import IDS, Blocks

    from stagecut import Setting, pipeline

    pipe = pipeline(Blocks(), (IDS,), stages=3, check=None)
    data = page_data([], pipe.program, pipe.report())
    assert [stage["index"] for stage in data["stages"]] == [0, 1, 2]
    assert sum(stage["share"] for stage in data["stages"]) == pytest.approx(1)
    assert data["report"]["schedule"] == "1F1B"
    assert {way["why"] for way in data["ways"]} > {"its gradient comes back"}
    said = [sentence for sentence, _ in data["findings"]]
    assert any("is the slowest" in sentence for sentence in said)
    assert any("needs the most memory" in sentence for sentence in said)
    assert not any("other cuts" in sentence for sentence in said)
    few = findings(pipe.program, pipe.report(Setting(n_microbatches=2)))
    assert any("time is waiting" in sentence for sentence, _ in few)
    report = replace(pipe.report(), best=0.5 * pipe.report().seconds)
    assert ("other cuts make the step 50 % shorter", "") in findings(pipe.program, report)


def test_a_stage_that_does_not_fit_is_marked_and_found_first() -> None:
    from test_balance import IDS, Blocks
    from test_report import SMALL

    from stagecut import Setting, pipeline

    pipe = pipeline(Blocks(), (IDS,), stages=3, check=None)
    data = page_data([], pipe.program, pipe.report(Setting([SMALL, "H100", "H100"])))
    assert data["report"]["too_large"] == [0]
    assert data["findings"][0][0].startswith("stage 0 needs")
    assert data["findings"][0][1] == "stage:0"


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = (Path(__file__).parent.parent / "docs" / "HTML.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    data = data_of((tmp_path / "compile.html").read_text(encoding="utf-8"))
    assert [stage["ops"] for stage in data["stages"]] == [2, 1]
    assert len(data["columns"]) == 1
    assert data["report"] is not None
