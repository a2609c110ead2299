"""balance: the found cuts are the best there are, within memory, with a bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stagecut import AtModules, Balanced, Device, Markers, Setting, pipe_split, pipeline
from stagecut.backend.costs.line import Line
from stagecut.backend.costs.ops import DEVICES, OpCost
from stagecut.backend.costs.search import Problem, _window_max
from stagecut.backend.costs.timeline import simulate
from stagecut.backend.schedules import SCHEDULES, SINGLE
from stagecut.ir.errors import InputError, SplitError
from stagecut.ir.graph import Op, Value
from stagecut.ir.types import TensorType
from stagecut.pipe import lower

UNIT = Device("unit", 1.0, 1.0, 100.0, 1.0, 0.0, 1.0)


# --- the search against all cuts ------------------------------------------------------------------------


@st.composite
def problems(draw: Callable[..., Any]) -> Problem:
    """A few ops, stages with speeds of their own, links, memory windows and places where no cut may be."""
    count = draw(st.integers(1, 9))
    stages = draw(st.integers(1, min(4, count)))
    whole = st.integers(0, 9)
    ops = draw(st.lists(whole, min_size=count, max_size=count))
    cross = [0, *draw(st.lists(whole, min_size=count - 1, max_size=count - 1)), 0]
    speeds = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=stages, max_size=stages))
    times = [torch.tensor([0.0, *itertools.accumulate(float(op * s) for op in ops)], dtype=torch.float64) for s in speeds]
    links = [torch.tensor(cross, dtype=torch.float64) * s for s in speeds]
    starts = None
    if draw(st.booleans()):
        most = draw(st.lists(st.integers(1, count), min_size=stages, max_size=stages))
        starts = [torch.tensor([max(0, end - m) for end in range(count + 1)]) for m in most]
    allowed = [torch.tensor([True, *draw(st.lists(st.integers(0, 9).map(bool), min_size=count - 1, max_size=count - 1)), True])] * (
        stages + 1
    )
    pin = draw(st.none() | st.tuples(st.integers(0, count - 1), st.integers(0, stages - 1)))
    if pin is not None:
        places = torch.arange(count + 1)
        allowed = [mask & (places <= pin[0] if cut <= pin[1] else places > pin[0]) for cut, mask in enumerate(allowed)]
    return Problem(times, links, starts, allowed)


def _all_cuts(problem: Problem) -> list[list[int]]:
    """Every way to cut that is allowed and fits."""
    count, stages = len(problem.times[0]) - 1, len(problem.times)
    found = []
    for inner in itertools.combinations(range(1, count), stages - 1):
        cuts = [0, *inner, count]
        fits = problem.starts is None or all(cuts[i] >= int(problem.starts[i][cuts[i + 1]]) for i in range(stages))
        if fits and all(bool(problem.allowed[i][cut]) for i, cut in enumerate(cuts)):
            found.append(cuts)
    return found


@given(problems())
@settings(max_examples=600, deadline=None)
def test_the_slowest_stage_is_as_fast_as_any_cuts_make_it(problem: Problem) -> None:
    everything = _all_cuts(problem)
    found = problem.best()
    if not everything:
        assert found is None
        return
    assert found in everything
    best = min(max(problem.stage_seconds(cuts)) for cuts in everything)
    assert max(problem.stage_seconds(found)) == pytest.approx(best, rel=1e-8)


@given(problems(), st.data())
@settings(max_examples=150, deadline=None)
def test_cuts_fit_together_as_they_do_alone(problem: Problem, data: Any) -> None:
    count, stages = len(problem.times[0]) - 1, len(problem.times)
    place = st.integers(0, count)
    rows = data.draw(st.lists(st.lists(place, min_size=stages - 1, max_size=stages - 1), min_size=1, max_size=20))
    cuts = [[0, *row, count] for row in rows]
    everything = _all_cuts(problem)
    assert problem.fitting(torch.tensor(cuts)).tolist() == [row in everything for row in cuts]


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=40), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_largest_in_a_window(values: list[int], random: Any) -> None:
    starts = [random.randint(0, end) for end in range(len(values))]
    found = _window_max(torch.tensor(values, dtype=torch.float64), torch.tensor(starts))
    assert found.tolist() == [max(map(float, values[a:e]), default=-math.inf) for e, a in enumerate(starts)]


# --- lines ----------------------------------------------------------------------------------------------


def _device(memory: float = math.inf, speed: float = 1.0, link: float = math.inf) -> Device:
    """A device that moves a byte in a second, or faster."""
    return Device("d", 1.0, speed, memory, link, link_latency=0.0)


def _line(costs: list[int], kept: list[int], setting: Setting, sizes: list[int] | None = None, backs: list[int] | None = None) -> Line:
    """Ops in a row, each of which keeps a value of its own for the backward, and hands on bytes."""
    ops, values = [], [Value(TensorType("u8", (size,)), f"v{i}") for i, size in enumerate(kept)]
    last = Value(TensorType("u8", (0,)), "x")
    for value, size in zip(values, sizes or [0] * len(values), strict=True):
        ops.append(Op("aten.mm.default", (last, last)))  # one that is not computed again
        last = ops[-1].add_result(TensorType("u8", (size,)), value.hint)
    both = zip(costs, backs or [0] * len(costs), values, strict=True)
    return Line(ops, [OpCost(moved=float(c), backward_moved=float(b), kept=(v,), weights=0.25) for c, b, v in both], setting, frozenset())


def _simulated(line: Line, cuts: list[int], sizes: list[int]) -> float:
    """The step with these cuts, from the costs of each stage by hand."""
    stages = [line.costs[a:b] for a, b in itertools.pairwise(cuts)]
    forward = [sum(c.moved for c in stage) for stage in stages]
    backward = [sum(c.backward_moved for c in stage) for stage in stages]
    split = [(0.0, backward[0]), *((0.75 * b, 0.25 * b) for b in backward[1:])]
    sent = [sizes[cut - 1] / 2 for cut in cuts[1:-1]]
    return simulate(line.setting, forward, backward, sent, split).seconds


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_cuts_have_a_shorter_step(schedule: str, data: Any) -> None:
    """Against all cuts, each simulated alone."""
    stages = data.draw(st.integers(1, 4)) if schedule in SINGLE else 4
    count = data.draw(st.integers(stages, 7))
    sizes, backs = (data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)) for _ in range(2))
    costs = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    setting = Setting(_device(link=1.0), schedule, 4 if schedule != "DualPipeV" else 6, ranks=None if schedule in SINGLE else 2)
    line = _line(costs, [0] * count, setting, sizes, backs)
    plan = Balanced(stages, setting, tolerance=0.0).of_line(line)
    ways = [[0, *inner, count] for inner in itertools.combinations(range(1, count), stages - 1)]
    assert plan.step == pytest.approx(min(_simulated(line, cuts, sizes) for cuts in ways))
    assert plan.step == pytest.approx(_simulated(line, [0, *plan.cuts, count], sizes))


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_where_ways_are_too_many_the_search_comes_near_the_best(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    setting = Setting(_device(), schedule, 8, ranks=None if schedule in SINGLE else 2)
    steps = []
    for few in (20_000, 0):
        monkeypatch.setattr("stagecut.backend.costs.steps.FEW", few)
        generator.manual_seed(0)
        numbers = torch.randint(1, 100, (20, 2, 24), generator=generator).tolist()
        lines = [_line(costs, [0] * 24, setting, None, backs) for costs, backs in numbers]
        steps.append([Balanced(4, setting, tolerance=0.0).of_line(line).step for line in lines])
    ratios = [climbed / best for best, climbed in zip(*steps, strict=True)]
    assert min(ratios) >= 1
    assert max(ratios) < 1.05


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_stage_fits_its_memory_or_the_refusal_says_which_does_not(data: Any) -> None:
    count = data.draw(st.integers(2, 8))
    costs, kept = (data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)) for _ in range(2))
    stages = data.draw(st.integers(1, min(4, count)))
    setting = Setting(_device(float(data.draw(st.integers(5, 60)))), n_microbatches=4)
    line = _line(costs, kept, setting)
    flights = setting.in_flight(stages)
    inside = []
    for inner in itertools.combinations(range(1, count), stages - 1):
        cuts = [0, *inner, count]
        if all(sum(kept[a:b]) * n <= 0.9 * setting.devices(1)[0].memory for a, b, n in zip(cuts, cuts[1:], flights, strict=False)):
            inside.append(_simulated(line, cuts, [0] * count))
    if inside:
        plan = Balanced(stages, setting, tolerance=0.0).of_line(line)
        assert plan.step == pytest.approx(min(inside), rel=1e-8)
        assert plan.bound <= plan.bottleneck * (1 + 1e-9)
    else:
        with pytest.raises(SplitError, match=r"do not fit: with the best cuts for memory, stage \d takes"):
            Balanced(stages, setting).of_line(line)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_no_way_to_share_out_the_ops_is_below_the_bound(costs: list[int], stages: int) -> None:
    stages = min(stages, len(costs))
    plan = Balanced(stages, Setting(_device()), tolerance=0.0).of_line(_line(costs, costs, Setting()))
    ways = itertools.product(range(stages), repeat=len(costs))
    best = min(max(sum(c for c, home in zip(costs, way, strict=True) if home == rank) for rank in range(stages)) for way in ways)
    assert plan.bound <= best * (1 + 1e-9)


def test_the_bound_knows_that_ops_are_whole() -> None:
    plan = Balanced(4, Setting(_device()), tolerance=0.0).of_line(_line([3] * 9, [1] * 9, Setting()))
    assert plan.bound == pytest.approx(9.0)


def test_as_few_stages_as_fit() -> None:
    setting = Setting(_device(10.0), "GPipe", n_microbatches=1)
    assert len(Balanced(None, setting).of_line(_line([1] * 8, [4] * 8, setting)).cuts) == 3


def test_devices_of_different_speed_get_stages_of_different_size() -> None:
    setting = Setting([_device(), _device(speed=3.0)])
    plan = Balanced(2, setting).of_line(_line([1] * 8, [0] * 8, setting))
    assert plan.cuts == (2,)
    assert plan.gap == pytest.approx(0.0, abs=1e-9)


def test_many_ops_on_ranks_with_several_stages_come_near_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = [int(x) for x in torch.randint(1, 100, (400,), generator=generator)]
    backs = [2 * cost for cost in costs]
    for schedule in ("Interleaved1F1B", "ZBVZeroBubble"):
        setting = Setting(_device(), schedule, ranks=4)
        policy = Balanced(8, setting)
        line = _line(costs, [0] * 400, setting, None, backs)
        equal = torch.arange(9)[None] * 50
        plan = policy.of_line(line)
        assert plan.step <= float(policy.steps(line, 8, 1.0).seconds(equal))
        assert plan.bound * setting.n_microbatches <= plan.step


# --- whole models ---------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, depth: int = 6, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 1000)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IDS = torch.zeros(4, 128, dtype=torch.long)
PLAIN = Setting(Device("plain", 1e12, 1e11, 1e12, math.inf, 0.0, 1.0))


def test_a_model_is_cut_into_so_many_stages() -> None:
    model = Blocks()
    pipe = pipeline(model, (IDS,), stages=3)
    assert pipe.num_stages == 3
    assert pipe.plan is not None
    assert pipe.plan.bottleneck >= pipe.plan.bound
    assert pipe.verify(IDS).ok


def test_cuts_are_at_module_boundaries_where_that_costs_little() -> None:
    model = Blocks()
    divided = []
    for tolerance in (0.0, 0.5):
        policy = Balanced(3, PLAIN, tolerance=tolerance, inside="always")
        stages = pipeline(model, (IDS,), split_policy=policy).program.stages
        pairs = [(before.ops[-1].scope, after.ops[0].scope) for before, after in itertools.pairwise(stages)]
        divided.append([before[:1] == after[:1] != () for before, after in pairs])
    assert any(divided[0])
    assert not any(divided[1])


def _steps(inside: str) -> tuple[float, float, float]:
    plan = pipeline(Blocks(), (IDS,), split_policy=Balanced(3, PLAIN, inside=inside)).plan
    assert plan is not None
    assert plan.choice is not None
    assert plan.choice.at_blocks is not None
    return plan.step, plan.choice.at_blocks.seconds, plan.choice.anywhere.seconds


def test_blocks_stay_whole_unless_it_is_worth_more() -> None:
    never, between, anywhere = _steps("never")
    always, _, _ = _steps("always")
    either, _, _ = _steps("if worth it")
    assert between == pytest.approx(never, rel=0.01)
    assert anywhere == pytest.approx(always, rel=0.01)
    assert between > anywhere
    assert either == (never if between <= anywhere * 1.03 else always)


def test_schedules_are_compared_on_so_many_ranks() -> None:
    setting = Setting(PLAIN.device, ranks=2)
    plan = pipeline(Blocks(), (IDS,), split_policy=Balanced(None, setting)).plan
    assert plan is not None
    assert [schedule for schedule, _, _ in plan.compared] == [*SCHEDULES]
    steps = {schedule: step for schedule, _, step in plan.compared if isinstance(step, float)}
    assert plan.step == min(steps.values()) == steps[plan.setting.schedule]
    again = Balanced(len(plan.seconds), plan.setting)
    assert pipeline(Blocks(), (IDS,), split_policy=again).plan.cuts == plan.cuts  # type: ignore[union-attr]
    assert f"{plan.setting.schedule}, " in str(plan)


def test_a_plan_prints_as_a_table() -> None:
    plan = pipeline(Blocks(), (IDS,), stages=2).plan
    assert plan is not None
    lines = str(plan).splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == ["cuts", "chosen", "best between blocks", "best anywhere", "op"]
    assert lines[-4:-2] == ["1F1B, 2 stages on 2 ranks, 8 micro-batches", "loss: cross-entropy in float32"]
    assert lines[-2:] == [*plan.basis]


def test_the_last_stage_has_the_loss() -> None:
    """A loss that costs as much as half of the model moves the cut."""

    def costly(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            output = output * 1.01
        return (output - target).square().mean()

    plans = [
        pipeline(Blocks(), (IDS,), split_policy=Balanced(2, PLAIN, loss_fn=loss, target=torch.zeros(4, 128, 1000))).plan
        for loss in (nn.functional.mse_loss, costly)
    ]
    assert [plan.loss for plan in plans if plan] == ["mse_loss", "costly"]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[1].cuts > plans[0].cuts
    with pytest.raises(InputError, match="the loss cannot be counted"):
        pipeline(Blocks(), (IDS,), split_policy=Balanced(2, PLAIN, loss_fn=costly, target=torch.zeros(3)))


def test_pins() -> None:
    model = Blocks()
    pipe = pipeline(model, (IDS,), split_policy=Balanced(3, PLAIN, pins={"blocks.0": 0, "blocks.1": 1, "head": -1}))
    assert "blocks.0.0.weight" in pipe.stages[0].state_dict()
    assert "blocks.1.0.weight" in pipe.stages[1].state_dict()
    assert "head.weight" in pipe.stages[2].state_dict()
    with pytest.raises(InputError, match="did you mean 'blocks"):
        pipeline(model, (IDS,), split_policy=Balanced(2, PLAIN, pins={"blocks.9": 0}))
    with pytest.raises(InputError, match="stage 4 of 2"):
        pipeline(model, (IDS,), split_policy=Balanced(2, PLAIN, pins={"head": 4}))
    with pytest.raises(SplitError, match="no cuts into 2 stages are possible"):
        pipeline(model, (IDS,), split_policy=Balanced(2, PLAIN, pins={"head": 0, "embed": 1}))


def test_regions_stay_whole() -> None:
    class Checkpointed(Blocks):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    pipe = pipeline(Checkpointed(2), (IDS,), stages=4)
    assert pipe.num_stages == 4
    with pytest.raises(SplitError, match="no cuts into 8 stages are possible"):
        pipeline(Checkpointed(2), (IDS,), stages=8)


def test_the_refusal_says_what_would_fit() -> None:
    small = Setting(Device("small", 1e12, 1e11, 1.5e6, math.inf), n_microbatches=2)
    with pytest.raises(SplitError) as caught:
        pipeline(Blocks(), (IDS,), split_policy=Balanced(2, small))
    assert "GiB more than" in caught.value.what
    assert "would fit" in caught.value.hint


def test_dynamic_sizes_are_those_of_the_example() -> None:
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    pipes = [pipeline(Blocks(), (IDS,), split_policy=Balanced(3, PLAIN), dynamic_shapes=d) for d in (None, shapes)]
    assert [len(s.ops) for s in pipes[0].program.stages] == [len(s.ops) for s in pipes[1].program.stages]


def test_other_policies() -> None:
    class Marked(Blocks):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            pipe_split()
            return self.head(x)

    assert pipeline(Marked(), (IDS,), split_policy=Markers()).num_stages == 2
    pipe = pipeline(Blocks(), (IDS,), split_policy=AtModules(["blocks.2", "head"]))
    assert [next(iter(s.state_dict())) for s in pipe.stages] == ["embed.weight", "blocks.2.0.weight", "head.weight"]
    with pytest.raises(SplitError, match="did you mean 'blocks"):
        pipeline(Blocks(), (IDS,), split_policy=AtModules(["blocks.7"]))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"stages": 2, "split_policy": Markers()}, "both say where to cut"),
        ({"split_policy": Balanced(2, Setting("H1000"))}, "did you mean 'H100'"),
        ({"split_policy": Balanced(2, Setting(schedule="1F2B"))}, "did you mean '1F1B'"),
        ({"split_policy": Balanced(2, Setting(optimizer="adam"))}, "did you mean 'adamw'"),
        ({"split_policy": Balanced(3, Setting(schedule="ZBVZeroBubble", ranks=2))}, "cannot place 3 stages"),
        ({"split_policy": Balanced(3, Setting(schedule="Interleaved1F1B"))}, r"cut into 4 \(2 ranks\) or 6 \(3 ranks\), or pass ranks="),
        ({"split_policy": Balanced(5, Setting(schedule="InterleavedZeroBubble"))}, r"cut into 6 \(3 ranks\) or 10 \(5 ranks\)"),
        ({"split_policy": Balanced(2, Setting(["H100"]))}, "2 ranks, but 1 devices"),
        ({"split_policy": Balanced(2, Setting(backward="graphs"))}, "did you mean 'graph'"),
        ({"split_policy": Balanced(2, Setting(compile=True))}, "compiles the functions of backward='graph'"),
        ({"split_policy": Balanced(2, Setting(recompute=True))}, "chooses what backward='graph' saves"),
        ({"split_policy": Balanced(2, Setting(n_microbatches=0))}, "n_microbatches=0"),
        ({"split_policy": Balanced(2, Setting(schedule="Interleaved1F1B", ranks=0))}, "ranks=0"),
        ({"split_policy": Balanced(2, "H100")}, "setting='H100' is no Setting"),
        ({"split_policy": Balanced("two")}, "stages='two' is no number"),
        ({"split_policy": Balanced(2, inside="yes")}, "inside 'yes' is not known"),
        ({"split_policy": Balanced(2, order="time")}, "did you mean 'timed'"),
        ({"split_policy": Balanced(2, pins={"head": 2})}, "pins names stage 2 of 2"),
        ({"split_policy": Balanced(2, profile_on="gpu")}, "profile_on='gpu' is no device"),
        ({"split_policy": Balanced(2, Setting([]))}, "no device is given"),
        ({"stages": 0}, "0 stages: there is at least one"),
        ({"stages": -2}, "-2 stages: there is at least one"),
        ({"split_policy": Balanced(0)}, "0 stages: there is at least one"),
    ],
)
def test_refusals_come_before_the_trace(options: dict[str, Any], why: str) -> None:
    class Slow(Blocks):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            pytest.fail("this model is traced")

    with pytest.raises((InputError, SplitError), match=why):
        pipeline(Slow(1), (IDS,), **options)


def test_more_stages_than_ops() -> None:
    """It says how many are possible, and so many are."""
    with pytest.raises(SplitError, match=r"500 stages of [0-9]+ ops: each stage has at least one op") as caught:
        pipeline(Blocks(1), (IDS,), stages=500)
    most = int(caught.value.hint.rpartition("=")[2])
    assert pipeline(Blocks(1), (IDS,), stages=most, check=None).num_stages == most


def test_ten_thousand_ops_take_no_second_of_search() -> None:
    """No clock: at most so many scans of the line."""
    scans = 0

    class Counting(Problem):
        def within(self, most: float) -> list[int] | None:
            nonlocal scans
            scans += 1
            return super().within(most)

    generator = torch.Generator().manual_seed(0)
    time = torch.cat([torch.zeros(1), torch.rand(10_000, generator=generator)]).double().cumsum(0)
    link = torch.rand(10_001, generator=generator).double()
    found = Counting([time] * 16, [link] * 16, None, [torch.ones(10_001, dtype=torch.bool)] * 17).best()
    assert found is not None
    assert scans < 60


def test_presets_are_accelerators() -> None:
    assert all(d.flops > d.bandwidth > d.link_bandwidth > 0 and d.memory > 0 for d in DEVICES.values())


def test_a_policy_is_a_function_of_the_program() -> None:
    program, _, _ = lower(Blocks(2), (IDS,), None)
    assert Balanced(2, PLAIN)(program) == list(Balanced(2, PLAIN).plan(program).cuts)


def test_many_stages_of_few_positions_are_all_tried() -> None:
    """torch.combinations would hold all pairs of everything."""
    setting = Setting(_device())
    plan = Balanced(12, setting).of_line(_line([1] * 14, [0] * 14, setting))
    assert len(plan.cuts) == 11
