"""The page in a real browser: no error, no network, folds, search, lives, keys, and names that do not run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from pages import History, linked, long, tampered

from stagecut.backend.page import page as page_module
from stagecut.backend.page.page import to_html
from stagecut.backend.pictures.dot import to_svg
from stagecut.backend.tables import count_text, time_text
from stagecut.ir.graph import Program
from stagecut.ir.text.printer import size_text

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

GRAPH = """<svg xmlns="http://www.w3.org/2000/svg" width="300" height="100">
<g id="stage-1"><rect width="60" height="40"/></g>
<g class="edge"><title>stage0&#45;&gt;stage2</title><path d="M70 10H200" fill="none" stroke="red"/><text>%skip</text></g>
<g id="value-b-2"><path d="M70 60H200" fill="none" stroke="red"/></g>
<g id="values-0-1" class="edge value-a value-skip route-send"><path d="M70 80H200" fill="none" stroke="red"/></g>
<g id="data"><text id="query">0</text></g>
<g id="x"><title>tile of stage 2</title><circle r="5"/></g>
</svg>"""
BY_TEXT = "[...document.querySelectorAll('{}')].find(e => e.textContent.includes('{}'))"
TITLE = "document.querySelector('#life h2')?.textContent"
SHOWN = "!document.getElementById('life').hidden"


def _one(selector: str, text: str = "") -> str:
    return BY_TEXT.format(selector, text)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as one:
        yield one


@pytest.fixture
def show(page: Page, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """show(history, program): the page is open. Afterwards it has said no error and asked for nothing but itself."""
    path = tmp_path / "compile.html"

    def opened(history: History, program: Program, fragment: str = "", **options: Any) -> Page:
        path.write_text(to_html(history, program, **options), encoding="utf-8")
        page.events.clear()
        page.open(path, fragment)
        return page

    yield opened
    page.run("1")
    assert page.errors == []
    assert {url.partition("#")[0] for url in page.requests} <= {path.resolve().as_uri(), "about:blank"}


def test_sizes_counts_and_times_read_as_everywhere(page: Page) -> None:
    """As print(pipe), reports and pictures have them: halves too."""
    random = Random(0)
    whole = [0, 1, 999, 1024, 1125, 10752, 1536, 999_900, *(int(2 ** random.uniform(0, 45)) for _ in range(300))]
    halves = [(2 * n + 1) * 512 for n in range(9, 60)] + [(4 * n + 1) * 256 * 1024 for n in range(1, 9)]
    times = [0.0, 1e-6, 9.996e-4, *(10 ** random.uniform(-6, 3) for _ in range(300))]
    source = page_module._read("data.js")
    code = source[source.index("/** A number with so many digits") : source.index("const sum =")]
    for name, numbers, text in (("bytes", whole + halves, size_text), ("count", whole + halves, count_text), ("seconds", times, time_text)):
        said = page.run(f"(() => {{ {code} return {json.dumps(numbers)}.map({name}); }})()")
        assert said == [text(number) for number in numbers]


def _open_passes(page: Page) -> None:
    page.click("document.querySelector('#passes summary')")
    page.wait("document.querySelector('.row')")


def _search(page: Page, text: str) -> None:
    page.press("/", "/")
    page.wait("document.activeElement.id === 'query'")
    page.write(text)
    page.wait("!document.getElementById('found').hidden")


def test_long_data_is_deflated(show: Callable[..., Page], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "PACKED", 0)
    page = show(*linked())
    page.wait("document.querySelectorAll('#costs tbody tr').length === 3")
    assert page.run("'packed' in document.getElementById('data').dataset")


def test_it_opens(show: Callable[..., Page]) -> None:
    page = show(*linked(), timeline_svg=GRAPH, graph_svg=GRAPH)
    assert page.run("document.title") == "stagecut: Linked"
    assert page.run("document.querySelectorAll('#costs tbody tr').length") == 3
    assert page.run("document.querySelectorAll('#ways tbody tr').length") == 5
    assert page.run("[...document.querySelectorAll('section')].filter(s => s.hidden).map(s => s.id)") == []
    assert page.run("document.querySelector('.column.strip .name').textContent") == "1. nothing"


def test_what_is_not_there_is_not_shown(show: Callable[..., Page]) -> None:
    page = show([], linked()[1])
    assert page.run("document.getElementById('timeline').hidden")
    assert page.run("document.getElementById('graph').hidden")
    assert page.run("document.querySelectorAll('#costs tbody tr').length") == 3


def test_a_click_in_the_text_shows_the_life(show: Callable[..., Page]) -> None:
    page = show(*linked())
    _open_passes(page)
    page.click(_one(".pane .t-value", "%skip"))
    page.wait(SHOWN)
    assert page.run(TITLE) == "%skip"
    said = page.run("document.getElementById('life').innerText")
    for part in ("stage 0", "aten.neg.default(%a)", "relay", "through 1", "%c = aten.add.Tensor(%d, %skip)"):
        assert part in said
    assert page.run("[...document.querySelectorAll('.lane button')].map(b => b.className)") == ["born", "pass", "read"]
    assert page.run("document.querySelectorAll('.marked').length") >= 3
    assert page.run("document.querySelector('.row.here').textContent").strip().startswith("%skip = ")


def test_state_and_versions(show: Callable[..., Page]) -> None:
    page = show(*linked())
    page.click(_one("#entries .ref.state", "@buf"))
    page.wait(f"{TITLE} === '@buf'")
    assert "@buf → %buf.1" in page.run("document.getElementById('life').innerText").replace("\n", "")
    page.click(_one("#life .ref.value", "%buf.1"))
    page.wait(f"{TITLE} === '%buf.1'")
    page.click(_one("#life button", "back"))
    page.wait(f"{TITLE} === '@buf'")


def test_tied_names_lead_to_one_life(show: Callable[..., Page]) -> None:
    page = show(*linked(), "#state:%40tied.w")
    page.wait(SHOWN)
    assert "stage 2 as @tied.w" in page.run("document.getElementById('life').innerText")


def test_escape_closes_and_gives_the_focus_back(show: Callable[..., Page]) -> None:
    page = show(*linked())
    page.click(_one("#ways .ref.value", "%skip"))
    page.wait(SHOWN)
    page.press("Escape")
    page.wait(f"!({SHOWN})")
    assert page.run("document.activeElement.textContent") == "%skip"
    assert page.run("location.hash") == ""
    assert page.run("document.querySelectorAll('.marked').length") == 0


@pytest.mark.parametrize(
    ("what", "title"),
    [("#stage-1", "stage 1"), (".edge", "%skip"), ("#value-b-2", "%b"), ("#values-0-1", "2 values"), ("#x", "stage 2")],
)
def test_clicks_in_the_graph(show: Callable[..., Page], what: str, title: str) -> None:
    page = show(*linked(), graph_svg=GRAPH)
    page.click(f"document.querySelector('.picture {what} :is(path, rect, circle)')")
    page.wait(SHOWN)
    assert page.run(TITLE) == title
    assert page.run(f"document.querySelector('.picture {what}').classList.contains('chosen')")


def test_the_graph_of_the_program(show: Callable[..., Page]) -> None:
    """What to_svg draws: a stage can be reached by keys, and shows what it is."""
    history, program = linked()
    page = show(history, program, graph_svg=to_svg(program))
    page.run("document.querySelector('.picture #stage-2').focus()")
    page.press("Enter")
    page.wait(f"{TITLE} === 'stage 2'")


def test_the_graph_zooms_and_pans(show: Callable[..., Page]) -> None:
    page = show(*linked(), graph_svg=GRAPH)
    box = "document.querySelector('.picture svg').getAttribute('viewBox').split(' ').map(Number)"
    first = page.run(box)
    page.click("document.querySelector('[title=\"zoom in\"]')")
    assert page.run(box)[2] < first[2]
    page.run("document.querySelector('.picture').focus()")
    page.press("ArrowRight")
    assert page.run(box)[0] > first[0]
    page.press("0")
    assert page.run(box) == first


def test_dragging_pans_and_is_no_click(show: Callable[..., Page]) -> None:
    page = show(*linked(), graph_svg=GRAPH)
    box = "document.querySelector('.picture svg').getAttribute('viewBox').split(' ').map(Number)"
    page.run("document.querySelector('.picture').scrollIntoView({block: 'center'})")
    x, y = page.run("(b => [b.x + b.width / 2, b.y + b.height / 2])(document.getElementById('stage-1').getBoundingClientRect())")
    first = page.run(box)
    for kind, left in (("mousePressed", x), ("mouseMoved", x - 40), ("mouseReleased", x - 40)):
        page.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, x=left, y=y)
    assert page.run(box)[0] > first[0]
    assert not page.run(SHOWN)


def test_folds_open_and_close(show: Callable[..., Page]) -> None:
    page = show(*long())
    _open_passes(page)
    column = "document.querySelector('[data-pass=canonicalize]')"
    folds = f"[...{column}.querySelectorAll('.fold')].map(f => f.textContent)"
    before = page.run(folds)
    assert before
    assert before[0].startswith("··· ")
    page.click(f"{column}.querySelector('.fold')")
    page.wait(f"{folds}[0] !== {before[0]!r}")
    page.click(_one("[data-pass=canonicalize] button", "all lines"))
    page.wait(f"{folds}.length === 0")
    page.click(_one("[data-pass=canonicalize] button", "changes only"))
    page.wait(f"{folds}[0] === {before[0]!r}")


def test_strips_open_and_close(show: Callable[..., Page]) -> None:
    page = show(*long())
    _open_passes(page)
    strip = "document.querySelector('[data-pass=resolve-aliases]')"
    for open_now in (True, False):
        page.click(f"{strip}.querySelector('.name')")
        assert page.run(f"!{strip}.classList.contains('strip')") is open_now


def test_a_long_program_makes_few_elements(show: Callable[..., Page]) -> None:
    page = show(*long())
    assert page.run("document.querySelectorAll('*').length") < 8000


def test_search_finds_and_jumps(show: Callable[..., Page]) -> None:
    page = show(*long())
    _search(page, "v3210")
    page.press("Enter")
    page.wait(f"{TITLE} === '%v3210'")
    assert page.run("document.getElementById('found').hidden")
    lines = "[...document.querySelectorAll('.column:not(.strip) .row.here')].map(r => r.textContent.trim().slice(0, 9))"
    page.wait(f"{lines}.length >= 3")
    assert set(page.run(lines)) == {"%v3210 = "}
    assert page.run("(r => r.top > 0 && r.bottom < 5000)(document.querySelector('.row.here').getBoundingClientRect())")


@pytest.mark.parametrize(
    ("text", "title"),
    [("layers.7", "module layers.7"), ("net.py:12", "net.py:12"), ("aten.add.Tensor", "aten.add.Tensor"), ("stage 2", "stage 2")],
)
def test_search_knows_modules_lines_ops_and_stages(show: Callable[..., Page], text: str, title: str) -> None:
    page = show(*long())
    _search(page, text)
    page.press("Enter")
    page.wait(SHOWN)
    assert page.run(TITLE) == title


def test_search_in_the_lines_of_the_program(show: Callable[..., Page]) -> None:
    page = show(*long())
    _search(page, "relu.default(%v3777)")
    page.press("Enter")
    page.wait("document.querySelector('[data-pass=route] .row.here')")
    assert "%v3778" in page.run("document.querySelector('[data-pass=route] .row.here').textContent")


def test_search_by_keys(show: Callable[..., Page]) -> None:
    page = show(*long())
    _search(page, "v399")
    first = page.run("document.querySelector('[aria-selected=true]').textContent")
    page.press("ArrowDown")
    assert page.run("document.querySelector('[aria-selected=true]').textContent") != first
    page.press("ArrowUp")
    assert page.run("document.querySelector('[aria-selected=true]').textContent") == first
    page.press("Escape")
    assert page.run("document.getElementById('found').hidden")


def test_nothing_found(show: Callable[..., Page]) -> None:
    page = show(*linked())
    _search(page, "no such thing")
    assert page.run("document.getElementById('found').textContent") == "nothing found"


def test_tables_sort(show: Callable[..., Page]) -> None:
    page = show(*linked())
    page.click(_one("#ways th button", "to"))
    assert page.run("[...document.querySelectorAll('#ways tbody tr')].map(r => r.cells[2].textContent)") == ["2", "2", "1", "1", "0"]


def test_light_and_dark(show: Callable[..., Page]) -> None:
    page = show(*linked())
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.run(paper) == "rgb(255, 255, 255)"
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.run(paper) == "rgb(21, 24, 28)"


def test_names_do_not_run(show: Callable[..., Page]) -> None:
    history, program = tampered()
    page = show(history, program, title="<img src=x onerror=window.hacked=1>", graph_svg=to_svg(program))
    for name in page.run("[...new Set([...document.querySelectorAll('[data-go]')].map(e => e.dataset.go))]"):
        kind, _, key = name.partition(":")
        page.run(f"location.hash = '#{kind}:' + encodeURIComponent({key!r})")
        page.run("new Promise(requestAnimationFrame)")
    page.run("document.activeElement.blur()")
    _search(page, "hacked")
    assert page.run("document.querySelectorAll('#found [role=option]').length") > 2
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("window.hacked === undefined")


def test_an_injected_handler_would_not_run(show: Callable[..., Page]) -> None:
    """The check above would mean little if handlers ran; this one shows that the page's policy stops them too."""
    page = show(*linked())
    page.run("document.body.insertAdjacentHTML('beforeend', '<button id=bad onclick=\"window.hacked=1\">x</button>')")
    page.run("document.getElementById('bad').click()")
    assert page.run("window.hacked === undefined")
    assert any("Content Security Policy" in error for error in page.errors)
    page.events.clear()


@pytest.mark.parametrize(
    "inside",
    [
        "<script>window.hacked=1</script>", "</svg><script>window.hacked=1</script><svg>",
        '<g onclick="window.hacked=1"><circle r="9"/></g>',
        '<circle r="9"><animate attributeName="r" to="8" dur="1ms" onend="window.hacked=1"/></circle>',
        "<foreignObject><body onload='window.hacked=1'><img src=x onerror='window.hacked=1'></body></foreignObject>",
        '<image href="http://127.0.0.1:9/x.png"/>', '<a href="javascript:window.hacked=1"><circle r="9"/></a>',
        '<use href="http://127.0.0.1:9/x.svg#a"/>', '<rect width="9" height="9" style="fill: url(http://127.0.0.1:9/x)"/>',
        '<style>@import "http://127.0.0.1:9/x.css";</style>', "<style>svg { background: \\75rl(http://127.0.0.1:9/x) }</style>",
        '</svg><base href="http://127.0.0.1:9/"><svg>', '</svg><iframe src="http://127.0.0.1:9/x"></iframe><svg>',
    ],
)  # fmt: skip
def test_nothing_in_a_picture_runs_or_loads(inside: str, show: Callable[..., Page]) -> None:
    """The policy of the page refuses it, or the browser does, and says so in the console."""
    page = show(*linked(), graph_svg=f'<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40">{inside}</svg>')
    click = "new MouseEvent('click', {bubbles: true, cancelable: true})"
    page.run(f"document.querySelectorAll('.picture *').forEach((element) => element.dispatchEvent({click}))")
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert page.run("window.hacked === undefined")
    page.events[:] = [event for event in page.events if event["method"] == "Network.requestWillBeSent" and not _refused(event, page)]


def _refused(event: dict[str, Any], page: Page) -> bool:
    """True for a request that the browser stopped before it left: for the policy, or for the place it goes to. What it then shows
    in a frame is a page of its own."""
    if event["params"].get("documentURL", "").startswith("chrome-error:"):
        return True
    lost = [e["params"] for e in page.events if e["method"] == "Network.loadingFailed"]
    return any(one["requestId"] == event["params"]["requestId"] and one.get("blockedReason") for one in lost)


def test_any_address_is_harmless(show: Callable[..., Page]) -> None:
    for fragment in ("#value:%25nothing", "#state:", "#stage:99", "#module:%zz", "#__proto__:x", "#constructor:x"):
        page = show(*linked(), fragment)
        assert not page.run(SHOWN)


def test_a_stage_that_does_not_fit_is_marked(show: Callable[..., Page]) -> None:
    from test_balance import IDS, Blocks
    from test_report import SMALL

    from stagecut import Setting, pipeline

    pipe = pipeline(Blocks(), (IDS,), stages=3, check=None)
    page = show([], pipe.program, report=pipe.report(Setting([SMALL, "H100", "H100"])))
    flags = page.run("[...document.querySelectorAll('#costs tr:has(.flag.over)')].map(row => row.dataset.stage).join()")
    assert flags == "0"
