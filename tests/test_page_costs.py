"""What the page says of costs, in a real browser: what takes the time and the memory of a stage, at two widths, light and dark."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Page, browser
from pages import linked
from test_balance import IDS, Blocks
from torch import nn

from stagecut import Pipe, Setting, SplitPoint, pipeline, to_html
from stagecut.backend.costs.timeline import Timeline
from stagecut.backend.page.page import page_data
from stagecut.backend.page.source import MOST_LINES, source_of
from stagecut.backend.schedules import Event
from stagecut.backend.tables import time_text
from stagecut.ir.graph import Loc
from stagecut.ir.text.life import Site
from stagecut.ir.text.printer import size_text

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

Show = Callable[..., Page]
WIDTHS = (1280, 1920)
SETTING = Setting("A100")
NODES = "[...document.querySelectorAll('#life .tree tbody tr')].map(r => r.dataset.node)"


@pytest.fixture(scope="module")
def pipe() -> Pipe:
    return pipeline(Blocks(), (IDS,), stages=3, check=None)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as one:
        yield one


@pytest.fixture
def show(page: Page, tmp_path: Path) -> Iterator[Show]:
    """show(html): the page is open. Afterwards it has said no error and asked for nothing but itself."""
    path = tmp_path / "compile.html"

    def opened(html: str, fragment: str = "", **how: Any) -> Page:
        path.write_text(html, encoding="utf-8")
        page.events.clear()
        page.open(path, fragment, **how)
        return page

    yield opened
    page.run("1")
    assert page.errors == []
    assert {url.partition("#")[0] for url in page.requests} <= {path.resolve().as_uri(), "about:blank"}


def test_a_stage_shows_its_modules_and_ops_with_what_they_take(show: Show, pipe: Pipe) -> None:
    report = pipe.report(SETTING)
    page = show(pipe.to_html(SETTING), "#stage:2")
    assert "blocks" in page.run(NODES)
    assert "the loss, cross-entropy in float32" in page.run(NODES)
    page.click("document.querySelector('#life .tree th:nth-child(4) button')")
    assert page.run("document.querySelector('#life .tree th:nth-child(4)').ariaSort") == "descending"
    stage = report.stages[2]
    assert sum(share.forward for share in report.shares[2]) == pytest.approx(stage.forward)
    assert sum(share.backward for share in report.shares[2]) == pytest.approx(stage.backward)
    assert sum(share.kept for share in report.shares[2]) == pytest.approx(stage.memory["activations"])
    held = stage.memory["parameters"] + stage.memory["gradients"] + stage.memory["optimizer"]
    assert sum(share.state for share in report.shares[2]) == held


def test_the_tree_opens_closes_and_sorts(show: Show, pipe: Pipe) -> None:
    page = show(pipe.to_html(SETTING), "#module:blocks.0")
    times = "[...document.querySelectorAll('#life .tree .time .share')].map(s => parseFloat(s.style.width))"
    shown = page.run(times)
    assert shown == sorted(shown, reverse=True)
    page.click("document.querySelector('#life .tree th button')")
    in_order = page.run(NODES)
    assert in_order == [f"blocks.0.{i}" for i in range(4)]
    page.click("document.querySelector('#life .tree .toggle')")
    assert page.run(NODES)[:2] == ["blocks.0.0", "aten.layer_norm.default"]
    page.click("document.querySelector('#life .tree .toggle')")
    assert page.run(NODES) == in_order


def test_an_op_of_the_tree_leads_to_its_line(show: Show, pipe: Pipe) -> None:
    page = show(pipe.to_html(SETTING), "#module:blocks.0.1")
    page.click("document.querySelector('#life .tree .ref.op')")
    page.wait("document.querySelector('.row.here')")
    assert "blocks.0.1" in page.run("document.querySelector('#panes .column:last-child .row.here').textContent")
    assert page.run("document.querySelector('.source .here').textContent").endswith("x = x + block(x)")
    page = show(to_html(*linked()), "#stage:1")  # there is no source: the line is in the passes
    page.click("document.querySelector('#life .tree .ref.op')")
    page.wait("document.querySelector('#passes details').open && document.querySelector('#columns .row.here')")


def test_without_costs_the_tree_has_names(show: Show) -> None:
    page = show(to_html(*linked()), "#stage:1")
    assert page.run("document.querySelectorAll('#life .tree th').length") == 1
    assert page.run("document.querySelectorAll('#life .tree tbody tr').length") > 0


@pytest.mark.parametrize("width", WIDTHS)
def test_all_columns_of_the_stages_are_in_sight(show: Show, width: int) -> None:
    """For modules of long names too. Those that are not named are counted."""
    model = nn.Sequential()
    inner = model
    for name in ("transformer", "text_model", "encoder"):
        inner.add_module(name, nn.Sequential())
        inner = inner.get_submodule(name)
    for letter in "abcdefghij":
        inner.add_module(f"feed_forward_{letter}", nn.Linear(8, 8))
    for i in range(5):
        inner.add_module(f"final_norm_{i}", nn.LayerNorm(8))
    cut = {"transformer.text_model.encoder.feed_forward_b": SplitPoint.BEGINNING}
    page = show(pipeline(model, (torch.zeros(2, 8),), split_spec=cut, check=None).to_html(SETTING), width=width)
    named = page.run("[...document.querySelectorAll('#costs td.modules')].map(cell => cell.textContent)")
    names = [f"transformer.text_model.encoder.feed_forward_{letter}" for letter in "abcdefg"]
    last = "transformer.text_model.encoder.final_norm_4"
    assert named == [names[0], ", ".join([*names[1:], "7 more modules", last])]
    assert page.run("(table => table.scrollWidth - table.clientWidth)(document.querySelector('#costs .scroll'))") == 0


def test_a_stage_that_waits_for_its_host_has_the_time_of_it(show: Show, pipe: Pipe) -> None:
    """The share of a stage is that of the host where it is the limit, in the panel as in the table."""
    stage = pipe.report(SETTING).stages[1]
    assert stage.waits_for_host
    said = show(pipe.to_html(SETTING), "#stage:1").run("document.querySelector('#life').textContent")
    for seconds in (stage.seconds, stage.forward, stage.backward, stage.host):
        assert time_text(seconds) in said
    on_cpu = show(pipe.to_html(Setting("CPU")), "#stage:1").run("document.querySelector('#life').textContent")
    assert "the host starts" not in on_cpu


def test_no_line_of_modules_begins_with_a_comma(show: Show) -> None:
    """However wide the cell is: some names end where the line does."""
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))) for _ in range(2)))
    for name in ("norm", "projection", "a_long_name_of_a_module"):
        model.add_module(name, nn.Linear(8, 8))
    page = show(pipeline(model, (torch.zeros(2, 8),), stages=1, check=None).to_html(SETTING))
    lefts = page.run("""(cell => {
      const box = document.createElement('div'), texts = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), commas = [];
      box.append(...cell.childNodes);
      cell.append(box);
      while (texts.nextNode()) {
        const place = texts.currentNode.textContent.indexOf(','), comma = document.createRange();
        if (place < 0) continue;
        comma.setStart(texts.currentNode, place);
        comma.setEnd(texts.currentNode, place + 1);
        commas.push(comma);
      }
      return Array.from({length: 280}, (_, i) => {
        box.style.width = `${60 + i}px`;
        return commas.map(comma => comma.getBoundingClientRect().left - box.getBoundingClientRect().left);
      });
    })(document.querySelector('#costs td.modules'))""")
    assert len(lefts[0]) == 3
    assert min(itertools.chain(*lefts)) > 5


@pytest.mark.parametrize("dark", [False, True])
def test_colours_of_a_legend_are_told_apart(show: Show, pipe: Pipe, dark: bool) -> None:
    page = show(pipe.to_html(SETTING), dark=dark)
    colours = page.run("[...document.querySelectorAll('#lanes .legend i')].map(i => getComputedStyle(i).backgroundColor)")
    assert len(colours) >= 6
    numbers = [[int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours]
    for one, other in itertools.combinations(numbers, 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) > 45**2, (one, other)


def test_what_is_found_has_its_remark_in_full(show: Show, pipe: Pipe) -> None:
    page = show(pipe.to_html(SETTING), width=1280)
    page.press("/", "/")
    page.write("embed")
    page.wait("!document.getElementById('found').hidden")
    remarks = "[...document.querySelectorAll('#found [role=option] span')]"
    assert "1 op" in page.run(f"{remarks}.map(s => s.textContent)")
    lines = f"{remarks}.filter(s => s.textContent.startsWith('stage '))"
    assert page.run(f"{lines}.length") > 0
    assert page.run(f"{lines}.every(s => s.scrollWidth <= s.clientWidth)")


@pytest.mark.parametrize("width", WIDTHS)
def test_an_open_panel_squeezes_nothing(show: Show, pipe: Pipe, width: int) -> None:
    page = show(pipe.to_html(SETTING), width=width)
    high = "[...document.querySelectorAll('#costs tr')].map(row => row.offsetHeight)"
    before = page.run(high)
    page.click("document.querySelector('#costs .ref.stage')")
    page.wait("!document.getElementById('life').hidden")
    assert page.run(high) == before
    assert page.run("document.querySelector('#costs .scroll').getBoundingClientRect().right") <= page.run(
        "document.getElementById('life').getBoundingClientRect().left"
    )


def test_the_panel_is_as_wide_as_one_makes_it(show: Show, pipe: Pipe) -> None:
    page = show(pipe.to_html(SETTING), "#stage:0", width=1280)
    wide = "document.getElementById('life').offsetWidth"
    before = page.run(wide)
    page.run("document.getElementById('edge').focus()")
    page.press("ArrowLeft")
    assert page.run(wide) == before + 40
    for kind, x in (("mousePressed", 1280 - before - 40), ("mouseMoved", 700), ("mouseReleased", 700)):
        page.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, x=x, y=500)
    assert page.run(wide) == 1280 - 700


NAMES_BREAK = """[...document.querySelectorAll('#costs .ref, #ways .ref, #entries .ref, #life .ref.module')].filter((ref) => {
  const parts = [...ref.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
  return parts.some((part) => {
    const range = document.createRange();
    range.selectNodeContents(part);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1;
  });
}).map((ref) => ref.textContent)"""


@pytest.mark.parametrize("width", WIDTHS)
def test_names_do_not_break_inside_words(show: Show, pipe: Pipe, width: int) -> None:
    page = show(pipe.to_html(SETTING), "#stage:1", width=width)
    assert page.run("document.querySelectorAll('#life .ref.module').length") > 3
    assert page.run(NAMES_BREAK) == []


def test_one_stage_alone_is_called_slowest(show: Show, pipe: Pipe) -> None:
    page = show(pipe.to_html(SETTING))
    flags = page.run("[...document.querySelectorAll('#costs .flag')].map(f => f.textContent)")
    assert flags.count("slowest") <= 1
    said = page.run("document.getElementById('findings').innerText")
    (row,) = page.run(
        "[...document.querySelectorAll('#costs tr:has(.flag)')].filter(r => r.innerText.includes('slowest')).map(r => r.dataset.stage)"
    )
    assert f"stage {row} is the slowest" in said


def test_a_stage_that_waits_for_its_host_is_marked(show: Show, pipe: Pipe) -> None:
    """Its time is that of the host, of which the bar shows what is beyond the device's."""
    flags = "[...document.querySelectorAll('#costs .flag')].map(f => f.textContent)"
    bars = "document.querySelectorAll('#costs tbody .bar:has(.forward) .host').length"
    bar = "[...document.querySelector('#costs tbody .bar').children].map(i => [i.className, parseFloat(i.style.width)])"
    page = show(pipe.to_html(Setting("H100")))
    report = pipe.report(Setting("H100"))
    assert page.run(flags).count("host") == page.run(bars) == 3
    longest = max(s.seconds for s in report.stages)
    first = report.stages[0]
    parts = dict(page.run(bar))
    assert parts == pytest.approx(
        {
            "forward": 100 * first.forward / longest,
            "backward": 100 * first.backward / longest,
            "host": 100 * (first.host - first.device) / longest,
        },
        abs=0.01,
    )
    assert "the host is the limit of stages 0-2" in page.run("document.getElementById('findings').innerText")
    page = show(pipe.to_html(Setting("CPU")))
    assert "host" not in page.run(flags)
    assert "host" not in page.run("document.querySelector('#costs .legend').innerText")


def test_what_crosses_lists_the_stages_on_its_way(show: Show) -> None:
    page = show(to_html(*linked()))
    through = "[...document.querySelectorAll('#ways tbody tr')].map(r => [r.cells[0].textContent, r.cells[5].textContent])"
    assert ["%skip", "1"] in page.run(through)


def test_passes_are_folded_below_what_users_need(show: Show) -> None:
    page = show(to_html(*linked()))
    assert page.run("[...document.querySelectorAll('section')].at(-1).id") == "passes"
    assert not page.run("document.querySelector('#passes details').open")
    page.click("[...document.querySelectorAll('nav a')].find(a => a.textContent === 'Passes')")
    page.wait("document.querySelector('#passes details').open && document.querySelector('.row')")


def _measured(timeline: Timeline) -> Timeline:
    """The same steps, each a tenth slower."""
    events = tuple(Event(e.step, e.rank, 1.1 * e.start, 1.1 * e.end) for e in timeline.events)
    return Timeline(events, timeline.ranks, "measured")


STEPS = "document.querySelectorAll('#lanes .step')"
BOX = "(b => [b.x, b.width])(document.querySelector('#lanes .step:last-of-type').getBoundingClientRect())"


def test_the_timeline_has_every_step_and_send_of_the_prediction(show: Show, pipe: Pipe) -> None:
    report = pipe.report(SETTING)
    (found,) = page_data([], pipe.program, report)["timelines"]
    assert len(found["events"]) == 2 * 3 * 8
    assert len(found["sent"]) == 2 * 2 * 8
    delays = {sent.end - sent.start for sent in report.timeline.sent}
    assert max(delays) == pytest.approx(min(delays))
    for sent in report.timeline.sent:
        made = [
            e for e in report.timeline.events if e.step.microbatch == sent.microbatch and e.step.stage == sent.boundary + sent.is_gradient
        ]
        (source,) = [e for e in made if (e.step.kind != "F") == sent.is_gradient]
        assert source.end <= sent.start
    page = show(pipe.to_html(SETTING))
    assert page.run(f"{STEPS}.length") == len(found["events"])
    assert page.run("document.querySelectorAll('#lanes .send').length") == len(found["sent"])
    page.click("document.querySelector('[data-shows=sends]')")
    assert page.run("document.querySelectorAll('#lanes .send').length") == 0


def test_memory_over_time_reaches_what_the_report_says(show: Show, pipe: Pipe) -> None:
    setting = replace(SETTING, schedule="1F1B", n_microbatches=4)
    totals = [sum(stage.memory.values()) for stage in pipe.report(setting).stages]
    page = show(pipe.to_html(setting))
    said = page.run("[...document.querySelectorAll('#lanes path.memory > title')].map(t => t.textContent)")
    shown = [text.partition("at most ")[2].partition(",")[0] for text in said]
    assert shown == [*map(size_text, totals)]
    page.click("document.querySelector('[data-shows=memory]')")
    assert page.run("document.querySelectorAll('#lanes path.memory').length") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_timeline_zooms_and_pans(show: Show, pipe: Pipe, width: int, dark: bool) -> None:
    page = show(pipe.to_html(SETTING), width=width, dark=dark)
    first = page.run(BOX)
    page.click("[...document.querySelectorAll('#timeline .tools button')][0]")
    page.wait(f"({BOX})[1] > {first[1]} * 1.2")
    zoomed = page.run(BOX)
    page.run("document.querySelector('#lanes .frame').focus()")
    page.press("ArrowRight")
    page.wait(f"({BOX})[0] !== {zoomed[0]}")
    page.press("0")
    page.wait(f"Math.abs(({BOX})[1] - {first[1]}) < 0.1")
    assert page.run("document.documentElement.scrollWidth") <= width


def test_a_click_on_a_step_shows_its_stage(show: Show, pipe: Pipe) -> None:
    page = show(pipe.to_html(SETTING))
    page.click("document.querySelector('#lanes [data-rank=\"1\"] .step')")
    page.wait("document.querySelector('#life h2')?.textContent === 'stage 1'")
    assert page.run(f"[...{STEPS}].filter(s => s.classList.contains('chosen')).length") == 2 * 8


def test_predicted_and_measured_stand_above_each_other(show: Show, pipe: Pipe) -> None:
    measured = _measured(pipe.report(SETTING).timeline)
    page = show(pipe.to_html(SETTING, measured=measured))
    titles = page.run("[...document.querySelectorAll('#lanes .title')].map(t => t.textContent.split(':')[0])")
    assert titles == ["predicted", "measured"]
    assert page.run(f"{STEPS}.length") == 2 * 2 * 3 * 8
    assert page.run("document.querySelectorAll('#lanes path.memory').length") == 2 * 3
    assert page.run("document.querySelectorAll('#measured tbody tr').length") == 3


def test_a_measured_step_alone(show: Show, pipe: Pipe) -> None:
    history, program = [], pipe.program
    page = show(to_html(history, program, measured=_measured(pipe.report(SETTING).timeline)))
    assert page.run(f"{STEPS}.length") == 2 * 3 * 8


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_two_cuts_stand_side_by_side(show: Show, pipe: Pipe, width: int, dark: bool) -> None:
    other = pipeline(Blocks(), (IDS,), stages=2, check=None)
    page = show(pipe.to_html(SETTING, against=other), width=width, dark=dark)
    assert not page.run("document.getElementById('against').hidden")
    assert page.run("[...document.querySelectorAll('#both .pair tbody')].map(b => b.rows.length)") == [3, 2]
    tops = page.run("[...document.querySelectorAll('#both .pair table')].map(t => t.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    assert page.run("document.querySelectorAll('#both .totals tbody tr')[0].innerText.split(/\\s+/)") == ["stages", "3", "2"]
    assert page.run("document.querySelectorAll('#both .totals tbody tr')[1].cells.length") == 3
    titles = page.run("[...document.querySelectorAll('#lanes .title')].map(t => t.textContent.split(':')[0])")
    assert titles == ["predicted", "the other cut"]
    assert page.run(f"{STEPS}.length") == 2 * (3 + 2) * 8
    assert page.run("document.documentElement.scrollWidth") <= width


def test_modules_that_moved_are_listed(pipe: Pipe) -> None:
    other = pipeline(Blocks(), (IDS,), stages=2, check=None)
    data = page_data([], pipe.program, pipe.report(SETTING), against=(other.program, other.report(SETTING)))["against"]
    moved = {path: (here, there) for path, here, there in data["moved"]}
    assert moved["head"] == ([2], [1])
    assert "embed" not in moved
    assert data["report"]["seconds"] == other.report(SETTING).seconds


def test_a_cut_against_itself_has_moved_nothing(show: Show, pipe: Pipe) -> None:
    page = show(pipe.to_html(SETTING, against=pipe))
    assert "Each module is in the same stages in both" in page.run("document.getElementById('both').innerText")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_source_and_program_lead_to_each_other(show: Show, pipe: Pipe, width: int, dark: bool) -> None:
    page = show(pipe.to_html(SETTING), width=width, dark=dark)
    lines = "[...document.querySelectorAll('.source .has')].map(row => row.textContent.replace(/^ *\\d+ */, ''))"
    assert "x = x + block(x)" in page.run(lines)
    page.click("[...document.querySelectorAll('.source .has')].find(row => row.textContent.includes('self.embed(ids)'))")
    page.wait("document.querySelector('#panes .column:last-child .row.here')")
    assert "aten.embedding" in page.run("document.querySelector('#panes .column:last-child .row.here').textContent")
    assert "test_balance.py:" in page.run("document.querySelector('#life h2').textContent")
    assert page.run("document.querySelector('.source .here').textContent").endswith("x = self.embed(ids)")
    rows = "[...document.querySelectorAll('#panes .column:last-child .row')]"
    place = f"{rows}.find(r => r.textContent.includes('add.Tensor')).querySelector('.t-loc')"
    page.wait(place)
    page.click(place)
    page.wait("document.querySelector('.source .here').textContent.endsWith('x = x + block(x)')")
    inside = "(b => (r => r.top >= b.top && r.bottom <= b.bottom)(document.querySelector('.source .here').getBoundingClientRect()))"
    assert page.run(f"{inside}(document.querySelector('.source').getBoundingClientRect())")
    assert page.run("document.documentElement.scrollWidth") <= width


def test_source_can_be_left_out(show: Show, pipe: Pipe) -> None:
    html = pipe.to_html(SETTING, source=False)
    assert "self.embed(ids)" not in html
    page = show(html)
    assert page.run("document.getElementById('beside') === null")
    assert not page.run("document.getElementById('passes').hidden")


def _site(file: str, line: int) -> Site:
    return Site(0, None, "t", "", Loc(file, line), "")


def test_source_is_the_lines_that_ops_name_and_those_around(tmp_path: Path) -> None:
    net, secret = tmp_path / "net.py", tmp_path / "secret.txt"
    net.write_text("".join(f"line {number}\n" for number in range(1, 101)))
    secret.write_text("a password\n")
    names = {str(net): "net.py", str(secret): "secret.txt"}
    places = [
        _site(str(net), 3),
        _site(str(net), 15),
        _site(str(net), 60),
        _site(str(net), 700),
        _site(str(secret), 1),
        _site("/gone.py", 1),
    ]
    found = source_of(names, places)
    assert list(found) == ["net.py"]  # nothing but Python is read, whatever the program names
    assert [(first, len(lines)) for first, lines in found["net.py"]] == [(1, 23), (52, 17)]
    assert found["net.py"][1][1][8] == "line 60"


def test_source_is_bounded(tmp_path: Path) -> None:
    net = tmp_path / "net.py"
    net.write_text("x = 1\n" * (2 * MOST_LINES))
    assert source_of({}, [_site(str(net), number) for number in range(1, 2 * MOST_LINES)]) == {}
