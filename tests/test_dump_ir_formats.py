"""Every format of three models is what the golden files hold; text reads back as itself."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stagecut.tools.dump_ir.main import main

ROOT = Path(__file__).parent.parent
MODELS = {
    "tied": ("--split-at", "inner", "--split-at", "head"),
    "bottleneck": ("--stages", "3"),
    "repeated": ("--split-at", "layers.2", "--split-at", "layers.4"),
}
FORMATS = {
    "text": (),
    "json": ("--format", "json"),
    "dot": ("--format", "dot"),
    "modules.dot": ("--format", "dot", "--only", "stage=1"),
    "ops.dot": ("--format", "dot", "--level", "ops"),
    "svg": ("--format", "svg"),
    "html": ("--format", "html"),
    "report.text": ("--report",),
    "report.json": ("--report", "--format", "json"),
    "report.svg": ("--report", "--format", "svg"),
    "timeline.svg": ("--timeline", "--format", "svg"),
    "timeline.json": ("--timeline", "--format", "json"),
}


def shown(name: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """What dump-ir prints of a model, with paths from the root of the project."""
    assert main([f"{ROOT}/tests/tool_models.py:{name}", *MODELS[name], *options]) == 0
    return capsys.readouterr().out.replace(f"{ROOT}/", "")


def _texts(svg: str) -> str:
    """The texts of a picture: where Graphviz puts them depends on its version."""
    return "".join(f"{text}\n" for text in sorted("".join(e.itertext()) for e in ElementTree.fromstring(svg).findall(".//{*}text")))


def _data(page: str) -> str:
    """The data in a page, without times."""

    class Data(HTMLParser):
        found = ""
        inside = False

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inside = tag == "script" and ("type", "application/json") in attrs

        def handle_data(self, data: str) -> None:
            self.found += data if self.inside else ""

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

    parser = Data()
    parser.feed(page)
    data = json.loads(parser.found)
    for column in data["columns"]:
        del column["seconds"]
    return "".join(f"{key}\n" + "".join(f"  {json.dumps(i)}\n" for i in (v if isinstance(v, list) else [v])) for key, v in data.items())


STEADY: dict[str, Callable[[str], str]] = {"svg": _texts, "html": _data}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_format(name: str, format: str, capsys: pytest.CaptureFixture[str], bless: Callable[[str, str], None]) -> None:
    steady = STEADY.get(format, lambda text: text)
    bless(f"dump-ir-{name}.{format}.golden", steady(shown(name, FORMATS[format], capsys)))


@pytest.mark.parametrize("stop", [(), ("--stop-after", "version-mutations"), ("--stop-after", "partition"), ("--stop-after", "liveness")])
@pytest.mark.parametrize("name", MODELS)
def test_text_reads_back_as_itself(
    name: str, stop: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shown(name, stop, capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO(first))
    assert main(["-"]) == 0
    assert capsys.readouterr().out == first
