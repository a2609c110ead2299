"""report: a table, JSON and a picture of what the stages cost."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_balance import IDS, Blocks
from torch import nn

from stagecut import AtModules, Device, Pipe, Setting, pipeline
from stagecut.backend.costs.ops import state_bytes
from stagecut.backend.costs.report import Report, TooLarge
from stagecut.backend.page.page import findings
from stagecut.backend.schedules import SCHEDULES, SINGLE
from stagecut.backend.tables import time_text
from stagecut.ir.errors import InputError


def _report(setting: Setting | None = None, **options: Any) -> tuple[Pipe, Report]:
    pipe = pipeline(Blocks(), (IDS,), **({"stages": 3} | options))
    return pipe, pipe.report(setting)


def test_numbers_add_up() -> None:
    pipe, report = _report()
    assert sum(s.share for s in report.stages) == pytest.approx(1.0)
    assert sum(s.parameters for s in report.stages) == sum(p.numel() for p in pipe.parameters())
    assert [s.memory["parameters"] for s in report.stages] == [state_bytes(s.state)[0] for s in pipe.program.stages]
    assert all(s.memory["optimizer"] == 2 * s.memory["gradients"] for s in report.stages)
    assert report.stages[0].sent == report.stages[1].received > 0
    assert 0 < report.balance <= 1
    assert 0 < report.bubble < 1
    assert report.speed_up < 3
    assert report.bound is not None
    assert pipe.plan is not None
    for stage, planned in zip(report.stages, pipe.plan.memory, strict=True):
        assert sum(stage.memory.values()) == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize("device", ["H100", "L4", "CPU"])
def test_a_step_has_room_for_what_the_table_says(device: str, schedule: str) -> None:
    """Whether the device or the host is the limit: a reader who multiplies the time of a stage gets most of the step."""
    pipe, _ = _report()
    report = pipe.report(Setting(device, schedule, 32))
    slowest = max(report.stages, key=lambda s: s.seconds)
    assert 0.75 * report.seconds < 32 * slowest.seconds <= report.seconds * (1 + 1e-9)
    assert sum(s.share for s in report.stages) == pytest.approx(1.0)
    assert slowest.share == max(s.share for s in report.stages)
    assert report.balance == pytest.approx(1 / (3 * slowest.share))
    assert 1 < report.speed_up < 3
    assert f"  {time_text(slowest.seconds)}  {100 * slowest.share:.1f} %  " in str(report)


HOSTS = [0.0, 2e-7, 2e-6, 1.5e-5]
_PIPES: dict[int, Pipe] = {}


def _cut_into(stages: int) -> Pipe:
    if stages not in _PIPES:
        _PIPES[stages] = pipeline(Blocks(), (IDS,), stages=stages, check=None)
    return _PIPES[stages]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from(SCHEDULES),
    st.integers(2, 8),
    st.floats(10, 14),
    st.sampled_from(HOSTS),
    st.sampled_from([0.0, 0.1]),
)
def test_what_is_printed_adds_up(stages: int, schedule: str, count: int, power: float, starting: float, slowed: float) -> None:
    """The speed-up is the number of ranks, less the bubble, and less the work that one device would not have."""
    where = Device("it", 10**power, 10 ** (power - 1), 1e12, 1e10, starting=starting, posting=4 * starting, slowed=slowed)
    ranks = None if schedule in SINGLE else max(stages // 2, 1)
    try:
        report = _cut_into(stages).report(Setting(where, schedule, 2 * count, ranks=ranks))
    except InputError:  # the schedule has no order for these numbers
        return
    said = re.search(r"bubble ([\d.]+) %, balance [\d.]+ %, ([\d.]+) times", str(report))
    assert said is not None
    longer = re.search(r"ranks work ([\d.]+) % longer", str(report))
    least = report.timeline.ranks * (1 - float(said[1]) / 100) / (1 + float(longer[1]) / 100 if longer else 1)
    assert float(said[2]) == pytest.approx(least, abs=0.006 + 0.012 * least)
    hosts_only = all(s.device < 0.3 * s.host for s in report.stages)
    if hosts_only or (not starting and not slowed):
        assert longer is None
        assert report.more_work == pytest.approx(0, abs=1e-6)
    if stages == 1:
        assert report.bubble == pytest.approx(0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2, 4]), st.sampled_from([*SINGLE]), st.sampled_from(HOSTS), st.floats(10, 14))
def test_the_timeline_shows_the_bubble_that_is_printed(stages: int, schedule: str, starting: float, power: float) -> None:
    """Of a rank's row there is left what is neither a step nor the host alone."""
    where = Device("it", 10**power, 10 ** (power - 1), 1e12, 1e10, starting=starting)
    line = _cut_into(stages).report(Setting(where, schedule, 8)).timeline
    for rank in range(line.ranks):
        steps = sorted((e.start, e.end) for e in line.events if e.rank == rank)
        until = line.host_until(rank)
        assert until <= line.hosts[rank] + 1e-9
        edges = [(0.0, 0.0), *steps, (line.seconds, line.seconds)]
        free = [max(after - max(before, until), 0.0) for (_, before), (after, _) in itertools.pairwise(edges)]
        assert sum(free) == pytest.approx(line.waits(rank), abs=1e-9 * line.seconds)
    waits = [line.waits(rank) for rank in range(line.ranks)]
    assert line.bubble == pytest.approx(sum(waits) / line.ranks / line.seconds)
    assert ("host alone" in line.to_svg()) == any(map(line.host_until, range(line.ranks)))


def test_a_host_that_is_the_limit_is_told() -> None:
    """A small model on a GPU: the host takes longer to start an op than the device to compute it."""
    pipe, report = _report()
    assert all(s.waits_for_host and s.seconds == s.host > s.device for s in report.stages)
    assert "host" in str(report).splitlines()[0].split()
    said = re.search(r"the host is the limit of stages 0-2: it starts the ops of stage (\d) in (.*), the device .* in (.*); ", str(report))
    assert said is not None
    longest = report.stages[int(said[1])]
    assert (said[2], said[3]) == (time_text(longest.host), time_text(longest.device))
    assert longest.host == max(s.host for s in report.stages)
    (found,) = (sentence for sentence, _ in findings(pipe.program, report) if "the host" in sentence)
    assert found == report.host_text
    assert json.loads(report.to_json())["stages"][0]["host"] == report.stages[0].host
    on_cpu = pipe.report(Setting("CPU"))
    assert [s.host for s in on_cpu.stages] == [0, 0, 0]
    assert "the host is the limit" not in str(on_cpu)


def test_balance_is_judged_by_what_limits() -> None:
    """Many small ops keep the host busy, and one large op the device."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)))
            self.large = nn.Linear(8, 1 << 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.large(self.small(x))

    with torch.device("meta"):
        pipe = pipeline(Uneven(), (torch.zeros(64, 8),), split_policy=AtModules(["large"]))
    report = pipe.report(Setting("H100", "GPipe", 4))
    small, large = report.stages
    assert small.host > small.device
    assert large.device > large.host
    assert report.balance == pytest.approx((small.host + large.device) / 2 / max(small.host, large.device))
    assert report.balance < 0.8 * (small.device + large.device) / 2 / max(small.device, large.device)
    assert "the host is the limit of stage 0:" in str(report)


def test_a_plan_has_the_times_of_the_report() -> None:
    """Those of the device for one stage, and of the host for another."""
    pipe, report = _report()
    assert pipe.plan is not None
    assert report.slowest == pytest.approx(max(s.seconds for s in report.stages), rel=0.05)
    for stage, planned in zip(report.stages, pipe.plan.seconds, strict=True):
        assert stage.seconds <= planned < 1.05 * stage.seconds  # with its links


def test_the_table() -> None:
    _, report = _report()
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["stage", "rank", "time", "share"]
    assert "embed" in lines[1]
    assert lines[5].startswith("1F1B with 8 micro-batches on H100: a step takes")
    assert any("no cuts can bring that below" in line for line in lines)
    assert any("send" in line and "its gradient comes back" in line for line in lines)


def test_json_reads_back() -> None:
    _, report = _report()
    data = json.loads(report.to_json())
    assert data["schedule"] == "1F1B"
    assert [s["index"] for s in data["stages"]] == [0, 1, 2]
    assert {c["route"] for c in data["crossings"]} == {"feed", "send"}


def test_the_picture_is_svg_with_a_bar_for_each_kind() -> None:
    _, report = _report()
    root = ElementTree.fromstring(report.to_svg())
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}g")) == 3
    assert all(len(g.findall(f"{space}rect")) == 8 for g in root.findall(f"{space}g"))


def test_crossings_say_why() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            self.c.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            return self.c(self.b(h)) + h

    pipe = pipeline(Skips(), (torch.randn(2, 4),), split_policy=lambda program: [1, 2], tied="transmit")
    report = pipe.report(Setting("A100", "GPipe", 4))
    why = {(c.route, c.target): c.why for c in report.crossings}
    assert why["feed", 0] == "an input, given to the stage"
    assert "handed on by 1" in why["relay", 2]
    assert any("tied parameter" in c.why for c in report.crossings)
    assert report.device == "A100"
    assert report.bound is None


def test_another_setting_gives_other_numbers() -> None:
    pipe, report = _report()
    other = pipe.report(Setting("L4", "GPipe", 32, optimizer="sgd"))
    assert other.stages[0].forward > report.stages[0].forward
    assert other.stages[0].memory["optimizer"] == 0
    assert pipe.report(Setting(n_microbatches=32)).bubble < report.bubble
    assert pipe.report(Setting(training=False)).stages[0].backward == 0
    assert (other.slowest, other.bound, other.best) == (None, None, None)  # those of the search are for its own setting
    assert "no cuts can bring" not in str(other)


def test_the_best_step_is_told_where_it_is_another() -> None:
    _, report = _report()
    assert report.best == pytest.approx(report.seconds, rel=1e-4)
    assert "; no cuts were found that make the step shorter\n" in str(report)
    shorter = replace(report, best=0.9 * report.seconds)
    assert f"; the cuts with the shortest step that were found make it {time_text(0.9 * report.seconds)}\n" in str(shorter)


def test_measured() -> None:
    pipe, _ = _report()
    assert pipe.report(profile_on="cpu").stages[0].sources["measured"] > 3


SMALL = Device("small", flops=1e12, bandwidth=1e11, memory=1.5e5, link_bandwidth=1e10)


def test_a_stage_that_does_not_fit_is_named_with_a_remedy() -> None:
    pipe, fits = _report()
    report = pipe.report(Setting([SMALL, "H100", "H100"]))
    (one,) = report.too_large
    assert (one.stages, one.has, one.needs) == ((0,), 150_000, sum(report.stages[0].memory.values()))
    (line,) = (line for line in str(report).splitlines() if "too large" in line)
    assert re.fullmatch(r"too large: stage 0 needs [\d.]+ MiB, small has 146 KiB: .*activation checkpointing, more stages.*", line)
    assert json.loads(report.to_json())["too_large"][0]["device"] == "small"
    assert report.to_svg().count("too large") == 1
    assert "too large" not in str(fits) + fits.to_svg()


def test_the_stages_of_a_rank_share_its_memory() -> None:
    pipe, _ = _report(stages=4)
    needs = [sum(s.memory.values()) for s in pipe.report(Setting(schedule="Interleaved1F1B", ranks=2)).stages]
    memory = max(needs) + 1  # each would fit alone
    report = pipe.report(Setting(replace(SMALL, memory=memory), "Interleaved1F1B", ranks=2))
    assert [one.stages for one in report.too_large] == [(0, 2), (1, 3)]
    (line,) = (line for line in str(report).splitlines() if line.startswith("too large"))
    assert "the stages 1, 3 of rank 1 need" in line
    assert "1 other rank needs more than there is: smaller micro-batches" in line


def test_ranks_that_do_not_fit_are_told_in_one_line_however_many_they_are() -> None:
    pipe, _ = _report(stages=4)
    report = pipe.report(Setting(SMALL))
    assert len(report.too_large) == 4
    (line,) = (line for line in str(report).splitlines() if line.startswith("too large"))
    assert f"stage {report.lacks_most.stages[0]} needs" in line  # type: ignore[union-attr]
    assert "and 3 other ranks need more than there is" in line
    assert [text for text, _ in findings(pipe.program, report) if "small has" in text] == [line.removeprefix("too large: ")]


def test_what_takes_the_most_decides_the_remedy() -> None:
    pipe, _ = _report()
    tiny = replace(SMALL, memory=1)
    assert "smaller micro-batches" in str(pipe.report(Setting(tiny, "GPipe", 512)).too_large[1])
    assert "smaller micro-batches" not in str(TooLarge(0, (0,), 2, "tiny", 1, "optimizer"))
