"""Pictures in a page: nothing in them runs or loads; the plain one shows stages and what goes between them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from helpers import load

from stagecut.backend.page.svg import clean_svg, stage_picture
from stagecut.ir.errors import InputError

SPACE = "{http://www.w3.org/2000/svg}"


def _svg(inside: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{inside}</svg>'


@pytest.mark.parametrize(
    "inside",
    [
        "<script>bad()</script>",
        '<g onload="bad()"/>',
        '<g onClick="bad()"/>',
        "<foreignObject><body>bad</body></foreignObject>",
        '<image href="http://bad/x.png"/>',
        '<a xlink:href="javascript:bad()"><text>x</text></a>',
        '<a href="http://bad/"><text>x</text></a>',
        '<use href="http://bad/x.svg#a"/>',
        '<rect style="fill: url(http://bad/x)"/>',
        '<rect fill="url( &quot;//bad/x&quot; )"/>',
        '<style>@import "http://bad/x.css";</style>',
        "<style>g { background: \\75rl(http://bad/x) }</style>",
        '<animate attributeName="href" values="javascript:bad()"/>',
        '<set attributeName="onclick" to="bad()"/>',
    ],
)
def test_what_could_run_or_load_is_gone(inside: str) -> None:
    assert "bad" not in clean_svg(_svg(inside))


def test_what_draws_stays() -> None:
    inside = '<g id="stage-2"><title>%x &lt;b&gt;</title><path d="M0 0" fill="url(#grey)"/><use xlink:href="#a"/><text>a &amp; b</text></g>'
    clean = clean_svg(f'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x.dtd">\n<!-- made -->{_svg(inside)}')
    assert clean.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    for part in ('id="stage-2"', "%x &lt;b&gt;", 'fill="url(#grey)"', 'href="#a"', "a &amp; b"):
        assert part in clean


@pytest.mark.parametrize("text", ["no picture", "<svg", "<html><body/></html>"])
def test_what_is_no_svg_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no SVG"):
        clean_svg(text)


def test_the_plain_picture() -> None:
    root = ElementTree.fromstring(stage_picture(load("linked")))
    groups = root.findall(f"{SPACE}g")
    assert [g.get("id") for g in groups if g.get("id")] == ["inputs", "stage-0", "stage-1", "stage-2"]
    pairs = {g.get("data-pair"): g.findtext(f"{SPACE}title") for g in groups if g.get("data-pair")}
    assert pairs == {"-1 0": "%x", "-1 1": "%y", "0 1": "%a", "0 2": "%skip", "1 2": "%b"}
