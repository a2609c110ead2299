"""gantt: well-formed, every step where and when it is, nothing over the edge, text only where it fits."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from stagecut.backend.costs.setting import Setting
from stagecut.backend.costs.timeline import Timeline, simulate
from stagecut.backend.pictures.gantt import BOX, COLORS, LEFT, ROW, gantt
from stagecut.backend.schedules import SCHEDULES, SINGLE, Event, Step

SVG = "{http://www.w3.org/2000/svg}"
SHAPES = [(schedule, 4, 8) for schedule in SCHEDULES] + [("1F1B", 16, 64), ("Interleaved1F1B", 16, 64)]


def _line(schedule: str, ranks: int, count: int, unit: float = 1e-3) -> Timeline:
    stages = ranks if schedule in SINGLE else 2 * ranks
    setting = Setting(schedule=schedule, n_microbatches=count, ranks=None if schedule in SINGLE else ranks)
    return simulate(setting, [unit] * stages, [2 * unit] * stages, [0.1 * unit] * (stages - 1))


@pytest.mark.parametrize(("schedule", "ranks", "count"), SHAPES)
def test_every_step_is_a_box_in_its_row_at_its_time(schedule: str, ranks: int, count: int) -> None:
    line = _line(schedule, ranks, count)
    root = ElementTree.fromstring(line.to_svg())
    wide = float(root.attrib["width"])
    assert wide < 4000
    scale = (float(root.find(f".//{SVG}g[@id='rank-0']/{SVG}g/{SVG}rect").attrib["width"])) / line.seconds  # type: ignore[union-attr]
    for rank in range(ranks):
        row = root.find(f"{SVG}g[@id='rank-{rank}']")
        assert row is not None
        groups = [g for g in row.findall(f"{SVG}g") if "micro-batch" in (g.findtext(f"{SVG}title") or "")]
        events = [e for e in line.events if e.rank == rank]
        assert len(groups) == len(events)
        ends = LEFT - 0.02
        for group, event in zip(groups, events, strict=True):
            box = group.find(f"{SVG}rect")
            assert box is not None
            x, w = float(box.attrib["x"]), float(box.attrib["width"])
            assert x == pytest.approx(LEFT + event.start * scale, abs=0.02)
            assert w == pytest.approx((event.end - event.start) * scale, abs=0.02)
            assert ends <= x + 0.02
            ends = x + w
            assert ends < wide - 60
            assert box.attrib["fill"] in COLORS[event.step.kind]
            text = "".join("".join(t.itertext()) for t in group.findall(f"{SVG}text"))
            assert 4.5 * len(text) <= w
            assert text in ("", f"{event.step.microbatch}", f"{event.step.microbatch}s{event.step.stage}")


def test_rows_do_not_touch_and_fit() -> None:
    root = ElementTree.fromstring(_line("1F1B", 16, 64).to_svg())
    tops = [float(g.find(f"{SVG}g/{SVG}rect").attrib["y"]) for g in root.findall(f"{SVG}g")]  # type: ignore[union-attr]
    assert all(b - a == ROW > BOX for a, b in pairwise(tops))
    assert tops[-1] + BOX + 20 < float(root.attrib["height"])


def test_tooltips_and_shares_are_exact() -> None:
    svg = gantt(Timeline((Event(Step("F", 3, 5), 0, 0.0, 0.002), Event(Step("B", 3, 5), 1, 0.0025, 0.004)), 2, 'odd <name> & "more"'))
    titles = [t.text for t in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    assert "forward of micro-batch 5, stage 3, rank 0\n0 ms to 2 ms, 2 ms" in titles
    assert "backward of micro-batch 5, stage 3, rank 1\n2.5 ms to 4 ms, 1.5 ms" in titles
    assert "rank 1 waits 2.5 ms, 62.5 % of the step" in titles
    texts = ["".join(t.itertext()) for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert 'odd <name> & "more": 4 ms, bubble 56.2 %' in texts
    assert {"50.0 % idle", "62.5 % idle", "rank 0", "rank 1", "forward", "backward", "bubble", "0 ms"} <= {*texts}
    assert "backward for the inputs" not in texts


@pytest.mark.parametrize(("unit", "name"), [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-10, "ns")])
def test_the_axis_has_a_unit_and_round_ticks(unit: float, name: str) -> None:
    root = ElementTree.fromstring(_line("GPipe", 4, 8, unit).to_svg())
    ticks = [m for t in root.iter(f"{SVG}text") if (m := re.fullmatch(rf"([\d.]+) {name}", t.text or ""))]
    assert len(ticks) >= 4
    steps = {round(float(b[1]) - float(a[1]), 6) for a, b in pairwise(ticks)}
    assert len(steps) == 1
    assert f"{steps.pop():.0e}"[0] in "125"


def test_the_axis_of_nothing() -> None:
    assert ElementTree.fromstring(gantt(Timeline((), 2))).tag == f"{SVG}svg"


def test_several_stages_of_a_rank_are_told_apart() -> None:
    fills = {rect.attrib["fill"] for rect in ElementTree.fromstring(_line("Interleaved1F1B", 4, 8).to_svg()).iter(f"{SVG}rect")}
    assert {COLORS["F"][0], COLORS["F"][1], COLORS["B"][0], COLORS["B"][1]} <= fills
