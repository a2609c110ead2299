"""The prediction that the page makes for other numbers and schedules is that of report()."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from test_balance import IDS, Blocks

from stagecut import Pipe, Setting, pipeline
from stagecut.backend.costs.runtime import Parts, as_run
from stagecut.backend.costs.timeline import simulate
from stagecut.backend.page.page import page_data
from stagecut.backend.schedules import SCHEDULES, SINGLE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

STAGES = 4
NOW = Setting("A100", n_microbatches=8)


@pytest.fixture(scope="module")
def pipe() -> Pipe:
    return pipeline(Blocks(), (IDS,), stages=STAGES, check=None)


@pytest.fixture(scope="module")
def keys(pipe: Pipe) -> list[tuple[str, int, int, int]]:
    return [tuple(key) for key in page_data([], pipe.program, pipe.report(NOW))["units"]["keys"]]


@pytest.fixture(scope="module")
def page(pipe: Pipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = tmp_path_factory.mktemp("page") / "compile.html"
    path.write_text(pipe.to_html(NOW), encoding="utf-8")
    with browser() as one:
        yield _opened(one, path)
        assert one.errors == []
        assert {url.partition("#")[0] for url in one.requests} <= {path.resolve().as_uri(), "about:blank"}


def _opened(page: Page, path: Path, **how: Any) -> Page:
    page.open(path, **how)
    page.wait("document.querySelector('#try [data-prediction]')")
    return page


def _choose(page: Page, schedule: str, stages: int, microbatches: int, choices: dict[str, list[int]]) -> dict[str, Any] | None:
    """The prediction of the page for these numbers, which are chosen as a reader does."""
    chosen = [("stages", choices["stages"].index(stages)), ("microbatches", choices["microbatches"].index(microbatches))]
    for name, place in chosen:
        page.run(f"(i => {{ i.value = {place}; i.dispatchEvent(new Event('input')); }})(document.querySelector('[data-chooses={name}]'))")
    page.run(
        f"(s => {{ s.value = '{schedule}'; s.dispatchEvent(new Event('change')); }})(document.querySelector('[data-chooses=schedule]'))"
    )
    found: dict[str, Any] | None = json.loads(page.run("document.querySelector('[data-prediction]').dataset.prediction"))
    return found


def _choices(keys: list[tuple[str, int, int, int]]) -> dict[str, list[int]]:
    return {"stages": sorted({key[1] for key in keys}), "microbatches": sorted({key[3] for key in keys})}


def _setting(key: tuple[str, int, int, int]) -> Setting:
    schedule, _, ranks, microbatches = key
    return replace(NOW, schedule=schedule, n_microbatches=microbatches, ranks=None if schedule in SINGLE else ranks)


def test_the_page_has_orders_of_all_schedules(keys: list[tuple[str, int, int, int]]) -> None:
    assert {key[0] for key in keys if key[1] == STAGES} == set(SCHEDULES)
    assert len({key[1] for key in keys}) >= 4
    assert len({key[3] for key in keys}) >= 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_take_as_long_as_simulated(page: Page, keys: list[tuple[str, int, int, int]], schedule: str) -> None:
    """For every number of stages and of micro-batches that can be chosen."""
    own = [key for key in keys if key[0] == schedule]
    assert len({key[1:] for key in own}) >= 5
    for key in own:
        found = _choose(page, schedule, key[1], key[3], _choices(keys))
        assert found is not None
        assert tuple(found["key"]) == key
        device, host = ([as_run(Parts(*stage["seconds"][i]), n, True) for n, stage in enumerate(found["stages"])] for i in range(2))
        split = [(part.inputs, part.weights) for part in device]
        made = simulate(_setting(key), [p.forward for p in device], [p.backward for p in device], found["delays"], split, host)
        assert found["seconds"] == pytest.approx(made.seconds, rel=1e-9), key
        assert found["bubble"] == pytest.approx(made.bubble, rel=1e-6), key


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_for_these_stages_it_is_what_the_report_says(page: Page, pipe: Pipe, keys: list[tuple[str, int, int, int]], schedule: str) -> None:
    for key in (key for key in keys if key[0] == schedule and key[1] == STAGES):
        found = _choose(page, schedule, key[1], key[3], _choices(keys))
        report = pipe.report(_setting(key))
        assert found is not None
        assert found["seconds"] == pytest.approx(report.seconds, rel=1e-5), key
        ranks = {stage.rank for stage in report.stages}
        fullest = max(sum(sum(s.memory.values()) for s in report.stages if s.rank == rank) for rank in ranks)
        assert found["fullest"] == pytest.approx(fullest, rel=1e-5), key


@pytest.mark.parametrize("stages", [2, 8])
def test_other_stages_have_all_the_ops(page: Page, pipe: Pipe, keys: list[tuple[str, int, int, int]], stages: int) -> None:
    found = _choose(page, "1F1B", stages, 8, _choices(keys))
    other = pipeline(Blocks(), (IDS,), stages=stages, check=None).report(NOW)
    assert found is not None
    forward = sum(stage["seconds"][0][0] for stage in found["stages"])
    assert forward == pytest.approx(sum(s.forward for s in other.stages), rel=1e-6)
    assert found["seconds"] == pytest.approx(other.seconds, rel=0.25)
    largest = max(sum(stage.memory.values()) for stage in other.stages)
    assert found["fullest"] == pytest.approx(largest, rel=0.25)


def test_what_is_chosen_is_drawn_and_can_be_taken_back(page: Page, keys: list[tuple[str, int, int, int]]) -> None:
    _choose(page, "GPipe", 8, 4, _choices(keys))
    titles = "[...document.querySelectorAll('#lanes .title')].map(t => t.textContent.split(':')[0])"
    page.wait(f"{titles}.join('; ') === 'predicted; GPipe, 8 stages on 8 ranks, 4 micro-batches'")
    page.click("[...document.querySelectorAll('#try button')].find(b => b.textContent === 'as it is')")
    page.wait(f"{titles}.length === 1")


def test_what_cannot_be_is_said(page: Page, keys: list[tuple[str, int, int, int]]) -> None:
    odd = next(key[1] for key in keys if key[1] % 2)
    assert _choose(page, "DualPipeV", odd, 8, _choices(keys)) is None
    assert "no order for these numbers" in page.run("document.getElementById('try').innerText")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 1920])
def test_it_fits_the_window(pipe: Pipe, page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "other.html"
    path.write_text(pipe.to_html(NOW), encoding="utf-8")
    with browser() as one:
        _opened(one, path, width=width, dark=dark)
        assert one.run("document.documentElement.scrollWidth") <= width
        assert one.errors == []


def test_devices_that_differ_have_no_what_if(pipe: Pipe) -> None:
    assert pipe.report(replace(NOW, device=["A100", "H100", "A100", "A100"])).units is None


def test_json_of_a_report_has_no_units(pipe: Pipe) -> None:
    assert "units" not in json.loads(pipe.report(NOW).to_json())
