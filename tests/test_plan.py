"""A plan says what was chosen, why not what is shorter, which loss was counted, and how others are asked for."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_balance import IDS, PLAIN, Blocks
from torch import nn

import stagecut
from stagecut import Balanced, Device, Setting, pipeline
from stagecut.backend.schedules import SCHEDULES, SINGLE
from stagecut.ir.graph import scope_fqn
from stagecut.pipe import lower


def test_a_plan_names_what_begins_at_each_cut() -> None:
    """The outermost module that is not divided, or the op where it belongs to the one that is, with the user's line."""
    model = Blocks()
    for inside in ("never", "always"):
        pipe = pipeline(model, (IDS,), split_policy=Balanced(3, PLAIN, inside=inside))
        assert pipe.plan is not None
        shown = str(pipe.plan).splitlines()
        for stage, cut in enumerate(pipe.plan.cuts, 1):
            op = pipe.program.stages[stage].ops[0]
            assert op.loc is not None
            (line,) = (line for line in shown if line.split()[0] == str(cut))
            assert f"  {Path(op.loc.file).name}:{op.loc.line}" in line
            place = pipe.plan.choice.places[cut]  # type: ignore[union-attr]
            assert place.is_inside == line.endswith("inside a block")
            begins = place.module.rpartition(" of ")[2]
            if " of " in place.module:
                assert begins == (scope_fqn(op.scope) or "the model")
            else:
                assert f"{scope_fqn(op.scope)}.".startswith(f"{begins}.")
                before = pipe.program.stages[stage - 1].ops[-1]
                assert not f"{scope_fqn(before.scope)}.".startswith(f"{begins}.")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"inside": "never"}, r'it divides blocks, and inside="never"'),
        (
            {"inside": "if worth it"},
            r'it divides blocks, and between them a step takes (.*) % longer: inside="if worth it" asks for more than 3 %',
        ),
        (
            {"inside": "always", "tolerance": 0.5},
            r"the chosen ones divide less, send less, or leave no stage without parameters, in at most 50 % more time",
        ),
    ],
)
def test_a_shorter_step_that_was_not_chosen_has_its_reason(options: dict[str, Any], why: str) -> None:
    plan = pipeline(Blocks(8), (IDS,), split_policy=Balanced(2, PLAIN, **options)).plan
    assert plan is not None
    assert plan.choice is not None
    chosen, anywhere, between = plan.choice.chosen, plan.choice.anywhere, plan.choice.at_blocks
    assert anywhere.seconds < chosen.seconds
    (line,) = (line for line in str(plan).splitlines() if line.startswith("best anywhere"))
    found = re.search(f"  {why}$", line)
    assert found is not None
    assert between is not None
    for percent in found.groups():
        assert float(percent) == pytest.approx(100 * (between.seconds / anywhere.seconds - 1), abs=0.05)
        assert float(percent) <= 3
    (line,) = (line for line in str(plan).splitlines() if line.startswith("chosen"))
    assert line.split()[-1] == str(plan.cuts[0])


def test_a_model_that_returns_its_loss_is_given_no_other() -> None:
    """It is among the ops: cross-entropy of the logits as well would be counted twice."""

    class WithLoss(Blocks):
        def forward(self, ids: torch.Tensor, *targets: torch.Tensor) -> Any:
            logits = super().forward(ids)
            losses = [nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()) for target in targets]
            return logits, *losses

    class WithPenalty(Blocks):
        """A number that is no loss of the logits: theirs is counted."""

        def forward(self, ids: torch.Tensor) -> Any:
            return super().forward(ids), self.embed.weight.square().sum()

    told = []
    for model, inputs in ((WithLoss(), (IDS, IDS)), (WithLoss(), (IDS,)), (WithPenalty(), (IDS,))):
        pipe = pipeline(model, inputs, stages=2)
        assert pipe.plan is not None
        (line,) = (line for line in str(pipe.plan).splitlines() if line.startswith("loss: "))
        told.append(line.removeprefix("loss: "))
        assert f"the last stage computes the loss, {told[-1]}" in str(pipe.report())
        assert (len(pipe.report().shares[-1]) > len(pipe.program.stages[-1].ops)) == (told[-1] != "the model's own")
    assert told == ["the model's own", *["cross-entropy in float32"] * 2]


def test_a_plan_names_a_policy_that_gives_the_same_cuts() -> None:
    own = Device("own", 1e12, 1e11, 1e12, math.inf, overhead=1e-6)
    tried = [
        Balanced(2, Setting("A100", "GPipe", 4)),
        Balanced(3, Setting([own, "L4", own], optimizer="sgd", training=False), pins={"head": -1}, tolerance=0.2, inside="never"),
        Balanced(2, Setting("CPU"), budget=0.5),
        Balanced(None, Setting("A100", ranks=2)),
        Balanced(4, Setting("A100", "ZBVZeroBubble", 4), order="timed"),
    ]
    program, bindings, _ = lower(Blocks(), (IDS,), {}, None, (), batches=False)
    names = {name: getattr(stagecut, name) for name in stagecut.__all__}
    for policy in tried:
        plan = policy.plan(program, {}, bindings)
        named = eval(plan.policy, names)
        assert named.pins == policy.pins
        again = named.plan(program, {}, bindings)
        assert (again.cuts, again.step, again.policy) == (plan.cuts, plan.step, plan.policy)


class Positions(nn.Module):
    """A language model of which one op, in front of the table of positions, reads nothing."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16)
        self.places = nn.Embedding(16, 16)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(blocks)))
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        logits: torch.Tensor = self.head(self.blocks(x))
        return logits


def _without_parameters(tolerance: float) -> list[int]:
    """Of models of some numbers of blocks, how many stages have no parameters."""
    counts: list[int] = []
    for blocks in (4, 6):
        policy = Balanced(4, Setting("A100", "Interleaved1F1B", 8, ranks=2), tolerance=tolerance)
        pipe = pipeline(Positions(blocks), (torch.zeros(2, 8, dtype=torch.long),), split_policy=policy, check=None)
        counts.append(sum(all(entry.kind != "param" for entry in stage.state) for stage in pipe.program.stages))
        assert pipe.plan is not None
        assert pipe.plan.choice is not None
        assert pipe.plan.choice.at_blocks is not None
        assert pipe.plan.step <= pipe.plan.choice.at_blocks.seconds * (1 + tolerance)
    return counts


def test_no_stage_is_without_parameters_where_others_are_as_good() -> None:
    """A rank of several stages may have one of a single op that makes its time that of the others."""
    assert max(_without_parameters(tolerance=0.0)) > 0
    assert max(_without_parameters(tolerance=0.02)) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_plan_and_the_report_give_one_time_for_the_same_cuts(schedule: str) -> None:
    """For the chosen cuts, and for those that were not."""
    model, args, _ = runpy.run_path("examples/language_model.py")["make"]()
    setting = Setting("H100", schedule, 8, ranks=None if schedule in SINGLE else 2)
    plan = pipeline(model, args, split_policy=Balanced(4, setting), check=None).plan
    assert plan is not None
    assert plan.choice is not None
    assert plan.step == plan.choice.chosen.seconds
    for way in {plan.choice.chosen, plan.choice.anywhere, plan.choice.evenest}:
        report = pipeline(model, args, split_policy=lambda program, way=way: [*way.cuts[1:-1]], check=None).report(setting)
        assert report.seconds == pytest.approx(way.seconds, rel=1e-6)
